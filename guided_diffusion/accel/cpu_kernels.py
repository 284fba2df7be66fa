"""The C++ kernels for CPUs, called with tensors.

Feature maps are (N, H, W, C), float32 and contiguous, with C a multiple of 16. A tensor of another
type, shape or layout than a kernel reads is a ValueError.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from guided_diffusion.accel.build import KernelError, load_library

_TAPS, _POINTS = 9, 36  # values a pair of channels in packed weights, without and with transform
_FEW_WEIGHTS = 9 * 256 * 512  # at most this many are transformed beforehand
_VECTOR = 16  # channels, of the widest instructions
# Whatever torch's defaults are.
_empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
Affine = tuple[Tensor, Tensor]  # scale and shift, each (N, C)


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
        ("reduced", c_int64),
        ("bias", c_void_p),
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
        ("added", c_void_p),
        ("added_stride", c_int64),
        ("gain", c_void_p),
        ("offset", c_void_p),
        ("gain_stride", c_int64),
        ("moments", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
    )


class _Pointwise(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p * 2),
        ("channels", c_int64 * 2),
        ("count", c_int64),
        ("pixels", c_int64),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("weight", c_void_p),
        ("reduced", c_int64),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("out_channels", c_int64),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("count", c_int64),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("width", c_int64),
        ("head_step", c_int64),
        ("part_step", c_int64),
        ("packed", c_void_p),
        ("out", c_void_p),
    )


_STRUCTURES = (_Convolution, _Normalisation, _Pointwise, _Attention)  # numbered as in size_of
_FUNCTIONS = (
    *("size_of", "has_bfloat16", "packed_size", "pack_weights", "convolve", "pointwise"),
    *("chunks_of", "group_norm", "attention_size", "attend"),
)


class Packed(NamedTuple):
    """A convolution's weights as ``Kernels.convolve`` and ``Kernels.pointwise`` take them."""

    weights: Tensor
    values: int  # a pair of channels: 1 of 1×1; of 3×3 9, or 36 if transformed
    is_reduced: bool  # whether products are of bfloat16
    channels: int
    out_channels: int


class Kernels:
    """The functions of the built library; KernelError if a structure has another size there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.name = Path(library._name).stem  # of its source, compiler, PyTorch and processor
        for name in _FUNCTIONS:
            getattr(library, name).restype = c_int64  # not read where nothing is returned
        for number, structure in enumerate(_STRUCTURES):
            expected, found = ctypes.sizeof(structure), library.size_of(c_int64(number))
            if expected != found:
                name = structure.__name__
                raise KernelError(f"{name}: expected {expected} bytes, found {found} in C++")

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16."""
        return bool(self._library.has_bfloat16())

    def pack_weights(self, weight: Tensor) -> Packed:
        """Pack a convolution's ``weight`` (out, C, 3, 3), or (out, C, 1, 1) for ``pointwise``.

        Small weights of 3×3 are transformed here, which takes four times their memory. Large ones
        belong to small maps and are transformed in every call. With bfloat16 weights the products
        are of bfloat16. Raises ValueError.
        """
        is_reduced = weight.dtype == torch.bfloat16
        if is_reduced and not self.has_bfloat16:
            raise ValueError("the processor does not multiply bfloat16")
        weight = (weight.float() if is_reduced else weight).contiguous()
        out_channels, channels, *sides = weight.shape
        _require_whole_vectors(channels)
        if sides == [3, 3]:
            values = _POINTS if weight.numel() <= _FEW_WEIGHTS else _TAPS
        elif sides == [1, 1]:
            values = 1
        else:
            raise ValueError(f"no kernels for weights {tuple(weight.shape)}")
        sizes = [c_int64(n) for n in (channels, out_channels, values, is_reduced)]
        packed = _empty(self._library.packed_size(*sizes))
        source = c_void_p(_pointer(weight, weight.numel()))
        self._library.pack_weights(source, *sizes, c_void_p(packed.data_ptr()), _threads())
        return Packed(packed, values, is_reduced, channels, out_channels)

    def convolve(
        self,
        maps: Sequence[Tensor],
        weight: Packed,
        bias: Tensor | None = None,
        *,
        affine: Affine | None = None,
        resize: int = 0,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Convolve one or two maps (N, H, W, C), joined: (N, H', W', out_channels).

        ``bias`` is (out_channels). Before it, with ``affine``, comes SiLU(scale · x + shift), then
        ``resize``: 1 doubles, -1 halves. ``residual`` is added, doubled if it has half the size.
        The result may be written over it, as ``out``. Raises MemoryError.
        """
        x = _JoinedMaps(maps)
        addresses = _addresses(x)
        _require_fit(x, weight, (_TAPS, _POINTS))
        height, width = (side // 2 if resize < 0 else side << resize for side in x.sides)
        shape = (x.count, height, width, weight.out_channels)
        numbers = math.prod(shape)
        if not numbers:
            raise ValueError(f"the result is empty for maps {tuple(maps[0].shape)}")
        if out is None:
            out = _empty(*shape)
        is_half = residual is not None and residual.shape[1] < height
        if residual is not None:
            count, *sides, channels = residual.shape
            if (count, *(side << is_half for side in sides), channels) != shape:
                raise _mismatch(residual, f"{shape}, or half the height and width")
        scale, shift = affine or (None, None)
        call = _Convolution(
            **addresses,
            count=x.count,
            height=x.sides[0],
            width=x.sides[1],
            scale=_pointer(scale, x.count * x.total),
            shift=_pointer(shift, x.count * x.total),
            resize=resize,
            weight=weight.weights.data_ptr(),
            values=weight.values,
            reduced=weight.is_reduced,
            bias=_pointer(bias, weight.out_channels),
            residual=_pointer(residual, numbers // 4 if is_half else numbers),
            residual_doubled=is_half,
            out=_pointer(out, numbers),
            out_channels=weight.out_channels,
        )
        if self._library.convolve(ctypes.byref(call), _threads()):
            raise MemoryError("out of memory in a convolution")
        return out

    def pointwise(
        self,
        maps: Sequence[Tensor],
        weight: Packed,
        bias: Tensor,
        *,
        affine: Affine | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Convolve one or two maps (N, H, W, C), joined, with 1×1: (N, H, W, out_channels).

        ``bias`` is (out_channels). Before it, with ``affine``, comes scale · x + shift; after it
        ``residual`` is added. Raises MemoryError.
        """
        x = _JoinedMaps(maps)
        addresses = _addresses(x)
        _require_fit(x, weight, (1,))
        out = _empty(x.count, *x.sides, weight.out_channels)
        scale, shift = affine or (None, None)
        call = _Pointwise(
            **addresses,
            count=x.count,
            pixels=x.pixels,
            scale=_pointer(scale, x.count * x.total),
            shift=_pointer(shift, x.count * x.total),
            weight=weight.weights.data_ptr(),
            reduced=weight.is_reduced,
            bias=_pointer(bias, weight.out_channels),
            residual=_pointer(residual, out.numel()),
            out=out.data_ptr(),
            out_channels=weight.out_channels,
        )
        if self._library.pointwise(ctypes.byref(call), _threads()):
            raise MemoryError("out of memory in a convolution")
        return out

    def attend(self, qkv: Tensor, num_heads: int, new_order: bool) -> Tensor:
        """Softmax attention over all positions: (N, H, W, 3·C) → (N, H, W, C).

        The order of channels is that of ``unet.attend``. Raises MemoryError.
        """
        count, height, width, channels = qkv.shape
        head_width = channels // 3 // num_heads
        if head_width * 3 * num_heads != channels:
            raise ValueError(f"{channels} channels are not q, k and v of {num_heads} heads")
        out = _empty(count, height, width, channels // 3)
        call = _Attention(
            qkv=_pointer(qkv, 3 * out.numel()),
            count=count,
            tokens=height * width,
            heads=num_heads,
            width=head_width,
            head_step=head_width if new_order else 3 * head_width,
            part_step=channels // 3 if new_order else head_width,
            out=out.data_ptr(),
        )
        packed = _empty(self._library.attention_size(ctypes.byref(call)))
        call.packed = packed.data_ptr()
        if self._library.attend(ctypes.byref(call), _threads()):
            raise MemoryError("out of memory in attention")
        return out

    def group_norm(
        self,
        maps: Sequence[Tensor],
        norm: nn.GroupNorm,
        *,
        added: Tensor | None = None,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Affine:
        """Return scale and shift, each (N, C), that normalise the joined maps x.

        scale · x + shift is norm(x + added), or (1 + gain) · norm(x + added) + offset. ``added``,
        ``gain`` and ``offset`` are (1 or N, C).
        """
        x = _JoinedMaps(maps)
        addresses = _addresses(x)
        chunks = self._library.chunks_of(c_int64(x.pixels))
        moments = _empty(x.count, chunks, 2, x.total)
        scale, shift = _empty(2, x.count, x.total).unbind()
        added_pointer, added_stride = _rows(added, x.count, x.total)
        gain_pointer, gain_stride = _rows(gain, x.count, x.total)
        offset_pointer, offset_stride = _rows(offset, x.count, x.total)
        if norm.weight is None or norm.bias is None:
            raise ValueError("a normalisation without weight and bias")
        if (gain is None) != (offset is None):
            raise ValueError("gain and offset are given together")
        if offset_stride != gain_stride:
            raise ValueError("gain and offset have different strides")
        call = _Normalisation(
            **addresses,
            count=x.count,
            pixels=x.pixels,
            groups=norm.num_groups,
            weight=_pointer(norm.weight, x.total),
            bias=_pointer(norm.bias, x.total),
            eps=norm.eps,
            added=added_pointer,
            added_stride=added_stride,
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


class _JoinedMaps:
    """One or two maps (N, H, W, C), side by side along the channels."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.maps = maps
        self.count, *self.sides, _ = maps[0].shape
        self.channels = [part.shape[3] for part in maps]
        self.pixels, self.total = math.prod(self.sides), sum(self.channels)


def _addresses(x: _JoinedMaps) -> dict[str, ctypes.Array]:
    """Return the maps' addresses and numbers of channels; raises ValueError."""
    _require_whole_vectors(*x.channels)
    if not x.count * x.pixels * x.total:
        raise ValueError(f"maps {tuple(x.maps[0].shape)} are empty")
    parts = zip(x.maps, x.channels, strict=True)
    pointers = [_pointer(part, x.count * x.pixels * channels) for part, channels in parts]
    return {"x": (c_void_p * 2)(*pointers), "channels": (c_int64 * 2)(*x.channels)}


def _require_fit(x: _JoinedMaps, weight: Packed, values: Sequence[int]) -> None:
    if x.total != weight.channels or weight.values not in values:
        expected = f"{weight.channels} channels, {weight.values} values a pair"
        raise ValueError(f"{x.total} channels, and weights for {expected}")


def _require_whole_vectors(*channels: int) -> None:
    for count in channels:
        if count % _VECTOR:
            raise ValueError(f"{count} channels are not a multiple of {_VECTOR}")


def _pointer(tensor: Tensor | None, numbers: int) -> int | None:
    """Return the address of a tensor with so many numbers; raises ValueError."""
    if tensor is None:
        return None
    is_right = tensor.numel() == numbers and tensor.dtype is torch.float32 and tensor.is_cpu
    if not (is_right and tensor.is_contiguous()):
        raise _mismatch(tensor, f"{numbers} numbers, contiguous")
    return tensor.data_ptr()


def _rows(tensor: Tensor | None, count: int, width: int) -> tuple[int | None, int]:
    """Return the address of rows (1 or N, width) and their distance, 0 for a single row."""
    if tensor is None:
        return None, 0
    (rows, columns), (stride, step) = tensor.shape, tensor.stride()
    is_right = rows in (1, count) and columns == width and step == 1
    if not (is_right and tensor.dtype is torch.float32 and tensor.is_cpu):
        raise _mismatch(tensor, f"1 or {count} rows of {width} numbers")
    return tensor.data_ptr(), 0 if rows == 1 else stride


def _mismatch(tensor: Tensor, expected: str) -> ValueError:
    found = f"{tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
    return ValueError(f"expected float32, {expected}; found {found}")


# ---- Building ------------------------------------------------------------------------------------


@functools.cache
def load() -> Kernels:
    """Return the kernels, built at the first use on a machine; raises KernelError."""
    return Kernels(load_library())
