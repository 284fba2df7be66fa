"""What resampling is worth, on pictures that the model has not seen.

``python tests/benchmarks/quality.py --conf_path confs/demo.yml --pictures DIR --count 16``

For each family of masks, the same pictures, masks and seeds are inpainted three times: going
straight down (``jump_n_sample`` 1), resampling (``jump_n_sample`` 10, same ``t_T``), and going
straight down in as many steps as the second has network calls: the paper's control, which asks
whether it is the resampling that helps or only the time (RePaint, section 5.5). Two errors, both on
pixels in [0, 1]: the mean square in the hole, and that of the steps from known pixels to their
generated neighbours, which are the seam. Means over pictures, with the mean's standard error.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from guided_diffusion.cli import command_line
from guided_diffusion.config.keys import InpaintConf, load_conf
from guided_diffusion.gaussian_diffusion import condition
from guided_diffusion.image_datasets import Pair, list_images, load_pair, output_name
from guided_diffusion.io.files import write_png, write_text_atomic
from guided_diffusion.io.images import mask_to_tensor, to_model_range, to_uint8
from guided_diffusion.io.sheets import montage
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.scheduler import count_steps, get_schedule_jump

FAMILIES = ("thick", "genhalf", "ex64", "ev2li", "nn2")


@dataclass
class Variant:
    """One way down, and the errors it made: mask family → one number a picture."""

    name: str
    conf: InpaintConf
    calls: int
    hole: dict[str, list[float]]
    seam: dict[str, list[float]]


def variants(conf: InpaintConf) -> list[Variant]:
    """Return the three ways down of the module's docstring."""

    def variant(name: str, t_T: int, jump_n_sample: int) -> Variant:
        jumps = dataclasses.replace(conf.schedule_jump_params, t_T=t_T, jump_n_sample=jump_n_sample)
        own = dataclasses.replace(conf, timestep_respacing=str(t_T), schedule_jump_params=jumps)
        calls = count_steps(get_schedule_jump(**vars(jumps)))[0]
        return Variant(f"{name} ({calls} calls)", own, calls, {}, {})

    t_T = conf.schedule_jump_params.t_T
    plain, resampling = variant("straight down", t_T, 1), variant("resampling", t_T, 10)
    return [plain, resampling, variant("slowly down", min(resampling.calls, 1000), 1)]


def seam_error(result: np.ndarray, gt: np.ndarray, known: np.ndarray) -> float:
    """Mean square error of the steps between known and generated neighbours; (H, W, 3), (H, W)."""
    errors = []
    for axis in (0, 1):
        across = np.diff(known.astype(np.int8), axis=axis) != 0
        step_error = np.diff(result - gt, axis=axis) ** 2
        errors.append(step_error[across].ravel())
    return float(np.concatenate(errors).mean())


@torch.inference_mode()
def inpaint(
    inpainter: Inpainter, gt: torch.Tensor, mask: torch.Tensor, seeds: list[int]
) -> torch.Tensor:
    """Return results (N, 3, S, S) with the known pixels as they are."""
    x = gt
    for step in inpainter.steps(gt, mask, seeds):
        x = step.x
    return condition(x, gt, mask)


def measure(ways: list[Variant], paths: list[str], batch_size: int, out: Path) -> None:
    """Fill in the errors of ``ways`` and write a grid of pictures for each family of masks."""
    inpainters = [
        Inpainter(way.conf, get_schedule_jump(**vars(way.conf.schedule_jump_params)))
        for way in ways
    ]
    device, size, seed = inpainters[0].device, ways[0].conf.image_size, ways[0].conf.seed or 0
    total = len(FAMILIES) * len(paths) * sum(way.calls for way in ways)
    with tqdm(total=total, unit="call") as bar:
        for family in FAMILIES:
            pairs = [Pair(i, p, family, output_name(p), True) for i, p in enumerate(paths)]
            loaded = [load_pair(pair, size, seed=seed) for pair in pairs]
            rows = [np.stack([gt for gt, _ in loaded])]
            rows.append(np.stack([(gt * (mask / 255)).astype(np.uint8) for gt, mask in loaded]))
            for way, inpainter in zip(ways, inpainters, strict=True):
                results = []
                for start in range(0, len(pairs), batch_size):
                    part = loaded[start : start + batch_size]
                    gt = torch.stack([to_model_range(g) for g, _ in part]).to(device)
                    mask = torch.stack([mask_to_tensor(m) for _, m in part]).to(device)
                    seeds = [seed + start + i for i in range(len(part))]
                    results.append(to_uint8(inpaint(inpainter, gt, mask, seeds)))
                    bar.update(len(part) * way.calls)
                rows.append(np.concatenate(results))
                errors = [one_error(r, *pair) for r, pair in zip(rows[-1], loaded, strict=True)]
                way.hole[family], way.seam[family] = map(list, zip(*errors, strict=True))
            write_png(out / f"{family}.png", montage(np.concatenate(rows), len(paths)))


def one_error(result: np.ndarray, gt: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Return (hole, seam) of one picture, all uint8 (S, S, 3)."""
    known = mask[:, :, 0] >= 128
    result, gt = result / 255, gt / 255
    return float(((result - gt)[~known] ** 2).mean()), seam_error(result, gt, known)


def table(ways: list[Variant]) -> str:
    """Return the Markdown table: a row for each family and way."""
    count = len(next(iter(ways[0].hole.values())))
    lines = [f"| mask (n = {count}) | way | MSE in the hole | MSE across its border |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for family in FAMILIES:
        for way in ways:
            cells = [f"{statistics.mean(e):.4f} ± {statistics.stdev(e) / len(e) ** 0.5:.4f}"
                     for e in (way.hole[family], way.seam[family])]  # fmt: skip
            lines.append(f"| {family} | {way.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, write it with the numbers and the grids to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conf_path", required=True)
    parser.add_argument("--pictures", required=True, help="a folder, or a text file of paths")
    parser.add_argument("--count", type=int, default=16, help="evenly over the sorted pictures")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--out", default="log/quality", type=Path)
    args = parser.parse_args()
    conf = load_conf(args.conf_path, InpaintConf)
    if args.pictures.endswith(".txt"):
        paths = Path(args.pictures).read_text(encoding="utf-8").split("\n")[:-1]
    else:
        paths = list_images(args.pictures)
    chosen = np.linspace(0, len(paths) - 1, min(args.count, len(paths))).round().astype(int)
    ways = variants(conf)
    measure(ways, [paths[i] for i in chosen], args.batch_size, args.out)
    print(table(ways))
    write_text_atomic(args.out / "quality.md", table(ways))
    numbers = {way.name: {"hole": way.hole, "seam": way.seam} for way in ways}
    write_text_atomic(args.out / "quality.json", json.dumps(numbers, indent=1))


if __name__ == "__main__":
    command_line(main)
