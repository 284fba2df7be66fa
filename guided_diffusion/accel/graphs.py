"""CUDA graphs and ``torch.compile`` around a network, which both want one batch size."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from guided_diffusion.accel.layout import Module, swap_modules, twin
from guided_diffusion.dist_util import is_out_of_memory
from guided_diffusion.nn import GroupNorm32
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


def with_compiled_blocks(network: Module, device: torch.device) -> Module:
    """Return a twin of ``network`` whose repeated blocks compile at their first call.

    Blocks of equal shapes are compiled once.
    """
    network = twin(network)
    if device.type == "cuda":
        swap_modules(network, GroupNorm32, ChunkedGroupNorm32)
    for module in network.modules():
        if isinstance(module, ResBlock | AttentionBlock | Head):
            module.compile(dynamic=False)
    return network


@contextlib.contextmanager
def _compiler_settings() -> Iterator[None]:
    """Set for a first call what compiling needs.

    Compiled code is kept for later runs in ~/.cache/repaint, unless TORCHINDUCTOR_CACHE_DIR says
    otherwise: the compiler takes its folder from nowhere else, and looks for it until the end.
    """
    cache = os.path.expanduser("~/.cache/repaint")  # noqa: PTH111 - pathlib's fails without a home
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
    limits = {
        name: max(getattr(torch._dynamo.config, name), _MOST_SHAPES)
        for name in ("cache_size_limit", "accumulated_cache_size_limit")
    }
    with warnings.catch_warnings(), torch._dynamo.config.patch(limits):
        # It advises TF32, which is the user's to choose.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        yield


class ChunkedGroupNorm32(GroupNorm32):
    """GroupNorm32 that reads a large channels_last map in memory's order, for Inductor on GPUs.

    Inductor's own reduction over a group walks such a map with steps of C, and takes two more
    kernels.
    """

    def __init__(self, norm: GroupNorm32) -> None:
        super().__init__(norm.num_channels)
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (N, C, ...)."""
        chunks = 1 if torch.is_grad_enabled() else chunks_of(x)
        return super().forward(x) if chunks == 1 else self.in_chunks(x, chunks)

    def in_chunks(self, x: Tensor, chunks: int) -> Tensor:
        """Normalise a channels_last ``x`` (N, C, H, W).

        First come the moments of each channel in each of ``chunks`` equal parts of the pixels, then
        those of the groups: the mean variance plus the variance of the means.
        """
        n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(n, chunks, h * w // chunks, c).float()
        var, mean = torch.var_mean(pixels, dim=2, correction=0)  # (n, chunks, c)
        var, mean = (part.unflatten(2, (self.num_groups, -1)) for part in (var, mean))
        group_mean = mean.mean((1, 3), keepdim=True)  # (n, 1, groups, 1)
        group_var = (var + (mean - group_mean).square()).mean((1, 3))
        rstd = torch.rsqrt(group_var + self.eps)[:, :, None]
        scale = rstd * self.weight.view(1, self.num_groups, -1)  # (n, groups, c / groups)
        shift = self.bias.view(1, self.num_groups, -1) - group_mean[:, 0] * scale
        scale, shift = (part.reshape(n, c, 1, 1) for part in (scale, shift))
        return (x.float() * scale + shift).type(x.dtype)


def chunks_of(x: Tensor) -> int:
    """Return in how many parts of its pixels ``x`` is best read; 1: all at once."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return 1
    n, c, h, w = x.shape
    if c // 32 * h * w <= 8192:  # a group that Inductor does in one kernel
        return 1
    chunks = min(h * w // 16, max(2, 65536 // (n * c)))
    while h * w % chunks:
        chunks -= 1
    return chunks
