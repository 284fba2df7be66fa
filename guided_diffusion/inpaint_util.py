"""One run over many images: what is to be done, batches, ranks, retries, resuming, the record.

Every result hangs on its seed and its image alone, so the work may be cut up in any way: into
batches of any size, over processes, and again after an interruption. A result is a PNG marked with
the fingerprint of the settings it was made with; resuming needs to know no more than that.
"""

import dataclasses
import hashlib
import os
import platform
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from guided_diffusion import UserError, dist_util
from guided_diffusion.conf import InpaintConf, conf_from_dict, conf_to_dict
from guided_diffusion.gaussian_diffusion import condition
from guided_diffusion.image_datasets import (
    Pair,
    check_pairs,
    load_pair,
    mask_to_tensor,
    pair_images,
    sample_names,
    to_model_range,
)
from guided_diffusion.image_writer import (
    ProcessFrame,
    finished_rows,
    read_mark,
    remove_leftovers,
    result_path,
    to_uint8,
    write_film_strip,
    write_gif,
    write_overview,
    write_result,
    write_text_atomic,
)
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import Inpainter, create_gaussian_diffusion, create_schedule

SAMPLE_SEED_STRIDE = 1_000_003  # sample j of image k: seed + k + j · this, so that none coincide

# Settings that change how a run goes, but not what a result looks like.
_WITHOUT_EFFECT_ON_RESULTS = (
    "name", "show_progress", "overview", "save_process", "device", "data.batch_size",
    "data.deterministic", "data.drop_last", "data.offset", "data.max_len", "data.paths.srs",
    "data.paths.lrs", "data.paths.gts", "data.paths.gt_keep_masks",
)  # fmt: skip


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
    mark: str  # the fingerprint of everything that results depend on


@dataclass
class Summary:
    """What a run did."""

    finished: int = 0  # results written
    image_calls: int = 0  # network calls, counted for every image of a batch
    seconds: float = 0.0  # of sampling and writing
    failures: list[str] = field(default_factory=list)  # a line for each result that failed


# ---- Planning ------------------------------------------------------------------------------------


def plan_run(conf: InpaintConf, *, resume: bool = False) -> Plan:
    """Check everything that can be wrong with a run, cheapest first, and list what is to be done.

    With ``resume``, results that are complete and were made with the same settings are left out.
    Raises UserError for whatever would fail later, and where ``resume`` meets other settings.
    """
    times = create_schedule(conf, create_gaussian_diffusion(conf))
    device = dist_util.get_device(conf.device)
    paths = {"model_path": conf.model_path}
    if conf.guided:
        paths["classifier_path"] = conf.classifier_path
    for path in paths.values():
        dist_util.check_beginning(path)
    checkpoints = {key: dist_util.fingerprint(path) for key, path in paths.items()}
    data = conf.data
    pairs = pair_images(
        data.gt_path,
        data.mask_path,
        offset=data.offset,
        max_len=data.max_len,
        samples_per_image=conf.samples_per_image,
    )
    for folder in result_folders(conf).values():
        _check_writable(Path(folder))
    recorded = _read_record(_record_path(conf)) if resume else None
    conf = dataclasses.replace(conf, seed=_choose_seed(conf, recorded))
    settings = _settings_of_results(conf, checkpoints, device.type)
    if recorded:
        _refuse_other_settings(_record_path(conf), recorded, settings)
    mark = hashlib.sha256(repr(settings).encode()).hexdigest()
    if dist_util.is_main():
        _check_and_announce(conf, pairs)
    jobs = _list_jobs(conf, pairs)
    finished = _finished(conf, jobs, mark) if resume and dist_util.is_main() else set()
    finished = dist_util.from_main(finished)
    todo = [job for job in jobs if job.name not in finished]
    return Plan(conf, times, jobs, todo, checkpoints, mark)


def result_folders(conf: InpaintConf) -> dict[str, str]:
    """Return the folders of results by their YAML keys, without those that are not wanted."""
    return {key: folder for key, folder in vars(conf.data.paths).items() if folder}


def _record_path(conf: InpaintConf) -> Path:
    return Path(conf.log_dir) / "run.yml"


def _check_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written into."""
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise UserError("results cannot be written there: not a folder", path=there)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError("results cannot be written there: no permission", path=there)


def _choose_seed(conf: InpaintConf, recorded: dict[str, Any] | None) -> int:
    """Return the seed of the YAML, of the run that is resumed, or a new one; equal in all ranks."""
    if conf.seed is not None:
        return conf.seed
    if recorded:
        return recorded["seed"]
    return dist_util.from_main(secrets.randbelow(2**31))


def _check_and_announce(conf: InpaintConf, pairs: Sequence[Pair]) -> None:
    """Decode every picture and mask, and say what share of them will be generated."""
    shares = check_pairs(
        pairs,
        conf.image_size,
        invert_mask=conf.invert_mask,
        seed=conf.seed,
        show_progress=conf.show_progress,
    )
    low, mean, high = min(shares), sum(shares) / len(shares), max(shares)
    spread = "" if low == high else f" ({low:.1%} to {high:.1%})"
    print(f"{len(pairs)} images, {mean:.1%} of their pixels to generate{spread}, seed {conf.seed}")


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
        for number, name in enumerate(sample_names(pair.name, conf.samples_per_image))
    ]


# ---- The record, and what resuming makes of it ---------------------------------------------------


def _settings_of_results(
    conf: InpaintConf, checkpoints: dict[str, str], device_type: str
) -> dict[str, str]:
    """Return everything that a result depends on, by dotted key."""

    def flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, str(value)

    tree = conf_to_dict(conf)
    tree["data"] = tree["data"]["eval"][conf.data.name]
    settings = {k: v for k, v in flat(tree) if k not in _WITHOUT_EFFECT_ON_RESULTS}
    contents = {f"content of {key}": value for key, value in checkpoints.items()}
    return dict(sorted({**settings, **contents, "device": device_type}.items()))


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return what an earlier run noted: its seed and the settings of its results; None if none."""
    if not path.exists():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        conf, record = conf_from_dict(tree, InpaintConf, path), tree["record"]
        settings = _settings_of_results(conf, record["checkpoints"], record["device_type"])
        return {"seed": conf.seed, "settings": settings}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, UserError, KeyError, TypeError) as error:
        problem = "is not the record of a run; remove it or run without --resume"
        raise UserError(problem, path=path) from error


def _refuse_other_settings(path: Path, recorded: dict[str, Any], settings: dict[str, str]) -> None:
    earlier = recorded["settings"]
    keys = sorted(settings.keys() | earlier.keys())
    differing = [key for key in keys if settings.get(key) != earlier.get(key)]
    if differing:
        raise UserError(
            "results there were made with other settings, and a run cannot mix them; run without "
            "--resume to overwrite them, or set back",
            path=path,
            key=" and ".join(differing),
            expected=", ".join(earlier.get(key, "nothing") for key in differing),
            got=", ".join(settings.get(key, "nothing") for key in differing),
        )


def _finished(conf: InpaintConf, jobs: Sequence[Job], mark: str) -> set[str]:
    """Return the names of results whose files are all whole, made with the settings of ``mark``."""
    folders = result_folders(conf)
    inpainted = folders.pop("srs")
    names = set()
    for job in tqdm(jobs, "looking for finished results", delay=2, leave=False):
        inputs = [result_path(folder, job.pair.name) for folder in folders.values()]
        if read_mark(result_path(inpainted, job.name)) == mark and None not in map(
            read_mark, inputs
        ):
            names.add(job.name)
    return names


def _write_record(plan: Plan, device: torch.device, summary: Summary | None = None) -> None:
    """Write ``run.yml``: the settings, which run again as they are, and what was noted."""
    conf = plan.conf
    device_name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    )
    record = {
        "state": "started" if summary is None else "failed" if summary.failures else "finished",
        "device_type": device.type,
        "device_name": device_name,
        "processes": dist_util.world_size(),
        "precision": conf.precision or ("float16" if conf.use_fp16 else "float32, torch's default"),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "checkpoints": plan.checkpoints,
        "network_calls_an_image": count_steps(plan.times)[0],
        "seeds": {job.name: job.seed for job in plan.jobs},
    }
    if summary is not None:
        record["images_made_last"] = summary.finished
        record["seconds_an_image"] = round(summary.seconds / max(1, summary.finished), 3)
        record["failures"] = summary.failures
    text = yaml.safe_dump({**conf_to_dict(conf), "record": record}, sort_keys=False)
    heading = f"# python test.py --conf_path {_record_path(conf)} repeats this run.\n"
    write_text_atomic(_record_path(conf), heading + text)


# ---- Running -------------------------------------------------------------------------------------


def run(plan: Plan, inpainter: Inpainter) -> Summary:
    """Make all results of ``plan`` that are still to do, this process its share of them.

    A result that fails is noted and the others go on. Returns the sum over all processes, in every
    process. Raises UserError where nothing more can be written.
    """
    worker = _Worker(plan, inpainter)
    main = dist_util.is_main()
    if main:
        for folder in result_folders(plan.conf).values():
            remove_leftovers(folder)
        _write_record(plan, inpainter.device)
    start = time.perf_counter()
    try:
        worker.run(plan.todo[dist_util.rank() :: dist_util.world_size()])
    except KeyboardInterrupt:
        done = len(plan.jobs) - len(plan.todo) + worker.done.add()
        raise KeyboardInterrupt(
            f"{done} of {len(plan.jobs)} results are in {plan.conf.log_dir}; the same command "
            "with --resume makes the others"
        ) from None
    parts = dist_util.from_all(worker.summary)
    total = Summary(
        sum(part.finished for part in parts),
        sum(part.image_calls for part in parts),
        time.perf_counter() - start,
        [line for part in parts for line in part.failures],
    )
    if main:
        if plan.conf.overview:
            images = dict.fromkeys(job.pair.name for job in plan.jobs)
            names = [(name, sample_names(name, plan.conf.samples_per_image)) for name in images]
            sheet = Path(plan.conf.log_dir) / "overview.png"
            write_overview(sheet, finished_rows(result_folders(plan.conf), names))
        _write_record(plan, inpainter.device, total)
    return total


def describe(plan: Plan, summary: Summary) -> str:
    """Say in one line where the results are, how many, and what they took."""
    earlier = len(plan.jobs) - len(plan.todo)
    parts = [f"{summary.finished} images"]
    if earlier:
        parts.append(f"{earlier} finished earlier")
    if summary.failures:
        parts.append(f"{len(summary.failures)} failed")
    if summary.finished:
        calls = count_steps(plan.times)[0]
        each = summary.seconds / summary.finished
        parts.append(f"{calls} network calls and {each:.1f} s an image")
    return f"{plan.conf.log_dir}: {', '.join(parts)}"


@dataclass
class _Batch:
    """What the loop made of some jobs."""

    samples: np.ndarray  # uint8 (N, S, S, 3)
    lost_at: list[int | None]  # the network call that gave no finite number, counted from 1
    frames: list[tuple[int, np.ndarray, np.ndarray]]  # t, x_t, x_0 along the way


class _Worker:
    """One process's share of a run."""

    def __init__(self, plan: Plan, inpainter: Inpainter) -> None:
        self.plan, self.conf, self.inpainter = plan, plan.conf, inpainter
        self.batch_size = plan.conf.data.batch_size
        self.calls = count_steps(plan.times)[0]
        self.summary = Summary()
        self.done = dist_util.SharedCounter("results")
        self.quiet = not (plan.conf.show_progress and dist_util.is_main())

    def run(self, jobs: list[Job]) -> None:
        """Make the results of ``jobs`` in batches, smaller ones where memory runs out."""
        with tqdm(
            total=len(self.plan.todo), desc="images", unit="image", disable=self.quiet
        ) as bar:
            while jobs:
                batch = jobs[: self.batch_size]
                try:
                    self._make(batch)
                except torch.cuda.OutOfMemoryError:
                    self._halve(len(batch))
                    continue
                jobs = jobs[len(batch) :]
                bar.update(self.done.add(len(batch)) - bar.n)
            while not self.quiet and bar.n < bar.total:  # the other processes' share
                time.sleep(0.2)
                bar.update(self.done.add() - bar.n)

    def _halve(self, size: int) -> None:
        if size == 1:
            raise UserError(
                "one picture alone does not fit into the GPU's memory", key="batch_size"
            )
        torch.cuda.empty_cache()
        self.batch_size = size // 2
        warnings.warn(
            f"batch_size: {size} pictures at once do not fit into memory, going on with "
            f"{self.batch_size}",
            stacklevel=2,
        )

    def _make(self, jobs: list[Job]) -> None:
        """Make and write one batch; what fails is noted."""
        loaded = [(job, pictures) for job in jobs if (pictures := self._load(job)) is not None]
        if not loaded:
            return
        jobs = [job for job, _ in loaded]
        gt_u8, mask_u8 = (np.stack([pictures[i] for _, pictures in loaded]) for i in (0, 1))
        batch = self._sample(self.inpainter, jobs, gt_u8, mask_u8)
        if self.inpainter.is_reduced and any(batch.lost_at):
            warnings.warn("no finite number in reduced precision; again in float32", stacklevel=2)
            self.inpainter = self.inpainter.in_float32()
            batch = self._sample(self.inpainter, jobs, gt_u8, mask_u8)
        for i, job in enumerate(jobs):
            if batch.lost_at[i]:
                self._fail(job, f"no finite number from network call {batch.lost_at[i]} on")
                continue
            pictures = (batch.samples[i], gt_u8[i], mask_u8[i])
            folders, names = result_folders(self.conf), (job.pair.name, job.name)
            self._write_process(job, [ProcessFrame(t, x[i], x0[i]) for t, x, x0 in batch.frames])
            write_result(folders, names[0], *pictures, sample_name=names[1], mark=self.plan.mark)
            self.summary.finished += 1

    def _load(self, job: Job) -> tuple[np.ndarray, np.ndarray] | None:
        """Read an image and its mask, mirrored where ``random_flip`` says; None if that fails."""
        flip = False
        if self.conf.data.random_flip:
            own = torch.Generator().manual_seed(self.conf.seed + job.pair.index)
            flip = bool(torch.rand((), generator=own) < 0.5)
        size, invert, seed = self.conf.image_size, self.conf.invert_mask, self.conf.seed
        try:
            return load_pair(job.pair, size, flip=flip, invert_mask=invert, seed=seed)
        except UserError as error:
            self._fail(job, str(error))
            return None

    @torch.inference_mode()
    def _sample(
        self, inpainter: Inpainter, jobs: Sequence[Job], gt_u8: np.ndarray, mask_u8: np.ndarray
    ) -> _Batch:
        device = inpainter.device
        gt = torch.stack([to_model_range(picture) for picture in gt_u8]).to(device)
        mask = torch.stack([mask_to_tensor(picture) for picture in mask_u8]).to(device)
        wanted = self._wanted_transitions()
        x, pred, frames = gt, gt, []
        not_finite = torch.zeros(len(jobs), dtype=torch.int64, device=device)  # calls since
        steps = inpainter.steps(gt, mask, [job.seed for job in jobs])
        with tqdm(
            total=self.calls, desc="network", unit="call", leave=False, disable=self.quiet
        ) as bar:
            for number, step in enumerate(steps):
                x = step.x
                if step.pred_xstart is not None:
                    pred = step.pred_xstart
                    not_finite += x.flatten(1).isfinite().logical_not().any(dim=1)
                    self.summary.image_calls += len(jobs)
                    bar.update()
                if number in wanted:
                    frames.append((step.t, to_uint8(x), to_uint8(pred)))
        if self.conf.paste_known:
            x = condition(x, gt, mask)
        lost_at = [self.calls - count + 1 if count else None for count in not_finite.tolist()]
        return _Batch(to_uint8(x.nan_to_num()), lost_at, frames)

    def _wanted_transitions(self) -> set[int]:
        """Numbers of the transitions that ``save_process`` keeps, evenly over the walk."""
        last = len(self.plan.times) - 2
        return set(np.linspace(0, last, self.conf.save_process).round().astype(int).tolist())

    def _write_process(self, job: Job, frames: list[ProcessFrame]) -> None:
        if frames:
            stem = Path(self.conf.log_dir) / "process" / Path(job.name).stem
            write_film_strip(f"{stem}.png", frames)
            write_gif(f"{stem}.gif", frames)

    def _fail(self, job: Job, problem: str) -> None:
        self.summary.failures.append(f"{job.name}: {problem}")
        tqdm.write(f"failed: {job.name}: {problem}", file=sys.stderr)
