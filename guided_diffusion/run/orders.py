"""One picture at a time, asked for piece by piece, as a page does: an order, its job, its files.

A job is a run like any other: it is written down as files and keys, planned and made as test.py
makes it, and leaves a YAML that repeats it.
"""

import dataclasses
import json
import secrets
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from guided_diffusion.config.keys import FAST, RESULT_FOLDERS, InpaintConf
from guided_diffusion.config.reading import as_overrides, load_conf
from guided_diffusion.config.schema import conf_to_dict
from guided_diffusion.dist_util import Team, get_device
from guided_diffusion.errors import UserError
from guided_diffusion.io.images import open_image, read_rgb, to_uint8
from guided_diffusion.masks import FAMILIES
from guided_diffusion.models.hub import fetch_configuration
from guided_diffusion.run.plan import checkpoints_of, plan_run
from guided_diffusion.run.record import settings_of_results
from guided_diffusion.run.repaint import RePaint
from guided_diffusion.run.task import network_calls
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import check_network

MAX_SAMPLES, MAX_MASK_GROW = 4, 64
SQUARE = ("windows=false", "output_format=png")  # keys that are for whole photos alone
PAINTED, UPLOADED = "painted", "uploaded"
NO_PICTURE = "upload a picture first"
NO_MASK = "upload a mask first"
NOTHING_PAINTED = "nothing is painted: paint over what is to be replaced"
_PREVIEW_SECONDS = 2.0
_SILENT_SECONDS = 30.0  # a job that nobody has asked after for so long is nobody's


class Cancelled(Exception):
    """The visitor wants no result any more, or is gone."""


@dataclass(frozen=True)
class Order:
    """What a visitor asks for; pictures are files that the page keeps."""

    picture: str | None
    strokes: Sequence[str]  # layers of the editor, opaque where painted
    mask: str | None
    hole: str  # PAINTED, UPLOADED or a family of masks
    method: str  # fast or repaint
    samples: int
    seed: int | None  # None is replaced by a drawn one
    full_size: bool
    mask_grow: int

    def __post_init__(self) -> None:
        """Take numbers as whole ones; programs may ask for what the controls do not offer."""
        seed = secrets.randbelow(2**31) if self.seed is None else int(self.seed)
        for name, value in (
            ("seed", seed),
            ("samples", min(max(int(self.samples), 1), MAX_SAMPLES)),
            ("mask_grow", min(int(self.mask_grow or 0), MAX_MASK_GROW)),
            ("full_size", bool(self.full_size)),
        ):
            object.__setattr__(self, name, value)


@dataclass
class Job:
    """One order under way, as the thread that works and the one that tells see it."""

    order: Order
    folder: Path
    calls: int = 0
    total: int = 0  # 0 until the networks are loaded
    started: float = 0.0
    preview: np.ndarray | None = None  # uint8 (H, W, 3), what was last predicted
    shown: float = 0.0
    asked: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    notes: list[str] = field(default_factory=list)
    original: Path | None = None
    results: list[Path] = field(default_factory=list)
    error: BaseException | None = None

    def see(self, _call: int, _x: torch.Tensor, pred_xstart: torch.Tensor) -> None:
        """Note a network call, and end the run if nobody waits for it; an ``Observer``."""
        now = time.monotonic()
        if self.is_cancelled or now - self.asked > _SILENT_SECONDS:
            raise Cancelled
        self.calls += 1
        if now - self.shown > _PREVIEW_SECONDS:
            self.preview, self.shown = np.concatenate(list(to_uint8(pred_xstart)), axis=1), now

    def seconds_left(self) -> int:
        """Estimate from the calls so far."""
        spent = time.monotonic() - self.started
        return round(spent / self.calls * max(0, self.total - self.calls)) if self.calls else 0


class Studio:
    """The networks of one configuration, loaded at the first job and kept, and one job at a time.

    They are loaded anew where YAML or checkpoint has changed since. ``overrides`` are KEY=VALUE as
    test.py's ``--set`` takes them. Raises UserError where keys, device or checkpoints are wrong.
    """

    def __init__(self, conf_path: str, overrides: Sequence[str] = ()) -> None:
        self.conf_path, self.overrides = conf_path, list(overrides)
        self.conf = load_conf(conf_path, InpaintConf, self.overrides)
        if fetch_configuration(self.conf.model_path):
            self.conf = load_conf(conf_path, InpaintConf, self.overrides)
        get_device(self.conf.device)
        for path in checkpoints_of(self.conf).values():
            check_network(path)
        self._repaint = self._networks = None
        self._lock = threading.Lock()

    def work(self, job: Job) -> None:
        """Do a job, in a thread of its own; what goes wrong is kept in it."""
        try:
            with self._lock, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                if job.is_cancelled:
                    raise Cancelled
                self._make(job)
            own = [warning for warning in caught if warning.category is UserWarning]
            job.notes = [str(warning.message) for warning in own]
        except (UserError, Cancelled) as error:
            job.error = error
        except Exception as error:
            traceback.print_exc()
            job.error = error
        if job.is_cancelled:  # the folder's owner may be gone
            shutil.rmtree(job.folder, ignore_errors=True)

    def _make(self, job: Job) -> None:
        picture, mask = write_inputs(job.order, job.folder)
        options = [*self.overrides, *options_of(job.order)]
        here = [*inputs_of(job.folder, picture, mask), *outputs_of(job.folder)]
        plan = plan_run(load_conf(self.conf_path, InpaintConf, [*options, *here]), Team())
        # The download names its pictures from where it lies; results are marked as its own are.
        there = [*inputs_of(Path(), picture, mask), "data.paths={}"]
        repeat = load_conf(self.conf_path, InpaintConf, [*options, *there])
        marks = settings_of_results(repeat, plan.checkpoints, plan.settings["device"])
        plan = dataclasses.replace(plan, settings=marks)
        networks = plan.checkpoints, plan.conf.network
        if self._networks != networks:
            self._repaint = self._networks = None  # both together may not fit into memory
            self._repaint, self._networks = RePaint(plan.conf), networks
        job.total = network_calls(plan.jobs, plan.conf.data.batch_size, count_steps(plan.times)[0])
        job.started = time.monotonic()
        summary = self._repaint.run(plan, Team(), job.see)
        if summary.failures:
            raise UserError("; ".join(summary.failures.values()))
        write_repeat(repeat, job.folder / "repeat.yml")
        made = [job.folder / "out" / "inpainted" / each.name for each in plan.jobs]
        job.original = job.folder / "out" / "gt" / plan.jobs[0].pair.name
        for number, path in enumerate(made, 1):
            name = f"result{number if len(made) > 1 else ''}{path.suffix}"
            job.results.append(path.rename(job.folder / name))
        if not any(job.folder.glob("mask.*")):  # it was drawn
            shutil.copyfile(
                job.folder / "out" / "gt_keep_mask" / plan.jobs[0].pair.name,
                job.folder / "mask.png",
            )


def write_inputs(order: Order, folder: Path) -> tuple[str, str]:
    """Write picture and mask into ``folder``; return their names, or the family of the mask.

    Raises UserError where one is missing, cannot be read or is too large.
    """
    if not order.picture:
        raise UserError(NO_PICTURE)
    for path in filter(None, (order.picture, order.mask, *order.strokes)):
        refuse_large(path)
    picture = f"picture{Path(order.picture).suffix.lower()}"
    shutil.copyfile(order.picture, folder / picture)
    if order.hole in FAMILIES:
        return picture, order.hole
    if order.hole == UPLOADED:
        if not order.mask:
            raise UserError(NO_MASK)
        mask = f"mask{Path(order.mask).suffix.lower()}"
        shutil.copyfile(order.mask, folder / mask)
        return picture, mask
    if order.hole != PAINTED:
        known = ", ".join([PAINTED, UPLOADED, *FAMILIES])
        raise UserError(key="hole", expected=known, got=repr(order.hole))
    width, height = read_rgb(str(folder / picture)).size
    known = np.full((height, width), 255, np.uint8)
    for path in order.strokes:
        with Image.open(path) as layer:
            painted = np.asarray(layer.convert("RGBA").resize((width, height)))[:, :, 3] > 0
        known[painted] = 0
    if known.all():
        raise UserError(NOTHING_PAINTED)
    Image.fromarray(known).save(folder / "mask.png")
    return picture, "mask.png"


def refuse_large(path: str) -> None:
    """Raise UserError for more than ``PIL.Image.MAX_IMAGE_PIXELS``: pictures are other people's."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Path(path).open("rb") as stream, open_image(stream) as image:
            is_large = limit is not None and image.width * image.height > limit
    except Exception:  # whoever reads the picture says what is wrong with it
        return
    if is_large:
        problem = "has too many pixels; make the picture smaller first"
        raise UserError(problem, path=Path(path).name, expected=f"at most {limit}")


def options_of(order: Order) -> list[str]:
    """Translate an order into KEY=VALUE."""
    options = [
        *("name=page", "overview=false", "save_process=0", "show_progress=false"),
        *("paste_known=true", "mask_hard=true", "invert_mask=false", "mask_hole=black"),
        *("data.offset=0", "data.max_len=", "data.random_flip=false", "data.drop_last=false"),
        f"samples_per_image={order.samples}",
        f"seed={order.seed}",
        f"full_size={json.dumps(order.full_size)}",
        f"mask_grow={order.mask_grow}",
    ]
    return [
        *as_overrides(FAST if order.method == "fast" else {}),
        *(() if order.full_size else SQUARE),
        *options,
    ]


def inputs_of(folder: Path, picture: str, mask: str) -> list[str]:
    """Return the options that name picture and mask in ``folder``, or a family of masks."""
    mask = mask if mask in FAMILIES else str(folder / mask)
    named = {"data.gt_path": str(folder / picture), "data.mask_path": mask}
    return [f"{key}={json.dumps(value)}" for key, value in named.items()]


def outputs_of(folder: Path) -> list[str]:
    """Return the options that send all results below ``folder``."""
    paths = {key: str(folder / "out" / name) for key, name in RESULT_FOLDERS.items()}
    return [f"data.paths={json.dumps(paths)}"]


def write_repeat(conf: InpaintConf, path: Path) -> None:
    """Write the YAML that repeats a result; of a path of this machine it keeps the last part."""
    tree = conf_to_dict(conf) | {"show_progress": True}
    for key in ("model_path", "classifier_path"):
        if Path(tree.get(key) or "").is_absolute():
            tree[key] = Path(tree[key]).name
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)
    note = (
        "# Put this file, the picture and the mask into the folder of test.py, and run there\n"
        f"# python test.py --conf_path {path.name}\n"
    )
    path.write_text(note + text, encoding="utf-8")
