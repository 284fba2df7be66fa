"""Jobs of the page: what a visitor asks for, the queue, and the files that a job leaves.

A job is planned and made as a run of test.py, and leaves a YAML that repeats it.
"""

import base64
import io
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from guided_diffusion import RePaint
from guided_diffusion.config.keys import FAST, RESULT_FOLDERS, InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.schema import conf_to_dict
from guided_diffusion.dist_util import Team, get_device
from guided_diffusion.errors import UserError
from guided_diffusion.io.images import origin_of, read_rgb
from guided_diffusion.io.results import write_image
from guided_diffusion.masks import FAMILIES
from guided_diffusion.models.hub import fetch_configuration
from guided_diffusion.run.plan import checkpoints_of, plan_run
from guided_diffusion.run.record import result_mark
from guided_diffusion.run.sampling import Made, Sampling
from guided_diffusion.script_util import check_network

JOB = "job-"  # how the names of their folders begin
# In the order of the page's controls.
SETTINGS = (*("hole", "mask", "mask_hole", "method", "samples", "seed", "full_size", "mask_grow"),)
RANGES = {"samples": (1, 4), "seed": (0, 2**31 - 1), "mask_grow": (0, 64)}
PAINTED, UPLOADED = "painted", "uploaded"
CHOICES = {
    "hole": (PAINTED, UPLOADED, *FAMILIES),
    "method": ("fast", "repaint"),
    "mask_hole": ("auto", "black", "alpha", "layer", "color"),
}


@dataclass(eq=False)
class Job:
    """A picture to inpaint, as the thread that works on it and the one that shows it see it.

    Its folder is the picture's, and holds the files of the steps that led to this picture, too.
    ``strokes`` are a PNG as a data URL, opaque where painted; ``size`` is the picture's width and
    height as a person sees it. Raises UserError that names the setting with a wrong type or value:
    programs may send anything.
    """

    picture: Path
    values: InitVar[Sequence[Any]]  # of SETTINGS; seed None: drawn
    strokes: str | None = None
    size: tuple[int, int] = (0, 0)
    phase: str = "preparing"  # then loading, preparing, running, writing
    since: float = field(default_factory=time.monotonic)  # start of the phase
    told: str = ""  # what was last told of it
    calls: int = 0
    total: int = 0  # 0 until the network runs
    predicted: torch.Tensor | None = None  # (N, C, S, S) in [-1, 1], by the last call
    is_cancelled: bool = False
    notes: list[str] = field(default_factory=list)
    original: Path | None = None
    results: list[Path] = field(default_factory=list)
    seconds: float = 0.0  # that it took
    work: Future | None = None

    def __post_init__(self, values: Sequence[Any]) -> None:
        self.settings = dict(zip(SETTINGS, values, strict=True))
        if self.settings["seed"] is None:
            self.settings["seed"] = secrets.randbelow(2**31)
        for name, known in CHOICES.items():
            if (got := self.settings[name]) not in known:
                raise UserError(key=name, expected=", ".join(known), got=repr(got))
        for name, (low, high) in RANGES.items():
            got = self.settings[name]
            if type(got) is not int or not low <= got <= high:
                expected = f"a whole number from {low} to {high}"
                raise UserError(key=name, expected=expected, got=repr(got))
        if type(got := self.settings["full_size"]) is not bool:
            raise UserError(key="full_size", expected="true or false", got=repr(got))
        self.folder = self.picture.parent
        earlier = len(list(self.folder.glob("repeat*.yml")))
        # What names the files of this step: nothing for the first, then -2, -3 and so on.
        self.suffix = f"-{earlier + 1}" if earlier else ""

    def enter(self, phase: str) -> None:
        """Note that a phase begins, or goes on; raises CancelledError where nobody waits."""
        if self.is_cancelled:
            raise CancelledError
        if phase != self.phase:
            self.phase, self.since = phase, time.monotonic()

    def see(self, _call: int, _x: torch.Tensor, pred_xstart: torch.Tensor) -> None:
        """Note a network call; an ``Observer``. Raises CancelledError as ``enter``."""
        self.enter("running")
        self.calls, self.predicted = self.calls + 1, pred_xstart
        if self.calls == self.total:
            self.enter("writing")

    def downloads(self) -> list[Path]:
        """Return the files to offer: results first, then those of this and of earlier steps."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return list(dict.fromkeys([*self.results, *files]))


class Worker:
    """The queue of jobs, one at a time, and the networks, loaded at the first job and kept.

    Jobs have their folders in ``folder``. ``overrides`` are KEY=VALUE as test.py's ``--set`` takes
    them. Raises UserError where keys, device or checkpoints are wrong.
    """

    def __init__(self, folder: Path, conf_path: str, overrides: Sequence[str] = ()) -> None:
        self.folder = folder
        self.conf = load_conf(conf_path, InpaintConf, overrides)
        if fetch_configuration(self.conf.model_path):
            self.conf = load_conf(conf_path, InpaintConf, overrides)
        get_device(self.conf.device)
        self._checkpoints = self._find_checkpoints()
        self._repaint: RePaint | None = None
        self._thread = ThreadPoolExecutor(1)
        self.jobs: list[Job] = []  # in their order, those that are not finished among them

    def _find_checkpoints(self) -> dict[str, str]:
        return {key: check_network(path) for key, path in checkpoints_of(self.conf).items()}

    def start(self, picture: Path, *request: Any) -> Job:
        """Put a job into the queue, with a copy of its picture; raises UserError.

        A picture that is a result comes with the files of the job that made it.
        """
        folder = Path(tempfile.mkdtemp("", JOB, self.folder))
        try:
            name = f"picture{picture.suffix.lower()}"
            if picture.parent.name.startswith(JOB):
                name = picture.name
                shutil.copytree(picture.parent, folder, dirs_exist_ok=True)
            else:
                shutil.copyfile(picture, folder / name)
            job = Job(folder / name, *request)
            job.work = self._thread.submit(self._work, job, write_mask(job))
        except BaseException:
            shutil.rmtree(folder)
            raise
        self.jobs = [*(each for each in self.jobs if not each.work.done()), job]
        return job

    def count_before(self, job: Job) -> int:
        """Return how many jobs have to finish before this one begins."""
        earlier = takewhile(lambda each: each is not job, self.jobs)
        return sum(not (each.is_cancelled or each.work.done()) for each in earlier)

    def _work(self, job: Job, mask: str) -> None:
        start = time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                if job.settings["hole"] == PAINTED:  # as the picture is seen, however it is turned
                    warnings.filterwarnings("ignore", f".*{mask}: ")
                self._make(job, mask)
        except BaseException:
            shutil.rmtree(job.folder, ignore_errors=True)
            raise
        job.notes = [str(each.message) for each in caught if each.category is UserWarning]
        job.seconds = time.monotonic() - start

    def _make(self, job: Job, mask: str) -> None:
        found = self._find_checkpoints()
        if self._repaint is None or found != self._checkpoints:
            job.enter("loading")
            self._repaint = None  # both together may not fit into memory
            self._repaint, self._checkpoints = RePaint(self.conf), found
        job.enter("preparing")
        inputs = {"gt_path": job.picture.name, "mask_path": mask}
        here = {key: str(job.folder / name) for key, name in inputs.items() if name not in FAMILIES}
        paths = {key: str(job.folder / "out" / key) for key in RESULT_FOLDERS}
        conf = self._repaint.with_keys(keys_of(job) | inputs | here | {"paths": paths})
        plan = plan_run(conf, Team())
        # The download names its pictures from where it lies, and its results are marked with that.
        settings = plan.settings | {f"data.{key}": name for key, name in inputs.items()}
        job.total = plan.network_calls(plan.jobs)
        if not job.total:
            raise UserError("nothing open")
        job.enter("running")
        inpainter = self._repaint.inpainter.with_walk(conf, plan.times)
        for batch in Sampling(inpainter, conf.data.batch_size, job.see).make(plan.jobs):
            for made in batch:
                write(job, made, conf, settings)
        write_repeat(conf, inputs, job.folder / f"repeat{job.suffix}.yml")


# ---- The files of a job --------------------------------------------------------------------------


def write_mask(job: Job) -> str:
    """Write the mask of a job, and decide what its hole is; return its name, or its family.

    Raises UserError where the mask is missing or cannot be read.
    """
    settings, mask = job.settings, f"mask{job.suffix}.png"
    if settings["hole"] != UPLOADED:
        settings["mask_hole"] = "black"
        if settings["hole"] in FAMILIES:
            return settings["hole"]
        painted_mask(job.strokes, job.size).save(job.folder / mask)
        return mask
    if not (file := settings["mask"]):
        raise UserError("no mask")
    origin = origin_of(read_rgb(file))
    if settings["mask_hole"] == "auto":
        kind = "layer" if origin.is_mostly_transparent else "alpha"
        settings["mask_hole"] = kind if origin.is_transparent else "black"
    mask = f"mask{job.suffix}{Path(file).suffix.lower()}"
    shutil.copyfile(file, job.folder / mask)
    return mask


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
    """Return the YAML keys that a job sets, but for the files."""
    settings = job.settings
    is_whole, is_layer = settings["full_size"], settings["mask_hole"] == "layer"
    return {
        **(FAST if settings["method"] == "fast" else {}),
        **({} if is_whole else {"windows": False}),
        **({"depth_min": 0.0, "depth_max": 0.0} if job.suffix else {}),  # a result has all levels
        "output_format": "same" if is_whole else "png",
        **{name: settings[name] for name in ("seed", "full_size", "mask_grow")},
        "name": f"page{job.suffix}", "samples_per_image": settings["samples"],
        "mask_hole": "alpha" if is_layer else settings["mask_hole"], "invert_mask": is_layer,
        "overview": False, "save_process": 0, "show_progress": False,
        "paste_known": True, "mask_hard": True,
        "offset": 0, "max_len": None, "random_flip": False, "drop_last": False,
    }  # fmt: skip


def write(job: Job, made: Made, conf: InpaintConf, settings: dict[str, str]) -> None:
    """Write a result as test.py does, and what it was made from where that is no file yet."""
    if made.problem:
        raise UserError(made.problem)
    result, picture = made.result(conf)
    number = len(job.results) + 1 if job.settings["samples"] > 1 else ""
    path = job.folder / f"result{number}{job.suffix}{Path(made.job.name).suffix}"
    write_image(path, result, mark=result_mark(settings, made.job, picture))
    job.results.append(path)
    if job.settings["hole"] in FAMILIES:
        write_image(job.folder / f"mask{job.suffix}.png", picture.mask)
    job.original = job.picture
    if not conf.full_size:
        job.original = job.folder / "out" / "square.png"
        write_image(job.original, picture.pixels)


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
