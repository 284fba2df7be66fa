"""CUDA graphs and ``torch.compile`` around a network."""

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from guided_diffusion.dist_util import is_out_of_memory
from guided_diffusion.unet import AttentionBlock, Head, ResBlock, UNetEncoder

# Blocks of different shapes that are compiled, each once; PyTorch's own limit is for debugging.
_MOST_SHAPES = 1024
_CALLS_WORTH_IT = 1000  # of a network: a walk of fewer is not worth the wait for a compiler
_WARM_UP_CALLS = 3  # before a CUDA graph is recorded, as its documentation asks


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
        network: UNetEncoder,
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

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what ``function`` returns, to rounding; the first dimension is the batch."""
        inputs, count = [x, timesteps, *([] if y is None else [y])], len(x)
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
