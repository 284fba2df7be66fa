"""What ``cpu_kernels.Kernels`` computes, on a GPU: convolutions by cuDNN, the rest in Triton.

Feature maps are (N, H, W, C), contiguous, of the weights' type or float32, with C a multiple of 32.
Normalisation reads a map once for its moments (Chan et al. 1983), and once as it is applied with
SiLU, resizing and joining; a convolution's bias goes into the normalisation behind it, or is added
with the residual. No call waits for the device, so that all of them can be recorded.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_diffusion.accel.cpu_kernels import Affine, JoinedMaps, resized
from guided_diffusion.unet import attend

_TILE = 8192  # numbers that a program works on
_GROUP = 16384  # a group of at most so many is one program's


class GpuKernels:
    """The same functions as ``cpu_kernels.Kernels`` has for networks."""

    def __init__(self) -> None:
        from guided_diffusion.accel import gpu_programs  # fails where there is no Triton

        self._programs: Any = gpu_programs

    def pack_weights(self, weight: Tensor) -> Tensor:
        """Return a convolution's ``weight`` with the channels of a tap side by side."""
        return weight.contiguous(memory_format=torch.channels_last)

    def convolve(
        self,
        maps: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        affine: Affine | None = None,
        resize: int = 0,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As ``cpu_kernels.Kernels.convolve``; computes in the weights' type."""
        x = self._applied(maps, affine, weight.dtype, silu=affine is not None, resize=resize)
        return self._sum(_convolved(x, weight, padding=1), bias, residual, out)

    def pointwise(
        self,
        maps: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor,
        *,
        affine: Affine | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As ``cpu_kernels.Kernels.pointwise``."""
        h = _convolved(self._applied(maps, affine, weight.dtype), weight)
        return self._sum(h, bias, residual)

    def attend(self, qkv: Tensor, num_heads: int, new_order: bool) -> Tensor:
        """As ``cpu_kernels.Kernels.attend``."""
        h = attend(qkv.flatten(1, 2).transpose(1, 2), num_heads, new_order)
        return h.transpose(1, 2).unflatten(1, qkv.shape[1:3])

    def group_norm(
        self,
        maps: Sequence[Tensor],
        norm: nn.GroupNorm,
        *,
        added: Tensor | None = None,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Affine:
        """As ``cpu_kernels.Kernels.group_norm``; scale and shift are float32."""
        x, parts = _joined(maps)
        scale, shift = torch.empty(2, x.count, x.total, device=maps[0].device).unbind()
        size = x.total // norm.num_groups
        conditions = (
            norm.weight, norm.bias, added, _stride(added), gain, offset, _stride(gain), scale, shift
        )  # fmt: skip
        options = {
            "EPS": norm.eps,
            "ADDED": added is not None,
            "GAIN": gain is not None,
            "GROUPS": norm.num_groups,
            "BC": _power_above(size),
        }
        grid = (x.count * norm.num_groups,)
        numbers = _power_above(x.pixels) * options["BC"]
        if numbers <= _GROUP:
            self._programs.affine_of_small[grid](
                *parts, x.pixels, *conditions, **options, BP=_power_above(x.pixels),
                SIZE=size, ALIGN=math.gcd(size, 16), num_warps=min(16, max(4, numbers // 1024)),
            )  # fmt: skip
            return scale, shift
        tile = _tile(x)
        per_chunk = _TILE // tile
        chunks = -(-x.pixels // per_chunk)
        moments = torch.empty(x.count, chunks, 2, x.total, device=maps[0].device)
        self._programs.moments[x.count * chunks, x.total // tile](
            *parts, x.pixels, chunks, moments, BP=per_chunk, BC=tile
        )
        self._programs.affine_of_moments[grid](
            moments, x.pixels, chunks, x.total, *conditions, **options, PER_CHUNK=per_chunk,
            BP=min(_power_above(chunks), max(1, _TILE // 4 // options["BC"])),
        )  # fmt: skip
        return scale, shift

    def _applied(
        self,
        maps: Sequence[Tensor],
        affine: Affine | None,
        dtype: torch.dtype,
        *,
        silu: bool = False,
        resize: int = 0,
    ) -> Tensor:
        """Return the joined maps, normalised, activated and resized, in ``dtype``."""
        if affine is None and len(maps) == 1 and not resize and maps[0].dtype == dtype:
            return maps[0]
        x, parts = _joined(maps)
        height, width = resized(x.height, x.width, resize)
        out = torch.empty(x.count, height, width, x.total, dtype=dtype, device=maps[0].device)
        tile = _tile(x)
        block = _TILE // 2 // tile
        scale, shift = affine or (out, out)  # which are not read
        self._programs.apply_affine[-(-height * width // block), x.total // tile, x.count](
            *parts, x.height, x.width, scale, shift, out,
            AFFINE=affine is not None, SILU=silu, RESIZE=resize, BP=block, BC=tile,
        )  # fmt: skip
        return out

    def _sum(
        self,
        h: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return h + bias + residual, written to ``out`` or over ``h``."""
        if bias is None and residual is None:
            return h
        count, height, width, total = h.shape
        out = h if out is None else out
        doubled = residual is not None and residual.shape[1] < height
        tile = min(_power_above(total), 64)
        block = _TILE // 2 // tile
        grid = (-(-height * width // block), -(-total // tile), count)
        self._programs.add[grid](
            h, h if bias is None else bias, h if residual is None else residual, out,
            height, width, total, BIAS=bias is not None, RESIDUAL=residual is not None,
            DOUBLED=doubled, BP=block, BC=tile,
        )  # fmt: skip
        return out


def _joined(maps: Sequence[Tensor]) -> tuple[JoinedMaps, tuple[Tensor, Tensor, int, int]]:
    """Return the maps and how a program takes them: both, or one twice, and their channels."""
    for part in maps:
        if not part.is_contiguous():
            raise ValueError(f"expected a contiguous map; got strides {part.stride()}")
    x = JoinedMaps(maps)
    return x, (maps[0], maps[-1], x.widths[0], x.widths[1] if len(maps) == 2 else 0)


def _tile(x: JoinedMaps) -> int:
    """Return the largest power of two up to 64 that divides both maps' channels."""
    return math.gcd(*x.widths, 64)


def _stride(rows: Tensor | None) -> int:
    """Return how far rows (1 or N, C) are apart: 0 if one serves all."""
    return 0 if rows is None or len(rows) == 1 else rows.stride(0)


def _power_above(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _convolved(x: Tensor, weight: Tensor, padding: int = 0) -> Tensor:
    """Convolve (N, H, W, C) by cuDNN, which reads and writes that layout: (N, H, W, out)."""
    h = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding)
    return h.permute(0, 2, 3, 1).contiguous()
