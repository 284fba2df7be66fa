"""The door of this folder: a network goes in, a faster callable that computes the same comes out.

Kernels and compiled code differ from machine to machine. So checks.py compares their output with
that of PyTorch's own operations on the machine that runs them.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from guided_diffusion.accel import cpu_kernels
from guided_diffusion.accel.build import KernelError
from guided_diffusion.accel.checks import Checked, Network, Verdicts
from guided_diffusion.accel.fused_unet import FusedUNet, samples, with_fused_convolutions
from guided_diffusion.accel.layout import arithmetic, lay_out, precision_on, trunk_dtype
from guided_diffusion.accel.memory import keep_freed_memory
from guided_diffusion.dist_util import use_device
from guided_diffusion.io.paths import cache_folder
from guided_diffusion.unet import UNetEncoder, UNetModel

__all__ = ["accelerate", "arithmetic", "precision_on", "prepare", "trunk_dtype"]


def prepare(device: torch.device) -> None:
    """Set the process's GPU, how it keeps freed memory, and how cuDNN chooses algorithms."""
    if device.type == "cpu":
        keep_freed_memory()
    use_device(device)
    torch.backends.cudnn.benchmark = True  # all calls have the same shapes


def accelerate(
    network: nn.Module,
    device: torch.device,
    compile: bool | str,
    check: str = "always",
    gradient: Callable[..., Tensor] | None = None,
) -> Network:
    """Return a fast callable that computes ``network``: (x, timesteps[, y]) → output, to rounding.

    With ``gradient`` it computes that of ``network``, which ``gradient`` takes before its other
    inputs. ``compile`` and ``check`` are the YAML keys; of foreign networks there are no kernels.
    """

    def with_gradient(network: Network) -> Network:
        return partial(gradient, network) if gradient else network

    plain = with_gradient(network)
    if (kernels := _cpu_kernels(network, device, compile)) is not None:
        if gradient is None:
            fast = FusedUNet(kernels, network)
        else:
            fast = with_gradient(with_fused_convolutions(kernels, network))
        kept = None
        if check != "always":
            kept = Verdicts(kernels.name, network, partial(samples, kernels, network))
        return Checked(fast, plain, network, kept)
    lay_out(network, device)
    if compile is not True:
        return plain
    return Checked(CompiledBatch(with_gradient(compiled(network, device)), device), plain, network)


def _cpu_kernels(
    network: nn.Module, device: torch.device, compile: bool | str
) -> cpu_kernels.Kernels | None:
    """Return the kernels for CPUs if they can compute ``network``, and else None.

    A warning says why they could not be built.
    """
    if device.type != "cpu" or compile is False or not isinstance(network, UNetEncoder):
        return None
    try:
        kernels = cpu_kernels.load()
    except KernelError as error:
        warnings.warn(f"compile: no C++ kernels, going on without: {error}", stacklevel=4)
        return None
    has_bfloat16 = kernels.has_bfloat16 and isinstance(network, UNetModel)
    is_known = network.dtype == torch.float32 or (network.dtype == torch.bfloat16 and has_bfloat16)
    return kernels if is_known else None


# ---- torch.compile -------------------------------------------------------------------------------


def compiled(network: nn.Module, device: torch.device) -> Network:
    """Return ``network`` through ``torch.compile``, which compiles at the first call.

    On a GPU the calls are CUDA graphs. Compiled code is kept in the cache folder, where PyTorch's
    default is a temporary folder.
    """
    if (folder := cache_folder()) is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(network, dynamic=False, mode=mode)


class CompiledBatch:
    """A compiled ``function`` of tensors, called with the largest batch size so far.

    A smaller batch is padded, because another size would be compiled anew: no image depends on
    another. Each output is a copy, because a CUDA graph writes the next output over the last one.
    PyTorch records a CUDA graph at the second call. On a GPU, two calls with zeros come before the
    first output, so that it is that of a graph which has read its inputs.
    """

    def __init__(self, function: Network, device: torch.device) -> None:
        self._function = function
        self._warm_up_calls = 2 if device.type == "cuda" else 0
        self._size = 0  # of the largest batch that worked

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what ``function`` returns, to rounding; the first dimension is the batch."""
        count, worked = len(inputs[0]), self._size
        size = max(count, worked)
        self._size = 0  # after a failure, such as a full memory, nothing is padded
        padded = [_padded(tensor, size) for tensor in inputs]
        if size > worked:
            for _ in range(self._warm_up_calls):
                self._function(*(torch.zeros_like(tensor) for tensor in padded))
        output = self._function(*padded)
        self._size = size
        return output[:count].clone()


def _padded(tensor: Tensor, size: int) -> Tensor:
    """Repeat the last entry of a batch until there are ``size``; the result is contiguous."""
    last = tensor[-1:].expand(size - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, last]).contiguous()
