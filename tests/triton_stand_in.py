"""The Triton programs in PyTorch, called in the same way."""

import torch
from torch.nn import functional as F


class StandIn:
    """The Triton programs in PyTorch, called in the same way."""

    def __getattr__(self, name):
        class Launch:
            def __getitem__(_, grid):
                return getattr(StandIn, f"_{name}")

        return Launch()

    @staticmethod
    def _joined(x0, x1, c0, c1):
        assert c1 in (0, x1.shape[3])
        return (x0 if not c1 else torch.cat([x0, x1], dim=3)).float()

    @staticmethod
    def _moments(x0, x1, c0, c1, pixels, chunks, out, BP, BC):
        x = StandIn._joined(x0, x1, c0, c1).flatten(1, 2)
        for i in range(chunks):
            part = x[:, i * BP : (i + 1) * BP]
            out[:, i, 0] = part.mean(1)
            out[:, i, 1] = (part - part.mean(1, keepdim=True)).square().sum(1)

    @staticmethod
    def _write(x, weight, bias, added, gain, offset, scale, shift, EPS, GROUPS):
        """From x (N, rows, C, numbers a row), whose last two are means and squares."""
        counts, means, squares = x
        if added is not None:
            means = means + added[:, None]
        channels = means.shape[2]
        counts = counts[:, None].expand(means.shape[1:])
        grouped = [part.unflatten(-1, (GROUPS, -1)) for part in (counts, means, squares)]
        counts, means, squares = grouped
        total = counts.sum((0, 2))
        mean = (counts * means).sum((1, 3)) / total
        squares = squares + counts * (means - mean[:, None, :, None]) ** 2
        rstd = (squares.sum((1, 3)) / total + EPS).rsqrt()
        own_scale = rstd.repeat_interleave(channels // GROUPS, 1) * weight
        own_shift = bias - mean.repeat_interleave(channels // GROUPS, 1) * own_scale
        if gain is not None:
            own_scale, own_shift = own_scale * (1 + gain), own_shift * (1 + gain) + offset
        if added is not None:
            own_shift = own_shift + own_scale * added
        scale.copy_(own_scale)
        shift.copy_(own_shift)

    @staticmethod
    def _affine_of_moments(
        moments, pixels, chunks, total, weight, bias, added, added_stride, gain, offset,
        gain_stride, scale, shift, *, PER_CHUNK, EPS, ADDED, GAIN, GROUPS, BP, BC,
    ):  # fmt: skip
        counts = torch.full((chunks,), float(PER_CHUNK))
        counts[-1] = pixels - (chunks - 1) * PER_CHUNK
        x = counts, moments[:, :, 0], moments[:, :, 1]
        StandIn._write(x, weight, bias, added, gain, offset, scale, shift, EPS, GROUPS)

    @staticmethod
    def _affine_of_small(
        x0, x1, c0, c1, pixels, weight, bias, added, added_stride, gain, offset, gain_stride,
        scale, shift, *, EPS, ADDED, GAIN, GROUPS, SIZE, BP, BC, ALIGN, num_warps,
    ):  # fmt: skip
        assert pixels <= BP
        assert BC >= SIZE
        assert num_warps in (4, 8, 16)
        x = StandIn._joined(x0, x1, c0, c1).flatten(1, 2)
        x = torch.ones(pixels), x, torch.zeros_like(x)
        StandIn._write(x, weight, bias, added, gain, offset, scale, shift, EPS, GROUPS)

    @staticmethod
    def _apply_affine(
        x0, x1, c0, c1, height, width, scale, shift, out, *, AFFINE, SILU, RESIZE, BP, BC
    ):
        x = StandIn._joined(x0, x1, c0, c1)
        if AFFINE:
            x = x * scale[:, None, None] + shift[:, None, None]
        x = F.silu(x) if SILU else x
        x = x.permute(0, 3, 1, 2)
        if RESIZE:
            x = F.interpolate(x, scale_factor=2) if RESIZE > 0 else F.avg_pool2d(x, 2)
        out.copy_(x.permute(0, 2, 3, 1))

    @staticmethod
    def _add(h, bias, residual, out, height, width, total, *, BIAS, RESIDUAL, DOUBLED, BP, BC):
        x = h.float()
        if BIAS:
            x = x + bias.float()
        if RESIDUAL:
            own = residual.float()
            if DOUBLED:
                own = own.repeat_interleave(2, 1).repeat_interleave(2, 2)
            x = x + own
        out.copy_(x)
