"""TRAIN: which pictures, times and noise a step sees.

Every random number depends on (seed, purpose, step) alone, and every process can draw all numbers
of a batch. So a resumed training equals one that was never interrupted, and processes that share a
batch see together what one would see alone. Dropout alone differs: each process seeds its own.
``LossSecondMomentSampler`` depends on earlier losses, and is saved.
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch

Tensor = torch.Tensor
ORDER, CUT, TIME, NOISE, DROPOUT, SHOW, HELD_OUT = range(7)


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Return the random numbers for one ``purpose`` (ORDER, CUT, …) at step or epoch ``number``."""
    return np.random.default_rng([seed, purpose, number])


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    return generator(seed, ORDER, epoch).permutation(count)


def batch_indices(count: int, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Return which of ``count`` pictures form batch ``step``: each once an epoch, shuffled anew.

    Epochs follow one another without a gap, so a batch may end one and begin the next.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch_order(count, place // count, seed)[place % count] for place in places])


def draw_times(
    probabilities: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``count`` times, and the weights 1/(T·p_t) that keep the expected loss unbiased."""
    t = rng.choice(len(probabilities), size=count, p=probabilities)
    return t, (1 / (len(probabilities) * probabilities[t])).astype(np.float32)


def draw_noise(
    seeds: np.ndarray, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Draw standard normal noise (len(seeds), *shape), each picture's from its own seed."""
    source = torch.Generator(device)
    draws = [
        torch.randn(shape, generator=source.manual_seed(int(seed)), device=device) for seed in seeds
    ]
    return torch.stack(draws)


class LossSecondMomentSampler:
    """Draws times as often as their loss is large: p_t ∝ sqrt(E[L_t²]) (IDDPM section 3.3).

    The mean is over the last ``history`` losses of each time; until all times have so many, times
    are drawn uniformly. ``uniform_share`` of the probability always is uniform.
    """

    def __init__(self, num_timesteps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        self.losses = np.zeros((num_timesteps, history))
        self.seen = np.zeros(num_timesteps, dtype=np.int64)
        self.uniform_share = uniform_share

    def probabilities(self) -> np.ndarray:
        """Return each time's probability, float64 (num_timesteps,)."""
        count, history = self.losses.shape
        if self.seen.min() < history:
            return np.full(count, 1 / count)
        root = np.sqrt((self.losses**2).mean(axis=1))
        return (1 - self.uniform_share) * root / root.sum() + self.uniform_share / count

    def update(self, t: np.ndarray, losses: np.ndarray) -> None:
        """Note the ``losses`` (n,) at times ``t`` (n,), each in place of its time's oldest.

        What is not finite is left out; it ends the training at the next row of the log.
        """
        finite = np.isfinite(losses)
        for time_, loss in zip(t[finite].astype(np.int64), losses[finite], strict=True):
            self.losses[time_, self.seen[time_] % self.losses.shape[1]] = loss
            self.seen[time_] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a resumed training needs."""
        return {"losses": torch.from_numpy(self.losses), "seen": torch.from_numpy(self.seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up where ``state_dict`` was taken."""
        self.losses, self.seen = state["losses"].numpy().copy(), state["seen"].numpy().copy()
