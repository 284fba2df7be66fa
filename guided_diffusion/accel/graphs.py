"""CUDA graphs and ``torch.compile`` around a network, which both want one batch size."""

import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from guided_diffusion.accel.layout import Module, twin
from guided_diffusion.dist_util import is_out_of_memory
from guided_diffusion.io.cache import cache_folder
from guided_diffusion.unet import AttentionBlock, Head, ResBlock

# Blocks of different shapes that are compiled, each once; PyTorch's own limit is for debugging.
_MOST_SHAPES = 1024
_WARM_UP_CALLS = 3  # before a CUDA graph is recorded, as its documentation asks


class FixedBatch:
    """``function`` of tensors, called with the largest batch size so far.

    A smaller batch is filled up, because another size would have to be compiled and recorded anew:
    images do not know each other. With ``recorded`` the call is a CUDA graph.
    """

    def __init__(
        self, function: Callable[..., Tensor], *, compiled: bool = False, recorded: bool = False
    ) -> None:
        self._function, self._is_compiled, self._is_recorded = function, compiled, recorded
        self._size = 0  # of the largest batch that worked
        self._runner: CudaGraphRunner | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what ``function`` returns, to rounding; the first dimension is the batch."""
        count = len(inputs[0])
        size = max(count, self._size)
        filled = [_filled_up(tensor, size) for tensor in inputs]
        compiles = self._is_compiled and size > self._size
        try:
            with _compiler_settings() if compiles else contextlib.nullcontext():
                output = self._run(*filled)
        except Exception as error:
            if is_out_of_memory(error):  # the next, smaller batch is not filled up
                self._size, self._runner = 0, None
            raise
        self._size = size
        return output[:count]

    def _run(self, *inputs: Tensor) -> Tensor:
        if not self._is_recorded:
            return self._function(*inputs)
        if self._runner is None or not self._runner.fits(*inputs):
            self._runner = None  # its memory goes first
            self._runner = CudaGraphRunner(self._function, inputs)
        return self._runner(*inputs)


def _filled_up(tensor: Tensor, size: int) -> Tensor:
    """Repeat the last entry of a batch until there are ``size``."""
    last = tensor[-1:].expand(size - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, last]) if len(last) else tensor


class CudaGraphRunner:
    """One call of ``function`` as a CUDA graph, replayed with other inputs of the same shapes.

    Raises what recording raises; it starts with zeros, so that a replay that does not read its
    inputs is told from one that does.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [torch.zeros_like(tensor) for tensor in inputs]
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
            causes = (error.__context__ or error, error)  # ending a broken recording fails, too
            raise next(filter(is_out_of_memory, causes), causes[0]) from None

    def fits(self, *inputs: Tensor) -> bool:
        """Whether ``inputs`` have the shapes that were recorded."""
        return [tensor.shape for tensor in inputs] == [own.shape for own in self._inputs]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Copy ``inputs`` in, replay, and return a copy of the output."""
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._output.clone()


# ---- torch.compile -------------------------------------------------------------------------------


def with_compiled_blocks(network: Module) -> Module:
    """Return a twin of ``network`` whose repeated blocks compile at their first call.

    Blocks of equal shapes are compiled once.
    """
    network = twin(network)
    for module in network.modules():
        if isinstance(module, ResBlock | AttentionBlock | Head):
            module.compile(dynamic=False)
    return network


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory:
    """Return a folder that goes with the program."""
    return tempfile.TemporaryDirectory(prefix="repaint-")


@contextlib.contextmanager
def _compiler_settings() -> Iterator[None]:
    """Set for a first call what compiling needs.

    Compiled code is kept for later runs where the kernels are, unless others may write there. The
    compiler takes its folder from the environment alone, and looks for it until the end.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = cache_folder() or _private_folder().name
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    limits = {
        name: max(getattr(torch._dynamo.config, name), _MOST_SHAPES)
        for name in ("cache_size_limit", "accumulated_cache_size_limit")
    }
    with warnings.catch_warnings(), torch._dynamo.config.patch(limits):
        # It advises TF32, which is the user's to choose.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        yield
