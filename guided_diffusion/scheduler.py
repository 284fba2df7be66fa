"""SCHEDULE: the walk through diffusion time that lets RePaint resample (paper, section 4.2).

RePaint does not only denoise: it jumps back up by adding noise and comes down again, so that the
generated part can settle with the known one. The walk is a plain list of times, made once before
anything is sampled; every consecutive pair is one transition, down (a network call) or up (an
undo). Run as a program, this module plots it and says what it costs:

    python guided_diffusion/scheduler.py --conf_path confs/face_example.yml --out schedule.pdf
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # sampling needs none of these
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from guided_diffusion.conf import InpaintConf

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


# ---- The command line ----------------------------------------------------------------------------

_WALK, _CLIMB = "#1f4e79", "#e07b39"
_COMPARED = ("#1f4e79", "#e07b39", "#3a8f5c", "#a34a86", "#b59a1e", "#4aa3c7", "#777777")
_STYLE = {
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.xmargin": 0.01,
    "font.size": 9,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "pdf.fonttype": 42,  # text that journals accept and readers can search
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_CROWDED = 600  # from so many transitions on, only an inset shows single climbs
_INSET = (20, 100)  # transitions before and after the first climb
_WARM_UP, _TIMED = 2, 8  # transitions for --measure


def plot_schedules(schedules: dict[str, list[int]]) -> "Figure":
    """Draw the walks by their labels: one with its climbs shaded, several over one another."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.2), dpi=300, layout="constrained")
        axes = figure.add_subplot(xlabel="transition", ylabel="diffusion time t")
        if len(schedules) == 1:
            ((label, times),) = schedules.items()
            title = "{}: {:,} network calls, {:,} undos".format(label, *count_steps(times))
            axes.set_title(title, loc="left", parse_math=False)
            _draw_walk(axes, times)
            legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0.2)
        else:
            for number, (label, times) in enumerate(schedules.items()):
                color = _COMPARED[number % len(_COMPARED)]
                text = f"{count_steps(times)[0]:,} network calls: {label}"
                # The first ones are wider, so that they are seen below others that are equal.
                width = 0.8 + 0.8 * (len(schedules) - 1 - number)
                axes.plot(times, color=color, linewidth=width, label=text)
            legend = axes.legend(loc="upper right")
        axes.set_ylim(bottom=_floor(*schedules.values()))
        for line, text in zip(legend.get_lines(), legend.get_texts(), strict=True):
            line.set_linewidth(1.5)
            text.set_parse_math(False)
    return figure


def _draw_walk(axes: "Axes", times: list[int]) -> None:
    crowded = len(times) > _CROWDED
    _draw_panel(axes, times, linewidth=0.4 if crowded else 1.1)
    ups = [i for i, (t, t_next) in enumerate(pairwise(times)) if t_next > t]
    upper_right = times[int(0.57 * len(times)) :]
    if crowded and ups and max(upper_right) < 0.5 * max(times):
        start, stop = max(0, ups[0] - _INSET[0]), ups[0] + _INSET[1]
        window = times[start : stop + 1]
        inset = axes.inset_axes((0.6, 0.5, 0.4, 0.5))
        _draw_panel(inset, times, linewidth=1.0)
        inset.set(xlim=(start, stop), ylim=(min(window) - 1, max(window) + 1))
        inset.spines[:].set_visible(True)
        inset.tick_params(labelsize=7)
        axes.indicate_inset(inset.viewLim.bounds, edgecolor="black", alpha=0.8, linewidth=0.6)


def _draw_panel(axes: "Axes", times: list[int], linewidth: float) -> None:
    x, y = [], []  # of the climbs alone, each ended by a gap
    for i, (t, t_next) in enumerate(pairwise(times)):
        if t_next > t:
            x += [i, i + 1]
            y += [t, t_next]
        elif x and x[-1] == i:
            x.append(math.nan)
            y.append(math.nan)
    axes.plot(times, color=_WALK, linewidth=linewidth, label="denoise")
    axes.plot(x, y, color=_CLIMB, linewidth=linewidth, label="undo")
    axes.fill_between(x, y, _floor(times), color=_CLIMB, alpha=0.2, linewidth=0)


def _floor(*walks: list[int]) -> float:
    return -1 - 0.03 * max(map(max, walks))


def measure_call(conf: "InpaintConf", times: list[int]) -> tuple[float, str]:
    """Return the seconds that a network call takes for one picture, and the device's name.

    The first transitions of the walk ``times`` are run as in a real run, in batches of the
    configuration's size. Raises UserError for a device or checkpoint that cannot be used.
    """
    import torch

    from guided_diffusion.script_util import Inpainter

    inpainter, n = Inpainter(conf, times), conf.data.batch_size
    gt = torch.zeros((n, 3, conf.image_size, conf.image_size), device=inpainter.device)

    def run(transitions: int) -> int:
        with torch.inference_mode():
            steps = list(islice(inpainter.steps(gt, torch.ones_like(gt), range(n)), transitions))
            steps[-1].x.sum().item()  # reading a number waits for the device
        return sum(step.pred_xstart is not None for step in steps)

    run(_WARM_UP)
    started = time.perf_counter()
    calls = run(_TIMED)
    seconds = (time.perf_counter() - started) / calls / n
    device = inpainter.device
    return seconds, torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from guided_diffusion import OptionParser, UserError

    parser = OptionParser(description="Plot a schedule and print what it costs.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--conf_path", metavar="YML", help="whose schedule to plot (default: the paper's)"
    )
    source.add_argument(
        "--compare", nargs="+", metavar="YML", help="schedules to plot over one another"
    )
    parser.add_argument(
        "--out",
        default="schedule.png",
        metavar="FILE",
        help="the plot, .png or .pdf (default: schedule.png)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="load the checkpoint, time a few network calls and print the seconds an image takes",
    )
    options = parser.parse_args(argv)
    options.confs = options.compare or [options.conf_path][: options.conf_path is not None]
    if Path(options.out).suffix.lower() not in (".png", ".pdf"):
        raise UserError(key="--out", expected="a name ending in .png or .pdf", got=options.out)
    if options.measure and not options.confs:
        raise UserError("needs --conf_path, for the network to measure", key="--measure")
    return options


def _schedule_of(conf: "InpaintConf", path: str) -> list[int]:
    from guided_diffusion import UserError
    from guided_diffusion.script_util import create_gaussian_diffusion, create_schedule

    try:
        return create_schedule(conf, create_gaussian_diffusion(conf))
    except UserError as error:
        raise UserError(str(error), path=path) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Plot the schedules that the command line asks for, and print one line of costs for each.

    Raises:
        UserError: an option or a YAML is wrong, or the plot cannot be written.
    """
    from guided_diffusion.conf import load_conf

    options = _parse(argv)
    confs = {path: load_conf(path) for path in options.confs}
    stems = [Path(path).stem for path in confs]
    labels = stems if len(set(stems)) == len(stems) else list(confs)
    schedules = {} if confs else {"default": get_schedule_jump(t_T=250)}
    for label, (path, conf) in zip(labels, confs.items(), strict=True):
        schedules[label] = _schedule_of(conf, path)

    from guided_diffusion.image_writer import atomic_path

    if options.measure:  # all of them, before the first is loaded
        from guided_diffusion.dist_util import check_beginning

        for conf in confs.values():
            check_beginning(conf.model_path)

    figure = plot_schedules(schedules)
    with atomic_path(options.out) as temporary:
        figure.savefig(temporary, format=Path(options.out).suffix[1:].lower())
    for label, times in schedules.items():
        calls, undos = count_steps(times)
        print(f"{label}: {calls + undos:,} transitions, {calls:,} network calls, {undos:,} undos")
    print(f"plot: {options.out}", flush=True)
    if options.measure:
        for label, conf in zip(labels, confs.values(), strict=True):
            seconds, device = measure_call(conf, schedules[label])
            whole = seconds * count_steps(schedules[label])[0]
            print(f"{label}: {whole:,.1f} s an image on {device}, {seconds:.3g} s a network call")
    return 0


if __name__ == "__main__":
    # As a script this file's own folder comes first on the path; the package lies one above it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from guided_diffusion import command_line

    command_line(main)
