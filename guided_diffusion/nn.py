"""The blocks' common parts: time embedding, normalisation, resizing, zero initialisation."""

import math
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F


class GroupNorm32(nn.GroupNorm):
    """GroupNorm over 32 groups that computes in float32 and returns its input's type."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` (N, C, ...)."""
        by_inductor = torch.compiler.is_compiling() and x.device.type == "cuda"
        if by_inductor and not torch.is_grad_enabled() and (chunks := _chunks(x)) > 1:
            return self.in_chunks(x, chunks)
        # Not torch.nn's, which takes a single number a group for a mistake of training.
        h = torch.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)
        return h.type(x.dtype)

    def in_chunks(self, x: torch.Tensor, chunks: int) -> torch.Tensor:
        """Normalise a channels_last ``x`` (N, C, H, W), reading memory in its order.

        Inductor's own reduction over a group walks such a map with steps of C, and takes two more
        kernels. Here come first the moments of each channel in each of ``chunks`` equal parts of
        the pixels, then those of the groups: the mean variance plus the variance of the means.
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


def _chunks(x: torch.Tensor) -> int:
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


class UpConv2d(nn.Conv2d):
    """A 3×3 convolution of the feature map doubled in height and width.

    After ``fold`` it computes the same, to rounding, with 4/9 of the multiplications: as every
    pixel is there twice in a row, an output pixel sees only 2×2 different ones, whose weights are
    added up beforehand, for each of the four places that it can have over an input pixel.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)
        self._folded: torch.Tensor | None = None  # (4·out, channels, 2, 2)

    @torch.no_grad()
    def fold(self) -> None:
        """Add up the weights, which may not change from here on; the output is channels_last."""
        # Along either side: at an even place (w0, w1 + w2) over pixels i - 1 and i, at an odd place
        # (w0 + w1, w2) over i and i + 1.
        sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        sums = sums.to(self.weight.device)
        folded = torch.einsum("pyh,qxw,oihw->pqoiyx", sums, sums, self.weight.float())
        folded = folded.flatten(0, 2).type(self.weight.dtype)
        self._folded = folded.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → (N, out, 2H, 2W)."""
        if self._folded is None:
            return super().forward(upsample(x))
        height, width = x.shape[2:]
        parts = F.conv2d(x, self._folded, self.bias.repeat(4), padding=1).chunk(4, dim=1)
        out = torch.empty(
            (len(x), self.out_channels, 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for (row, column), part in zip(product((0, 1), repeat=2), parts, strict=True):
            out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
        return out


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Embed ``timesteps`` (N,) as (N, dim) float32: dim/2 cosines, then as many sines.

    Frequencies fall geometrically from 1 to 1/10000 (Vaswani et al. 2017, section 3.5); an odd
    ``dim`` ends with a zero.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(10_000.0) * exponents)
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def silu(x: torch.Tensor) -> torch.Tensor:
    """Apply x · sigmoid(x), in place where no gradient is recorded: ``x`` is the caller's own."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of ``module`` to zero, so that its branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def upsample(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) → (N, C, 2H, 2W), each pixel repeated."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def downsample(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) → (N, C, H/2, W/2), the mean of each 2×2."""
    return F.avg_pool2d(x, 2)
