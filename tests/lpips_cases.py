"""LPIPS from its definition, in numpy, for tests; and AlexNet with random weights."""

import numpy as np
import torch

from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.tools.perceptual import heads_file

# Of torchvision's alexnet().features: place, output and input channels, side, stride, padding.
LAYERS = [(0, 64, 3, 11, 4, 2), (3, 192, 64, 5, 1, 2), (6, 384, 192, 3, 1, 1),
          (8, 256, 384, 3, 1, 1), (10, 256, 256, 3, 1, 1)]  # fmt: skip


def alexnet_state():
    """Random weights of a size that keeps every layer alive."""
    rng = np.random.default_rng(0)
    state = {}
    for place, out, into, side, *_ in LAYERS:
        weight = rng.normal(0, (2 / (into * side * side)) ** 0.5, (out, into, side, side))
        state[f"features.{place}.weight"] = torch.from_numpy(weight).float()
        state[f"features.{place}.bias"] = torch.from_numpy(rng.normal(0, 0.1, out)).float()
    return state


def windows(x, side, stride):
    """All windows of (C, H, W): (C, rows, columns, side, side)."""
    return np.lib.stride_tricks.sliding_window_view(x, (side, side), (1, 2))[:, ::stride, ::stride]


def reference(state, x, y, hole):
    """LPIPS of (3, H, W) in [-1, 1] from the paper's eq. 1, in float64, whole and hole."""
    heads, total, inside = load_state_dict(heads_file()), 0.0, 0.0
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    h = [((p + 1) / 2 - mean[:, None, None]) / deviation[:, None, None] for p in (x, y)]
    for number, (place, _, _, side, stride, padding) in enumerate(LAYERS):
        if number in (1, 2):
            h = [windows(p, 3, 2).max((3, 4)) for p in h]
        weight, bias = (state[f"features.{place}.{k}"].double().numpy() for k in ("weight", "bias"))
        h = [np.pad(p, ((0, 0), (padding,) * 2, (padding,) * 2)) for p in h]
        h = [np.einsum("ihwab,oiab->ohw", windows(p, side, stride), weight) for p in h]
        h = [np.maximum(p + bias[:, None, None], 0) for p in h]
        one, two = (p / np.linalg.norm(p, axis=0) for p in h)
        head = heads[f"lin{number}.model.1.weight"].double().numpy().ravel()
        layer = np.einsum("c,chw->hw", head, (one - two) ** 2)
        total += layer.mean()
        inside += enlarged(layer, *hole.shape)[hole].mean()
    return total, inside


def enlarged(layer, height, width):
    """Bilinear, pixels being squares: pixel i lies at (i + 0.5) · small / large - 0.5."""
    for axis, size in ((0, height), (1, width)):
        small = layer.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * small / size - 0.5, 0, small - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, small - 1), at - low
        share = share[:, None] if axis == 0 else share
        layer = layer.take(low, axis) * (1 - share) + layer.take(high, axis) * share
    return layer
