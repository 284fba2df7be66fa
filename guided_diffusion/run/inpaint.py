"""One run over many images: batches and processes, retries, and what is said about it all."""

import contextlib
import dataclasses
import gc
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from guided_diffusion import dist_util
from guided_diffusion.cli import Interrupts
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import condition
from guided_diffusion.image_datasets import sample_names
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
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.run.plan import (
    Job,
    Plan,
    Summary,
    load_inputs,
    result_folders,
    result_mark,
    write_record,
)
from guided_diffusion.scheduler import count_steps

_LOST_CHECK_INTERVAL = 64  # network calls between looks at what is lost


def build(plan: Plan) -> Inpainter:
    """Load the networks; raises UserError as ``Inpainter``, and where memory is too small."""
    try:
        return Inpainter(plan.conf, plan.times)
    except (RuntimeError, MemoryError) as error:
        if not dist_util.is_out_of_memory(error):
            raise
        problem = "the network does not fit into memory"
        raise UserError(problem, path=plan.conf.model_path, key="device") from error


def run(plan: Plan, inpainter: Inpainter, team: dist_util.Team) -> Summary:
    """Make all results of ``plan`` that are still to do, this process its share of them.

    A result that fails is noted and the others go on. Returns the sum over all processes in the
    main one; the others need not wait for it and return nothing of their own. Raises UserError
    where nothing more can be written, and KeyboardInterrupt after Ctrl-C, both with a way to go on.
    """
    if team.is_main:
        for folder in {*result_folders(plan.conf).values(), plan.conf.log_dir}:
            remove_leftovers(folder)
        write_record(plan, "started", Summary())
    start = time.perf_counter()
    with Interrupts() as interrupts:
        worker = _Worker(plan, inpainter, team, interrupts)
        try:
            parts = worker.run(plan.todo[team.rank :: team.size])
        except UserError as error:
            raise UserError(f"{error}; {_way_on(plan, team)}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_way_on(plan, team) if team.is_main else "") from None
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
        images = dict.fromkeys(job.pair.name for job in plan.jobs)
        names = [(name, sample_names(name, plan.conf.samples_per_image)) for name in images]
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
        calls = count_steps(plan.times)[0]
        each = summary.seconds / summary.finished
        parts.append(f"{calls} network calls and {each:.3g} s an image")
    return " ".join(f"{plan.conf.log_dir}: {', '.join(parts)}".split())


def _way_on(plan: Plan, team: dist_util.Team) -> str:
    """Say how much is done and with which command the rest will be."""
    done = len(plan.jobs) - len(plan.todo)
    with contextlib.suppress(UserError):
        done += team.count("written")
    command = [arg for arg in sys.orig_argv if arg != "--resume"] + ["--resume"]
    how = shlex.join(command) if team.size == 1 else "the same torchrun command with --resume"
    return f"{done} of {len(plan.jobs)} results are in {plan.conf.log_dir}; go on with: {how}"


def _say(text: str) -> None:
    """Write one line to stderr, past the progress bars, which are the main process's."""
    start = "" if dist_util.is_main() else "\n"
    tqdm.write(start + " ".join(text.split()), file=sys.stderr)


@dataclass
class _Made:
    """What the loop made of one job."""

    sample: np.ndarray  # uint8 (S, S, 3)
    lost_at: int  # the network call, counted from 1, after which it was not finite; 0 if it is
    frames: list[ProcessFrame]


class _Peek:
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


class _Worker:
    """One process's share of a run."""

    def __init__(
        self,
        plan: Plan,
        inpainter: Inpainter,
        team: dist_util.Team,
        interrupts: Interrupts,
    ) -> None:
        self.plan, self.conf, self.team, self.interrupts = plan, plan.conf, team, interrupts
        self.inpainter, self.exact = inpainter, None  # in float32, once that is needed
        self.batch_size, self.too_large = plan.conf.data.batch_size, 0
        self.times_called = [t for t, after in pairwise(plan.times) if after < t]
        self.summary = Summary()
        self.quiet = not (plan.conf.show_progress and team.is_main)

    def run(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Make the results of ``jobs`` in batches; return what each process did, if this is main.

        Where memory runs out, batches are halved. Other processes leave their sums for main.
        """
        mine = jobs
        with self._bar("images", len(self.plan.todo), "image", leave=True) as bar:
            while jobs:
                self.interrupts.check()
                batch = jobs[: self.batch_size]
                if not self._fits(batch):
                    continue
                jobs = jobs[len(batch) :]
                bar.update(self.team.count("done", len(batch)) - bar.n)
            self._find_vanished(mine)
            own = dataclasses.asdict(self.summary)
            parts = self.team.from_all("summary", own)
            while self.team.is_main and parts is None:
                self.interrupts.check()
                time.sleep(0.2)
                bar.update(self.team.count("done") - bar.n)
                parts = self.team.from_all("summary", own)
        return parts if self.team.is_main else []

    def _bar(self, title: str, total: int, unit: str, *, leave: bool) -> tqdm:
        interval = 0.1 if sys.stderr.isatty() else 30  # a night's bars should not fill a log file
        return tqdm(
            total=total, desc=title, unit=unit, leave=leave, disable=self.quiet,
            mininterval=interval, maxinterval=max(10, interval),
        )  # fmt: skip

    def _fits(self, batch: list[Job]) -> bool:
        """Make one batch; False where it needs too much memory, and the next is to be smaller."""
        try:
            self._make(batch)
        except (RuntimeError, MemoryError) as error:
            if not dist_util.is_out_of_memory(error):
                raise
        else:
            if self.too_large:
                _say(
                    f"warning: batch_size: {self.too_large} images at once do not fit into memory, "
                    f"{len(batch)} do"
                )
            self.too_large = 0
            return True
        # Only here, with the exception gone, is what it held free.
        gc.collect()
        if self.inpainter.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            raise UserError("one image alone does not fit into memory", key="batch_size")
        self.too_large = self.too_large or len(batch)
        self.batch_size = len(batch) // 2
        return False

    def _make(self, jobs: list[Job]) -> None:
        """Make and write one batch; what fails is noted."""
        loaded = []
        for job in jobs:
            try:
                loaded.append((job, *load_inputs(self.conf, job.pair)))
            except UserError as error:  # noqa: PERF203 - one bad picture costs no other
                self._fail(job, str(error))
        if not loaded:
            return
        made = self._sample(self.inpainter, loaded)
        lost = [i for i, one in enumerate(made) if one.lost_at and self.inpainter.is_reduced]
        if lost:
            names = [loaded[i][0].name for i in lost]
            _say(f"warning: no finite number in reduced precision, in float32: {', '.join(names)}")
            self.exact = self.exact or self.inpainter.in_float32()
            again = self._sample(self.exact, [loaded[i] for i in lost])
            made = [again[lost.index(i)] if i in lost else one for i, one in enumerate(made)]
            self.summary.in_float32 += names
        refusal = None
        for (job, gt_u8, mask_u8), one in zip(loaded, made, strict=True):
            try:
                self._write(job, gt_u8, mask_u8, one)
            except UserError as error:  # noqa: PERF203 - the others may still find their place
                refusal = refusal or error
        if refusal:
            raise refusal

    def _write(self, job: Job, gt_u8: np.ndarray, mask_u8: np.ndarray, one: _Made) -> None:
        if one.lost_at:
            t = self.times_called[one.lost_at - 1]
            self._fail(job, f"no finite number after network call {one.lost_at}, at time t = {t}")
            return
        if one.frames:
            stem = Path(self.conf.log_dir) / "process" / Path(job.name).stem
            write_film_strip(f"{stem}.png", one.frames)
            write_gif(f"{stem}.gif", one.frames)
        write_result(
            result_folders(self.conf),
            job.pair.name,
            one.sample,
            gt_u8,
            mask_u8,
            sample_name=job.name,
            mark=result_mark(self.plan.settings, job, gt_u8, mask_u8),
        )
        self.summary.finished += 1
        self.team.count("written", 1)

    @torch.inference_mode()
    def _sample(
        self, inpainter: Inpainter, loaded: Sequence[tuple[Job, np.ndarray, np.ndarray]]
    ) -> list[_Made]:
        """Walk the schedule with a batch; raises KeyboardInterrupt between two steps."""
        device = inpainter.device
        gt = torch.stack([to_model_range(gt_u8) for _, gt_u8, _ in loaded]).to(device)
        mask = torch.stack([mask_to_tensor(mask_u8) for _, _, mask_u8 in loaded]).to(device)
        wanted = self._wanted_transitions()
        x, pred, frames, call, peek = gt, gt, [], 0, _Peek(device)
        lost_at = torch.zeros(len(loaded), dtype=torch.int64, device=device)
        steps = inpainter.steps(gt, mask, [job.seed for job, _, _ in loaded])
        with self._bar("network", len(self.times_called), "call", leave=False) as bar:
            for number, step in enumerate(steps):
                self.interrupts.check()
                x = step.x
                if step.pred_xstart is not None:
                    pred, call = step.pred_xstart, call + 1
                    is_lost = x.isfinite().flatten(1).all(dim=1).logical_not_()
                    lost_at.add_(is_lost & (lost_at == 0), alpha=call)  # waits for no device
                    bar.update()
                    if call % _LOST_CHECK_INTERVAL == 0 and peek(lost_at.all()):
                        break
                if number in wanted:
                    frames.append((step.t, to_uint8(x), to_uint8(pred)))
        if self.conf.paste_known:
            x = condition(x, gt, mask)
        pictures = to_uint8(x.nan_to_num())
        return [
            _Made(pictures[i], lost, [ProcessFrame(t, now[i], x0[i]) for t, now, x0 in frames])
            for i, lost in enumerate(lost_at.tolist())
        ]

    def _wanted_transitions(self) -> set[int]:
        """Numbers of the transitions that ``save_process`` keeps, evenly over the walk."""
        last = len(self.plan.times) - 2
        return set(np.linspace(0, last, self.conf.save_process).round().astype(int).tolist())

    def _find_vanished(self, jobs: Sequence[Job]) -> None:
        """Count as failed what was written but is there no more."""
        folders = result_folders(self.conf)
        for job in jobs:
            names = {key: job.name if key == "srs" else job.pair.name for key in folders}
            paths = [result_path(folder, names[key]) for key, folder in folders.items()]
            if job.name not in self.summary.failures and not all(p.exists() for p in paths):
                self.summary.finished -= 1
                self._fail(job, "was written, but somebody removed it")

    def _fail(self, job: Job, problem: str) -> None:
        if job.name not in self.summary.failures:  # a batch may be tried twice
            self.summary.failures[job.name] = problem
            _say(f"failed: {job.name}: {problem}")
