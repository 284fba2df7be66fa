"""PREDICT on a CPU: the UNet's forward pass in fused kernels (kernels.cpp), for inference.

Computes what ``UNetModel.forward`` does, to rounding. Feature maps are (N, H, W, C) here; ``emb``
is the embedding after its SiLU, (1 or N, 4·model_channels).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_diffusion.dist_util import file_mappings, forget_pages
from guided_diffusion.kernels import Affine, KernelError, Kernels, Packed, load
from guided_diffusion.nn import UpConv2d, downsample
from guided_diffusion.unet import (
    AttentionBlock,
    Downsample,
    EmbedSequential,
    ResBlock,
    Trunk,
    UNetModel,
    Upsample,
    attend,
)

Layer = Callable[[list[Tensor], Tensor], Tensor]  # of one map or two joined ones, and ``emb``


def fused_unet(model: UNetModel) -> "FusedUNet | None":
    """Return ``model`` in fused kernels, or None where they do not serve.

    They compute in float32. Warns where they cannot be built.
    """
    if model.dtype != torch.float32:
        return None
    try:
        kernels = load()
    except KernelError as error:
        warnings.warn(f"compile: no C++ kernels, going on without: {error}", stacklevel=3)
        return None
    return FusedUNet(model, kernels)


class Conv3x3:
    """A 3×3 convolution whose weights are packed at the first call."""

    def __init__(self, kernels: Kernels, conv: nn.Conv2d, mapped: list[range]) -> None:
        self._kernels, self._conv, self._mapped = kernels, conv, mapped
        self._weight: Packed | None = None
        self._transposed: Packed | None = None  # the weights of ``gradient``

    def __call__(
        self,
        *maps: Tensor,
        affine: Affine | None = None,
        resize: int = 0,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As ``Kernels.convolve``; ``bias`` (1 or N, out) comes on top of the convolution's own."""
        if self._weight is None:
            self._weight = self._kernels.pack_weights(self._conv.weight)
            forget_pages(self._conv.weight, self._mapped)
        own = self._conv.bias[None]
        bias = own if bias is None else own + bias
        options = {"affine": affine, "resize": resize, "residual": residual, "out": out}
        return self._kernels.convolve(maps, self._weight, bias, **options)

    def gradient(self, grad: Tensor) -> Tensor:
        """(N, H, W, out) → (N, H, W, C): a loss's gradient at the input from that at the output."""
        weight = self._conv.weight
        if self._transposed is None:
            self._transposed = self._kernels.pack_weights(weight.flip(2, 3).transpose(0, 1))
            forget_pages(weight, self._mapped)
        bias = grad.new_zeros(1, weight.shape[1])
        return self._kernels.convolve([grad], self._transposed, bias)


class FusedResBlock:
    """``ResBlock`` of one map or two joined ones."""

    def __init__(self, kernels: Kernels, block: ResBlock, mapped: list[range]) -> None:
        self._kernels, self._block = kernels, block
        is_up, is_down = isinstance(block.in_layers[2], UpConv2d), block.resize is downsample
        self._resize = int(is_up) - int(is_down)
        self._conv_in = Conv3x3(kernels, block.in_layers[2], mapped)
        self._conv_out = Conv3x3(kernels, block.out_layers[3], mapped)

    def __call__(self, maps: list[Tensor], emb: Tensor) -> Tensor:
        """One or two (N, H, W, C) → (N, H', W', out)."""
        block = self._block
        emb_out = block.emb_layers[1](emb)  # (1 or N, out or 2·out)
        affine = self._kernels.group_norm(maps, block.in_layers[0])
        if block.use_scale_shift_norm:
            h = self._conv_in(*maps, affine=affine, resize=self._resize)
            affine = self._kernels.group_norm([h], block.out_layers[0], *emb_out.chunk(2, dim=1))
        else:
            h = self._conv_in(*maps, affine=affine, resize=self._resize, bias=emb_out)
            affine = self._kernels.group_norm([h], block.out_layers[0])
        residual, is_own = self._skip(maps)
        return self._conv_out(h, affine=affine, residual=residual, out=residual if is_own else None)

    def _skip(self, maps: list[Tensor]) -> tuple[Tensor, bool]:
        """Return the other branch, and whether no one else needs it."""
        skip = self._block.skip_connection
        if isinstance(skip, nn.Conv2d):
            weights = skip.weight[:, :, 0, 0].split([part.shape[3] for part in maps], dim=1)
            out = skip.bias
            for part, weight in zip(maps, weights, strict=True):
                out = torch.addmm(out, part.flatten(0, 2), weight.t())
            return out.unflatten(0, maps[0].shape[:3]), True
        if self._resize < 0:
            return downsample(maps[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1), True
        if len(maps) == 1:
            return maps[0], False
        return torch.cat(maps, dim=3), True


class FusedAttention:
    """``AttentionBlock``."""

    def __init__(self, kernels: Kernels, block: AttentionBlock) -> None:
        self._kernels, self._block = kernels, block

    def __call__(self, x: Tensor) -> Tensor:
        """(N, H, W, C) → (N, H, W, C)."""
        block = self._block
        scale, shift = self._kernels.group_norm([x], block.norm)
        tokens = torch.addcmul(shift[:, None], x.flatten(1, 2), scale[:, None])  # (N, L, C)
        qkv = F.linear(tokens, block.qkv.weight[:, :, 0], block.qkv.bias)  # (N, L, 3·C)
        h = attend(qkv.transpose(1, 2), block.num_heads, block.new_order).transpose(1, 2)
        h = F.linear(h, block.proj_out.weight[:, :, 0], block.proj_out.bias)
        return h.add_(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class FusedUNet:
    """``model`` in inference on a CPU; its parameters may not change from here on."""

    def __init__(self, model: UNetModel, kernels: Kernels) -> None:
        self._model, self._kernels = model, kernels
        self._mapped = file_mappings()
        self._input_blocks = [self._fused(block) for block in model.input_blocks[1:]]
        self._middle_block = self._fused(model.middle_block)
        self._output_blocks = [self._fused(block) for block in model.output_blocks]
        self._conv_out = Conv3x3(kernels, model.out[2], self._mapped)

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """``UNetModel.forward``."""
        model = self._model
        if timesteps.stride() == (0,):  # one time for all: one embedding
            timesteps = timesteps[:1]
        emb = model.embed_time(timesteps)
        if model.label_emb is not None:
            emb = emb + model.label_emb(y)
        emb = F.silu(emb)
        h = model.input_blocks[0](x.contiguous(memory_format=torch.channels_last), emb)
        h = _channels_last(h)
        skips = [h]
        for block in self._input_blocks:
            h = _run(block, [h], emb)
            skips.append(h)
        h = _run(self._middle_block, [h], emb)
        for block in self._output_blocks:
            h = _run(block, [h, skips.pop()], emb)
        affine = self._kernels.group_norm([h], model.out[0])
        return self._conv_out(h, affine=affine).permute(0, 3, 1, 2).contiguous()

    def _fused(self, block: EmbedSequential) -> list[Layer]:
        return [self._fused_layer(layer) for layer in block]

    def _fused_layer(self, layer: nn.Module) -> Layer:
        if isinstance(layer, ResBlock):
            return FusedResBlock(self._kernels, layer, self._mapped)
        if isinstance(layer, AttentionBlock):
            attention = FusedAttention(self._kernels, layer)
            return lambda maps, emb: attention(*maps)
        if isinstance(layer, Upsample):
            conv = Conv3x3(self._kernels, layer.conv, self._mapped)
            return lambda maps, emb: conv(*maps, resize=1)
        if isinstance(layer, Downsample):
            return lambda maps, emb: _downsampled(layer, *maps)
        raise TypeError(f"no kernels for {type(layer).__name__}")


def _downsampled(layer: Downsample, x: Tensor) -> Tensor:
    return _channels_last(layer(x.permute(0, 3, 1, 2)))


def _run(layers: list[Layer], maps: list[Tensor], emb: Tensor) -> Tensor:
    for layer in layers:
        maps = [layer(maps, emb)]
    return maps[0]


# ---- With a gradient -----------------------------------------------------------------------------


def fuse_convolutions(network: Trunk) -> bool:
    """Let the kernels do the 3×3 convolutions of a network through which gradients pass.

    On a CPU, float32, gradients at its inputs only: its parameters may not change from here on.
    Returns False, with nothing changed, where the kernels cannot be built.
    """
    try:
        kernels = load()
    except KernelError:
        return False  # told by fused_unet
    network.memory_format = torch.channels_last
    mapped = file_mappings()
    for conv in network.modules():
        is_conv = isinstance(conv, nn.Conv2d) and conv.in_channels > 3  # the picture's are too few
        if is_conv and (conv.kernel_size, conv.stride) == ((3, 3), (1, 1)):
            conv.forward = partial(_convolve, Conv3x3(kernels, conv, mapped))
    return True


def _convolve(conv: Conv3x3, x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, out, H, W), both channels_last."""
    return _Convolution.apply(x, conv)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: Conv3x3) -> Tensor:
        ctx.conv = conv
        return conv(_channels_last(x)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.conv.gradient(_channels_last(grad)).permute(0, 3, 1, 2), None


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
