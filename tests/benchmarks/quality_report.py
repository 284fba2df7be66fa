"""Tables and plot from the blocks that quality.py has made."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from guided_diffusion.errors import UserError
from guided_diffusion.io.files import atomic_path, write_text_atomic
from guided_diffusion.masks import FAMILIES

MEASURES = {
    "lpips": "LPIPS",
    "lpips_hole": "LPIPS of the hole",
    "hole": "MSE in the hole",
    "border": "MSE across its border",
}
PLOTTED = ("lpips", "hole", "border")
BUDGETS = (10, 25, 50, 100, 250, 500, 1000, 2500)
BASELINES = {
    "nearest": "nearest training picture",
    "mirror": "mirror image",
    "posterior": "another face with the same known pixels",
}
_KINDS = {"repaint": "RePaint", "ddim": "DDIM steps", "ddnm": "DDNM"}


@dataclass(frozen=True)
class Numbers:
    """One block: what a setting costs, and its numbers (N,) by measure, picture by picture."""

    setting: str
    calls: int
    seconds: float  # of all pictures
    values: dict[str, np.ndarray]


Blocks = dict[str, dict[str, Numbers]]  # by mask and setting, the cheapest first


def read_block(path: Path) -> dict[str, Any]:
    """Return a block as quality.py writes it; raises UserError for anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        family_of(tree["setting"])
        numbers_of(tree, len(tree["rows"]))
        is_whole = {"digest", "overrides", "machine"} <= tree.keys()
        is_whole = is_whole and all("picture" in row for row in tree["rows"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError("is no whole block: remove it, and it is made anew", path=path)
    return tree


def numbers_of(tree: dict[str, Any], count: int) -> Numbers:
    """Return the numbers of a block's first ``count`` pictures."""
    rows = tree["rows"][:count]
    values = {key: np.array([row[key] for row in rows], float) for key in MEASURES}
    return Numbers(tree["setting"], int(tree["calls"]), float(tree["seconds"]), values)


def read_blocks(out: Path, count: int) -> tuple[Blocks, set[str]]:
    """Return the numbers of the first ``count`` pictures below ``out``, and who made them.

    Blocks of fewer pictures are left out, so that all figures are of the same ones. Raises
    UserError for a damaged block.
    """
    blocks, machines = {}, set()
    for family in FAMILIES:
        found = []
        for path in sorted((out / "blocks" / family).glob("*.json")):
            tree = read_block(path)
            if len(tree["rows"]) < count:
                continue
            found.append(numbers_of(tree, count))
            machines.add(tree["machine"])
        if found:
            found.sort(key=lambda one: (one.calls, one.setting))
            blocks[family] = {one.setting: one for one in found}
    return blocks, machines


def label(setting: str) -> str:
    """Say in words what a setting's name says, such as ddnm0.85-r5-t50."""
    if setting in BASELINES:
        return BASELINES[setting]
    return f"{family_of(setting)}, t_T {setting.rpartition('-t')[2]}"


def family_of(setting: str) -> str:
    """Return the curve that a setting is a point of; a baseline is its own."""
    if setting in BASELINES:
        return setting
    name = re.fullmatch(r"([a-z]+)([\d.]*)(?:-j(\d+))?(?:-r(\d+))?-t\d+", setting)
    kind, eta, jump, repeats = name.groups()
    parts = [_KINDS[kind] + f" {eta}" * bool(eta)]
    if repeats or kind == "repaint":
        parts.append(f"r = {repeats or 1}")
    if jump:
        parts.append(f"jumps of {jump}")
    return ", ".join(parts)


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Return mean ± standard error."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {standard_error(values):.4f}" if len(values) > 1 else mean


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Return that of the mean, NaN for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


# ---- tables --------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def curve_table(blocks: Blocks, measure: str) -> str:
    """Return one measure, a row for each setting and a column for each mask.

    The last column is the mean over masks, for settings that have all of them; its standard error
    is that of a picture's mean over masks.
    """
    found = {one.setting: one.calls for settings in blocks.values() for one in settings.values()}
    rows = []
    for name in sorted(found, key=lambda name: (found[name], name)):
        values = [
            settings[name].values[measure] if name in settings else None
            for settings in blocks.values()
        ]
        cells = ["" if one is None else spread(one) for one in values]
        is_whole = all(one is not None for one in values)
        cells.append(spread(np.mean(values, axis=0)) if is_whole else "")
        rows.append([label(name), found[name], *cells])
    return table([MEASURES[measure], "calls", *blocks, "mean"], rows)


def budget_table(blocks: Blocks) -> str:
    """Return which setting has the lowest LPIPS for so many calls, over all masks.

    A picture's LPIPS is its mean over masks; only settings measured with all masks there are take
    part. Beside the lowest stands the cheapest whose difference, picture by picture, is within two
    standard errors.
    """
    common = set.intersection(*({*settings} for settings in blocks.values()))
    order = [one.setting for one in next(iter(blocks.values())).values()]
    names = [name for name in order if name in common and name not in BASELINES]
    if not names:
        return "No setting is measured with all masks yet."
    calls = {name: next(iter(blocks.values()))[name].calls for name in names}
    score = {
        name: np.mean([settings[name].values["lpips"] for settings in blocks.values()], axis=0)
        for name in names
    }
    rows, taking_part = [], 0
    for budget in BUDGETS:
        able = [name for name in names if calls[name] <= budget]
        if not able or len(able) == taking_part:  # nothing new to choose from
            continue
        taking_part = len(able)
        best = min(able, key=lambda name: score[name].mean())

        def is_as_good(name: str, best: str = best) -> bool:
            difference = score[name] - score[best]
            return difference.mean() <= 2 * standard_error(difference)

        cheapest = next(name for name in able if name == best or is_as_good(name))
        rows.append([f"{budget:,}", *(
            cell for name in (best, cheapest)
            for cell in (label(name), calls[name], spread(score[name]))
        )])  # fmt: skip
    head = ["calls at most", "lowest LPIPS", "calls", "LPIPS"]
    head += ["cheapest within two standard errors of it", "calls", "LPIPS"]
    note = f"Means over {', '.join(blocks)}."
    return f"{note}\n\n{table(head, rows)}"


def resampling_table(blocks: Blocks) -> str | None:
    """Return what resampling is worth at equal calls, None where it is not measured.

    A setting that resamples is compared with one that goes straight down in as many steps as the
    first has calls; the faster way straight down stands beside.
    """
    rows = []
    for family, settings in blocks.items():
        for name, resampling in settings.items():
            slowly = settings.get(f"repaint-t{resampling.calls}")
            match = re.fullmatch(r"repaint-r\d+-t(\d+)", name)
            if not match or slowly is None:
                continue
            plain = settings.get(f"repaint-t{match[1]}")
            ways = {"straight down": plain, "resampling": resampling, "slowly down": slowly}
            ways = {way: one for way, one in ways.items() if one is not None}
            for way, one in ways.items():
                cells = [spread(one.values[key]) for key in PLOTTED]
                rows.append([family, f"{way} ({label(one.setting)}; {one.calls} calls)", *cells])
            cells = []
            for key in PLOTTED:
                less = resampling.values[key] - slowly.values[key]
                cells.append(f"{spread(less)}; lower in {int((less < 0).sum())} of {len(less)}")
            rows.append([family, "resampling minus slowly down, picture by picture", *cells])
    if not rows:
        return None
    return table(["mask", "way", *(MEASURES[key] for key in PLOTTED)], rows)


# ---- plot ----------------------------------------------------------------------------------------


def plot(blocks: Blocks) -> Figure:
    """Draw each measure against calls, a column for each mask, a line for each family of ways."""
    families = dict.fromkeys(
        family_of(name) for settings in blocks.values() for name in sorted(settings)
    )
    colours = {family: f"C{i}" for i, family in enumerate(families)}
    size = (1 + 3.2 * len(blocks), 2.6 * len(PLOTTED) + 1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(PLOTTED), len(blocks), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for column, (mask, settings) in enumerate(blocks.items()):
        axes[0, column].set_title(mask)
        axes[-1, column].set_xlabel("network calls a picture")
        for row, key in enumerate(PLOTTED):
            axis = axes[row, column]
            axis.set_xscale("log")
            axis.set_xticks([10, 25, 50, 100, 250, 1000], ["10", "25", "50", "100", "250", "1000"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            for family, colour in colours.items():
                points = [one for one in settings.values() if family_of(one.setting) == family]
                if not points:
                    continue
                mean = [one.values[key].mean() for one in points]
                if points[0].calls == 0:
                    handles[family] = axis.axhline(mean[0], color=colour, linestyle="--")
                    continue
                error = np.nan_to_num([standard_error(one.values[key]) for one in points])
                calls = [one.calls for one in points]
                handles[family] = axis.errorbar(
                    calls, mean, error, color=colour, marker="o", markersize=3, capsize=2, lw=1
                )
            axis.set_ylim(bottom=0)
            if column == 0:
                axis.set_ylabel(MEASURES[key])
    words = [BASELINES.get(family, family) for family in handles]
    figure.legend(
        handles.values(), words, loc="outside right upper", fontsize=8,
        title="± one standard error", title_fontsize=8,
    )  # fmt: skip
    return figure


def write(out: Path, command: str, count: int) -> str:
    """Write ``quality.md`` and ``quality.png`` from the blocks in ``out``; return the tables."""
    blocks, machines = read_blocks(out, count)
    if not blocks:
        raise UserError(f"holds no block of {count} pictures yet", path=out)
    parts = [
        f"`{command}`, last; on {'; '.join(sorted(machines))}. Means ± standard errors, "
        f"n = {count} pictures.",
        "## Quality against network calls", *(curve_table(blocks, key) for key in MEASURES),
        "## I have N calls: take this", budget_table(blocks),
    ]  # fmt: skip
    resampling = resampling_table(blocks)
    if resampling:
        parts += ["## Does resampling beat going slowly at equal calls?", resampling]
    text = "\n\n".join(parts) + "\n"
    write_text_atomic(out / "quality.md", text)
    with mpl.rc_context({"svg.hashsalt": "repaint"}), atomic_path(out / "quality.png") as temporary:
        plot(blocks).savefig(temporary, format="png", dpi=120)
    return text
