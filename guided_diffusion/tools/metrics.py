"""Measure the results of a run: LPIPS, PSNR and SSIM, of whole pictures and of their holes.

    python guided_diffusion/tools/metrics.py --conf_path confs/test_c256_thick.yml --paper

The PNGs of ``inpainted`` are compared with those of ``gt``, known pixels included. The hole is
where the first channel of ``gt_keep_mask`` is below 128. Each number describes one result:

- LPIPS 0.1 with AlexNet. Whole: as in the lpips package. Hole: its map at the picture's size,
  averaged over the hole (``perceptual.LPIPS``). A gray picture is repeated over three channels.
- PSNR in dB, 10·log10(peak² / mean square error over all channels), of all pixels or of the hole.
  The peak is 255, or 65,535 for gray pictures of 16 bits.
- SSIM with the Gaussian window of Wang et al. 2004 (sigma 1.5, 11 x 11), averaged over channels.
  Whole: the mean of its map without the 5 pixels at the border. Hole: the mean of the map over the
  hole, with pictures reflected at their borders.
- LPIPS between samples, where a picture has several: the mean over all pairs. Higher is more
  diverse.

Transparent pictures are compared over black; where only one of the two has transparency, it is
ignored. The samples of a picture are averaged first. A mean over pictures has a standard error: the
standard deviation over the square root of their number. A picture without a hole is left out of the
means over holes, and a result that equals ``gt``, whose PSNR is infinite, of the mean PSNR.
"""

import argparse
import csv
import functools
import io
import itertools
import json
import math
import re
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

if __name__ == "__main__":  # as a script its own folder comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import RESULT_FOLDERS, InpaintConf
from guided_diffusion.config.reading import load_conf, read_yaml
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import list_images, output_name, sample_names
from guided_diffusion.io.colours import is_deep, to_rgb
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.io.images import read_upright, to_model_range
from guided_diffusion.io.results import result_path
from guided_diffusion.tools.perceptual import LPIPS, MIN_SIDE, load_lpips

SSIM_BORDER = 5  # half of the window of 11, which sees nothing but the picture inside of it
TITLES = {
    "lpips": "LPIPS, lower is better",
    "psnr": "PSNR in dB, higher is better",
    "ssim": "SSIM, higher is better",
    "diversity": "LPIPS between samples, higher is more diverse",
}
COLUMNS = [f"{key}{part}" for key in TITLES for part in ("", "_hole")]
# RePaint's LPIPS in the paper's tables: data sets, then masks with a figure for each data set. The
# published configurations take 100 pictures each.
PAPER_SETS = {"c256": "CelebA-HQ", "inet256": "ImageNet"}
PAPER = {
    "thick": ("Wide", 0.059, 0.134), "thin": ("Narrow", 0.028, 0.064),
    "nn2": ("2x super-resolution", 0.029, 0.183), "ev2li": ("alternating lines", 0.009, 0.089),
    "genhalf": ("half", 0.165, 0.304), "ex64": ("expand", 0.435, 0.629),
}  # fmt: skip


Numbers = dict[str, float]


@dataclass(frozen=True)
class Run:
    """The folders of a run by their YAML keys, and the results of each picture.

    ``results`` are file names in ``srs`` by the name of the picture in ``gts``. ``failures`` are
    results that the run could not make; a file of such a name is from an earlier run.
    """

    name: str
    log_dir: Path
    folders: dict[str, str]  # srs, gts, gt_keep_masks
    results: dict[str, list[str]]
    samples_per_image: int
    failures: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` pictures, with its standard error; NaN where there are too few."""

    mean: float
    standard_error: float
    n: int

    def text(self, digits: int = 4) -> str:
        """Return mean ± standard error; a dash without a mean."""
        if not self.n:
            return "–"
        error = f" ± {self.standard_error:.{digits}f}" if math.isfinite(self.standard_error) else ""
        return f"{self.mean:.{digits}f}{error}"


# ---- the files of a run --------------------------------------------------------------------------


def find_run(conf_path: str | None, folder: str | None) -> Run:
    """Return the results of a YAML's run, or those in a log folder.

    ``run.yml`` in the log folder is the record of the run, ``--set`` included, and lists its
    results. Without a record, as from the published program, all pictures in ``gt`` count. A log
    folder may have been moved together with its ``inpainted``, ``gt`` and ``gt_keep_mask``.
    Raises ``UserError`` where a folder is missing, and warns of a run that has not ended.
    """
    conf = load_conf(conf_path, InpaintConf) if conf_path is not None else None
    log_dir = Path(folder if conf is None else conf.log_dir)
    path, record = log_dir / "run.yml", {}
    if path.is_file():
        conf = load_conf(path, InpaintConf)
        record = read_yaml(path).get("record", {})
        try:
            record = {**record, **{key: dict(record.get(key, {})) for key in ("seeds", "failures")}}
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError("is not the record of a run", path=path, key="record") from error
    folders = {key: str(log_dir / RESULT_FOLDERS[key]) for key in ("srs", "gts", "gt_keep_masks")}
    if conf and (folder is None or not Path(folders["srs"]).is_dir()):
        folders = {key: getattr(conf.data.paths, key) for key in folders}
    for key, path_of_key in folders.items():
        if not path_of_key or not Path(path_of_key).is_dir():
            problem = "no such folder of results: has the run been made, and all its folders kept?"
            raise UserError(problem, path=path_of_key or log_dir, key=f"paths.{key}")
    if record.get("state") == "started":
        warnings.warn(f"{path}: this run has not ended, and results of an earlier one may be "
                      "among its own", stacklevel=2)  # fmt: skip
    count = conf.samples_per_image if conf else 1
    names = [result_path(folders["srs"], str(name)).name for name in record.get("seeds", ())]
    if not names:
        pictures = [output_name(path) for path in list_images(folders["gts"])]
        names = [name for picture in pictures for name in sample_names(picture, count)]
    # A result may be a JPEG (output_format: same); its gt is always a PNG.
    ending, results = rf"{r'_[0-9]+' if count > 1 else ''}\.\w+$", {}
    for name in names:
        results.setdefault(re.sub(ending, ".png", name), []).append(name)
    failures = frozenset(map(str, record.get("failures", ())))
    return Run(conf.name if conf else log_dir.name, log_dir, folders, results, count, failures)


def read_like(path: Path, gt: Image.Image | None = None) -> Image.Image:
    """Read a picture of ``gt``'s size; ``UserError`` for another size, or one below 31 pixels."""
    image = read_upright(str(path))
    got = "{} x {}".format(*image.size)
    if gt is not None and image.size != gt.size:
        expected = "{} x {}".format(*gt.size)
        raise UserError("does not have the size of gt", path=path, expected=expected, got=got)
    if min(image.size) < MIN_SIDE:
        expected = f"{MIN_SIDE} pixels or more"
        raise UserError("is too small for LPIPS", path=path, expected=expected, got=got)
    return image


def comparable(result: Image.Image, gt: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of two pictures over the same ground, uint8 (H, W, 3).

    Two gray pictures are (H, W, 1), and uint16 if both have 16 bits.
    """
    images = (result, gt)
    if all(map(is_deep, images)):
        return tuple(np.asarray(image).astype(np.uint16)[:, :, None] for image in images)
    if result.has_transparency_data != gt.has_transparency_data:
        images = [i if is_deep(i) else i.convert("RGBA").convert("RGB") for i in images]
    is_gray = all(image.mode in ("1", "L", "LA") or is_deep(image) for image in (result, gt))
    arrays = (np.asarray(to_rgb(image)) for image in images)
    return tuple(array[:, :, :1] if is_gray else array for array in arrays)


# ---- measures ------------------------------------------------------------------------------------


def compare(lpips: LPIPS, result: np.ndarray, gt: np.ndarray, hole: np.ndarray) -> Numbers:
    """Return lpips, psnr and ssim of a result, and of its hole as lpips_hole and so on.

    Pictures are uint8 or uint16 (H, W, C), C = 1 or 3, with H, W >= 31; ``hole`` is bool (H, W).
    NaN where there is no hole; the PSNR of equal pictures is infinite.
    """
    import torchmetrics.functional.image as image_metrics  # load_lpips has told where it is missing

    peak = float(np.iinfo(gt.dtype).max)
    x, y = (torch.from_numpy(picture.astype(np.float64)) for picture in (result, gt))
    region = torch.from_numpy(hole)
    planes = (picture.permute(2, 0, 1)[None] for picture in (x, y))
    ssim = image_metrics.structural_similarity_index_measure
    full = ssim(*planes, data_range=peak, return_full_image=True)[1][0].mean(0)
    psnr = functools.partial(image_metrics.peak_signal_noise_ratio, data_range=peak)
    whole, inside = distance(lpips, result, gt, hole)
    return {
        "lpips": whole,
        "psnr": psnr(x, y).item(),
        "ssim": full[SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER].mean().item(),
        "lpips_hole": inside,
        "psnr_hole": psnr(x[region], y[region]).item() if hole.any() else math.nan,
        "ssim_hole": full[region].mean().item(),
    }


def distance(lpips: LPIPS, x: np.ndarray, y: np.ndarray, hole: np.ndarray) -> tuple[float, float]:
    """Return LPIPS between two pictures and between their holes, as ``compare`` takes them."""
    tensors = (to_model_range(picture.copy())[None].expand(1, 3, -1, -1) for picture in (x, y))
    whole, inside = lpips(*tensors, torch.from_numpy(hole)[None])
    return whole.item(), inside.item()


def measure(run: Run, lpips: LPIPS) -> list[dict[str, Any]]:
    """Return a row for each picture: its name, the hole's share, all numbers, and the samples.

    Numbers are those of ``compare`` averaged over the samples, whose own are under
    ``samples``; with two samples or more also ``diversity`` and ``diversity_hole``. Warns of
    missing results and of gray pictures. Raises ``UserError`` where no picture remains, and for
    files that cannot be read or do not fit each other.
    """
    rows, missing, gray = [], [], 0
    for name, names in tqdm(run.results.items(), "measuring", delay=2, leave=False):
        paths = {n: Path(run.folders["srs"]) / n for n in names if n not in run.failures}
        found = {n: path for n, path in paths.items() if path.is_file()}
        missing += [n for n in names if n not in found]
        if not found:
            continue
        gt = read_like(Path(run.folders["gts"]) / name)
        mask = read_like(Path(run.folders["gt_keep_masks"]) / name, gt)
        hole = np.asarray(to_rgb(mask))[:, :, 0] < 128
        pairs = [comparable(read_like(path, gt), gt) for path in found.values()]
        gray += pairs[0][1].shape[2] == 1
        each = [compare(lpips, *pair, hole) for pair in pairs]
        row = {key: statistics.fmean(numbers[key] for numbers in each) for key in each[0]}
        if len(pairs) > 1:
            two_of = itertools.combinations([result for result, _ in pairs], 2)
            distances = [distance(lpips, *two, hole) for two in two_of]
            means = map(statistics.fmean, zip(*distances, strict=True))
            row["diversity"], row["diversity_hole"] = means
        samples = [{"name": n} | numbers for n, numbers in zip(found, each, strict=True)]
        rows.append({"name": name, "hole_share": float(hole.mean())} | row | {"samples": samples})
    if not rows:
        raise UserError("holds no results of this run", path=run.folders["srs"])
    if missing:
        total = sum(map(len, run.results.values()))
        warnings.warn(f"{len(missing)} of {total} results are missing, such as {missing[0]}",
                      stacklevel=2)  # fmt: skip
    if gray:
        warnings.warn(f"{gray} of {len(rows)} pictures are gray: LPIPS repeats them over three "
                      "channels", stacklevel=2)  # fmt: skip
    return rows


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> Mean:
    """Return the mean over pictures of one number, without those where it is not finite."""
    values = [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
    if not values:
        return Mean(math.nan, math.nan, 0)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), error, len(values))


# ---- output --------------------------------------------------------------------------------------


def markdown(*rows: Sequence[object]) -> str:
    """Return a Markdown table, whose first row is the heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def summary_table(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of means."""

    def cell(key: str) -> str:
        mean = mean_of(rows, key)
        fewer = f" (n = {mean.n})" if 0 < mean.n < len(rows) else ""
        return f"{mean.text(2 if key.startswith('psnr') else 4)}{fewer}"

    samples = sum(len(row["samples"]) for row in rows)
    share = statistics.fmean(row["hole_share"] for row in rows)
    first = f"n = {len(rows)} pictures, {samples} results, holes of {share:.1%} on average"
    found = [key for key in TITLES if any(key in row for row in rows)]
    means = [(TITLES[key], cell(key), cell(f"{key}_hole")) for key in found]
    text = f"{run.name}: {first}\n\n"
    text += markdown(("mean ± standard error", "whole picture", "hole only"), *means)
    if equal := sum(math.isinf(row["psnr"]) for row in rows):
        text += f"\n\n{equal} of them equal gt: an infinite PSNR, which the mean leaves out."
    return text


def each_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table with a row for each picture."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    cells = [[f"{row[key]:.4f}" if key in row else "–" for key in keys] for row in rows]
    named = [(row["name"], *numbers) for row, numbers in zip(rows, cells, strict=True)]
    return markdown(("picture", *keys), *named)


def paper_figure(name: str) -> tuple[str, str, float]:
    """Return data set, mask and LPIPS of the paper, by a run's name such as test_c256_thick."""
    sets, masks = "|".join(PAPER_SETS), "|".join(PAPER)
    found = re.search(rf"(?<![a-z0-9])({sets})_({masks})(?![a-z0-9])", name)
    if found is None:
        expected = f"a name with {sets}, _, and one of {masks}, such as test_c256_thick"
        problem = "the paper's figures are chosen by the run's name"
        raise UserError(problem, key="--paper", expected=expected, got=name)
    title, *figures = PAPER[found[2]]
    figure = figures[list(PAPER_SETS).index(found[1])]
    return PAPER_SETS[found[1]], f"{found[2]} ({title})", figure


def paper_table(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of the paper's LPIPS beside that of the run."""
    here = mean_of(rows, "lpips")
    heading = ("data set", "mask", "LPIPS in the paper", f"LPIPS here (n = {here.n})")
    table = markdown(heading, (*paper_figure(run.name), here.text()))
    return (
        f"{table}\n\nThe published configurations take 100 pictures without saying which: the "
        "figures compare only if gt_path holds the same ones."
    )


def write_numbers(run: Run, rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write ``metrics.csv``, a row for each result, and ``metrics.json``; return their paths.

    JSON has no NaN and no infinity: there they are null.
    """
    means = {key: vars(mean) for key in COLUMNS if (mean := mean_of(rows, key)).n}
    tree = {
        "name": run.name, "pictures": len(rows), "samples_per_image": run.samples_per_image,
        "means": means, "each": rows,
    }  # fmt: skip
    finite = json.loads(json.dumps(tree), parse_constant=lambda _: None)
    table = io.StringIO()
    keys = [key for key in COLUMNS if key in rows[0]["samples"][0] or key in means]
    names = ["picture", "result", "hole_share", *keys]
    writer = csv.DictWriter(table, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for sample in row["samples"]:
            writer.writerow(row | sample | {"picture": row["name"], "result": sample["name"]})
    texts = {
        out / "metrics.csv": table.getvalue(),
        out / "metrics.json": json.dumps(finite, indent=1, ensure_ascii=False) + "\n",
    }
    for path, text in texts.items():  # the names of files may be any bytes
        write_text_atomic(path, text.encode("utf-8", "backslashreplace").decode())
    return list(texts)


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
    parser.add_argument("--alexnet", metavar="FILE", help="AlexNet's weights in torchvision's "
                        "format; absent: they are fetched once")  # fmt: skip
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
        paper_figure(run.name)  # before anything is measured
    rows = measure(run, load_lpips(args.alexnet))
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
