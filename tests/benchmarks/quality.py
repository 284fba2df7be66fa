"""Quality against network calls, of every way down that this program knows.

``python tests/benchmarks/quality.py --conf_path confs/demo.yml --pictures DIR --count 64``

A *setting* is one way to inpaint: a few keys of the YAML, spelt as a name such as
``repaint-r10-t25``. All settings get the same pictures, masks and seeds, and run by the code that
test.py runs by. Known pixels are pasted into the result, so that all errors are the hole's. A
picture gets four numbers: LPIPS (AlexNet 0.1) of the picture and of its hole, as
guided_diffusion/tools/perceptual.py defines them; the mean square error in the hole, pixels in
[0, 1]; and the mean square error of the steps from known pixels to their generated neighbours,
which is the seam. Two settings make no network call. ``nearest`` pastes in the picture of
``--train`` that is nearest by the known pixels. ``posterior`` pastes in another drawn face with the
same known pixels, which is what a perfect sampler gives.

A setting with one family of masks is a *block*: a JSON file of numbers and a PNG of the results in
--out, written after each batch. The same command continues where it was interrupted, and a larger
--count adds pictures. The cheapest settings come first; ``--dry_run`` lists what remains. At the
end quality_report.py makes tables and plot of all blocks in --out.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch, as guided_diffusion/cli.py says

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality_report
import sampler
from quality_baselines import Nearest, Posterior

from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.dist_util import get_device
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import condition
from guided_diffusion.image_datasets import Pair, ReadOptions, list_images, load_pair, output_name
from guided_diffusion.io.checkpoints import check_beginning, fingerprint
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.io.images import load_crop, mask_to_tensor, to_levels, to_model_range
from guided_diffusion.io.results import write_image
from guided_diffusion.io.sheets import montage
from guided_diffusion.masks import FAMILIES
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import create_gaussian_diffusion, create_schedule
from guided_diffusion.tools.perceptual import LPIPS, MIN_SIDE, load_lpips

COLUMNS = 16  # of a block's PNG
CURVE = (
    *(f"repaint-t{t_T}" for t_T in (25, 50, 100)),
    *(f"repaint-r{r}-t{t_T}" for r in (5, 10) for t_T in (25, 50, 100)),
    *(f"ddnm0.85-t{t_T}" for t_T in (10, 15, 20, 25, 33, 50, 100)),
    *(f"ddnm0.85over1-t{t_T}" for t_T in (10, 15, 20, 25, 33, 50)),
)
NAME = re.compile(
    r"(repaint|ddim|ddnm(?P<eta>[01](?:\.\d+)?)(?:over(?P<over>\d*\.?\d+))?)"
    r"(?:-j(?P<j>\d+))?(?:-r(?P<r>\d+))?"
    r"-t(?P<respacing>[a-z]*(?P<t_T>\d+))"
)


@dataclass(frozen=True)
class Inputs:
    """The pictures of one family of masks: names, and uint8 (N, S, S, 3) each."""

    names: list[str]
    gt: np.ndarray
    masks: np.ndarray
    first: int = 0  # the number of the first picture

    @property
    def holes(self) -> np.ndarray:
        """Where pixels are generated: bool (N, S, S)."""
        return self.masks[:, :, :, 0] < 128

    def part(self, start: int, stop: int) -> "Inputs":
        """Return the pictures from ``start`` to before ``stop``."""
        part = slice(start, stop)
        return Inputs(self.names[part], self.gt[part], self.masks[part], self.first + start)


Method = Callable[[Inputs], np.ndarray]  # gives results, uint8 (N, S, S, 3)


@dataclass(frozen=True)
class Setting:
    """A way to inpaint: its name, its configuration, and the walk; a baseline has no times."""

    name: str
    conf: InpaintConf
    times: list[int] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Network calls a picture."""
        return count_steps(self.times)[0] if self.times else 0


# ---- what is to be done --------------------------------------------------------------------------


def choose_names(words: Sequence[str]) -> list[str]:
    """Return the settings that names, ``curve`` or patterns such as 'ddnm*' mean, each once."""
    names = []
    for word in words:
        names += CURVE if word == "curve" else fnmatch.filter(CURVE, word) or [word]
    return list(dict.fromkeys(names))


def overrides_of(name: str) -> dict[str, Any]:
    """Return the keys of the YAML that a name stands for.

    Of ddnm0.85-r5-t50 the eta is .85, jump_n_sample 5 and t_T 50; a j before r is the jump_length,
    else 10 as published. What follows t is the ``timestep_respacing``, in all its forms. Raises
    UserError for other names.
    """
    match = NAME.fullmatch(name)
    if match is None:
        expected = f"curve, posterior, nearest, or a name such as {', '.join(CURVE[:7:3])}"
        raise UserError(key="--settings", expected=expected, got=name)
    keys = {
        "timestep_respacing": match["respacing"],
        "schedule_jump_params.t_T": int(match["t_T"]),
        "schedule_jump_params.jump_length": int(match["j"] or 10),
        "schedule_jump_params.jump_n_sample": int(match["r"] or 1),
        "use_ddim": name.startswith("ddim"),
        "sampler": "ddnm" if match["eta"] else "repaint",
    }
    if match["eta"]:
        over = float(match["over"] or 0)
        keys |= {"ddnm_eta": float(match["eta"]), "ddnm_overshoot": over}
    return keys


def settings_of(args: argparse.Namespace, base: InpaintConf) -> list[Setting]:
    """Return the settings asked for, the cheapest first; raises UserError where one cannot run."""
    settings = []
    for name in choose_names(args.settings):
        if name == "nearest" and args.train is None:
            raise UserError("needs --train, the training pictures", key="--settings", got=name)
        if name in quality_report.BASELINES:
            settings.append(Setting(name, base))
            continue
        changes = [f"{key}={json.dumps(value)}" for key, value in overrides_of(name).items()]
        conf = load_conf(args.conf_path, InpaintConf, [*args.overrides, *changes])
        conf = dataclasses.replace(conf, seed=base.seed)
        settings.append(Setting(name, conf, create_schedule(conf, create_gaussian_diffusion(conf))))
    within = (one for one in settings if args.most_calls is None or one.calls <= args.most_calls)
    return sorted(within, key=lambda setting: setting.calls)


def check_run(args: argparse.Namespace, base: InpaintConf) -> None:
    """Note in run.json what results depend on; refuse an ``--out`` of another model or pictures.

    Only keys that differ from their defaults count: a key that a later version adds changes
    nothing. More pictures may be added.
    """
    paths = [base.model_path, *([base.classifier_path] if base.guided else [])]
    for path in paths:
        check_beginning(path)
    ignored = ("name", "data", "overview", "show_progress", "model_path", "classifier_path")
    keys = {
        key.name: str(getattr(base, key.name))
        for key in dataclasses.fields(base)
        if key.name not in ignored and getattr(base, key.name) != key.default
    }
    pictures = [
        [output_name(path), hashlib.sha256(load_crop(path, base.image_size)).hexdigest()[:12]]
        for path in args.paths
    ]
    run = {
        "model": [fingerprint(path) for path in paths], "keys": keys,
        "device": get_device(base.device).type, "pictures": pictures,
    }  # fmt: skip
    path = args.out / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else run
    common = min(len(pictures), len(before["pictures"]))
    for key, wanted in {**run, "pictures": pictures[:common]}.items():
        made = before[key][:common] if key == "pictures" else before[key]
        if made != wanted:
            problem = f"has results with other {key}: take another --out or remove it"
            raise UserError(problem, path=args.out)
    if not args.dry_run:
        run["pictures"] = max(before["pictures"], pictures, key=len)
        write_text_atomic(path, json.dumps(run, indent=1))


def choose_pictures(where: str, count: int) -> list[str]:
    """Return ``count`` pictures of a folder, in an order that is fixed.

    The order is drawn at random once, so that a few pictures are of all kinds, and the few are the
    first of many.
    """
    paths = list_images(where, key="--pictures")
    order = np.random.default_rng(0).permutation(len(paths))[:count]
    if len(order) < count:
        raise UserError("too few", path=where, key="--count", expected=count, got=len(order))
    return [paths[i] for i in order]


def load_inputs(paths: Sequence[str], family: str, conf: InpaintConf) -> Inputs:
    """Load pictures and draw their masks, which depend on seed and position alone."""
    pairs = [Pair(i, path, family, output_name(path), True) for i, path in enumerate(paths)]
    loaded = [load_pair(pair, conf.image_size, ReadOptions(seed=conf.seed)) for pair in pairs]
    gt, masks = (np.stack(pictures) for pictures in zip(*loaded, strict=True))
    return Inputs([pair.name for pair in pairs], gt, masks)


# ---- making --------------------------------------------------------------------------------------


@torch.inference_mode()
def inpaint(inpainter: Inpainter, inputs: Inputs, bar: tqdm) -> np.ndarray:
    """Return what the network makes of the pictures, as a ``Method``."""
    known = torch.stack([to_model_range(picture) for picture in inputs.gt]).to(inpainter.device)
    keep = torch.stack([mask_to_tensor(mask) for mask in inputs.masks]).to(inpainter.device)
    x, seed, count = known, inpainter.conf.seed + inputs.first, len(inputs.gt)
    for step in inpainter.steps(known, keep, range(seed, seed + count)):
        x = step.x
        if step.pred_xstart is not None:
            bar.update(count)
    return to_levels(condition(x, known, keep))


def method_of(setting: Setting, args: argparse.Namespace, bar: tqdm) -> Method:
    """Return what makes a setting's results; what it reads is read now."""
    if setting.name == "nearest":
        nearest = Nearest(args.train, setting.conf.image_size)
        return lambda inputs: nearest(inputs.gt, inputs.holes)
    if setting.name == "posterior":
        posterior = Posterior()
        return lambda inputs: posterior(inputs.names, inputs.gt, inputs.holes)
    inpainter = Inpainter(setting.conf, setting.times)
    return lambda inputs: inpaint(inpainter, inputs, bar)


# ---- measuring -----------------------------------------------------------------------------------


def hole_error(result: np.ndarray, gt: np.ndarray, hole: np.ndarray) -> float:
    """Return the mean square error in the hole, pixels in [0, 1]; (S, S, 3) uint8, (S, S) bool."""
    return float((((result.astype(float) - gt) / 255)[hole] ** 2).mean())


def border_error(result: np.ndarray, gt: np.ndarray, hole: np.ndarray) -> float:
    """Return the mean square error of the steps between known and generated neighbours."""
    difference, errors = (result.astype(float) - gt) / 255, []
    for axis in (0, 1):
        across = np.diff(hole.astype(np.int8), axis=axis) != 0
        errors.append((np.diff(difference, axis=axis) ** 2)[across].ravel())
    return float(np.concatenate(errors).mean())


def measure(lpips: LPIPS, inputs: Inputs, results: np.ndarray) -> list[dict[str, Any]]:
    """Return a row of numbers for each picture."""
    gt, holes = inputs.gt, inputs.holes
    x, y = (torch.stack([to_model_range(p) for p in pictures]) for pictures in (results, gt))
    whole, inside = lpips(x, y, torch.from_numpy(holes))
    return [
        {
            "picture": inputs.names[i],
            "lpips": whole[i].item(),
            "lpips_hole": inside[i].item(),
            "hole": hole_error(results[i], gt[i], holes[i]),
            "border": border_error(results[i], gt[i], holes[i]),
        }
        for i in range(len(results))
    ]


# ---- blocks --------------------------------------------------------------------------------------


class Block:
    """The results of one setting with one family of masks, as far as they are made."""

    def __init__(self, out: Path, setting: Setting, family: str) -> None:
        self.family, self._conf = family, setting.conf
        self.path = out / "blocks" / family / f"{setting.name}.json"
        self._tree: dict[str, Any] = {
            "setting": setting.name, "mask": family, "calls": setting.calls, "seconds": 0.0,
            "rows": [],
        }  # fmt: skip
        if self.path.is_file():
            self._tree = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is measured, a row a picture."""
        return self._tree["rows"]

    def add(self, rows: list[dict[str, Any]], results: np.ndarray, seconds: float) -> None:
        """Write numbers and pictures again, with these added."""
        sheet, size = self.path.with_suffix(".png"), results.shape[1]
        if self.rows:
            with Image.open(sheet) as image:
                tiles = np.asarray(image)
            tiles = tiles.reshape(-1, size, COLUMNS, size, 3).swapaxes(1, 2)
            results = np.concatenate([tiles.reshape(-1, size, size, 3)[: len(self.rows)], results])
        # The numbers last: pictures without numbers are made again, the other way round not.
        write_image(sheet, montage(results, COLUMNS))
        self._tree["rows"] = [*self.rows, *rows]
        self._tree["seconds"] += seconds
        self._tree["machine"] = machine(self._conf)
        write_text_atomic(self.path, json.dumps(self._tree, indent=1))


def machine(conf: InpaintConf) -> str:
    """Describe processor or GPU, and torch, in a few words."""
    device = get_device(conf.device)
    cores = "" if device.type == "cuda" else f"{os.cpu_count()} cores of "
    return f"{cores}{sampler.machine(device)}, PyTorch {torch.__version__}"


def make(setting: Setting, blocks: Sequence[Block], args: argparse.Namespace, bar: tqdm) -> None:
    """Make and measure what is missing of a setting's blocks, batch by batch."""
    method = method_of(setting, args, bar)
    for block in blocks:
        inputs = load_inputs(args.paths, block.family, setting.conf)
        show_inputs(block.path.parent, inputs)
        for start in range(len(block.rows), args.count, args.batch_size):
            part = inputs.part(start, min(start + args.batch_size, args.count))
            began = time.perf_counter()
            results = method(part)
            seconds = time.perf_counter() - began
            block.add(measure(args.lpips, part, results), results, seconds)


def show_inputs(folder: Path, inputs: Inputs) -> None:
    """Write the pictures and their holes beside the results, laid out alike."""
    write_image(folder / "0-pictures.png", montage(inputs.gt, COLUMNS))
    holes = np.where(inputs.holes[..., None], 0, inputs.gt).astype(np.uint8)
    write_image(folder / "0-holes.png", montage(holes, COLUMNS))


# ---- the command ---------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OptionParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conf_path", required=True, metavar="YAML")
    parser.add_argument("--pictures", required=True, metavar="DIR", help="held-out pictures")
    parser.add_argument("--train", metavar="DIR", help="training pictures, for nearest")
    parser.add_argument("--count", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--settings", default="curve", type=lambda text: text.split(","),
                        help="names, patterns such as 'ddnm*', or curve, the default")  # fmt: skip
    parser.add_argument("--masks", default=list(FAMILIES), type=lambda text: text.split(","),
                        help="families of masks (default: all six)")  # fmt: skip
    parser.add_argument("--most_calls", type=int, metavar="N", help="leave out what makes more")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="any key of the YAML, for all settings; repeatable")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--alexnet", metavar="FILE", help="as metrics.py takes it")
    parser.add_argument("--reference", metavar="NAME", help="compare all settings with this one, "
                        "picture by picture")  # fmt: skip
    parser.add_argument("--out", default="log/quality", type=Path, metavar="DIR")
    parser.add_argument("--dry_run", action="store_true", help="only list what remains")
    args = parser.parse_args(argv)
    for family in args.masks:
        if family not in FAMILIES:
            raise UserError(key="--masks", expected=f"of {', '.join(FAMILIES)}", got=family)
    return args


def remaining(
    settings: Sequence[Setting], args: argparse.Namespace
) -> Iterator[tuple[Setting, list[Block], int]]:
    """Yield each setting with its unfinished blocks and the network calls that these will make."""
    for setting in settings:
        blocks = [Block(args.out, setting, family) for family in args.masks]
        blocks = [block for block in blocks if len(block.rows) < args.count]
        if blocks:
            pictures = sum(args.count - len(block.rows) for block in blocks)
            yield setting, blocks, pictures * setting.calls


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, then write tables and plot of all that is in ``--out``."""
    args = parse_args(argv)
    args.paths = choose_pictures(args.pictures, args.count)
    base = load_conf(args.conf_path, InpaintConf, args.overrides)
    base = dataclasses.replace(base, seed=base.seed or 0)
    if base.image_size < MIN_SIDE:
        expected, got = f"at least {MIN_SIDE}, for LPIPS", base.image_size
        raise UserError(path=args.conf_path, key="image_size", expected=expected, got=got)
    settings = settings_of(args, base)
    check_run(args, base)
    todo = list(remaining(settings, args))
    total = sum(calls for *_, calls in todo)
    print(f"{sum(len(blocks) for _, blocks, _ in todo)} blocks of {len(settings) * len(args.masks)}"
          f" to make: {total:,} network calls x pictures")  # fmt: skip
    if args.dry_run:
        for setting, blocks, calls in todo:
            families = ", ".join(block.family for block in blocks)
            print(f"{setting.name}: {setting.calls} calls a picture, {calls:,} in all: {families}")
        return
    if todo:
        args.lpips = load_lpips(args.alexnet)
    with tqdm(total=total, unit="call", mininterval=1) as bar:
        for setting, blocks, _ in todo:
            bar.set_description(setting.name)
            make(setting, blocks, args, bar)
    print(quality_report.write(args.out, args.reference))


if __name__ == "__main__":
    command_line(main)
