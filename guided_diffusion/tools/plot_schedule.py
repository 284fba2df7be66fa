"""Plot schedules and print what they cost: ``python guided_diffusion/scheduler.py``."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # as a script its own folder comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.errors import UserError
from guided_diffusion.scheduler import count_steps, get_schedule_jump

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.01,
    "font.size": 9,
    "pdf.fonttype": 42,  # text that journals accept and readers can search
}
_CROWDED = 600  # with more transitions than this, an inset shows the first climb
_INSET = (20, 100)  # transitions before and after the first climb in the inset
_WARM_UP, _TIMED = 2, 8  # transitions for --measure


def plot_schedules(schedules: dict[str, list[int]]) -> "Figure":
    """Draw schedules, lists of times by label: one with shaded climbs, several as plain lines."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.2), dpi=300, layout="constrained")
        axes = figure.add_subplot(xlabel="transition", ylabel="diffusion time t")
        if len(schedules) == 1:
            ((label, times),) = schedules.items()
            title = "{}: {:,} network calls, {:,} undos".format(label, *count_steps(times))
            axes.set_title(title, loc="left", parse_math=False)
            _draw_schedule(axes, times)
            legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0.2)
        else:
            for number, (label, times) in enumerate(schedules.items()):
                text = f"{count_steps(times)[0]:,} network calls: {label}"
                # Earlier lines are wider, so that a line below an equal one can be seen.
                width = 0.8 + 0.8 * (len(schedules) - 1 - number)
                axes.plot(times, linewidth=width, label=text)
            legend = axes.legend(loc="upper right")
        axes.set_ylim(bottom=_floor(*schedules.values()))
        for line, text in zip(legend.get_lines(), legend.get_texts(), strict=True):
            line.set_linewidth(1.5)
            text.set_parse_math(False)
    return figure


def _draw_schedule(axes: "Axes", times: list[int]) -> None:
    crowded = len(times) > _CROWDED
    _draw_panel(axes, times, linewidth=0.4 if crowded else 1.1)
    ups = [i for i, (t, t_next) in enumerate(pairwise(times)) if t_next > t]
    if crowded and ups:
        start, stop = max(0, ups[0] - _INSET[0]), ups[0] + _INSET[1]
        window = times[start : stop + 1]
        inset = axes.inset_axes((0.6, 0.5, 0.4, 0.5))
        _draw_panel(inset, times, linewidth=1.0)
        inset.set(xlim=(start, stop), ylim=(min(window) - 1, max(window) + 1))
        inset.spines[:].set_visible(True)
        inset.tick_params(labelsize=7)
        axes.indicate_inset(inset.viewLim.bounds, edgecolor="black", alpha=0.8, linewidth=0.6)


def _draw_panel(axes: "Axes", times: list[int], linewidth: float) -> None:
    x, y = [], []  # the climbs alone, with NaN between them
    for i, (t, t_next) in enumerate(pairwise(times)):
        if t_next > t:
            x += [i, i + 1]
            y += [t, t_next]
        elif x and x[-1] == i:
            x.append(math.nan)
            y.append(math.nan)
    axes.plot(times, linewidth=linewidth, label="denoise")
    axes.plot(x, y, color="C1", linewidth=linewidth, label="undo")
    axes.fill_between(x, y, _floor(times), color="C1", alpha=0.2, linewidth=0)


def _floor(*schedules: list[int]) -> float:
    return -1 - 0.03 * max(map(max, schedules))


def measure_call(conf: InpaintConf, times: list[int]) -> tuple[float, str]:
    """Return the seconds that a network call takes for one picture, and the device's name.

    Runs the first transitions of the schedule ``times`` with batches of the configured size. Raises
    UserError for a device or checkpoint that cannot be used, and if memory is too small.
    """
    import torch

    from guided_diffusion.dist_util import is_out_of_memory
    from guided_diffusion.run.inpainter import Inpainter

    n = conf.data.batch_size

    def run(transitions: int) -> int:
        gt = torch.zeros((n, conf.in_channels, *[conf.image_size] * 2), device=inpainter.device)
        with torch.inference_mode():
            steps = list(islice(inpainter.steps(gt, torch.ones_like(gt), range(n)), transitions))
            steps[-1].x.sum().item()  # reading a number waits for the GPU
        return sum(step.pred_xstart is not None for step in steps)

    try:
        inpainter = Inpainter(conf, times)
        run(_WARM_UP)
        started = time.perf_counter()
        calls = run(_TIMED)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"the network with {n} image{'s' * (n > 1)} at once does not fit into memory"
        raise UserError(problem, key="data.batch_size") from error
    seconds = (time.perf_counter() - started) / calls / n
    device = inpainter.device
    return seconds, torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(description="Plot a schedule and print what it costs.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--conf_path", metavar="YML",
                        help="whose schedule to plot (default: the paper's)")  # fmt: skip
    source.add_argument("--compare", nargs="+", metavar="YML",
                        help="schedules to plot in one figure")  # fmt: skip
    parser.add_argument("--out", default="schedule.png", metavar="FILE",
                        help="the plot, .png or .pdf (default: schedule.png)")  # fmt: skip
    parser.add_argument("--measure", action="store_true", help="load the checkpoint, time a few "
                        "network calls and print the seconds an image takes")  # fmt: skip
    options = parser.parse_args(argv)
    options.confs = options.compare or [options.conf_path][: options.conf_path is not None]
    if Path(options.out).suffix.lower() not in (".png", ".pdf"):
        raise UserError(key="--out", expected="a name ending in .png or .pdf", got=options.out)
    if options.measure and not options.confs:
        raise UserError("needs --conf_path, for the network to measure", key="--measure")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Plot the schedules of the command line, and print what each costs in one line.

    Raises UserError if an option or a YAML is wrong, or if the plot cannot be written.
    """
    options = _parse(argv)
    confs = {path: load_conf(path) for path in options.confs}
    stems = [Path(path).stem for path in confs]
    labels = stems if len(set(stems)) == len(stems) else list(confs)
    schedules = {} if confs else {"default": get_schedule_jump(t_T=250)}
    for label, (path, conf) in zip(labels, confs.items(), strict=True):
        from guided_diffusion.script_util import create_gaussian_diffusion, create_schedule

        try:
            schedules[label] = create_schedule(conf, create_gaussian_diffusion(conf))
        except UserError as error:
            raise UserError(str(error), path=path) from error

    from guided_diffusion.io.files import atomic_path

    if options.measure:  # check all of them before the first is loaded
        from guided_diffusion.script_util import check_network

        for conf in confs.values():
            check_network(conf.model_path)

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
    command_line(main)
