"""How the networks are made fast on the device that runs them, without changing what they compute.

Arithmetic (the ``precision`` key), memory layout, compilation and CUDA graphs. Every way that a
device or an installation lacks is left out with one warning, and the exact eager network goes on.
"""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from guided_diffusion.dist_util import file_mappings, forget_pages, is_out_of_memory
from guided_diffusion.nn import UpConv2d
from guided_diffusion.unet import AttentionBlock, Head, ResBlock, Trunk

# Blocks of different shapes that are compiled, each once; PyTorch's own limit is for debugging.
_MOST_SHAPES = 1024
_CALLS_WORTH_IT = 1000  # of a network: a walk of fewer is not worth the wait for a compiler
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


def lay_out(network: Trunk, device: torch.device, *, at_once: bool = True) -> None:
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


def is_compiled(compile: bool | str, device: torch.device, calls: int) -> bool:
    """Decide ``compile: auto``: on a GPU, where it takes seconds, for a walk of many ``calls``."""
    if compile == "auto":
        return device.type == "cuda" and calls >= _CALLS_WORTH_IT
    return bool(compile)


class CaptureError(Exception):
    """A CUDA graph could not be recorded."""


class Accelerated:
    """A function of tensors whose network is ``compiled``, and ``recorded`` as a CUDA graph.

    ``network`` is the one that ``function`` calls. What does not work at a first call is undone
    with one warning, and goes on without. A batch smaller than an earlier one is filled up to it,
    because another size would have to be compiled and recorded anew: images do not know each other.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        network: Trunk,
        *,
        compiled: bool = False,
        recorded: bool = False,
    ) -> None:
        self._function, self._network = function, network
        self._is_compiled, self._is_recorded = compiled, recorded
        self._size = 0  # of the largest batch that worked
        self._recording: CudaRecording | None = None
        if compiled:
            _compile_blocks(network)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what ``function`` returns, to rounding; the first dimension is the batch."""
        count = len(inputs[0])
        while self._is_compiled or self._is_recorded:
            size = max(count, self._size)
            try:
                output = self._run(*(_filled_up(tensor, size) for tensor in inputs))
            except Exception as error:
                if is_out_of_memory(error):
                    self._size, self._recording = 0, None
                    raise
                if size == self._size:  # it did work: this is something else
                    raise
                self._go_without(error)
            else:
                self._size = size
                return output[:count]
        return self._function(*inputs)

    def _run(self, *inputs: Tensor) -> Tensor:
        if not self._is_recorded:
            return self._function(*inputs)
        if self._recording is None or not self._recording.fits(*inputs):
            self._recording = None  # its memory goes first
            self._recording = CudaRecording(self._function, inputs)
        return self._recording(*inputs)

    def _go_without(self, error: Exception) -> None:
        """Undo what failed; raises ``error`` where that was the network itself."""
        if isinstance(error, CaptureError):
            name, self._is_recorded = "a CUDA graph", False
        elif self._is_compiled:
            name, self._is_compiled = "compile:", False
            _compile_blocks(self._network, undo=True)
        else:
            raise error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = f"{name} does not work here, going on without: {lines[0][:200]}"
        warnings.warn(text, stacklevel=3)


def _filled_up(tensor: Tensor, size: int) -> Tensor:
    """Repeat the last entry of a batch until there are ``size``."""
    last = tensor[-1:].expand(size - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, last]) if len(last) else tensor


class CudaRecording:
    """One call of ``function`` as a CUDA graph, replayed with other inputs of the same shapes.

    Raises CaptureError where the recording itself fails, and what ``function`` raises.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                function(*self._inputs)
        current.wait_stream(stream)
        try:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = function(*self._inputs)
        except Exception as error:
            torch.cuda.set_stream(current)  # torch stays on the recording's otherwise
            first = error.__context__ or error  # ending a broken recording fails too
            for cause in (first, error):
                if is_out_of_memory(cause):
                    raise cause from None
            raise CaptureError(str(first)) from error

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
    cache = os.path.expanduser("~/.cache/repaint")  # noqa: PTH111 - pathlib's fails without a home
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
    # It advises TF32, which is the user's to choose.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    for name in ("cache_size_limit", "accumulated_cache_size_limit"):
        limit = max(getattr(torch._dynamo.config, name), _MOST_SHAPES)
        setattr(torch._dynamo.config, name, limit)
    for module in network.modules():
        if isinstance(module, ResBlock | AttentionBlock | Head):
            if undo:
                module._compiled_call_impl = None
            else:
                module.compile(dynamic=False)


class CallMemory:
    """What a call of the network takes of a device's memory beside the weights, and what is left.

    Measured at its first call on a GPU; on a CPU, under Linux, at the second, because at the first
    one weights are packed.
    """

    def __init__(self, device: torch.device, weights: int) -> None:
        self._device, self._weights = device, weights  # bytes
        self._before: int | None = None  # bytes of the process before the second call
        self._is_told = True  # on a CPU, by the system
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # loading is not what a call takes

    def after_call(self) -> tuple[int, int] | None:
        """Return bytes taken at once and bytes that are free without them; None: not known yet."""
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            free += torch.cuda.memory_reserved(self._device) - self._weights
            return max(1, torch.cuda.max_memory_allocated(self._device) - self._weights), free
        if not self._is_told:
            return None
        try:
            if self._before is not None:
                peak = bytes_of("/proc/self/status", "VmHWM")
                free = bytes_of("/proc/meminfo", "MemAvailable")
                return max(1, peak - self._before), free + peak - self._before
            with contextlib.suppress(AttributeError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
            self._before = bytes_of("/proc/self/status", "VmRSS")
        except (OSError, LookupError):  # another system than Linux, or it does not tell
            self._is_told = False  # so that no further call pays for asking
        return None


def bytes_of(path: str, name: str) -> int:
    """Return what Linux states of ``name`` in a file below /proc; raises OSError, LookupError."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(name)
