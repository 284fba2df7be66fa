"""Requests of the page, the queue of jobs that they become, and the files that a job leaves.

A job is a run like any other: it is written down as files and keys, planned and made as test.py
makes it, and leaves a YAML that repeats it.
"""

import base64
import contextlib
import io
import json
import secrets
import shutil
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, JpegImagePlugin

from guided_diffusion.config.keys import FAST, RESULT_FOLDERS, InpaintConf
from guided_diffusion.config.reading import as_overrides, load_conf
from guided_diffusion.config.schema import conf_to_dict
from guided_diffusion.dist_util import Team, get_device
from guided_diffusion.errors import UserError
from guided_diffusion.io.images import open_image, read_rgb, to_uint8
from guided_diffusion.io.results import write_result
from guided_diffusion.masks import FAMILIES
from guided_diffusion.models.hub import fetch_configuration
from guided_diffusion.run.plan import checkpoints_of, plan_run
from guided_diffusion.run.record import result_mark, settings_of_results
from guided_diffusion.run.repaint import RePaint
from guided_diffusion.run.sampling import Made, Sampling
from guided_diffusion.run.task import network_calls
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import (
    check_network,
    create_gaussian_diffusion,
    create_schedule,
)

MAX_SAMPLES, MAX_MASK_GROW, MAX_SEED = 4, 64, 2**31 - 1
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 26  # of a picture or a mask
MAX_WAITING = 16
SQUARE = ("windows=false", "output_format=png")  # keys that are for whole photos alone
PAINTED, UPLOADED = "painted", "uploaded"
HOLES = (PAINTED, UPLOADED, *FAMILIES)
METHODS, MASK_HOLES = ("fast", "repaint"), ("black", "alpha", "color")
_PREVIEW_SECONDS = 2.0
_SILENT_SECONDS = 30.0


class Cancelled(Exception):
    """The visitor wants no result any more, or is gone."""


@dataclass(frozen=True)
class Chosen:
    """A picture to work on: a file, and the folders of the jobs whose results led to it."""

    path: Path
    size: tuple[int, int]  # width and height as a person sees it
    photo: Path  # the first of this chain
    earlier: tuple[Path, ...] = ()


@dataclass
class Request:
    """What a visitor asks for; raises UserError that names the argument with a wrong value."""

    picture: Chosen
    strokes: str | None  # PNG as a data URL, opaque where painted
    hole: str
    mask: str | None  # a file
    mask_hole: str
    method: str
    samples: int
    seed: int | None  # None: drawn
    full_size: bool
    mask_grow: int

    def __post_init__(self) -> None:
        """Check types and ranges: programs may send anything."""
        self.seed = secrets.randbelow(MAX_SEED) if self.seed is None else self.seed
        for name, low, high in (
            ("samples", 1, MAX_SAMPLES), ("seed", 0, MAX_SEED), ("mask_grow", 0, MAX_MASK_GROW),
        ):  # fmt: skip
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and value == value // 1 and low <= value <= high):
                expected = f"a whole number from {low} to {high}"
                raise UserError(key=name, expected=expected, got=repr(value))
            setattr(self, name, int(value))
        if not isinstance(self.full_size, bool):
            raise UserError(key="full_size", expected="true or false", got=repr(self.full_size))
        for name, known in (("hole", HOLES), ("method", METHODS), ("mask_hole", MASK_HOLES)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(key=name, expected=", ".join(known), got=repr(value))


@dataclass(eq=False)
class Job:
    """A request under way, as the thread that works on it and the one that shows it see it."""

    request: Request
    folder: Path
    phase: str = "waiting"  # then loading, preparing, running, writing
    since: float = field(default_factory=time.monotonic)  # start of the phase
    started: float = 0.0
    calls: int = 0
    total: int = 0  # 0 until the network runs
    preview: np.ndarray | None = None  # uint8 (H, W, 3), what was last predicted
    shown: float = 0.0
    asked: float = field(default_factory=time.monotonic)  # when the page last asked for its state
    is_cancelled: bool = False
    notes: list[str] = field(default_factory=list)
    original: Path | None = None
    results: list[Path] = field(default_factory=list)
    error: BaseException | None = None
    finished: float = 0.0  # 0: not yet

    @property
    def suffix(self) -> str:
        """What names the files of this step: nothing for the first, then -2, -3 and so on."""
        step = len(self.request.picture.earlier) + 1
        return f"-{step}" if step > 1 else ""

    def enter(self, phase: str) -> None:
        """Note that the next phase begins; raises Cancelled where nobody waits for the result."""
        if self.is_cancelled or time.monotonic() - self.asked > _SILENT_SECONDS:
            raise Cancelled
        self.phase, self.since = phase, time.monotonic()

    def see(self, _call: int, _x: torch.Tensor, pred_xstart: torch.Tensor) -> None:
        """Note a network call; raises Cancelled as ``enter``. It is an ``Observer`` of a run."""
        now = time.monotonic()
        if self.is_cancelled or now - self.asked > _SILENT_SECONDS:
            raise Cancelled
        self.calls += 1
        if now - self.shown > _PREVIEW_SECONDS:
            self.preview, self.shown = np.concatenate(list(to_uint8(pred_xstart)), axis=1), now
        if self.calls == self.total:
            self.enter("writing")

    def seconds_left(self) -> int:
        """Estimate the time that the remaining network calls take from the calls so far."""
        spent = time.monotonic() - self.since
        return round(spent / max(1, self.calls) * max(0, self.total - self.calls))

    def downloads(self) -> list[Path]:
        """Return the files to offer: those of this step, results first, and of earlier steps."""
        files = [file for file in sorted(self.folder.iterdir()) if file.is_file()]
        for folder in self.request.picture.earlier:
            files += [file for file in sorted(folder.iterdir()) if file.is_file()]
        unique = {file.name: file for file in [*self.results, *files]}
        return list(unique.values())


class Worker:
    """The queue of jobs, one at a time, and the networks of one configuration, which it keeps.

    They are loaded at the first job, and again where YAML or checkpoint has changed since.
    ``overrides`` are KEY=VALUE as test.py's ``--set`` takes them. Raises UserError where keys,
    device or checkpoints are wrong.
    """

    def __init__(self, conf_path: str, overrides: Sequence[str] = ()) -> None:
        self.conf_path, self.overrides = conf_path, list(overrides)
        self.conf = load_conf(conf_path, InpaintConf, self.overrides)
        if fetch_configuration(self.conf.model_path):
            self.conf = load_conf(conf_path, InpaintConf, self.overrides)
        get_device(self.conf.device)
        for path in checkpoints_of(self.conf).values():
            check_network(path)
        self.steps = {  # network calls of a walk, by method
            method: count_steps(create_schedule(conf, create_gaussian_diffusion(conf)))[0]
            for method, keys in (("fast", FAST), ("repaint", {}))
            for conf in [load_conf(conf_path, InpaintConf, [*self.overrides, *as_overrides(keys)])]
        }
        self._repaint = self._networks = None
        self._thread = ThreadPoolExecutor(1)
        self._jobs: list[Job] = []  # not finished

    def submit(self, job: Job) -> None:
        """Put a job into the queue, and its inputs into its folder; raises UserError."""
        if len(self._jobs) > MAX_WAITING:
            raise UserError("queue full")
        names = write_inputs(job)
        self._jobs.append(job)
        self._thread.submit(self._work, job, *names)

    def count_before(self, job: Job) -> int:
        """Return how many jobs have to finish before this one begins."""
        jobs = list(self._jobs)
        earlier = jobs[: jobs.index(job)] if job in jobs else []
        return sum(not each.is_cancelled for each in earlier)

    def _work(self, job: Job, picture: str, mask: str) -> None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                self._make(job, picture, mask)
            found = [warning for warning in caught if warning.category is UserWarning]
            job.notes = [str(warning.message) for warning in found]
        except Exception as error:
            if not isinstance(error, UserError | Cancelled):
                traceback.print_exc()
            job.error = error
            shutil.rmtree(job.folder, ignore_errors=True)
        self._jobs.remove(job)
        job.finished = time.monotonic()

    def _make(self, job: Job, picture: str, mask: str) -> None:
        job.started = time.monotonic()
        job.enter("preparing" if self._repaint else "loading")
        options = [*self.overrides, *options_of(job)]
        here = [*inputs_of(job.folder, picture, mask), *outputs_of(job.folder)]
        plan = plan_run(load_conf(self.conf_path, InpaintConf, [*options, *here]), Team())
        # The download names its pictures from where it lies; results are marked as its own are.
        there = [*inputs_of(Path(), picture, mask), "data.paths={}"]
        repeat = load_conf(self.conf_path, InpaintConf, [*options, *there])
        marks = settings_of_results(repeat, plan.checkpoints, plan.settings["device"])
        networks = plan.checkpoints, plan.conf.network
        if self._networks != networks:
            self._repaint = self._networks = None  # both together may not fit into memory
            self._repaint, self._networks = RePaint(plan.conf), networks
        batch_size = plan.conf.data.batch_size
        job.total = network_calls(plan.jobs, batch_size, count_steps(plan.times)[0])
        job.enter("running")
        inpainter = self._repaint.inpainter.with_walk(plan.conf, plan.times)
        for batch in Sampling(inpainter, batch_size, job.see).make(plan.jobs):
            for made in batch:
                self._write(job, made, plan.conf, marks)
        write_repeat(repeat, job.folder / f"repeat{job.suffix}.yml")

    def _write(self, job: Job, made: Made, conf: InpaintConf, settings: dict[str, str]) -> None:
        """Write a result as test.py does, and in the photo's own format, too."""
        if made.problem:
            raise UserError(made.problem)
        result, picture = made.result(conf)
        wanted = ("srs", "gt_keep_masks", *(() if conf.full_size else ("gts",)))
        folders = {
            key: job.folder / "out" / key if key in wanted else None for key in RESULT_FOLDERS
        }
        *inputs, path = write_result(
            folders, made.job.pair.name, result, picture.pixels, picture.mask,
            sample_name=made.job.name, mark=result_mark(settings, made.job, picture),
        )  # fmt: skip
        number = len(job.results) + 1 if job.request.samples > 1 else ""
        job.results.append(path.rename(job.folder / f"result{number}{job.suffix}{path.suffix}"))
        if conf.full_size:
            write_as_photo(job.results[-1], job.request.picture.photo)
        job.original = job.folder / job.request.picture.path.name if conf.full_size else inputs[-1]
        if not any(job.folder.glob("mask*")):  # it was drawn
            shutil.copyfile(inputs[0], job.folder / f"mask{job.suffix}.png")


# ---- What goes in --------------------------------------------------------------------------------


def choose(path: Path) -> tuple[Chosen, Image.Image]:
    """Read a picture that a visitor chose wholly, as RGB; raises UserError where that fails."""
    refuse_large(path)
    image = read_rgb(str(path))
    return Chosen(path, image.size, path), image


def write_inputs(job: Job) -> tuple[str, str]:
    """Write picture and mask into the job's folder; return their names, or the mask's family.

    Raises UserError where one is missing or cannot be read.
    """
    request, folder = job.request, job.folder
    picture = request.picture.path.name
    shutil.copyfile(request.picture.path, folder / picture)
    if request.hole in FAMILIES:
        return picture, request.hole
    if request.hole == UPLOADED:
        if not request.mask:
            raise UserError("no mask")
        refuse_large(request.mask)
        mask = f"mask{job.suffix}{Path(request.mask).suffix.lower()}"
        shutil.copyfile(request.mask, folder / mask)
        return picture, mask
    mask = f"mask{job.suffix}.png"
    painted_mask(request.strokes, request.picture.size).save(folder / mask)
    return picture, mask


def painted_mask(strokes: str | None, size: tuple[int, int]) -> Image.Image:
    """Return the mask of a photo of ``size`` from strokes, of another resolution: 0 = hole."""
    try:
        content = base64.b64decode((strokes or "").partition(",")[2])
        with open_image(io.BytesIO(content)) as layer:
            if layer.width * layer.height > MAX_PIXELS:
                raise ValueError
            alpha = layer.convert("RGBA").getchannel("A")
    except (OSError, SyntaxError, ValueError):  # absent, or not what the editor sends
        raise UserError("nothing painted") from None
    mask = alpha.resize(size).point(lambda level: 0 if level > 127 else 255)
    if mask.getextrema()[0]:
        raise UserError("nothing painted")
    return mask


def refuse_large(path: str | Path) -> None:
    """Raise UserError for a picture of more than ``MAX_PIXELS``."""
    try:
        with Path(path).open("rb") as stream, open_image(stream) as image:
            width, height = image.size
    except Exception:  # whoever reads the picture says what is wrong with it
        return
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} pixels"
        raise UserError(
            "is too large", path=path, expected=f"at most {MAX_PIXELS} pixels", got=size
        )


# ---- The run, and what comes out -----------------------------------------------------------------


def write_as_photo(result: Path, photo: Path) -> None:
    """Write a result in the format of its photo, with its EXIF data, if that is a lossy one."""
    with photo.open("rb") as stream, open_image(stream) as before, Image.open(result) as after:
        format_ = "JPEG" if before.format == "MPO" else before.format
        suffix = {"JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}.get(format_)
        if not suffix:
            return
        options: dict[str, Any] = {"icc_profile": after.info.get("icc_profile"), "quality": 95}
        with contextlib.suppress(Exception):  # damaged EXIF data
            exif = before.getexif()
            exif[0x0112] = 1  # the pixels are upright
            options["exif"] = exif
        if format_ == "JPEG" and before.mode == after.mode:  # its own quality
            options |= {"qtables": before.quantization, "quality": -1,
                        "subsampling": JpegImagePlugin.get_sampling(before)}  # fmt: skip
        after.save(result.with_suffix(suffix), format_, **options)


def options_of(job: Job) -> list[str]:
    """Translate a request into KEY=VALUE."""
    request = job.request
    options = [
        f"name=page{job.suffix}",
        f"mask_hole={request.mask_hole if request.hole == UPLOADED else 'black'}",
        *("overview=false", "save_process=0", "show_progress=false"),
        *("paste_known=true", "mask_hard=true", "invert_mask=false"),
        *("data.offset=0", "data.max_len=", "data.random_flip=false", "data.drop_last=false"),
        f"samples_per_image={request.samples}",
        f"seed={request.seed}",
        f"full_size={json.dumps(request.full_size)}",
        f"mask_grow={request.mask_grow}",
    ]
    return [
        *as_overrides(FAST if request.method == "fast" else {}),
        *(() if request.full_size else SQUARE),
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
