"""The blocks' common parts: time embedding, normalisation, resizing, zero initialisation."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class GroupNorm32(nn.GroupNorm):
    """GroupNorm that computes in float32 and returns its input's type."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__(groups, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` (N, C, ...)."""
        # Not torch.nn's, which takes a single number a group for a mistake of training.
        h = torch.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)
        return h.type(x.dtype)


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Embed ``timesteps`` (N,) as (N, dim) float32: dim/2 cosines, then as many sines.

    Frequency i of ``half`` = dim // 2 is 10000^(-i/half), from 1 to 10000^(-(half-1)/half) (Vaswani
    et al. 2017, section 3.5); an odd ``dim`` ends with a zero.
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
