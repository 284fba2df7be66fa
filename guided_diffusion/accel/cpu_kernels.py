"""The C++ kernels for CPUs, called with tensors.

Feature maps are (N, H, W, C), float32 and contiguous, with C a multiple of 16. A tensor of another
type, shape or layout than a kernel reads is a ValueError.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from guided_diffusion.accel.build import KernelError, load_library

_TAPS, _POINTS = 9, 36  # values a pair of channels in packed weights, without and with transform
_FEW_WEIGHTS = 9 * 256 * 512  # at most this many are transformed beforehand
_VECTOR = 16  # channels, of the widest instructions
_FUNCTIONS = ("has_bfloat16", "packed_size", "pack_weights", "convolve", "group_norm", "attend")
# Whatever torch's defaults are.
_empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
Affine = tuple[Tensor, Tensor]  # scale and shift, each (N, C)


class Packed(NamedTuple):
    """A convolution's weights as ``Kernels.convolve`` takes them."""

    weights: Tensor
    values: int  # a pair of channels: 1 of 1×1; of 3×3 9, or 36 if transformed
    is_reduced: bool  # whether products are of bfloat16
    channels: int
    out_channels: int


class Kernels:
    """The functions of the built library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.name = Path(library._name).stem  # of its source, compiler, PyTorch and processor
        for name in _FUNCTIONS:
            getattr(library, name).restype = c_int64  # not read where nothing is returned
        self.has_bfloat16 = bool(library.has_bfloat16())  # whether the processor multiplies it

    def _run(self, name: str, **fields: int | None) -> None:
        """Call a function with a structure of numbers and addresses, eight bytes each.

        The ``fields`` stand in the order in which C++ declares them; None is NULL. Raises
        KernelError if C++ declares more or fewer, and MemoryError.
        """
        structure = (c_int64 * len(fields))(*(int(field or 0) for field in fields.values()))
        size, function = ctypes.sizeof(structure), getattr(self._library, name)
        found = function(structure, c_int64(size), c_int64(torch.get_num_threads()))
        if found < 0:
            raise MemoryError(f"out of memory in {name}")
        if found != size:
            raise KernelError(f"{name}: expected {size} bytes, found {found} in C++")

    def pack_weights(self, weight: Tensor) -> Packed:
        """Pack a convolution's ``weight``: (out, C, 3, 3), (out, C, 1, 1) or (out, C, 1).

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
        elif sides in ([1, 1], [1]):
            values = 1
        else:
            raise ValueError(f"no kernels for weights {tuple(weight.shape)}")
        sizes = [c_int64(n) for n in (channels, out_channels, values, is_reduced)]
        packed = _empty(self._library.packed_size(*sizes))
        source, threads = _pointer(weight, weight.numel()), c_int64(torch.get_num_threads())
        self._library.pack_weights(c_void_p(source), *sizes, c_void_p(packed.data_ptr()), threads)
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

        ``bias`` is (out_channels). Before it, with ``affine``, comes scale · x + shift; a 3×3
        convolution takes SiLU of that, then ``resize``: 1 doubles, -1 halves. ``residual`` is
        added, after 3×3 doubled if it has half the size. The result may be written over it, as
        ``out``. Raises ValueError and MemoryError.
        """
        x = _JoinedMaps(maps)
        if x.total != weight.channels:
            raise ValueError(f"{x.total} channels, and weights for {weight.channels}")
        height, width = (side // 2 if resize < 0 else side << resize for side in x.sides)
        shape = (x.count, height, width, weight.out_channels)
        numbers = math.prod(shape)
        is_half = residual is not None and residual.shape[1] < height
        if weight.values == 1 and (resize or is_half):
            raise ValueError("a 1×1 convolution neither resizes nor doubles")
        if not numbers:
            raise ValueError(f"the result is empty for maps {tuple(maps[0].shape)}")
        if out is None:
            out = _empty(*shape)
        if residual is not None:
            count, *sides, channels = residual.shape
            if (count, *(side << is_half for side in sides), channels) != shape:
                raise _mismatch(residual, f"{shape}, or half the height and width")
        scale, shift = affine or (None, None)
        self._run(
            "convolve",
            **x.fields,
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
        return out

    def attend(self, qkv: Tensor, num_heads: int, new_order: bool) -> Tensor:
        """Softmax attention over all positions: (N, H, W, 3·C) → (N, H, W, C).

        The order of channels is that of ``unet.attend``. Raises ValueError and MemoryError.
        """
        count, height, width, channels = qkv.shape
        head_width = channels // 3 // num_heads
        if head_width * 3 * num_heads != channels:
            raise ValueError(f"{channels} channels are not q, k and v of {num_heads} heads")
        out = _empty(count, height, width, channels // 3)
        self._run(
            "attend",
            qkv=_pointer(qkv, 3 * out.numel()),
            count=count,
            tokens=height * width,
            heads=num_heads,
            width=head_width,
            head_step=head_width if new_order else 3 * head_width,
            part_step=channels // 3 if new_order else head_width,
            out=out.data_ptr(),
        )
        return out

    def group_norm(
        self,
        maps: Sequence[Tensor],
        norm: nn.GroupNorm,
        *,
        added: Tensor | None = None,
        gain_offset: Tensor | None = None,
    ) -> Affine:
        """Return scale and shift, each (N, C), that normalise the joined maps x.

        scale · x + shift is norm(x + added), or (1 + gain) · norm(x + added) + offset. ``added`` is
        (1 or N, C), ``gain_offset`` (1 or N, 2·C). Raises ValueError and MemoryError.
        """
        x = _JoinedMaps(maps)
        scale, shift = _empty(2, x.count, x.total).unbind()
        eps = ctypes.c_double(norm.eps)
        added_address, added_rows = _rows(added, x.count, x.total)
        address, rows = _rows(gain_offset, x.count, 2 * x.total)
        self._run(
            "group_norm",
            **x.fields,
            count=x.count,
            pixels=x.pixels,
            groups=norm.num_groups,
            weight=_pointer(norm.weight, x.total),
            bias=_pointer(norm.bias, x.total),
            eps=ctypes.addressof(eps),
            added=added_address,
            added_rows=added_rows,
            gain_offset=address,
            gain_offset_rows=rows,
            scale=scale.data_ptr(),
            shift=shift.data_ptr(),
        )
        return scale, shift


class _JoinedMaps:
    """One or two maps (N, H, W, C), side by side along the channels; raises ValueError."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.count, *self.sides, _ = maps[0].shape
        channels = [part.shape[3] for part in maps]
        self.pixels, self.total = math.prod(self.sides), sum(channels)
        _require_whole_vectors(*channels)
        if not self.count * self.pixels * self.total:
            raise ValueError(f"maps {tuple(maps[0].shape)} are empty")
        addresses = [_pointer(part, self.count * self.pixels * part.shape[3]) for part in maps]
        is_single = len(maps) == 1
        self.fields = {
            "x_0": addresses[0],
            "x_1": None if is_single else addresses[1],
            "channels_0": channels[0],
            "channels_1": 0 if is_single else channels[1],
        }


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
    """Return the address of rows (1 or N, width) and their number; raises ValueError."""
    if tensor is None:
        return None, 0
    if tensor.shape not in ((1, width), (count, width)):
        raise _mismatch(tensor, f"1 or {count} rows of {width} numbers")
    return _pointer(tensor, tensor.numel()), len(tensor)


def _mismatch(tensor: Tensor, expected: str) -> ValueError:
    found = f"{tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
    return ValueError(f"expected float32, {expected}; found {found}")


@functools.cache
def load() -> Kernels:
    """Return the kernels, built at the first use on a machine; raises KernelError."""
    return Kernels(load_library())
