"""What a run over many images has to do, before a network is loaded; its record, and resuming.

Every result hangs on its seed and its image alone, so the work may be cut up in any way: into
batches of any size, over processes, and again after an interruption. A result is a PNG marked with
the fingerprint of all it was made from; resuming needs to know no more than that.
"""

import contextlib
import dataclasses
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from guided_diffusion import dist_util
from guided_diffusion.accel.accelerate import precision_on
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import read_yaml
from guided_diffusion.config.schema import conf_from_dict, conf_to_dict, result_settings
from guided_diffusion.errors import StoppedError, UserError
from guided_diffusion.image_datasets import (
    Handling,
    Pair,
    Photo,
    check_pairs,
    load_pair,
    load_photo,
    pair_images,
    sample_names,
    warn_of_extremes,
    warn_of_kinds,
)
from guided_diffusion.io.files import (
    FileStamp,
    check_folder,
    refuse_inside,
    refuse_overwriting,
    stamp_of,
    write_text_atomic,
)
from guided_diffusion.io.results import JPEG_SUFFIXES, is_written, result_path
from guided_diffusion.run.full_size import Cut, find_cuts, known_in
from guided_diffusion.run.windows import window_places
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import (
    check_network,
    create_gaussian_diffusion,
    create_schedule,
)

SAMPLE_SEED_STRIDE = 1_000_003  # sample j of image k: seed + k + j · this, so that none coincide


@dataclass(frozen=True)
class Job:
    """One result to make: a sample of an image."""

    pair: Pair
    name: str  # of its PNG
    seed: int


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before a network is loaded."""

    conf: InpaintConf  # with its seed
    times: list[int]
    jobs: list[Job]  # all of the run
    todo: list[Job]  # without those that an earlier run has finished
    checkpoints: dict[str, str]  # the fingerprint of each, by its YAML key
    stamps: dict[str, FileStamp]  # their size, time and inode before they were read, by path
    settings: dict[str, str]  # all that results depend on, but for seeds and pictures
    earlier: dict[str, Any]  # what the run that is resumed noted about itself


@dataclass
class Summary:
    """What a run did."""

    finished: int = 0  # results written
    seconds: float = 0.0  # of sampling and writing
    failures: dict[str, str] = field(default_factory=dict)  # the reason, by the result's name
    in_float32: list[str] = field(default_factory=list)  # results that reduced precision lost


# ---- Planning ------------------------------------------------------------------------------------


def plan_run(conf: InpaintConf, team: dist_util.Team, *, resume: bool = False) -> Plan:
    """Check everything that can be wrong with a run, cheapest first, and list what is to be done.

    With ``resume``, results that are complete and were made with the same settings are left out.
    Raises UserError for whatever would fail later, and where ``resume`` meets other settings.
    """
    times = create_schedule(conf, create_gaussian_diffusion(conf))
    device = dist_util.get_device(conf.device)
    checkpoints = checkpoints_of(conf)
    stamps = {path: stamp for path in checkpoints.values() if (stamp := stamp_of(path))}
    for folder in (conf.log_dir, *result_folders(conf).values()):
        refuse_inside(folder, conf.data.gt_path, key="gt_path")
        refuse_inside(folder, conf.data.mask_path, key="mask_path")
    pairs = pair_images(
        conf.data.gt_path,
        conf.data.mask_path,
        all_formats=conf.all_formats,
        offset=conf.data.offset,
        max_len=conf.data.max_len,
        samples_per_image=conf.samples_per_image,
    )
    checkpoints = {key: check_network(path) for key, path in checkpoints.items()}
    recorded = _read_record(conf) if resume and team.is_main else None
    seed = conf.seed
    if seed is None:
        seed = recorded["seed"] if recorded else secrets.randbelow(2**31)
    conf = dataclasses.replace(conf, seed=team.from_main("seed", seed))
    settings = settings_of_results(conf, checkpoints, device.type)
    jobs = _list_jobs(conf, pairs)
    finished = []
    if team.is_main:
        _check_folders(conf, jobs)
        _refuse_replacing_a_configuration(conf)
        refuse_overwriting(_files_to_write(conf, jobs), _files_to_read(conf, pairs))
        if recorded:
            _refuse_other_settings(conf, recorded["settings"], settings)
        _check_and_announce(conf, pairs, times)
        finished = _finished(conf, jobs, settings) if resume else []
    view = [settings, [job.name for job in jobs]]
    words = team.from_main("work", {"view": view, "finished": finished})
    if words["view"] != view:
        problem = "this process has other pictures, checkpoints or devices than the first"
        raise UserError(problem, key=f"process {team.rank}")
    todo = [job for job in jobs if job.name not in set(words["finished"])]
    earlier = recorded["record"] if recorded else {}
    return Plan(conf, times, jobs, todo, checkpoints, stamps, settings, earlier)


def refuse_changed(plan: Plan) -> None:
    """Raise ``StoppedError`` where a checkpoint is another file than when the run was planned.

    One that was only removed is no matter: what is in memory is what was checked.
    """
    for path, stamp in plan.stamps.items():
        if stamp_of(path) not in (None, stamp):
            raise StoppedError("has changed since this run began to read it", path=path)


def checkpoints_of(conf: InpaintConf) -> dict[str, str]:
    """Return the paths of the checkpoints that a run loads by their YAML keys."""
    keys = ("model_path", "classifier_path") if conf.guided else ("model_path",)
    return {key: getattr(conf, key) for key in keys}


def result_folders(conf: InpaintConf) -> dict[str, str]:
    """Return the folders of results by their YAML keys, without those that are not wanted."""
    return {key: folder for key, folder in vars(conf.data.paths).items() if folder}


def _check_folders(conf: InpaintConf, jobs: Sequence[Job]) -> None:
    """Refuse folders that could not be made or written into; warn of a disk that is nearly full."""
    for folder in map(Path, {*result_folders(conf).values(), conf.log_dir}):
        there = check_folder(folder)
        for name in {name for job in jobs for name in (job.name, job.pair.name)}:
            if (folder / name).is_dir():
                raise UserError("a folder is in the place of a result", path=folder / name)
    needed, free = len(jobs) * 4 * 3 * conf.image_size**2, shutil.disk_usage(there).free
    if free < needed:
        text = f"{there}: {free >> 20} MiB are free, and results may take {needed >> 20}"
        warnings.warn(text, stacklevel=3)


def _files_to_write(conf: InpaintConf, jobs: Sequence[Job]) -> Iterator[Path]:
    """Yield the pictures that a run writes, but for further pages of the overview."""
    log = Path(conf.log_dir)
    for job in jobs:
        for key, folder in result_folders(conf).items():
            yield Path(folder) / (job.name if key == "srs" else job.pair.name)
        if conf.save_process:
            stem = Path(job.name).stem
            yield from (log / "process" / f"{stem}{suffix}" for suffix in (".png", ".gif"))
    if conf.overview:
        yield log / "overview.png"


def _files_to_read(conf: InpaintConf, pairs: Sequence[Pair]) -> Iterator[str]:
    for pair in pairs:
        yield pair.gt_path
        if pair.mask_file:
            yield pair.mask_file
    yield from filter(None, (conf.model_path, conf.classifier_path))


def _check_and_announce(conf: InpaintConf, pairs: Sequence[Pair], times: list[int]) -> None:
    """Decode every picture and mask, and say what share of them will be generated."""
    if conf.full_size:
        shares, work = _check_photos(conf, pairs, count_steps(times)[0])
    else:
        work = ""
        shares = check_pairs(
            pairs,
            conf.image_size,
            invert_mask=conf.invert_mask,
            seed=conf.seed,
            show_progress=conf.show_progress,
            handling=handling_of(conf),
        )
    low, mean, high = min(shares), sum(shares) / len(shares), max(shares)
    spread = "" if low == high else f" ({low:.1%} to {high:.1%})"
    images = "1 image" if len(pairs) == 1 else f"{len(pairs)} images"
    print(f"{images}, {mean:.1%} of the pixels to generate{spread}, seed {conf.seed}{work}")


def _check_photos(conf: InpaintConf, pairs: Sequence[Pair], steps: int) -> tuple[list[float], str]:
    """Look at every photo as it is; return its share of hole, and in words what is to be done.

    ``steps`` is how often a walk predicts.
    """
    shares, notes, cuts, calls = [], [], 0, 0
    hidden = not conf.show_progress
    for pair in tqdm(pairs, "checking photos", leave=False, delay=2, disable=hidden):
        photo = load_full(conf, pair)
        shares.append(1 - float(photo.known.mean()) / 255)
        notes += [(pair.gt_path, note) for note in (photo.dim, photo.lost)]
        notes.append((pair.mask_path, photo.odd))
        found = find_cuts(photo.known, conf.image_size)
        cuts += len(found)
        calls += steps * sum(_windows_of(conf, photo.known, cut) for cut in found)
    warn_of_extremes(pairs, shares)
    warn_of_kinds(notes)
    times = conf.samples_per_image
    return shares, f", {cuts * times} cuts, at most {calls * times:,} network calls"


def _windows_of(conf: InpaintConf, known: np.ndarray, cut: Cut) -> int:
    """Return how many network calls a step of a cut takes."""
    if not conf.windows or cut.side <= conf.image_size:
        return 1
    places = window_places(known_in(known, cut) == 255, conf.image_size)
    return -(-len(places) // conf.data.batch_size)


def _list_jobs(conf: InpaintConf, pairs: Sequence[Pair]) -> list[Job]:
    """Return all results of the run, in the order in which they are made."""
    order = list(pairs)
    if not conf.data.deterministic:
        np.random.default_rng(conf.seed).shuffle(order)
    if conf.data.drop_last:
        order = order[: len(order) - len(order) % conf.data.batch_size]
    if not order:
        key = f"data.eval.{conf.data.name}.drop_last and data.eval.{conf.data.name}.batch_size"
        raise UserError(f"no batch is full with {len(pairs)} images", key=key)
    return [
        Job(pair, name, conf.seed + pair.index + number * SAMPLE_SEED_STRIDE)
        for pair in order
        for number, name in enumerate(result_names(conf, pair))
    ]


def walked_by(conf: InpaintConf) -> str:
    """Name what takes the network calls of a walk, once each: an image, or a part of a photo."""
    if not conf.full_size:
        return "an image"
    return "a window" if conf.windows else "a cut"


def result_names(conf: InpaintConf, pair: Pair) -> list[str]:
    """Return the file names of an image's samples: PNGs, or JPEGs where that is asked for."""
    names = sample_names(pair.name, conf.samples_per_image)
    suffix = Path(pair.gt_path).suffix
    if conf.output_format == "same" and suffix.lower() in JPEG_SUFFIXES:
        return [f"{Path(name).stem}{suffix}" for name in names]
    return names


def load_full(conf: InpaintConf, pair: Pair) -> Photo:
    """Read an image and its mask at the image's own size."""
    return load_photo(
        pair, invert_mask=conf.invert_mask, seed=conf.seed, handling=handling_of(conf)
    )


def load_inputs(conf: InpaintConf, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask as results keep them, both uint8 (S, S, 3), or (H, W, 3).

    Both are mirrored where ``random_flip`` says.
    """
    if conf.full_size:
        photo = load_full(conf, pair)
        return photo.pixels, np.broadcast_to(photo.known[:, :, None], photo.pixels.shape)
    flip = False
    if conf.data.random_flip:
        own = torch.Generator().manual_seed(conf.seed + pair.index)
        flip = bool(torch.rand((), generator=own) < 0.5)
    invert, seed = conf.invert_mask, conf.seed
    return load_pair(
        pair,
        conf.image_size,
        flip=flip,
        invert_mask=invert,
        seed=seed,
        handling=handling_of(conf),
    )


def handling_of(conf: InpaintConf) -> Handling:
    """Return how the run's files are read where a key asks for other than the usual."""
    hole = None if conf.mask_hole == "black" else conf.mask_hole
    return Handling(hole, conf.mask_grow, conf.mask_hard, conf.depth)


# ---- The record, and what resuming makes of it ---------------------------------------------------


def settings_of_results(
    conf: InpaintConf, checkpoints: dict[str, str], device_type: str
) -> dict[str, str]:
    """Return what results depend on by dotted key; ``checkpoints`` are fingerprints by key."""
    settings = {**result_settings(conf), **checkpoints, "device": device_type}
    return dict(sorted(settings.items()))


def result_mark(settings: dict[str, str], job: Job, gt_u8: np.ndarray, mask_u8: np.ndarray) -> str:
    """Return the fingerprint of everything that a result is made from."""
    digest = hashlib.sha256(repr((settings, job.seed)).encode())
    for pixels in (gt_u8, mask_u8):
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def _finished(conf: InpaintConf, jobs: Sequence[Job], settings: dict[str, str]) -> list[str]:
    """Return the names of results whose files are all whole and what this run would write."""
    folders = result_folders(conf)

    def is_finished(job: Job) -> bool:
        if not result_path(folders["srs"], job.name).exists():
            return False
        pictures = load_inputs(conf, job.pair)
        mark = result_mark(settings, job, *pictures)
        return is_written(folders, job.pair.name, *pictures, sample_name=job.name, mark=mark)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        title, hidden = "looking for finished results", not conf.show_progress
        answers = tqdm(pool.map(is_finished, jobs), title, len(jobs), delay=2, disable=hidden)
        return [job.name for job, answer in zip(jobs, answers, strict=True) if answer]


def _record_path(conf: InpaintConf) -> Path:
    return Path(conf.log_dir) / "run.yml"


def _refuse_replacing_a_configuration(conf: InpaintConf) -> None:
    """Raise UserError where the record would take the place of a YAML that somebody wrote."""
    path, tree = _record_path(conf), None
    if os.path.lexists(path):
        with contextlib.suppress(UserError):
            tree = read_yaml(path)
    if isinstance(tree, dict) and "model_path" in tree and "record" not in tree:
        problem = "the record of this run would overwrite this configuration; rename it"
        raise UserError(problem, path=path)


def _read_record(conf: InpaintConf) -> dict[str, Any] | None:
    """Return an earlier run's seed, settings and notes about itself; None where there was none."""
    path = _record_path(conf)
    if not os.path.lexists(path):
        return None
    try:
        tree = read_yaml(path)
        earlier, record = conf_from_dict(tree, InpaintConf, path, is_complete=True), tree["record"]
        checkpoints = {key: str(value) for key, value in record["checkpoints"].items()}
        settings = settings_of_results(earlier, checkpoints, str(record["device_type"]))
        if earlier.seed is None:
            raise KeyError("seed")
        return {"seed": earlier.seed, "settings": settings, "record": record}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = "is not the record of a run; remove it or run without --resume"
        raise UserError(problem, path=path) from error


def _refuse_other_settings(
    conf: InpaintConf, earlier: dict[str, str], settings: dict[str, str]
) -> None:
    keys = sorted(settings.keys() | earlier.keys())
    differing = [key for key in keys if settings.get(key) != earlier.get(key)]
    if differing:
        raise UserError(
            "the results there were made with other settings, and a run does not mix them; run "
            "without --resume to overwrite them, or set back",
            path=_record_path(conf),
            key=" and ".join(differing),
            expected=", ".join(earlier.get(key, "nothing") for key in differing),
            got=", ".join(settings.get(key, "nothing") for key in differing),
        )


def write_record(plan: Plan, state: str, summary: Summary) -> None:
    """Write ``run.yml``: the settings, which run again as they are, and what was noted."""
    conf, device = plan.conf, dist_util.get_device(plan.conf.device)
    is_cuda = device.type == "cuda"
    last = {key: plan.earlier[key] for key in ("made", "seconds_an_image") if key in plan.earlier}
    if summary.finished:
        seconds = round(summary.seconds / summary.finished, 3)
        last = {"made": summary.finished, "seconds_an_image": seconds}
    record = {
        "state": state,
        "device_type": device.type,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "processes": dist_util.world_size(),
        "precision": precision_on(device, conf.precision, conf.use_fp16)
        or "float32, torch's default",
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "checkpoints": plan.checkpoints,
        f"network_calls_{walked_by(conf).replace(' ', '_')}": count_steps(plan.times)[0],
        **last,
        "failures": summary.failures,
        "again_in_float32": summary.in_float32,
        "seeds": {job.name: job.seed for job in plan.jobs},
    }
    path = _record_path(conf)
    text = yaml.safe_dump({**conf_to_dict(conf), "record": record}, sort_keys=False, width=1000)
    command = f"python test.py --conf_path {shlex.quote(str(path))}"
    write_text_atomic(path, f"# {command} repeats this run.\n{text}")
