"""Requests of the page, the queue of jobs that they become, and the files that a job leaves.

A job is planned and made as a run of test.py, and leaves a YAML that repeats it.
"""

import base64
import io
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
from PIL import Image

from guided_diffusion import RePaint
from guided_diffusion.config.keys import FAST, RESULT_FOLDERS, InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.schema import conf_to_dict
from guided_diffusion.dist_util import Team, get_device
from guided_diffusion.errors import UserError
from guided_diffusion.io.images import origin_of, read_header, read_rgb, read_upright, to_levels
from guided_diffusion.io.results import write_result
from guided_diffusion.masks import FAMILIES
from guided_diffusion.models.hub import fetch_configuration
from guided_diffusion.run.plan import checkpoints_of, plan_run
from guided_diffusion.run.record import result_mark
from guided_diffusion.run.sampling import Made, Sampling
from guided_diffusion.run.task import network_calls
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import check_network

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 26  # of a picture or a mask
MAX_WAITING = 16  # jobs
RANGES = {"samples": (1, 4), "seed": (0, 2**31 - 1), "mask_grow": (0, 64)}
PAINTED, UPLOADED = "painted", "uploaded"
CHOICES = {
    "hole": (PAINTED, UPLOADED, *FAMILIES),
    "method": ("fast", "repaint"),
    "mask_hole": ("auto", "black", "alpha", "layer", "color"),
}
_PREVIEW_SECONDS = 2.0
_SILENT_SECONDS = 30.0


class Cancelled(Exception):
    """The visitor wants no result any more, or is gone."""


@dataclass(frozen=True)
class Chosen:
    """A picture to work on, and the folders of the jobs whose results led to it."""

    path: Path
    size: tuple[int, int]  # width and height as a person sees it
    earlier: tuple[Path, ...] = ()


def read(path: str | Path) -> Image.Image:
    """Read a picture or mask wholly, as RGB; raises UserError that names the file."""
    width, height = read_header(str(path)).size
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} pixels"
        raise UserError(
            "is too large", path=path, expected=f"at most {MAX_PIXELS} pixels", got=size
        )
    return read_rgb(str(path))


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
        self.seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        for name, known in CHOICES.items():
            if (got := getattr(self, name)) not in known:
                raise UserError(key=name, expected=", ".join(known), got=repr(got))
        for name, (low, high) in RANGES.items():
            got = getattr(self, name)
            if type(got) is not int or not low <= got <= high:
                expected = f"a whole number from {low} to {high}"
                raise UserError(key=name, expected=expected, got=repr(got))
        if type(self.full_size) is not bool:
            raise UserError(key="full_size", expected="true or false", got=repr(self.full_size))


@dataclass(eq=False)
class Job:
    """A request under way, as the thread that works on it and the one that shows it see it."""

    request: Request
    folder: Path
    phase: str = "waiting"  # then loading, preparing, running, writing
    since: float = field(default_factory=time.monotonic)  # start of the phase
    started: float = 0.0
    finished: float = 0.0  # 0: not yet
    asked: float = field(default_factory=time.monotonic)  # when the page last asked for its state
    calls: int = 0
    total: int = 0  # 0 until the network runs
    preview: np.ndarray | None = None  # uint8 (H, W, C), what was last predicted
    shown: float = 0.0
    is_cancelled: bool = False
    notes: list[str] = field(default_factory=list)
    original: Path | None = None
    results: list[Path] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def suffix(self) -> str:
        """What names the files of this step: nothing for the first, then -2, -3 and so on."""
        earlier = self.request.picture.earlier
        return f"-{len(earlier) + 1}" if earlier else ""

    def enter(self, phase: str) -> None:
        """Note that a phase begins, or goes on; raises Cancelled where nobody waits any more."""
        now = time.monotonic()
        if self.is_cancelled or now - self.asked > _SILENT_SECONDS:
            raise Cancelled
        if phase != self.phase:
            self.phase, self.since = phase, now

    def see(self, _call: int, _x: torch.Tensor, pred_xstart: torch.Tensor) -> None:
        """Note a network call; an ``Observer``. Raises Cancelled as ``enter``."""
        self.enter("running")
        self.calls += 1
        if time.monotonic() - self.shown > _PREVIEW_SECONDS:
            self.preview = np.concatenate(list(to_levels(pred_xstart)), axis=1)
            self.shown = time.monotonic()
        if self.calls == self.total:
            self.enter("writing")

    def seconds_left(self) -> int:
        """Estimate the time of the remaining network calls from the calls so far."""
        spent = time.monotonic() - self.since
        return round(spent / max(1, self.calls) * max(0, self.total - self.calls))

    def downloads(self) -> list[Path]:
        """Return the files to offer: results first, then those of this and of earlier steps."""
        folders = (self.folder, *self.request.picture.earlier)
        files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
        return list({file.name: file for file in [*self.results, *files]}.values())


class Worker:
    """The queue of jobs, one at a time, and the networks, loaded at the first job and kept.

    ``overrides`` are KEY=VALUE as test.py's ``--set`` takes them. Raises UserError where keys,
    device or checkpoints are wrong.
    """

    def __init__(self, conf_path: str, overrides: Sequence[str] = ()) -> None:
        self.conf = load_conf(conf_path, InpaintConf, overrides)
        if fetch_configuration(self.conf.model_path):
            self.conf = load_conf(conf_path, InpaintConf, overrides)
        get_device(self.conf.device)
        self._checkpoints = self._find_checkpoints()
        self._repaint: RePaint | None = None
        self._thread = ThreadPoolExecutor(1)
        self._jobs: list[Job] = []  # not finished

    def _find_checkpoints(self) -> dict[str, str]:
        return {key: check_network(path) for key, path in checkpoints_of(self.conf).items()}

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
            job.notes = [str(each.message) for each in caught if each.category is UserWarning]
            if job.request.hole == PAINTED:  # as the picture is seen, however its file is turned
                job.notes = [note for note in job.notes if f"{mask}: " not in note]
        except Exception as error:
            if not isinstance(error, UserError | Cancelled):
                traceback.print_exc()
            job.error = error
            shutil.rmtree(job.folder, ignore_errors=True)
        self._jobs.remove(job)
        job.preview = None
        job.finished = time.monotonic()

    def _make(self, job: Job, picture: str, mask: str) -> None:
        job.started = time.monotonic()
        found = self._find_checkpoints()
        if self._repaint is None or found != self._checkpoints:
            job.enter("loading")
            self._repaint = None  # both together may not fit into memory
            self._repaint, self._checkpoints = RePaint(self.conf), found
        job.enter("preparing")
        inputs = {"gt_path": picture, "mask_path": mask}
        here = {key: str(job.folder / name) for key, name in inputs.items() if name not in FAMILIES}
        paths = {key: str(job.folder / "out" / key) for key in RESULT_FOLDERS}
        conf = self._repaint.with_keys(keys_of(job) | inputs | here | {"paths": paths})
        plan = plan_run(conf, Team())
        # The download names its pictures from where it lies, and its results are marked with that.
        settings = plan.settings | {f"data.{key}": name for key, name in inputs.items()}
        batch_size = conf.data.batch_size
        job.total = network_calls(plan.jobs, batch_size, count_steps(plan.times)[0])
        job.enter("running")
        inpainter = self._repaint.inpainter.with_walk(conf, plan.times)
        for batch in Sampling(inpainter, batch_size, job.see).make(plan.jobs):
            for made in batch:
                write(job, made, conf, settings)
        write_repeat(conf, inputs, job.folder / f"repeat{job.suffix}.yml")


# ---- The files of a job --------------------------------------------------------------------------


def write_inputs(job: Job) -> tuple[str, str]:
    """Write picture and mask into the job's folder; return their names, or the mask's family.

    Raises UserError where the mask is missing or cannot be read.
    """
    request, path, mask = job.request, job.request.picture.path, f"mask{job.suffix}.png"
    if request.hole in FAMILIES:
        mask = request.hole
    elif request.hole == PAINTED:
        painted_mask(request.strokes, request.picture.size).save(job.folder / mask)
    elif not request.mask:
        raise UserError("no mask")
    else:
        read(request.mask)
        if request.mask_hole == "auto":
            is_layer = origin_of(read_upright(request.mask)).is_mostly_transparent
            request.mask_hole = "layer" if is_layer else "black"
        mask = Path(mask).stem + Path(request.mask).suffix.lower()
        shutil.copyfile(request.mask, job.folder / mask)
    picture = path.name if request.picture.earlier else f"picture{path.suffix.lower()}"
    shutil.copyfile(path, job.folder / picture)
    return picture, mask


def painted_mask(strokes: str | None, size: tuple[int, int]) -> Image.Image:
    """Return the mask of a photo of ``size`` from strokes, of another resolution: 0 = hole."""
    try:
        content = base64.b64decode((strokes or "").partition(",")[2])
        layer = Image.open(io.BytesIO(content), formats=["PNG"])
        alpha = layer.convert("RGBA").getchannel("A")
    except (OSError, SyntaxError, ValueError):  # absent, or not what the editor sends
        raise UserError("nothing painted") from None
    mask = alpha.resize(size).point(lambda level: 0 if level > 127 else 255)
    if mask.getextrema()[0]:
        raise UserError("nothing painted")
    return mask


def keys_of(job: Job) -> dict[str, Any]:
    """Return the YAML keys that a request sets, but for the files."""
    request = job.request
    is_layer = request.hole == UPLOADED and request.mask_hole == "layer"
    rule = {"layer": "alpha", "auto": "black"}.get(request.mask_hole, request.mask_hole)
    return {
        **(FAST if request.method == "fast" else {}),
        **({} if request.full_size else {"windows": False}),
        "output_format": "same" if request.full_size else "png",
        **{name: getattr(request, name) for name in ("seed", "full_size", "mask_grow")},
        "name": f"page{job.suffix}", "samples_per_image": request.samples,
        "mask_hole": rule if request.hole == UPLOADED else "black", "invert_mask": is_layer,
        "overview": False, "save_process": 0, "show_progress": False,
        "paste_known": True, "mask_hard": True,
        "offset": 0, "max_len": None, "random_flip": False, "drop_last": False,
    }  # fmt: skip


def write(job: Job, made: Made, conf: InpaintConf, settings: dict[str, str]) -> None:
    """Write a result as test.py does."""
    if made.problem:
        raise UserError(made.problem)
    result, picture = made.result(conf)
    unwanted = {"lrs"} | ({"gts"} if conf.full_size else set())
    folders = {key: None if key in unwanted else folder
               for key, folder in vars(conf.data.paths).items()}  # fmt: skip
    *inputs, path = write_result(
        folders, made.job.pair.name, result, picture.pixels, picture.mask,
        sample_name=made.job.name, mark=result_mark(settings, made.job, picture),
    )  # fmt: skip
    number = len(job.results) + 1 if job.request.samples > 1 else ""
    job.results.append(path.rename(job.folder / f"result{number}{job.suffix}{path.suffix}"))
    job.original = Path(conf.data.gt_path) if conf.full_size else inputs[-1]
    if not any(job.folder.glob("mask*")):  # it was drawn
        shutil.copyfile(inputs[0], job.folder / f"mask{job.suffix}.png")


def write_repeat(conf: InpaintConf, inputs: dict[str, str], path: Path) -> None:
    """Write the YAML that repeats a result; of a path of this machine it keeps the last part."""
    tree = conf_to_dict(conf) | {"show_progress": True}
    data = tree["data"]["eval"][conf.data.name]
    data.update(inputs)
    del data["paths"]
    for key in ("model_path", "classifier_path"):
        if Path(tree.get(key) or "").is_absolute():
            tree[key] = Path(tree[key]).name
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)
    note = (
        "# Put this file, the picture and the mask into the folder of test.py, and run there\n"
        f"# python test.py --conf_path {path.name}\n"
    )
    path.write_text(note + text, encoding="utf-8")
