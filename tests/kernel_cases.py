"""What kernels are to compute, in float64, and numbers to try them with; maps are (N, H, W, C)."""

import torch
from torch.nn import functional as F


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolution(maps, weight, bias, affine=None, resize=0, residual=None):
    """What ``convolve`` is to compute, in float64; all of it (N, H, W, C)."""
    x = torch.cat(maps, dim=3).double()
    if affine:
        x = F.silu(x * affine[0].double()[:, None, None] + affine[1].double()[:, None, None])
    x = x.permute(0, 3, 1, 2)
    if resize:
        x = F.interpolate(x, scale_factor=2) if resize > 0 else F.avg_pool2d(x, 2)
    out = F.conv2d(x, weight.double(), padding=1) + bias.double()[None, :, None, None]
    if residual is not None:
        added = residual.double().permute(0, 3, 1, 2)
        out = out + (
            F.interpolate(added, out.shape[2:]) if added.shape[2] < out.shape[2] else added
        )
    return out.permute(0, 2, 3, 1)


def affine_of(count, channels):
    return random(count, channels, seed=2).abs() + 0.5, random(count, channels, seed=3)


def pointwise(maps, weight, bias, affine=None, residual=None):
    """What ``pointwise`` is to compute, in float64."""
    x = torch.cat(maps, dim=3).double()
    if affine:
        x = x * affine[0].double()[:, None, None] + affine[1].double()[:, None, None]
    out = x @ weight[:, :, 0, 0].double().t() + bias.double()
    return out if residual is None else out + residual.double()


def group_norm(maps, norm, added=None, gain=None, offset=None):
    """The joined maps, normalised."""
    x = torch.cat(maps, dim=3).double().permute(0, 3, 1, 2)
    if added is not None:
        x = x + added.double()[:, :, None, None]
    parameters = (part.detach().double() for part in (norm.weight, norm.bias))
    x = F.group_norm(x, norm.num_groups, *parameters, norm.eps)
    if gain is not None:
        x = (1 + gain.double()[:, :, None, None]) * x + offset.double()[:, :, None, None]
    return x.permute(0, 2, 3, 1)
