"""Tables and plot from the blocks that quality.py has made."""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
BASELINES = ("nearest", "posterior")


@dataclass(frozen=True)
class Numbers:
    """One block: what a setting costs, and its numbers (N,) by measure, picture by picture."""

    setting: str
    calls: int
    values: dict[str, np.ndarray]
    machine: str = ""

    @property
    def count(self) -> int:
        """How many pictures are measured."""
        return len(self.values["lpips"])


Blocks = dict[str, dict[str, Numbers]]  # by mask and setting, the cheapest first


def numbers_of(tree: dict[str, Any]) -> Numbers:
    """Return the numbers of a block."""
    values = {key: np.array([row[key] for row in tree["rows"]], float) for key in MEASURES}
    return Numbers(tree["setting"], int(tree["calls"]), values, tree["machine"])


def read_blocks(out: Path) -> Blocks:
    """Return the numbers of all blocks below ``out``."""
    blocks = {}
    for family in FAMILIES:
        paths = sorted((out / "blocks" / family).glob("*.json"))
        found = [numbers_of(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
        found.sort(key=lambda block: (block.calls, block.setting))
        if found:
            blocks[family] = {block.setting: block for block in found}
    return blocks


def curve_of(setting: str) -> str:
    """Return the curve that a setting is a point of: its name without the number of steps."""
    return setting.rstrip("0123456789")


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Return mean ± standard error."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {standard_error(values):.4f}" if len(values) > 1 else mean


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Return that of the mean, NaN for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def long_table(blocks: Blocks) -> str:
    """Return all numbers as CSV: a row a block, each measure's mean and its standard error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = [column for key in MEASURES for column in (key, f"{key}_se")]
    writer.writerow(["mask", "setting", "calls", "pictures", *head, "machine"])
    for family, settings in blocks.items():
        for name, block in settings.items():
            figures = (
                f"{figure:.6f}"
                for values in block.values.values()
                for figure in (values.mean(), standard_error(values))
            )
            writer.writerow([family, name, block.calls, block.count, *figures, block.machine])
    return text.getvalue()


def curve_table(blocks: Blocks, measure: str) -> str:
    """Return one measure, a row for each setting and a column for each mask.

    Cells are mean ± standard error; one of fewer pictures than the most says how many. The last
    column is the mean over masks of the pictures that all of these have.
    """
    calls = {name: one.calls for settings in blocks.values() for name, one in settings.items()}
    most = max(block.count for settings in blocks.values() for block in settings.values())
    rows = []
    for name in sorted(calls, key=lambda name: (calls[name], name)):
        found = [settings.get(name) for settings in blocks.values()]
        cells = []
        for block in found:
            cell = spread(block.values[measure]) if block else ""
            cells.append(f"{cell} (n = {block.count})" if block and block.count < most else cell)
        if all(found):
            count = min(block.count for block in found)
            mean = spread(np.mean([block.values[measure][:count] for block in found], axis=0))
            cells.append(f"{mean} (n = {count})" if count < most else mean)
        else:
            cells.append("")
        rows.append([name, calls[name], *cells])
    return table([f"{MEASURES[measure]}, n = {most}", "calls", *blocks, "mean"], rows)


def differences(blocks: Blocks, reference: str) -> dict[str, dict]:
    """Return by setting and mask how much more LPIPS it has than ``reference``, by picture.

    The mask ``mean`` is that of a picture over all masks, where both are measured with all.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for family, settings in blocks.items():
        if reference not in settings:
            continue
        base = settings[reference].values["lpips"]
        for name, block in settings.items():
            count = min(block.count, len(base))
            more = block.values["lpips"][:count] - base[:count]
            found.setdefault(name, {})[family] = more
    for values in found.values():
        if values.keys() == blocks.keys():
            count = min(map(len, values.values()))
            values["mean"] = np.mean([more[:count] for more in values.values()], axis=0)
    return found


def difference_table(blocks: Blocks, reference: str) -> str:
    """Return a table of ``differences`` in LPIPS: mean ± standard error, and the pictures."""
    rows = []
    for name, values in differences(blocks, reference).items():
        if name == reference:
            continue
        cells = [
            f"{spread(values[key])} (n = {len(values[key])})" if key in values else ""
            for key in (*blocks, "mean")
        ]
        rows.append([name, *cells])
    return table([f"LPIPS more than {reference}", *blocks, "mean"], rows)


def plot(blocks: Blocks) -> Figure:
    """Draw LPIPS against calls: a panel for each mask, a line for each curve.

    What makes no call is drawn as a dashed line.
    """
    curves = dict.fromkeys(
        curve_of(name) for settings in blocks.values() for name in sorted(settings)
    )
    colours = {curve: f"C{i}" for i, curve in enumerate(curves)}
    columns = min(3, len(blocks))
    lines = math.ceil(len(blocks) / columns)
    figure = Figure(figsize=(2.5 + 3 * columns, 0.6 + 2.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    most = max(block.calls for settings in blocks.values() for block in settings.values())
    handles: dict[str, Any] = {}
    for axis, (mask, settings) in zip(axes, blocks.items(), strict=False):
        axis.set_title(mask, fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks([10, 25, 50, 100, 250, 1000], ["10", "25", "50", "100", "250", "1000"])
        axis.minorticks_off()
        axis.set_xlim(8, 1.25 * max(most, 20))
        axis.grid(alpha=0.3)
        for curve, colour in colours.items():
            points = [block for block in settings.values() if curve_of(block.setting) == curve]
            if not points:
                continue
            mean = [block.values["lpips"].mean() for block in points]
            if points[0].calls == 0:
                handles[curve] = axis.axhline(mean[0], color=colour, linestyle="--")
                continue
            error = np.nan_to_num([standard_error(block.values["lpips"]) for block in points])
            calls = [block.calls for block in points]
            handles[curve] = axis.errorbar(
                calls, mean, error, color=colour, marker="o", markersize=3, capsize=2, lw=1
            )
        axis.set_ylim(bottom=0)
    for axis in axes[len(blocks) :]:
        axis.set_visible(False)
    figure.supxlabel("network calls a picture", fontsize=10)
    figure.supylabel("LPIPS", fontsize=10)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", fontsize=8,
        title="± one standard error", title_fontsize=8,
    )  # fmt: skip
    return figure


def write(out: Path, reference: str | None = None) -> str:
    """Write ``quality.csv`` and ``quality.png`` from the blocks in ``out``; return the tables."""
    blocks = read_blocks(out)
    if not blocks:
        raise UserError("holds no block yet", path=out)
    write_text_atomic(out / "quality.csv", long_table(blocks))
    with atomic_path(out / "quality.png") as temporary:
        plot(blocks).savefig(temporary, format="png", dpi=100)
    tables = [curve_table(blocks, measure) for measure in ("lpips", "hole")]
    if reference:
        tables.append(difference_table(blocks, reference))
    return "\n\n".join(tables)
