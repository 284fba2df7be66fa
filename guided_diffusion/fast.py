"""How the networks are made fast on the device that runs them, without changing what they compute.

Arithmetic (the ``precision`` key), memory layout, compilation and CUDA graphs. Every way that a
device or an installation lacks is left out with one warning, and the exact eager network goes on.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from guided_diffusion.unet import AttentionBlock, ResBlock, Trunk

# Weights of more bytes are not copied on a CPU: they stay mapped from their file.
_LARGEST_COPY = 500 * 2**20
# Blocks of different shapes that are compiled, each once; PyTorch's own limit is for debugging.
_MOST_SHAPES = 256
_WARM_UP_CALLS = 3  # before a CUDA graph is recorded, as its documentation asks


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


def lay_out(network: Trunk, device: torch.device) -> None:
    """Put the channels of a pixel side by side in memory, as convolutions read them.

    Large weights on a CPU stay as they are, because a copy of them costs more memory than it saves
    time; the feature maps are laid out all the same.
    """
    if device.type not in ("cpu", "cuda"):
        return
    network.memory_format = torch.channels_last
    size = sum(parameter.nbytes for parameter in network.parameters())
    if device.type == "cuda" or size <= _LARGEST_COPY:
        network.to(memory_format=torch.channels_last)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next feature map instead of returning it.

    By default it maps and unmaps every large block, and the kernel clears each page anew, which
    takes about a tenth of the time of a 256×256 network. Where the C library is not glibc, nothing
    happens.
    """
    mmap_max, trim_threshold = -4, -1  # names of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def is_compiled(compile: bool | str, device: torch.device) -> bool:
    """Decide ``compile: auto``: on a GPU, where it takes seconds; on a CPU it takes minutes."""
    return device.type == "cuda" if compile == "auto" else bool(compile)


class Accelerated:
    """A function of tensors whose network is compiled, and on a GPU recorded as a CUDA graph.

    ``network`` is the one that ``function`` calls. Where the first call fails, everything is undone
    with one warning and ``function`` runs as it is.
    """

    def __init__(
        self, function: Callable[..., Tensor], network: Trunk, device: torch.device, compiled: bool
    ) -> None:
        self._function, self._network = function, network
        self._is_compiled, self._is_recorded = compiled, compiled and device.type == "cuda"
        self._is_proven = not compiled
        self._recording: CudaRecording | None = None
        if compiled:
            _compile_blocks(network)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what ``function`` returns, to rounding."""
        if self._is_proven:
            return self._run(*inputs)
        try:
            output = self._run(*inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways, and none is fatal
            lines = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"compile: does not work here, going on without: {lines[0][:200]}", stacklevel=2
            )
            _compile_blocks(self._network, undo=True)
            self._is_compiled = self._is_recorded = False
            output = self._run(*inputs)
        self._is_proven = True
        return output

    def _run(self, *inputs: Tensor) -> Tensor:
        if not self._is_recorded:
            return self._function(*inputs)
        if self._recording is None or not self._recording.fits(*inputs):
            self._recording = None  # its memory goes first
            self._recording = CudaRecording(self._function, inputs)
        return self._recording(*inputs)


class CudaRecording:
    """One call of ``function`` as a CUDA graph, replayed with other inputs of the same shapes."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def fits(self, *inputs: Tensor) -> bool:
        """Whether ``inputs`` have the shapes that were recorded."""
        return [tensor.shape for tensor in inputs] == [own.shape for own in self._inputs]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Copy ``inputs`` in, replay, and return a copy of the output."""
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._output.clone()


def _compile_blocks(network: nn.Module, undo: bool = False) -> None:
    """Compile the repeated blocks, those of equal shapes together; it happens at their first call.

    Compiled code is kept in ~/.cache/repaint for later runs, unless TORCHINDUCTOR_CACHE_DIR says
    otherwise.
    """
    cache = Path("~/.cache/repaint").expanduser()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    for name in ("cache_size_limit", "accumulated_cache_size_limit"):
        limit = max(getattr(torch._dynamo.config, name), _MOST_SHAPES)
        setattr(torch._dynamo.config, name, limit)
    for module in network.modules():
        if isinstance(module, ResBlock | AttentionBlock):
            if undo:
                module._compiled_call_impl = None
            else:
                module.compile(dynamic=False)


def batch_that_fits(device: torch.device, batch_size: int, weights: int) -> int:
    """Return how many images the GPU's free memory would hold at once.

    Judged by the peak of memory that ``batch_size`` images took beside ``weights`` bytes.
    """
    each = max(1, torch.cuda.max_memory_allocated(device) - weights) / batch_size
    free, _ = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) - weights
    return int(0.9 * usable / each)  # a tenth is for fragmentation
