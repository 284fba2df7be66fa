"""SCHEDULE: the walk through diffusion time that lets RePaint resample (paper, section 4.2).

RePaint does not only denoise: it jumps back up by adding noise and comes down again, so that the
generated part can settle with the known one. The walk is a plain list of times, made once before
anything is sampled; every consecutive pair is one transition, down (a network call) or up (an
undo). Run as a program, this module plots it and says what it costs:

    python guided_diffusion/scheduler.py --conf_path confs/face_example.yml --out schedule.pdf
"""

import runpy
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

MAX_TRANSITIONS = 10_000_000  # days of work on any machine: a typing error, not a wish


@dataclass
class _Jumps:
    """One level of jumps: how far, and how many are left at each time that holds some."""

    length: int
    n_sample: int
    t_T: int
    left: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.refill()

    def refill(self) -> None:
        self.left = dict.fromkeys(range(0, self.t_T - self.length, self.length), self.n_sample - 1)

    def take(self, t: int, start_resampling: int) -> bool:
        """Use up one jump at ``t`` if there is one."""
        if self.left.get(t, 0) <= 0 or t > start_resampling - self.length:
            return False
        self.left[t] -= 1
        return True


def get_schedule_jump(
    t_T: int,
    n_sample: int = 1,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    jump2_length: int = 1,
    jump2_n_sample: int = 1,
    jump3_length: int = 1,
    jump3_n_sample: int = 1,
    start_resampling: int = 100_000_000,
) -> list[int]:
    """Return the times of the walk from ``t_T - 1`` down to -1; neighbours differ by one.

    Every multiple of ``jump_length`` is reached ``jump_n_sample`` times: each time but the last the
    walk climbs ``jump_length`` steps and comes down again. ``jump2`` and ``jump3`` do the same
    inside such a jump with lengths of their own, anew after every coarser jump. ``n_sample`` - 1
    times each step is undone and redone at once. No resampling above ``start_resampling``. -1
    stands for the finished image, below the cleanest level 0. Raises ValueError where a length or
    count is below 1, or the walk would never end in a lifetime. (Paper, Algorithm 1, and the
    schedule of its appendix.)
    """
    counts = (t_T, n_sample, jump_length, jump_n_sample, jump2_length, jump2_n_sample)
    if not all(1 <= n <= MAX_TRANSITIONS for n in (*counts, jump3_length, jump3_n_sample)):
        raise ValueError(f"every length and count must be between 1 and {MAX_TRANSITIONS:,}")
    coarse_to_fine = [
        _Jumps(jump_length, jump_n_sample, t_T),
        _Jumps(jump2_length, jump2_n_sample, t_T),
        _Jumps(jump3_length, jump3_n_sample, t_T),
    ]
    t, times = t_T, []
    while t > 0:
        t -= 1
        times.append(t)
        if t + 1 < t_T - 1 and t <= start_resampling:
            times += [t + 1, t] * (n_sample - 1)
        # Finest first; a coarser test sees the t to which a finer jump has just climbed.
        for level in (2, 1, 0):
            jumps = coarse_to_fine[level]
            if jumps.take(t, start_resampling):
                times += range(t + 1, t + jumps.length + 1)
                t += jumps.length
                for finer in coarse_to_fine[level + 1 :]:
                    finer.refill()
        if len(times) > MAX_TRANSITIONS:
            raise ValueError(f"the schedule has more than {MAX_TRANSITIONS:,} transitions")
    return [*times, -1]


def count_steps(times: list[int]) -> tuple[int, int]:
    """Return (network calls, undos): how many transitions of ``times`` go down, how many up."""
    ups = sum(after > before for before, after in pairwise(times))
    return len(times) - 1 - ups, ups


if __name__ == "__main__":  # the program lies in tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module("guided_diffusion.tools.plot_schedule", run_name="__main__")
