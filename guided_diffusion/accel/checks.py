"""The check of fast networks: their outputs have to be those of PyTorch's own operations."""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from guided_diffusion.accel.memory import forget_pages
from guided_diffusion.dist_util import is_out_of_memory
from guided_diffusion.io.paths import cache_folder
from guided_diffusion.unet import EmbedSequential, UNetEncoder

Network = Callable[..., Tensor]  # of (x, timesteps[, y]), each (N, ...)
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 1e-2
_SOURCES = ("accel/cpu_kernels.py", "accel/fused_unet.py", "unet.py")  # what calls the kernels


class Verdicts:
    """The checks that kernels have passed on this machine, which a later run need not repeat.

    Each is a small file in the cache folder, named by all that its outcome depends on:
    ``kernels`` (the name of the built library: its source, compiler, PyTorch and processor), the
    Python code that calls them, the network's shapes and type, and the shapes of the inputs.
    ``samples`` returns outputs of a few small layers, each with the expected one.
    """

    def __init__(
        self,
        kernels: str,
        network: UNetEncoder,
        samples: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    ) -> None:
        package = Path(__file__).parents[1]
        sources = [hashlib.sha256((package / name).read_bytes()).hexdigest() for name in _SOURCES]
        shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
        self._subject = [kernels, sources, type(network), network.cfg, network.dtype, shapes]
        self._folder, self.samples = cache_folder(), samples

    def _path(self, inputs: Sequence[Tensor]) -> Path | None:
        call = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in inputs]
        digest = hashlib.sha256(repr([*self._subject, call]).encode()).hexdigest()[:32]
        return self._folder and self._folder / "kernels-checked" / digest

    def is_passed(self, inputs: Sequence[Tensor]) -> bool:
        """Whether an earlier run checked a call with such inputs, and found nothing."""
        path = self._path(inputs)
        return path is not None and path.exists()

    def add(self, inputs: Sequence[Tensor]) -> None:
        """Record that a call with such inputs has passed, if there is a cache folder."""
        if (path := self._path(inputs)) is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(mode=0o700, exist_ok=True)
                path.write_text(f"{self._subject[0]}: {[tuple(t.shape) for t in inputs]}\n")


class Checked:
    """``fast``, whose first output of each shape has to equal that of ``plain`` to rounding.

    If it does not, or if ``fast`` fails, one warning says so, and every output from then on is that
    of ``plain``. Running out of memory is raised. ``network`` is the one that ``plain`` calls.
    Where ``verdicts`` say that an earlier run checked this shape, only its samples are compared. On
    a CPU an output that is not finite is compared too.
    """

    def __init__(
        self, fast: Network, plain: Network, network: nn.Module, verdicts: Verdicts | None = None
    ) -> None:
        self._fast: Network | None = fast
        self._plain, self._network, self._verdicts = plain, network, verdicts
        self._checked: set[torch.Size] = set()  # shapes of ``x``
        self._is_plain_finite = True

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what ``plain`` returns for ``x`` (N, C, S, S), ``timesteps`` and ``y`` (N,)."""
        inputs = [x, timesteps, *([] if y is None else [y])]
        if self._fast is None:
            return self._plain(*inputs)
        try:
            output = self._fast(*inputs)
            has_to_be_compared = self._has_to_be_compared(output, inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            expected = self._plain(*inputs)  # raises, too, if the inputs are wrong
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return self._give_up(f"does not work: {lines[0][:200]}", expected)
        return self._compared(output, inputs) if has_to_be_compared else output

    def _has_to_be_compared(self, output: Tensor, inputs: list[Tensor]) -> bool:
        """Whether ``output`` is the first of its shape, or is not finite."""
        x = inputs[0]
        if x.shape not in self._checked:
            if not (self._verdicts and self._verdicts.is_passed(inputs)):
                return True
            for sample, expected in self._verdicts.samples():
                if not _largest_error(sample, expected) <= _tolerance(self._network, x.device):
                    return True
            self._checked.add(x.shape)
        # Looking at an output would wait for a GPU.
        return x.device.type == "cpu" and self._is_plain_finite and not output.isfinite().all()

    def _compared(self, output: Tensor, inputs: list[Tensor]) -> Tensor:
        """Return ``output`` if it is that of ``plain``; else ``plain``'s, and use that alone."""
        x = inputs[0]
        with _forgetting_pages(self._network):  # image by image, which takes little memory
            images = zip(*(tensor.split(1) for tensor in inputs), strict=True)
            expected = torch.cat([self._plain(*image) for image in images])
        error, tolerance = _largest_error(output, expected), _tolerance(self._network, x.device)
        if not error <= tolerance:  # NaN compares as False
            problem = f"is wrong by {error:.2g} of the largest value at batch size {len(x)}"
            return self._give_up(problem, expected)
        self._checked.add(x.shape)
        self._is_plain_finite = bool(expected.isfinite().all())
        if self._verdicts and self._is_plain_finite:
            self._verdicts.add(inputs)
        return output

    def _give_up(self, problem: str, expected: Tensor) -> Tensor:
        self._fast = None
        text = f"compile: the fast network {problem}; going on with PyTorch's own operations"
        warnings.warn(text, stacklevel=4)
        return expected


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
    """Release the pages of a mapped checkpoint after each block.

    The fast network has packed copies of the weights: 2 GB would be in memory twice.
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
