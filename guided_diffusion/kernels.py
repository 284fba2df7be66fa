"""The C++ kernels of kernels.cpp for CPUs: built on the machine that runs them, given tensors.

Feature maps are (N, H, W, C), float32 and contiguous, with C a multiple of 16. What does not have
the type, shape or layout that a kernel reads is a ValueError.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC"]
_COMPILERS = ("g++", "clang++", "c++")
_TAPS, _POINTS = 9, 36  # values a pair of channels in packed weights, without and with transform
_FEW_WEIGHTS = 9 * 256 * 512  # at most this many are transformed beforehand
_CACHE = os.path.expanduser("~/.cache/repaint")  # noqa: PTH111 - pathlib's fails without a home
_VECTOR = 16  # channels, of the widest instructions
_TIMEOUT = 300  # s; it takes about one

Affine = tuple[Tensor, Tensor]  # scale and shift, each (N, C)


class KernelError(Exception):
    """The kernels cannot be built, or not be loaded, on this machine."""


class _Convolution(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p * 2),
        ("channels", c_int64 * 2),
        ("count", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("resize", c_int64),
        ("weight", c_void_p),
        ("values", c_int64),
        ("bias", c_void_p),
        ("bias_stride", c_int64),
        ("residual", c_void_p),
        ("residual_doubled", c_int64),
        ("out", c_void_p),
        ("out_channels", c_int64),
    )


class _Normalisation(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p * 2),
        ("channels", c_int64 * 2),
        ("count", c_int64),
        ("pixels", c_int64),
        ("groups", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_double),
        ("gain", c_void_p),
        ("offset", c_void_p),
        ("gain_stride", c_int64),
        ("moments", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
    )


class Packed(NamedTuple):
    """A convolution's weights as ``Kernels.convolve`` takes them."""

    weights: Tensor
    values: int  # a pair of channels: 9, or 36 if transformed
    channels: int
    out_channels: int


class Kernels:
    """The functions of the built library; AttributeError where it is another."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("packed_size", "chunks_of", "convolve"):
            getattr(library, name).restype = c_int64
        for name in ("pack_weights", "group_norm"):
            getattr(library, name).restype = None

    def pack_weights(self, weight: Tensor) -> Packed:
        """Pack a convolution's ``weight`` (out, C, 3, 3).

        Small ones are transformed, which takes four times their memory; of large ones, which
        belong to small maps, the transform waits for the call that reads them.
        """
        weight = weight.contiguous()
        out_channels, channels = weight.shape[:2]
        _require_whole_vectors(channels)
        values = _POINTS if weight.numel() <= _FEW_WEIGHTS else _TAPS
        sizes = c_int64(channels), c_int64(out_channels), c_int64(values)
        packed = torch.empty(self._library.packed_size(*sizes))
        source = c_void_p(_pointer(weight, 9 * out_channels * channels))
        self._library.pack_weights(source, *sizes, c_void_p(packed.data_ptr()), _threads())
        return Packed(packed, values, channels, out_channels)

    def convolve(
        self,
        maps: Sequence[Tensor],
        weight: Packed,
        bias: Tensor,
        *,
        affine: Affine | None = None,
        resize: int = 0,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Convolve one or two maps (N, H, W, C), joined: (N, H', W', out_channels).

        ``bias`` is (1 or N, out_channels). Before it, with ``affine``, comes SiLU(scale · x +
        shift), then ``resize``: 1 doubles, -1 halves. ``residual`` is added, doubled if it has half
        the size. The result may be written over it, as ``out``. Raises MemoryError.
        """
        x = _Maps(maps)
        if x.total != weight.channels:
            raise ValueError(f"{x.total} channels, and weights for {weight.channels}")
        height, width = (
            side // 2 if resize < 0 else side << resize for side in (x.height, x.width)
        )
        numbers = x.count * height * width * weight.out_channels
        if not numbers:
            raise ValueError(f"nothing is left of {x.count} maps of {x.height}×{x.width}")
        if out is None:
            out = torch.empty(x.count, height, width, weight.out_channels)
        is_half = residual is not None and residual.shape[1] < height
        scale, shift = affine or (None, None)
        bias_pointer, bias_stride = _rows(bias, x.count, weight.out_channels)
        call = _Convolution(
            x=x.pointers,
            channels=x.channels,
            count=x.count,
            height=x.height,
            width=x.width,
            scale=_pointer(scale, x.count * x.total),
            shift=_pointer(shift, x.count * x.total),
            resize=resize,
            weight=weight.weights.data_ptr(),
            values=weight.values,
            bias=bias_pointer,
            bias_stride=bias_stride,
            residual=_pointer(residual, numbers // 4 if is_half else numbers),
            residual_doubled=is_half,
            out=_pointer(out, numbers),
            out_channels=weight.out_channels,
        )
        if self._library.convolve(ctypes.byref(call), _threads()):
            raise MemoryError("out of memory in a convolution")
        return out

    def group_norm(
        self,
        maps: Sequence[Tensor],
        norm: nn.GroupNorm,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Affine:
        """Return scale and shift, each (N, C), with which the joined maps come out normalised.

        With ``gain`` and ``offset``, each (1 or N, C), that is (1 + gain) · norm(x) + offset.
        """
        x = _Maps(maps)
        chunks = self._library.chunks_of(c_int64(x.height * x.width))
        moments = torch.empty(x.count, chunks, 2, x.total)
        scale, shift = torch.empty(2, x.count, x.total).unbind()
        gain_pointer, gain_stride = _rows(gain, x.count, x.total)
        offset_pointer, offset_stride = _rows(offset, x.count, x.total)
        if offset_stride != gain_stride:
            raise ValueError("gain and offset lie differently in memory")
        call = _Normalisation(
            x=x.pointers,
            channels=x.channels,
            count=x.count,
            pixels=x.height * x.width,
            groups=norm.num_groups,
            weight=_pointer(norm.weight, x.total),
            bias=_pointer(norm.bias, x.total),
            eps=norm.eps,
            gain=gain_pointer,
            offset=offset_pointer,
            gain_stride=gain_stride,
            moments=moments.data_ptr(),
            scale=scale.data_ptr(),
            shift=shift.data_ptr(),
        )
        self._library.group_norm(ctypes.byref(call), _threads())
        return scale, shift


def _threads() -> c_int64:
    return c_int64(torch.get_num_threads())


class _Maps:
    """One or two maps (N, H, W, C), joined along the channels."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.count, self.height, self.width, channels = maps[0].shape
        pixels = self.count * self.height * self.width
        widths = [channels] if len(maps) == 1 else [part.shape[3] for part in maps]
        self.total = sum(widths)
        _require_whole_vectors(*widths)
        pointers = [
            _pointer(part, pixels * width) for part, width in zip(maps, widths, strict=True)
        ]
        self.pointers, self.channels = (c_void_p * 2)(*pointers), (c_int64 * 2)(*widths)


def _require_whole_vectors(*widths: int) -> None:
    for width in widths:
        if width % _VECTOR:
            raise ValueError(f"{width} channels are not a multiple of {_VECTOR}")


def _pointer(tensor: Tensor | None, numbers: int) -> int | None:
    """Return where a tensor of so many numbers begins; None of none."""
    if tensor is None:
        return None
    if not (tensor.numel() == numbers and tensor.dtype is torch.float32 and tensor.is_contiguous()):
        raise _mismatch(tensor, f"{numbers} numbers, contiguous")
    return tensor.data_ptr()


def _rows(tensor: Tensor | None, count: int, width: int) -> tuple[int | None, int]:
    """Return where rows (1 or N, width) begin, and how far they are apart: 0 if one serves all."""
    if tensor is None:
        return None, 0
    (rows, own_width), (stride, step) = tensor.shape, tensor.stride()
    is_right = rows in (1, count) and own_width == width and step == 1
    if not is_right or tensor.dtype is not torch.float32:
        raise _mismatch(tensor, f"1 or {count} rows of {width} numbers")
    return tensor.data_ptr(), 0 if rows == 1 else stride


def _mismatch(tensor: Tensor, expected: str) -> ValueError:
    got = f"{tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
    return ValueError(f"expected float32, {expected}; got {got}")


# ---- Building ------------------------------------------------------------------------------------


@functools.cache
def load() -> Kernels:
    """Return the kernels, built at the first use on a machine; raises KernelError.

    They are kept where Inductor's code is: in TORCHINDUCTOR_CACHE_DIR, or ~/.cache/repaint.
    """
    problem = None
    for compiler in _compilers():
        try:
            return _built(compiler)
        except (OSError, AttributeError, KernelError) as error:  # noqa: PERF203 - two or three
            problem = problem or error
    raise KernelError(str(problem)) from problem


def _compilers() -> list[list[str]]:
    """Return the command lines to try; raises KernelError where there is no compiler at all."""
    own = os.environ.get("CXX")
    commands = [shlex.split(own)] if own else [[name] for name in _COMPILERS]
    found = [[path, *options] for name, *options in commands if (path := shutil.which(name))]
    if not found:
        names = ", ".join(name for name, *_ in commands)
        raise KernelError(f"no C++ compiler found ({names})")
    return found


def _built(compiler: list[str]) -> Kernels:
    name = f"kernels-{_fingerprint(compiler)}.so"
    if (folder := _cache_folder()) is not None:
        library = folder / name
        # A file that was cut short is built anew; a folder that is full or allows no programs
        # leaves the temporary one.
        for is_there in (library.exists(), False):
            with contextlib.suppress(OSError, AttributeError, KernelError):
                if not is_there:
                    _build(compiler, library)
                return Kernels(ctypes.CDLL(str(library)))
    with tempfile.TemporaryDirectory() as private:
        _build(compiler, Path(private, name))
        return Kernels(ctypes.CDLL(f"{private}/{name}"))


def _cache_folder() -> Path | None:
    """Return the folder of compiled code, or None where it is not this user's alone to write."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _CACHE)
    try:
        if not folder.is_absolute():  # a user without a home
            return None
        folder.mkdir(parents=True, exist_ok=True)
        status = folder.stat()
        is_own = status.st_uid == os.geteuid() and not status.st_mode & stat.S_IWOTH
    except (OSError, AttributeError):  # of a system without users, too
        return None
    return folder if is_own else None


def _fingerprint(compiler: list[str]) -> str:
    """Return what the built library depends on, as some hexadecimal digits."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    processor = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    version = _run([*compiler, "--version"])
    parts = [*compiler, version, *_FLAGS, str(torch.__version__), platform.machine()]
    text = "\n".join([*parts, *sorted(processor)])
    digest = hashlib.sha256(text.encode(errors="surrogateescape") + _SOURCE.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: list[str], library: Path) -> None:
    """Compile to a temporary name and rename: other processes may do the same at this moment."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
        _run([*compiler, *_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", compiled])
        # First without OpenMP's own library, so that it is the one that torch has loaded already:
        # the threads of two would keep each other from the cores.
        for options in ([], ["-fopenmp"]):
            _run([*compiler, "-shared", *options, compiled, "-o", linked])
            try:
                ctypes.CDLL(linked)
                break
            except OSError as error:
                problem = error
        else:
            raise KernelError(str(problem))
        Path(linked).replace(library)


def _run(command: list[str]) -> str:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{command[0]} cannot be run: {error}") from error
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise KernelError(f"{command[0]} fails: {line[:200]}")
    return run.stdout
