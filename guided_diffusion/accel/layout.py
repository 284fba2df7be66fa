"""Arithmetic and memory layout of the networks, and modules that take the place of others."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_diffusion.accel.memory import forget_pages
from guided_diffusion.nn import upsample
from guided_diffusion.unet import ResBlock, UNetEncoder, Upsample

Module = TypeVar("Module", bound=nn.Module)


def precision_on(device: torch.device, precision: str | None, use_fp16: bool) -> str | None:
    """Return the ``precision`` that a network has on ``device``; None is torch's own default."""
    precision = precision or ("float16" if use_fp16 else None)
    return "float32" if precision == "float16" and device.type == "cpu" else precision


def trunk_dtype(precision: str | None, use_fp16: bool, device: torch.device) -> torch.dtype:
    """Return the type of the trunk's convolutions; warn of half precision on a CPU."""
    asked, precision = precision, precision_on(device, precision, use_fp16)
    if precision == "float32" != asked:
        warnings.warn("half precision is for GPUs; on this CPU it runs in float32", stacklevel=3)
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision, torch.float32)


@contextlib.contextmanager
def arithmetic(precision: str | None) -> Iterator[None]:
    """Let torch multiply float32 on a GPU as ``precision`` says while the block runs.

    With another precision than float32 and tf32 torch's own setting stays: convolutions in TF32
    and products of matrices in float32.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        if precision in ("float32", "tf32"):
            matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@torch.inference_mode(False)  # a gradient may have to pass through the weights
def lay_out(network: UNetEncoder, device: torch.device) -> None:
    """Change the layout of maps and weights to channels_last, which convolutions read fastest.

    On a CPU, convolutions of doubled maps are folded too. There the pages of a mapped checkpoint
    are released once they are copied.
    """
    if device.type not in ("cpu", "cuda"):
        return
    network.memory_format = torch.channels_last
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
        return
    swap_modules(network, Upsample, lambda module: FoldedConv2d(module.conv))
    for module in network.modules():
        if isinstance(module, ResBlock) and module.h_upd is upsample:
            module.h_upd, module.in_layers[2] = nn.Identity(), FoldedConv2d(module.in_layers[2])
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            laid_out = weight.contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(laid_out, requires_grad=weight.requires_grad)
            forget_pages(weight)


def swap_modules(
    network: nn.Module, kind: type[Module], replacement: Callable[[Module], nn.Module]
) -> None:
    """Replace every module of a kind by ``replacement(module)``."""
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, kind):
                setattr(parent, name, replacement(module))


def twin(network: Module) -> Module:
    """Return a copy of all modules that shares parameters and buffers with ``network``.

    Replacing a module of the copy leaves ``network`` as it is.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


class FoldedConv2d(nn.Module):
    """A 3×3 convolution of a map doubled in height and width, computed from the map itself.

    The result is the same to rounding, with 4/9 of the multiplications. A pixel of the map is four
    equal pixels of the doubled map, so that an output pixel depends on 2×2 pixels of the map. Their
    weights are sums, computed once for each of the four output pixels over a pixel of the map.
    """

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        # Along one side: an even output has (w0, w1 + w2) over pixels i - 1 and i, an odd output
        # (w0 + w1, w2) over i and i + 1.
        sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        folded = torch.einsum("pyh,qxw,oihw->pqoiyx", sums, sums, self.weight.float())
        folded = folded.flatten(0, 2).type(self.weight.dtype)
        folded = folded.contiguous(memory_format=torch.channels_last)  # (4·out, channels, 2, 2)
        self.register_buffer("folded", folded, persistent=False)
        forget_pages(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out, 2H, 2W), channels_last."""
        height, width = x.shape[2:]
        parts = F.conv2d(x, self.folded, self.bias.repeat(4), padding=1).chunk(4, dim=1)
        shape = (len(x), len(self.bias), 2 * height, 2 * width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for (row, column), part in zip(product((0, 1), repeat=2), parts, strict=True):
            out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
        return out
