"""The door of this folder: a network goes in, a faster callable that computes the same comes out.

Kernels and compiled code differ from machine to machine. So their first output of each shape is
compared with PyTorch's own operations on the machine that runs them.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from guided_diffusion.accel import cpu_kernels
from guided_diffusion.accel.build import KernelError
from guided_diffusion.accel.fused_unet import FusedUNet, with_fused_convolutions
from guided_diffusion.accel.layout import arithmetic, lay_out, precision_on, trunk_dtype
from guided_diffusion.accel.memory import forget_pages, keep_freed_memory
from guided_diffusion.dist_util import is_out_of_memory, use_device
from guided_diffusion.io.cache import cache_folder
from guided_diffusion.unet import EmbedSequential, EncoderUNetModel, UNetEncoder

__all__ = [
    "accelerate",
    "accelerate_gradient",
    "arithmetic",
    "precision_on",
    "prepare",
    "trunk_dtype",
]
Network = Callable[..., Tensor]  # of (x, timesteps[, y]), each (N, ...)
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 1e-2


def prepare(device: torch.device) -> None:
    """Set what holds for the whole process: its GPU, how memory is kept, the choice of convolutions."""
    if device.type == "cpu":
        keep_freed_memory()
    use_device(device)
    torch.backends.cudnn.benchmark = True  # all calls have the same shapes


def accelerate(model: nn.Module, device: torch.device, compile: bool | str) -> Network:
    """Return a fast callable that computes ``model``: (x, timesteps[, y]) → output, to rounding.

    ``compile`` is the YAML key. The CPU's kernels compute ``UNetModel`` alone.
    """
    if (kernels := _cpu_kernels(model, device, compile)) is not None:
        return Checked(FusedUNet(kernels, model), model, model)
    lay_out(model, device, at_once=compile is True)
    if compile is not True:
        return model
    return Checked(CompiledBatch(compiled(model, device), device), model, model)


def accelerate_gradient(
    gradient: Callable[..., Tensor],
    classifier: EncoderUNetModel,
    device: torch.device,
    compile: bool | str,
) -> Network:
    """Return a fast ``gradient`` of ``classifier``: (x, timesteps, y) → output, to rounding.

    ``gradient`` takes the classifier before its other inputs.
    """
    plain = partial(gradient, classifier)
    if (kernels := _cpu_kernels(classifier, device, compile)) is not None:
        fast = partial(gradient, with_fused_convolutions(kernels, classifier))
        return Checked(fast, plain, classifier)
    lay_out(classifier, device, at_once=compile is True)
    if compile is not True:
        return plain
    fast = CompiledBatch(partial(gradient, compiled(classifier, device)), device)
    return Checked(fast, plain, classifier)


def _cpu_kernels(
    network: nn.Module, device: torch.device, compile: bool | str
) -> cpu_kernels.Kernels | None:
    """Return the CPU's kernels where they are wanted; None, with a warning, if there are none."""
    has_kernels = isinstance(network, UNetEncoder) and network.dtype == torch.float32
    if device.type != "cpu" or compile is False or not has_kernels:
        return None
    try:
        return cpu_kernels.load()
    except KernelError as error:
        warnings.warn(f"compile: no C++ kernels, going on without: {error}", stacklevel=4)
        return None


# ---- torch.compile -------------------------------------------------------------------------------


def compiled(network: nn.Module, device: torch.device) -> Network:
    """Return ``network`` through ``torch.compile``, which compiles at the first call.

    On a GPU the calls are CUDA graphs. Compiled code is kept in our own folder of kept things:
    PyTorch's default is a folder of temporary files.
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


# ---- The check -----------------------------------------------------------------------------------


class Checked:
    """``fast``, whose first output of each shape has to equal that of ``plain`` to rounding.

    If it does not, or if ``fast`` fails, one warning says so, and every output from then on is that
    of ``plain``. Running out of memory is raised. ``network`` is the one that ``plain`` calls.
    """

    def __init__(self, fast: Network, plain: Network, network: nn.Module) -> None:
        self._fast: Network | None = fast
        self._plain, self._network = plain, network
        self._checked: set[torch.Size] = set()  # shapes of ``x``

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what ``plain`` returns for ``x`` (N, C, S, S), ``timesteps`` and ``y`` (N,)."""
        inputs = [x, timesteps, *([] if y is None else [y])]
        if self._fast is None:
            return self._plain(*inputs)
        try:
            output = self._fast(*inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            expected = self._plain(*inputs)  # raises, too, if the inputs are wrong
            return self._give_up(f"does not work: {_first_line(error)}", expected)
        if x.shape in self._checked:
            return output
        expected = self._expected(inputs)
        error, tolerance = _largest_error(output, expected), _tolerance(self._network, x.device)
        if not error <= tolerance:  # NaN compares as False
            problem = f"is wrong by {error:.2g} of the largest value at batch size {len(x)}"
            return self._give_up(problem, expected)
        self._checked.add(x.shape)
        return output

    def _expected(self, inputs: list[Tensor]) -> Tensor:
        """Return what ``plain`` computes, image by image, so that it takes little memory."""
        with _forgetting_pages(self._network):
            images = zip(*(tensor.split(1) for tensor in inputs), strict=True)
            return torch.cat([self._plain(*image) for image in images])

    def _give_up(self, problem: str, expected: Tensor) -> Tensor:
        self._fast = None
        text = f"compile: the fast network {problem}; going on with PyTorch's own operations"
        warnings.warn(text, stacklevel=4)
        return expected


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _largest_error(output: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest value; only where ``expected`` is finite."""
    if output.shape != expected.shape:
        return float("inf")
    is_finite = expected.isfinite()
    error = torch.where(is_finite, output - expected, 0).abs().max().item()
    largest = torch.where(is_finite, expected, 0).abs().max().item()
    return error / largest if error and largest else error


def _tolerance(network: nn.Module, device: torch.device) -> float:
    """Return the error that is rounding, in the arithmetic of ``network`` on ``device``."""
    switches = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    if network.dtype == torch.float32 and device.type == "cuda" and any(switches):
        return _TF32_TOLERANCE
    return _TOLERANCES[network.dtype]


@contextlib.contextmanager
def _forgetting_pages(network: nn.Module) -> Iterator[None]:
    """Let a mapped checkpoint's weights leave memory again after each block.

    The fast network has packed copies of them: 2 GB would be there twice.
    """
    handles = [
        block.register_forward_hook(lambda block, *_: forget_pages(*block.parameters()))
        for block in network.modules()
        if isinstance(block, EmbedSequential)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        forget_pages(*network.parameters())
