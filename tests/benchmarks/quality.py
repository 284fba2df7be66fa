"""Quality against network calls, of every way down that this program knows.

``python tests/benchmarks/quality.py --conf_path confs/demo.yml --pictures DIR --count 64``

The same pictures, masks and seeds are inpainted in each way (a *setting*: some keys of the YAML
changed), with masks of each family, by what test.py runs on. Known pixels are pasted into the
result, so that all errors are the hole's. For each picture: LPIPS (AlexNet 0.1) of the whole
picture and of its hole, as guided_diffusion/tools/perceptual.py defines them; the mean square error
in the hole, pixels in [0, 1]; and that of the steps from known pixels to their generated
neighbours, which is the seam. Three more settings make no network call: ``nearest`` pastes in the
picture of ``--train`` that is nearest by the known pixels, ``mirror`` the picture's own mirror
image, hidden pixels included, and ``posterior``, for the demo's drawn faces, another face with the
same known pixels, which is what a perfect sampler gives.

Every setting and mask is a *block*: a JSON file of numbers and a PNG of the results in --out,
written after each batch. The same command goes on where it was interrupted; a larger --count adds
pictures. From the first --count pictures of all blocks that have as many, also of other calls, it
writes quality.md and quality.png. The cheapest settings come first. ``--dry_run`` says what is left
to do.
"""

import argparse
import base64
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.dist_util import get_device
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import condition
from guided_diffusion.image_datasets import Pair, list_images, load_pair, output_name
from guided_diffusion.io.checkpoints import check_beginning, fingerprint
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.io.images import load_crop, mask_to_tensor, to_model_range, to_uint8
from guided_diffusion.io.results import write_image
from guided_diffusion.io.sheets import montage
from guided_diffusion.masks import FAMILIES
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import create_gaussian_diffusion, create_schedule
from guided_diffusion.tools.perceptual import LPIPS, MIN_SIDE, load_lpips

COLUMNS = 16  # of a block's PNG
FACES = Path(__file__).resolve().parents[2] / "data" / "faces"


@dataclass(frozen=True)
class Setting:
    """One way down: what of the YAML it changes, by dotted key; a baseline changes nothing."""

    name: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


BASELINES = ("nearest", "mirror", "posterior")
CURVE = (
    *(f"repaint-t{t_T}" for t_T in (10, 25, 50, 100, 250, 1000)),
    *(f"repaint-r{r}-t{t_T}" for r in (5, 10) for t_T in (25, 50, 100, 250)),
    *(f"ddim-t{t_T}" for t_T in (10, 25, 50, 100, 250)),
    *(f"ddnm{eta}-t{t_T}" for eta in ("0.85", "1") for t_T in (10, 25, 50, 100, 250)),
    *(f"ddnm{eta}-r5-t{t_T}" for eta in ("0.85", "1") for t_T in (25, 50, 100)),
)
# Straight down, resampling, and straight down in as many steps as that has calls: the paper's
# control, which asks whether it is the resampling that helps or only the time (section 5.5).
RESAMPLING = ("repaint-t25", "repaint-r10-t25", "repaint-t205")
GROUPS = {"curve": CURVE, "resampling": RESAMPLING, "baselines": ("nearest", "mirror")}
NAME = re.compile(
    r"(repaint|ddim|ddnm(?P<eta>[01](?:\.\d+)?))(?:-j(?P<j>\d+))?(?:-r(?P<r>\d+))?-t(?P<t_T>\d+)"
)


def setting_of(name: str) -> Setting:
    """Return what a name means, such as ddnm0.85-r5-t50: eta .85, jump_n_sample 5, t_T 50.

    A j before r is the jump_length, else 10 as published. Any such name is a setting, listed above
    or not. Raises ``UserError`` for other names.
    """
    match = NAME.fullmatch(name)
    if name in BASELINES:
        return Setting(name)
    if match is None:
        expected = f"{', '.join(GROUPS)}, a pattern of {', '.join(CURVE)}, or a name like these"
        raise UserError(key="--settings", expected=expected, got=name)
    t_T, repeats = int(match["t_T"]), int(match["r"] or 1)
    keys = {
        "timestep_respacing": str(t_T),
        "schedule_jump_params.t_T": t_T,
        "schedule_jump_params.jump_length": int(match["j"] or 10),
        "schedule_jump_params.jump_n_sample": repeats,
        "use_ddim": name.startswith("ddim"),
    }
    if match["eta"]:
        keys |= {"sampler": "ddnm", "ddnm_eta": float(match["eta"])}
    return Setting(name, keys)


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
        own = slice(start, stop)
        return Inputs(self.names[own], self.gt[own], self.masks[own], self.first + start)


Method = Callable[[Inputs], np.ndarray]  # gives results, uint8 (N, S, S, 3)


@dataclass(frozen=True)
class Way:
    """A setting that can be run, and what its results depend on."""

    setting: Setting
    conf: InpaintConf
    times: list[int]  # empty for a baseline
    digest: str

    @property
    def calls(self) -> int:
        """Network calls a picture."""
        return count_steps(self.times)[0] if self.times else 0


@dataclass(frozen=True)
class Model:
    """What tells one model, run by one YAML, from another."""

    network: list[Any]
    overrides: list[str]
    seed: int
    image_size: int


# ---- what is to be done --------------------------------------------------------------------------


def choose_settings(words: Sequence[str]) -> list[Setting]:
    """Return the settings that names, groups or patterns such as 'ddnm*' mean, each once."""
    known = [name for group in GROUPS.values() for name in group]
    names = []
    for word in words:
        names += GROUPS.get(word) or fnmatch.filter(known, word) or [word]
    return [setting_of(name) for name in dict.fromkeys(names)]


def load_base(args: argparse.Namespace) -> tuple[InpaintConf, Model]:
    """Return what all settings start from, and what the results of it depend on."""
    base = load_conf(args.conf_path, InpaintConf, args.overrides)
    if base.image_size < MIN_SIDE:
        expected = f"at least {MIN_SIDE}, for LPIPS"
        raise UserError(
            path=args.conf_path, key="image_size", expected=expected, got=base.image_size
        )
    model = what_model(base, args.overrides)
    return dataclasses.replace(base, seed=model.seed), model


def choose_ways(args: argparse.Namespace, base: InpaintConf, model: Model) -> list[Way]:
    """Check each setting against the program at hand; what that does not know is left out."""
    ways, refused = [], {}
    for setting in choose_settings(args.settings):
        if setting.name in BASELINES:
            if setting.name == "nearest" and args.train is None:
                refused.setdefault("needs --train, the training pictures", []).append(setting.name)
                continue
            if setting.name == "nearest":
                setting = Setting(setting.name, {"--train": args.train})
            if setting.name == "posterior" and not (FACES / "node_modules").is_dir():
                refused.setdefault("needs npm install in data/faces", []).append(setting.name)
                continue
            ways.append(Way(setting, base, [], digest_of(setting, model)))
            continue
        # A YAML may say ddnm; a program that knows no samplers has this one.
        keys = ({"sampler": "repaint"} if hasattr(base, "sampler") else {}) | setting.overrides
        changes = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        try:
            conf = load_conf(args.conf_path, InpaintConf, [*args.overrides, *changes])
            times = create_schedule(conf, create_gaussian_diffusion(conf))
        except UserError as error:
            refused.setdefault(str(error), []).append(setting.name)
            continue
        conf = dataclasses.replace(conf, seed=base.seed)
        ways.append(Way(setting, conf, times, digest_of(setting, model)))
    for reason, names in refused.items():
        print(f"left out: {', '.join(names)}: {reason}")
    within = [way for way in ways if args.most_calls is None or way.calls <= args.most_calls]
    return sorted(within, key=lambda way: way.calls)


def what_model(conf: InpaintConf, overrides: list[str]) -> Model:
    """Return what the results of a configuration depend on.

    Only keys that differ from their defaults count: keys that a later version of the program adds
    leave blocks valid.
    """
    paths = [conf.model_path, *([conf.classifier_path] if conf.guided else [])]
    for path in paths:
        check_beginning(path)
    defaults = {f.name: f.default for f in dataclasses.fields(conf)}
    names = sorted(name for name in vars(conf) if getattr(conf, name) != defaults.get(name))
    ignored = ("name", "data", "overview", "show_progress", "model_path", "classifier_path")
    keys = {name: str(getattr(conf, name)) for name in names if name not in ignored}
    network = [[fingerprint(path) for path in paths], keys, get_device(conf.device).type]
    return Model(network, overrides, conf.seed or 0, conf.image_size)


def digest_of(setting: Setting, model: Model) -> str:
    """Return a short fingerprint of what a block depends on, but for its pictures."""
    tree = [setting.overrides, model.network, model.overrides, model.seed]
    if setting.name in BASELINES:  # no network has a part in these
        tree = [setting.name, setting.overrides, model.seed, model.image_size]
    return hashlib.sha256(repr(tree).encode()).hexdigest()[:16]


def check_blocks(args: argparse.Namespace, conf: InpaintConf, model: Model) -> None:
    """Refuse an ``--out`` with blocks of another model or of other pictures: tables show them all.

    Pictures are told by name and by their pixels; blocks of earlier versions have names alone.
    """
    paths = sorted((args.out / "blocks").glob("*/*.json"))
    trees = {path: quality_report.read_block(path) for path in paths}
    most = max((len(tree["rows"]) for tree in trees.values()), default=0)
    wanted = [
        (output_name(path), digest_of_pixels(load_crop(path, conf.image_size)))
        for path in args.paths[:most]
    ]
    for path, tree in trees.items():
        refuse_other(path, tree, digest_of(Setting(tree["setting"], tree["overrides"]), model))
        for row, (name, pixels) in zip(tree["rows"], wanted, strict=False):
            found = row["picture"], row.get("pixels", pixels)
            if found != (name, pixels):
                problem = "was made with other --pictures: take another --out or remove it"
                expected, got = (f"{n} with pixels {p}" for n, p in ((name, pixels), found))
                raise UserError(problem, path=path, expected=expected, got=got)


def refuse_other(path: Path, tree: dict[str, Any], digest: str) -> None:
    """Raise UserError for a block with another digest."""
    if tree["digest"] != digest:
        problem = "was made with another model, seed or YAML: take another --out or remove it"
        raise UserError(problem, path=path)


def digest_of_pixels(picture: np.ndarray) -> str:
    """Return a short fingerprint of a picture, uint8 (S, S, 3)."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()[:12]


def choose_pictures(where: str, count: int) -> list[str]:
    """Return ``count`` pictures of a folder or a text file of paths, in an order that is fixed.

    The order is drawn once for all, so that few pictures are of all kinds and the first of many
    are the few.
    """
    if where.endswith(".txt"):
        try:
            paths = Path(where).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            raise UserError(problem, path=where, key="--pictures") from error
    else:
        paths = list_images(where, key="--pictures")
    order = np.random.default_rng(0).permutation(len(paths))[:count]
    if len(order) < count:
        raise UserError("too few", path=where, key="--count", expected=count, got=len(order))
    return [paths[i] for i in order]


def load_inputs(paths: Sequence[str], family: str, conf: InpaintConf) -> Inputs:
    """Load pictures and draw their masks, which depend on seed and place alone."""
    pairs = [Pair(i, path, family, output_name(path), True) for i, path in enumerate(paths)]
    loaded = [load_pair(pair, conf.image_size, seed=conf.seed) for pair in pairs]
    gt, masks = (np.stack(pictures) for pictures in zip(*loaded, strict=True))
    return Inputs([pair.name for pair in pairs], gt, masks)


# ---- making --------------------------------------------------------------------------------------


@torch.inference_mode()
def inpaint(inpainter: Inpainter, inputs: Inputs, bar: tqdm) -> np.ndarray:
    """Return what the network makes of the pictures, as a ``Method``."""
    tensors = (
        torch.stack([convert(picture) for picture in pictures]).to(inpainter.device)
        for convert, pictures in ((to_model_range, inputs.gt), (mask_to_tensor, inputs.masks))
    )
    known, keep = tensors
    x, seed, count = known, inpainter.conf.seed + inputs.first, len(inputs.gt)
    for step in inpainter.steps(known, keep, range(seed, seed + count)):
        x = step.x
        if step.pred_xstart is not None:
            bar.update(count)
    return to_uint8(condition(x, known, keep))


class Nearest:
    """The training picture with the smallest square error on the known pixels, pasted in."""

    def __init__(self, folder: str, size: int) -> None:
        paths = tqdm(list_images(folder, key="--train"), "training pictures", leave=False, delay=2)
        self._pictures = np.stack([load_crop(path, size) for path in paths])

    def __call__(self, inputs: Inputs) -> np.ndarray:
        """Paste in, as a ``Method``."""
        gt, holes = inputs.gt, inputs.holes
        known = np.repeat(~holes[..., None], 3, axis=3).reshape(len(gt), -1).astype(np.float32)
        target = known * gt.reshape(len(gt), -1)
        best, where = np.full(len(gt), np.inf, np.float32), np.zeros(len(gt), int)
        for start in range(0, len(self._pictures), 1000):
            part = self._pictures[start : start + 1000]
            part = part.reshape(len(part), -1).astype(np.float32)
            # |m(p - g)|², but for |mg|², which is the same for all p.
            errors = part**2 @ known.T - 2 * part @ target.T
            lowest = errors.argmin(0)
            value = errors[lowest, np.arange(len(gt))]
            where = np.where(value < best, start + lowest, where)
            best = np.minimum(best, value)
        return np.where(holes[..., None], self._pictures[where], gt)


class Posterior:
    """Another drawn face with the same known pixels, as data/faces/posterior.mjs draws it."""

    def __init__(self) -> None:
        node = shutil.which("node")
        if node is None:
            raise UserError("node is not installed", key="--settings", got="posterior")
        self._program = subprocess.Popen(
            [node, "posterior.mjs"],
            cwd=FACES,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, inputs: Inputs) -> np.ndarray:
        """Draw, as a ``Method``, for faces whose names are their seeds.

        Raises UserError for a picture that is no such face.
        """
        faces = list(zip(inputs.names, inputs.gt, inputs.holes, strict=True))
        return np.stack([self._draw(*face) for face in tqdm(faces, "faces", leave=False, delay=2)])

    def _draw(self, name: str, gt: np.ndarray, hole: np.ndarray) -> np.ndarray:
        stem = Path(name).stem
        if not (stem.isascii() and stem.isdigit()):
            raise UserError("is no face of make.mjs", path=name, expected="its seed as its name")
        pixels, hidden = (base64.b64encode(array.tobytes()).decode() for array in (gt, hole))
        face = {"seed": int(stem), "size": len(gt), "picture": pixels, "hole": hidden}
        print(json.dumps(face), file=self._program.stdin, flush=True)
        line = self._program.stdout.readline()
        if not line:
            raise UserError("has ended; its message is above", path=FACES / "posterior.mjs")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"], path=name)
        return np.frombuffer(base64.b64decode(answer["picture"]), np.uint8).reshape(gt.shape)


def mirror(inputs: Inputs) -> np.ndarray:
    """Paste the mirror image into the hole, also where its pixels were hidden; a ``Method``."""
    return np.where(inputs.holes[..., None], inputs.gt[:, :, ::-1], inputs.gt)


def method_of(way: Way, args: argparse.Namespace, bar: tqdm) -> Method:
    """Return what makes a setting's results; what it reads is read now."""
    if way.setting.name == "nearest":
        return Nearest(args.train, way.conf.image_size)
    if way.setting.name == "posterior":
        return Posterior()
    if way.setting.name == "mirror":
        return mirror
    inpainter = Inpainter(way.conf, way.times)
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
    names, gt, holes = inputs.names, inputs.gt, inputs.holes
    x, y = (torch.stack([to_model_range(p) for p in pictures]) for pictures in (results, gt))
    whole, inside = lpips(x, y, torch.from_numpy(holes))
    return [
        {
            "picture": names[i],
            "pixels": digest_of_pixels(gt[i]),
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

    def __init__(self, out: Path, way: Way, family: str) -> None:
        self.way, self.family = way, family
        self.path = out / "blocks" / family / f"{way.setting.name}.json"
        self.tree: dict[str, Any] = {
            "setting": way.setting.name, "overrides": way.setting.overrides, "mask": family,
            "calls": way.calls, "digest": way.digest, "seconds": 0.0, "rows": [],
        }  # fmt: skip
        if self.path.is_file():
            self.tree = quality_report.read_block(self.path)
            refuse_other(self.path, self.tree, way.digest)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is measured, a row a picture."""
        return self.tree["rows"]

    def add(self, rows: list[dict[str, Any]], results: np.ndarray, seconds: float) -> None:
        """Write block and pictures anew, with these added."""
        sheet, size = self.path.with_suffix(".png"), results.shape[1]
        if self.rows:
            with Image.open(sheet) as image:
                tiles = np.asarray(image)
            tiles = tiles.reshape(-1, size, COLUMNS, size, 3).swapaxes(1, 2)
            results = np.concatenate([tiles.reshape(-1, size, size, 3)[: len(self.rows)], results])
        # The numbers last: pictures without numbers are made again, the other way round not.
        write_image(sheet, montage(results, COLUMNS))
        self.tree["rows"] = [*self.rows, *rows]
        self.tree["seconds"] += seconds
        self.tree["machine"] = machine(self.way.conf)
        write_text_atomic(self.path, json.dumps(self.tree, indent=1))


def machine(conf: InpaintConf) -> str:
    """Describe processor or GPU, and torch, in a few words."""
    device = get_device(conf.device)
    cores = "" if device.type == "cuda" else f"{os.cpu_count()} cores of "
    return f"{cores}{sampler.machine(device)}, PyTorch {torch.__version__}"


def make(way: Way, blocks: Sequence[Block], args: argparse.Namespace, bar: tqdm) -> None:
    """Make and measure what is missing of a setting's blocks, batch by batch."""
    method = method_of(way, args, bar)
    for block in blocks:
        inputs = load_inputs(args.paths, block.family, way.conf)
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
    parser.add_argument("--pictures", required=True, metavar="PATH",
                        help="held-out pictures: a folder, or a .txt of paths")  # fmt: skip
    parser.add_argument("--train", metavar="DIR", help="training pictures, for nearest")
    parser.add_argument("--count", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--settings", default="curve", type=lambda text: text.split(","),
                        help="groups (curve, resampling, baselines), names, and patterns such as "
                        "'ddnm*' (default: curve)")  # fmt: skip
    parser.add_argument("--masks", default=list(FAMILIES), type=lambda text: text.split(","),
                        help="families of masks (default: all six)")  # fmt: skip
    parser.add_argument("--most_calls", type=int, metavar="N", help="leave out what makes more")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="any key of the YAML, for all settings; repeatable")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--alexnet", metavar="FILE", help="as metrics.py takes it")
    parser.add_argument("--out", default="log/quality", type=Path, metavar="DIR")
    parser.add_argument("--dry_run", action="store_true", help="only say what is left to do")
    args = parser.parse_args(argv)
    for key in ("count", "batch_size"):
        if getattr(args, key) < 1:
            raise UserError(key=f"--{key}", expected="1 or more", got=getattr(args, key))
    for family in args.masks:
        if family not in FAMILIES:
            raise UserError(key="--masks", expected=f"of {', '.join(FAMILIES)}", got=family)
    return args


def left_to_do(
    ways: Sequence[Way], args: argparse.Namespace
) -> Iterator[tuple[Way, list[Block], int]]:
    """Yield each setting with its unfinished blocks and the network calls that these will make."""
    for way in ways:
        blocks = [Block(args.out, way, family) for family in args.masks]
        blocks = [block for block in blocks if len(block.rows) < args.count]
        if blocks:
            yield way, blocks, sum(args.count - len(block.rows) for block in blocks) * way.calls


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, then write tables and plot of all that is in ``--out``."""
    args = parse_args(argv)
    args.paths = choose_pictures(args.pictures, args.count)
    base, model = load_base(args)
    check_blocks(args, base, model)
    ways = choose_ways(args, base, model)
    todo = list(left_to_do(ways, args))
    total = sum(calls for *_, calls in todo)
    print(f"{sum(len(blocks) for _, blocks, _ in todo)} blocks of {len(ways) * len(args.masks)} "
          f"to make: {total:,} network calls x pictures")  # fmt: skip
    if args.dry_run:
        for way, blocks, calls in todo:
            families = ", ".join(block.family for block in blocks)
            print(f"{way.setting.name}: {way.calls} calls a picture, {calls:,} in all: {families}")
        return
    if todo:
        args.lpips = load_lpips(args.alexnet)
    with tqdm(total=total, unit="call", mininterval=1) as bar:
        for way, blocks, _ in todo:
            bar.set_description(way.setting.name)
            make(way, blocks, args, bar)
    command = shlex.join(["python", *map(str, sys.orig_argv[1:])])
    print(quality_report.write(args.out, command, args.count))


if __name__ == "__main__":
    command_line(main)
