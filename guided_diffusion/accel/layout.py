"""Arithmetic and memory layout of the networks."""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from guided_diffusion.accel.memory import file_mappings, forget_pages
from guided_diffusion.nn import UpConv2d
from guided_diffusion.unet import UNetEncoder


def set_arithmetic(precision: str | None, use_fp16: bool, device: torch.device) -> torch.dtype:
    """Return the type of the trunk's convolutions, and set how torch multiplies float32.

    Without a ``precision`` torch's own default stays: on a GPU, convolutions in TF32 and products
    of matrices in float32.
    """
    precision = precision or ("float16" if use_fp16 else None)
    if precision in ("float32", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision == "float16" and device.type == "cpu":
        warnings.warn("half precision is for GPUs; on this CPU it runs in float32", stacklevel=3)
        return torch.float32
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision, torch.float32)


def lay_out(network: UNetEncoder, device: torch.device, *, at_once: bool = True) -> None:
    """Put the channels of a pixel side by side in memory, as convolutions read them.

    On a CPU convolutions after a doubling are folded, too. There, unless ``at_once``, a
    convolution's weights wait for its first call, so that loading 2 GB delays no one. Either way
    there is never more than one copy of them in memory.
    """
    if device.type not in ("cpu", "cuda"):
        return
    network.memory_format = torch.channels_last
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
        return
    mapped = file_mappings()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            if at_once:
                _lay_out_weights(module, mapped)
            else:
                _at_first_call(module, lambda conv: _lay_out_weights(conv, mapped))


def _at_first_call(module: nn.Module, prepare: Callable[[nn.Module], None]) -> None:
    def once(module: nn.Module, _: tuple) -> None:
        handle.remove()
        prepare(module)

    handle = module.register_forward_pre_hook(once)


def _lay_out_weights(conv: nn.Conv2d, mapped: list[range]) -> None:
    weight = conv.weight
    with torch.inference_mode(False):  # a gradient may have to pass through them
        if isinstance(conv, UpConv2d):
            conv.fold()
        else:
            laid_out = weight.contiguous(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(laid_out, requires_grad=weight.requires_grad)
    forget_pages(weight, mapped)
