"""Which steps of the training chain are kept (Nichol & Dhariwal 2021, section 4, "sampling speed").

A network trained on 1,000 steps is run on fewer. The kept steps form a chain of their own, whose
betas are chosen so that it passes through the same noise levels as the long one.
"""

import numpy as np

KARRAS_SHARE = 0.3  # of 'karrasN', chosen by measurement: docs/quality.md
HIGHEST_SIGMA = 160.0  # where DDPM's linear chain ends; others end in noise alone


def space_timesteps(
    num_timesteps: int, respacing: str, betas: np.ndarray | None = None
) -> list[int]:
    """Return the kept indices of a chain of ``num_timesteps`` steps, ascending.

    ``respacing`` is one of

    - ``'250'`` or ``'20,30'``: divide the chain into as many equal sections as there are counts and
      keep that many steps of each;
    - ``'ddimN'``: N steps at one integer stride from 0;
    - ``'karrasN'``: N steps from 0 to the last at 0.7 t_i + 0.3 s_i, where the t_i are even in
      time and the s_i are where Karras et al. (2022, eq. 5, with rho = 7) have their levels: even
      in sigma^(1/7), with sigma^2 = (1 - alphabar) / alphabar and at most 160. Steps lie closer
      where there is much noise and where there is little. It needs ``betas``, those of the chain;
    - empty: all of them.

    Raises ValueError where that is impossible.
    """
    if respacing.startswith("ddim"):
        return _stride(num_timesteps, _count(respacing.removeprefix("ddim"), respacing))
    if respacing.startswith("karras"):
        if betas is None:
            raise ValueError(f"{respacing!r} needs the betas of the chain")
        return _karras(betas, _count(respacing.removeprefix("karras"), respacing))
    counts = [_count(part, respacing) for part in respacing.split(",")] if respacing else []
    return _sections(num_timesteps, counts or [num_timesteps])


def _count(text: str, respacing: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"expected '250', '20,30', 'ddim50' or 'karras25', found {respacing!r}")
    return int(text)


def _stride(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"no integer stride through {num_timesteps} steps gives exactly {count}")


def _karras(betas: np.ndarray, count: int) -> list[int]:
    last = len(betas) - 1
    # At this density neighbours differ by at least 1 before rounding, so by 1 after it.
    if count - 1 > (1 - KARRAS_SHARE) * last:
        most = int((1 - KARRAS_SHARE) * last) + 1
        raise ValueError(f"cannot keep {count} steps of {last + 1} by karras, at most {most}")
    alphas_cumprod = np.cumprod(1.0 - betas)
    sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    levels = np.minimum(sigmas, HIGHEST_SIGMA) ** (1 / 7)
    even = np.linspace(0, 1, count)
    by_level = np.interp(levels[0] + even * (levels[-1] - levels[0]), levels, np.arange(last + 1))
    positions = (1 - KARRAS_SHARE) * even * last + KARRAS_SHARE * by_level
    return [round(position) for position in positions.tolist()]


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
