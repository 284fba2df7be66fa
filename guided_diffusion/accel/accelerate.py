"""THE DOOR of this room: a network goes in, a callable that computes the same comes out, faster."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from guided_diffusion.accel.cpu_kernels import Kernels
from guided_diffusion.accel.fused_unet import (
    FusedUNet,
    fuse_convolutions,
    load_gpu_kernels,
    load_kernels,
)
from guided_diffusion.accel.graphs import Accelerated, is_compiled
from guided_diffusion.accel.layout import lay_out
from guided_diffusion.accel.memory import keep_freed_memory
from guided_diffusion.unet import EncoderUNetModel, UNetEncoder, UNetModel

Network = Callable[..., Tensor]


def prepare(device: torch.device) -> None:
    """Set what holds for the whole process: how memory and convolutions are chosen."""
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # all calls have the same shapes


def accelerate(model: nn.Module, device: torch.device, compile: bool | str, calls: int) -> Network:
    """Return what computes ``model`` fastest: (x, timesteps[, y]) → output, to rounding.

    ``compile`` is the YAML key; ``calls`` is how often a walk calls the network. There are kernels
    for ``UNetModel`` alone.
    """
    if not isinstance(model, UNetModel):
        return _accelerated(model, model, device, compile, calls)
    if (kernels := _cpu_kernels(model, device, compile)) is not None:
        return FusedUNet(kernels, model)
    if device.type == "cuda" and compile == "auto":
        gpu_kernels = load_gpu_kernels(device, model.dtype)
        if gpu_kernels:
            lay_out(model, device)
            return Accelerated(FusedUNet(gpu_kernels, model), model, recorded=True)
    return _accelerated(model, model, device, compile, calls)


def accelerate_gradient(
    gradient: Network,
    classifier: EncoderUNetModel,
    device: torch.device,
    compile: bool | str,
    calls: int,
) -> Network:
    """Return what computes ``gradient``, a function through ``classifier``, fastest."""
    if (kernels := _cpu_kernels(classifier, device, compile)) is not None:
        fuse_convolutions(kernels, classifier)
        return gradient
    return _accelerated(gradient, classifier, device, compile, calls)


def _cpu_kernels(network: UNetEncoder, device: torch.device, compile: bool | str) -> Kernels | None:
    is_fused = device.type == "cpu" and compile is not False and network.dtype == torch.float32
    return load_kernels() if is_fused else None


def _accelerated(
    function: Network, network: UNetEncoder, device: torch.device, compile: bool | str, calls: int
) -> Network:
    compiled = is_compiled(compile, device, calls)
    lay_out(network, device, at_once=compiled)
    recorded = device.type == "cuda" and compile is not False
    return Accelerated(function, network, compiled=compiled, recorded=recorded)
