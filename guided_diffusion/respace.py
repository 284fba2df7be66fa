"""Which steps of the training chain are kept (Nichol & Dhariwal 2021, section 4, "sampling speed").

A network trained on 1,000 steps is run on fewer. The kept steps form a chain of their own, whose
betas are chosen so that it passes through the same noise levels as the long one.
"""

import numpy as np


def space_timesteps(num_timesteps: int, respacing: str) -> list[int]:
    """Return the kept indices of a chain of ``num_timesteps`` steps, ascending.

    ``respacing`` is one of

    - ``'250'`` or ``'20,30'``: divide the chain into as many equal sections as there are counts and
      keep that many steps of each;
    - ``'ddimN'``: N steps at one integer stride from 0;
    - empty: all of them.

    Raises ValueError where that is impossible.
    """
    if respacing.startswith("ddim"):
        return _stride(num_timesteps, _count(respacing.removeprefix("ddim"), respacing))
    counts = [_count(part, respacing) for part in respacing.split(",")] if respacing else []
    return _sections(num_timesteps, counts or [num_timesteps])


def _count(text: str, respacing: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"expected '250', '20,30' or 'ddim50', found {respacing!r}")
    return int(text)


def _stride(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"no integer stride through {num_timesteps} steps gives exactly {count}")


def _sections(num_timesteps: int, counts: list[int]) -> list[int]:
    base, remainder = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = base + (section < remainder)
        if count > size:
            raise ValueError(f"cannot keep {count} steps of a section of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        position = 0.0  # Upstream: a running float sum, rounded half to even.
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def respaced_betas(betas: np.ndarray, kept: list[int]) -> np.ndarray:
    """Return the betas of the chain of ``kept``: 1 - alphabar[i] / alphabar[previous kept].

    ``betas`` is float64 of the original chain's length, the result float64 of ``len(kept)``. Where
    the chain ends in noise alone a ratio may be lost in rounding; the beta is below 1 all the same.
    """
    alphas_cumprod = np.cumprod(1.0 - betas)[kept]
    previous = np.concatenate([[1.0], alphas_cumprod[:-1]])
    return np.minimum(1.0 - alphas_cumprod / previous, 1 - 1e-15)
