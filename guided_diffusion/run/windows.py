"""PREDICT for pictures larger than the network: overlapping windows, and their weighted average.

MultiDiffusion (Bar-Tal et al. 2023, section 4): a network trained on squares of one side predicts
every window of a larger picture, and overlapping predictions are averaged. Here weights fall
towards a window's border, so that no border shows. The sampling loop does not change.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def window_starts(length: int, size: int, step: int | None = None) -> list[int]:
    """Return where windows of ``size`` begin along ``length`` pixels, the last one at its end.

    They are evenly spaced, at most ``step`` pixels apart, or half a size.
    """
    count = -(-(length - size) // (step or max(1, size // 2))) + 1
    return [round(i * (length - size) / max(1, count - 1)) for i in range(count)]


def window_places(known: Tensor | np.ndarray, size: int) -> list[tuple[int, int]]:
    """Return top and left of each window of ``size`` that has a hole: where (H, W) is not known.

    A picture without a hole has one window, the first.
    """
    height, width = known.shape
    places = [(y, x) for y in window_starts(height, size) for x in window_starts(width, size)]
    with_hole = [(y, x) for y, x in places if not bool(known[y : y + size, x : x + size].all())]
    return with_hole or places[:1]


class Windows:
    """A network for squares of ``size`` as a callable for any larger picture.

    ``gt_keep_mask`` (1, C, H, W) is 1 where pixels are known. Windows without a hole are left out,
    and the prediction there is 0. ``batch_size`` windows go through the network at once.
    """

    def __init__(
        self, network: Callable[..., Tensor], size: int, gt_keep_mask: Tensor, batch_size: int
    ) -> None:
        self._network, self._size, self._batch_size = network, size, batch_size
        self._places = window_places((gt_keep_mask >= 1).all(dim=1)[0], size)
        ramp = torch.arange(1, size + 1, dtype=torch.float32, device=gt_keep_mask.device)
        ramp = torch.minimum(ramp, ramp.flip(0)) / size
        self._weight = ramp[:, None] * ramp  # (size, size), largest in the middle
        total = gt_keep_mask.new_zeros(gt_keep_mask.shape[2:])
        for y, x in self._places:
            total[y : y + size, x : x + size] += self._weight
        self._total = total.where(total > 0, 1)  # no division by 0 outside all windows

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict for ``x`` (1, C, H, W) at ``timesteps`` (1,), with labels ``y`` (1,)."""
        labels = [] if y is None else [y]
        output = None
        for first in range(0, len(self._places), self._batch_size):
            places = self._places[first : first + self._batch_size]
            parts = torch.cat([self._window(x, place) for place in places])
            conditions = [c.expand(len(places)) for c in (timesteps, *labels)]
            predictions = self._network(parts, *conditions)
            if output is None:
                output = x.new_zeros(1, predictions.shape[1], *x.shape[2:])
            for place, prediction in zip(places, predictions, strict=True):
                self._window(output, place).add_(prediction * self._weight)
        return output.div_(self._total)

    def _window(self, x: Tensor, place: tuple[int, int]) -> Tensor:
        top, left = place
        return x[:, :, top : top + self._size, left : left + self._size]
