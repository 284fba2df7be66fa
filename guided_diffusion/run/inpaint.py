"""One run over many images: batches, retries, and what is written and said."""

import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from guided_diffusion.cli import Interrupts
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.dist_util import Team, is_main, is_out_of_memory
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import condition
from guided_diffusion.io.files import remove_leftovers
from guided_diffusion.io.images import mask_to_tensor, to_model_range, to_uint8
from guided_diffusion.io.results import result_path, write_result
from guided_diffusion.io.sheets import (
    ProcessFrame,
    finished_rows,
    write_film_strip,
    write_gif,
    write_overview,
)
from guided_diffusion.run.full_size import CUT_SEED_STRIDE, Cut, cut_out, find_cuts, paste
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.run.plan import (
    Job,
    Plan,
    Summary,
    load_full,
    load_inputs,
    refuse_changed,
    result_folders,
    result_mark,
    result_names,
    walked_by,
    write_record,
)
from guided_diffusion.scheduler import count_steps

# Sees each network call: its number in the walk, from 1, and what it predicts, (N, 3, S, S) in
# [-1, 1]. What it raises ends the run.
Observer = Callable[[int, torch.Tensor], None]
_NONFINITE_CHECK_INTERVAL = 64  # network calls between looks at whether all images are lost


def build(plan: Plan) -> Inpainter:
    """Load the networks; raises UserError as ``Inpainter``, and where memory is too small."""
    try:
        return Inpainter(plan.conf, plan.times)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = "the network does not fit into memory"
        raise UserError(problem, path=plan.conf.model_path, key="device") from error


def run(
    plan: Plan,
    inpainter: Inpainter,
    team: Team,
    observe: Observer | None = None,
    *,
    resume_with: str = "",
) -> Summary:
    """Make all results of ``plan`` that are still to do, this process its share of them.

    A result that fails is noted and the others go on; ``observe`` sees every network call. Returns
    the sum over all processes in the main one; the others need not wait for it and return nothing
    of their own. Raises UserError where nothing more can be written, and KeyboardInterrupt after
    Ctrl-C; both say how much is done where ``resume_with``, the command for the rest, is given.
    """
    if team.is_main:
        log_dir = plan.conf.log_dir
        for folder in {*result_folders(plan.conf).values(), log_dir, f"{log_dir}/process"}:
            remove_leftovers(folder)
        write_record(plan, "started", Summary())
    start = time.perf_counter()
    with Interrupts() as interrupts:
        share = Share(plan, inpainter, team, interrupts, observe)
        try:
            parts = make_all(share)
        except UserError as error:
            if not resume_with:
                raise
            raise type(error)(f"{error}; {resume_hint(plan, team, resume_with)}") from error
        except KeyboardInterrupt:
            is_told = team.is_main and resume_with
            hint = resume_hint(plan, team, resume_with) if is_told else ""
            raise KeyboardInterrupt(hint) from None
    total = Summary(seconds=time.perf_counter() - start)
    for part in parts:
        total.finished += part["finished"]
        total.failures |= part["failures"]
        total.in_float32 += part["in_float32"]
    return total


def conclude(plan: Plan, summary: Summary) -> str:
    """Write record and overview; say in one line where the results are and what they took."""
    write_record(plan, "failed" if summary.failures else "finished", summary)
    if plan.conf.overview:
        images = {job.pair.name: job.pair for job in plan.jobs}
        # A file in the place of a result that failed is an earlier run's.
        names = [
            (name, [n for n in result_names(plan.conf, pair) if n not in summary.failures])
            for name, pair in images.items()
        ]
        sheet = Path(plan.conf.log_dir) / "overview.png"
        write_overview(sheet, finished_rows(result_folders(plan.conf), names))
    earlier = len(plan.jobs) - len(plan.todo)
    parts = [f"{summary.finished} image{'s' * (summary.finished != 1)}"]
    if earlier:
        parts.append(f"{earlier} finished earlier")
    if summary.failures:
        some = ", ".join(list(summary.failures)[:5]) + ", …" * (len(summary.failures) > 5)
        parts.append(f"{len(summary.failures)} failed ({some}), which --resume tries again")
    if summary.finished:
        calls, walked = f"{count_steps(plan.times)[0]} network calls", walked_by(plan.conf)
        seconds = f"{summary.seconds / summary.finished:.3g} s an image"
        if walked == "an image":
            parts.append(f"{calls} and {seconds}")
        else:
            parts += [f"{calls} {walked}", seconds]
    return " ".join(f"{plan.conf.log_dir}: {', '.join(parts)}".split())


def resume_hint(plan: Plan, team: Team, command: str) -> str:
    """Say how much is done and with which command the rest will be."""
    done = len(plan.jobs) - len(plan.todo)
    with contextlib.suppress(UserError):
        done += team.count("written")
    return f"{done} of {len(plan.jobs)} results are in {plan.conf.log_dir}; go on with: {command}"


def log(text: str) -> None:
    """Write one line to stderr, past the progress bars, which are the main process's."""
    start = "" if is_main() else "\n"
    tqdm.write(start + " ".join(text.split()), file=sys.stderr)


@dataclass
class Share:
    """One process's share of a run: what it works with, and what it has done."""

    plan: Plan
    inpainter: Inpainter
    team: Team
    interrupts: Interrupts
    observe: Observer | None = None
    exact: Inpainter | None = None  # the same in float32, once that is needed
    summary: Summary = field(default_factory=Summary)

    def progress(self, title: str, total: int, unit: str, *, leave: bool) -> tqdm:
        """Return a progress bar; only the main process shows it."""
        interval = 0.1 if sys.stderr.isatty() else 30  # a night's bars should not fill a log file
        return tqdm(
            total=total, desc=title, unit=unit, leave=leave, mininterval=interval,
            maxinterval=max(10, interval),
            disable=not (self.plan.conf.show_progress and self.team.is_main),
        )  # fmt: skip

    def fail(self, job: Job, problem: str) -> None:
        """Note that a result failed, and say it once."""
        if job.name not in self.summary.failures:  # a batch may be tried twice
            self.summary.failures[job.name] = problem
            log(f"failed: {job.name}: {problem}")


def make_all(share: Share) -> list[dict[str, Any]]:
    """Make this process's results in batches; return what each process did, if this is main.

    Where memory runs out, batches are halved. Other processes leave their sums for main.
    """
    plan, team = share.plan, share.team
    mine = jobs = plan.todo[team.rank :: team.size]
    batch_size, too_large = plan.conf.data.batch_size, 0
    with share.progress("images", len(plan.todo), "image", leave=True) as bar:
        while jobs:
            share.interrupts.check()
            refuse_changed(plan)
            batch, fits = jobs[:batch_size], True
            try:
                make_batch(share, batch, batch_size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            if not fits:  # only here, with the exception gone, is what it held free
                tried = batch_size if plan.conf.full_size else len(batch)
                too_large = too_large or tried
                batch_size = halve(share.inpainter.device, tried)
                continue
            if too_large:
                log(
                    f"warning: batch_size: {too_large} images at once do not fit into memory, "
                    f"{batch_size} do"
                )
            too_large, jobs = 0, jobs[len(batch) :]
            bar.update(team.count("done", len(batch)) - bar.n)
        find_vanished(share, mine)
        own = dataclasses.asdict(share.summary)
        parts = team.from_all("summary", own)
        while team.is_main and parts is None:
            share.interrupts.check()
            time.sleep(0.2)
            bar.update(team.count("done") - bar.n)
            parts = team.from_all("summary", own)
    return parts if team.is_main else []


def halve(device: torch.device, batch_size: int) -> int:
    """Return the next smaller batch size after memory ran out; UserError where there is none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if batch_size == 1:
        raise UserError("one image alone does not fit into memory", key="batch_size")
    return batch_size // 2


@dataclass
class Inputs:
    """What the network works on: a job's picture, or a cut of its photo."""

    job: Job
    gt_u8: np.ndarray  # (S, S, 3)
    mask_u8: np.ndarray  # (S, S, 3), 255 = known
    seed: int
    cut: Cut | None = None  # where in the photo it lies, with full_size


@dataclass
class SampleResult:
    """What the loop made of one job."""

    sample_u8: np.ndarray  # (S, S, 3)
    nonfinite_at: int  # the network call, from 1, after which it was not finite; 0: it is finite
    frames: list[ProcessFrame]


def make_batch(share: Share, jobs: list[Job], batch_size: int) -> None:
    """Make and write the results of some jobs, ``batch_size`` pictures at once in the network.

    What fails is noted. Raises UserError where it cannot write.
    """
    inputs: list[Inputs] = []
    for job in jobs:
        try:
            inputs += load_job(share.plan.conf, job)
        except UserError as error:  # noqa: PERF203 - one bad picture costs no other
            share.fail(job, str(error))
    results: list[SampleResult] = []
    while len(results) < len(inputs):
        batch = inputs[len(results) :][:batch_size]
        if share.plan.conf.windows:
            batch = batch[:1]  # its windows are a batch
        made = sample_batch(share, share.inpainter, batch, batch_size)
        if share.inpainter.is_reduced and any(result.nonfinite_at for result in made):
            made = again_in_float32(share, batch, made, batch_size)
        results += made
    refuse_changed(share.plan)  # float32 may have loaded it again
    refusal = None
    for job in jobs:
        parts = [pair for pair in zip(inputs, results, strict=True) if pair[0].job is job]
        try:
            write_job(share, job, parts)
        except UserError as error:
            refusal = refusal or error  # the others may still find their place
    if refusal:
        raise refusal


def load_job(conf: InpaintConf, job: Job) -> list[Inputs]:
    """Return what the network is to see of a job: its picture, or with full_size its cuts."""
    if not conf.full_size:
        return [Inputs(job, *load_inputs(conf, job.pair), seed=job.seed)]
    photo, inputs = load_full(conf, job.pair), []
    for number, cut in enumerate(find_cuts(photo.known, conf.image_size)):
        size = max(cut.side, conf.image_size) if conf.windows else conf.image_size
        pieces = cut_out(photo.pixels, photo.known, cut, size)
        inputs.append(Inputs(job, *pieces, seed=job.seed + number * CUT_SEED_STRIDE, cut=cut))
    return inputs


def again_in_float32(
    share: Share, inputs: Sequence[Inputs], results: Sequence[SampleResult], batch_size: int
) -> list[SampleResult]:
    """Return ``results`` with those that are not finite sampled again in float32."""
    lost = [i for i, result in enumerate(results) if result.nonfinite_at]
    names = [inputs[i].job.name for i in lost]
    log(f"warning: no finite number in reduced precision, in float32: {', '.join(names)}")
    share.exact = share.exact or share.inpainter.in_float32()
    again = sample_batch(share, share.exact, [inputs[i] for i in lost], batch_size)
    share.summary.in_float32 += names
    return [again[lost.index(i)] if i in lost else result for i, result in enumerate(results)]


def write_job(share: Share, job: Job, parts: Sequence[tuple[Inputs, SampleResult]]) -> None:
    """Write a job's result and process pictures; note it as failed where it is not finite."""
    plan = share.plan
    if job.name in share.summary.failures:
        return
    if lost := [result.nonfinite_at for _, result in parts if result.nonfinite_at]:
        t = [t for t, after in pairwise(plan.times) if after < t][lost[0] - 1]
        share.fail(job, f"no finite number after network call {lost[0]}, at time t = {t}")
        return
    if parts and parts[0][1].frames:  # of several cuts, the largest shows the process
        frames = max(parts, key=lambda part: part[0].cut.side if part[0].cut else 0)[1].frames
        stem = Path(plan.conf.log_dir) / "process" / Path(job.name).stem
        write_film_strip(f"{stem}.png", frames)
        write_gif(f"{stem}.gif", frames)
    if plan.conf.full_size:
        sample, gt_u8, mask_u8 = put_together(plan.conf, job, parts)
    else:
        [(one, result)] = parts
        sample, gt_u8, mask_u8 = result.sample_u8, one.gt_u8, one.mask_u8
    write_result(
        result_folders(plan.conf),
        job.pair.name,
        sample,
        gt_u8,
        mask_u8,
        sample_name=job.name,
        mark=result_mark(plan.settings, job, gt_u8, mask_u8),
    )
    share.summary.finished += 1
    share.team.count("written", 1)


def put_together(
    conf: InpaintConf, job: Job, parts: Sequence[tuple[Inputs, SampleResult]]
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Return the photo with what was made of its cuts, its own pixels and mask, (H, W, 3)."""
    photo = load_full(conf, job.pair)  # read again, so that a batch of photos fits into memory
    pixels = photo.pixels.copy()
    for one, result in parts:
        paste(pixels, photo.known, one.cut, result.sample_u8, conf.feather)
    mask_u8 = np.broadcast_to(photo.known[:, :, None], pixels.shape)
    return photo.image_of(pixels), photo.pixels, mask_u8


def find_vanished(share: Share, jobs: Sequence[Job]) -> None:
    """Count as failed what was written but is there no more."""
    folders = result_folders(share.plan.conf)
    for job in jobs:
        names = {key: job.name if key == "srs" else job.pair.name for key in folders}
        paths = [result_path(folder, names[key]) for key, folder in folders.items()]
        if job.name not in share.summary.failures and not all(p.exists() for p in paths):
            share.summary.finished -= 1
            share.fail(job, "was written, but somebody removed it")


@torch.inference_mode()
def sample_batch(
    share: Share, inpainter: Inpainter, inputs: Sequence[Inputs], batch_size: int
) -> list[SampleResult]:
    """Walk the schedule with a batch, ``batch_size`` windows at once if it is one large picture.

    Raises KeyboardInterrupt between two steps. What the observer raises ends it too.
    """
    plan, device = share.plan, inpainter.device
    gt = torch.stack([to_model_range(one.gt_u8) for one in inputs]).to(device)
    mask = torch.stack([mask_to_tensor(one.mask_u8) for one in inputs]).to(device)
    wanted = wanted_transitions(plan)
    x, pred_xstart, frames, calls = gt, gt, [], 0
    nonfinite_at = torch.zeros(len(inputs), dtype=torch.int64, device=device)
    all_lost = AsyncFlag(device)
    steps = inpainter.steps(gt, mask, [one.seed for one in inputs], batch_size)
    with share.progress("network", count_steps(plan.times)[0], "call", leave=False) as bar:
        for number, step in enumerate(steps):
            share.interrupts.check()
            x = step.x
            if step.pred_xstart is not None:
                pred_xstart, calls = step.pred_xstart, calls + 1
                is_lost = x.isfinite().flatten(1).all(dim=1).logical_not_()
                nonfinite_at.add_(is_lost & (nonfinite_at == 0), alpha=calls)  # waits for no device
                bar.update()
                if share.observe:
                    share.observe(calls, pred_xstart)
                if calls % _NONFINITE_CHECK_INTERVAL == 0 and all_lost(nonfinite_at.all()):
                    break
            if number in wanted:
                frames.append((step.t, to_uint8(x), to_uint8(pred_xstart)))
    if plan.conf.paste_known:
        x = condition(x, gt, mask)
    samples = to_uint8(x.nan_to_num())
    return [
        SampleResult(samples[i], lost, [ProcessFrame(t, now[i], x0[i]) for t, now, x0 in frames])
        for i, lost in enumerate(nonfinite_at.tolist())
    ]


def wanted_transitions(plan: Plan) -> set[int]:
    """Return the transitions that ``save_process`` keeps, evenly over the walk with its end."""
    last = len(plan.times) - 2
    return set(np.linspace(last, 0, plan.conf.save_process).round().astype(int).tolist())


class AsyncFlag:
    """A flag on the device, read without waiting for it: late, or, on a CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._seen = torch.zeros((), dtype=torch.bool, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None

    def __call__(self, flag: torch.Tensor) -> bool:
        """Return what was last seen of the flag, and look again unless that is still under way."""
        if self._copied is None:
            return bool(flag)
        if not self._copied.query():
            return False
        seen = bool(self._seen)
        self._seen.copy_(flag, non_blocking=True)
        self._copied.record()
        return seen
