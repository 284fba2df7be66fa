"""A run of test.py: jobs are shared among processes, and results, record and overview written."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from guided_diffusion.cli import Interrupts
from guided_diffusion.dist_util import Team, is_main
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import remove_leftovers
from guided_diffusion.io.results import result_path, write_result
from guided_diffusion.io.sheets import finished_rows, write_film_strip, write_gif, write_overview
from guided_diffusion.run.checks import result_folders
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.run.plan import Plan, refuse_changed, result_names
from guided_diffusion.run.record import Summary, result_mark, write_record
from guided_diffusion.run.sampling import Made, Observer, Sampling
from guided_diffusion.run.task import Job, network_calls
from guided_diffusion.scheduler import count_steps


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
        _record(plan, "started", Summary())
    start = time.perf_counter()
    with Interrupts() as interrupts:
        sampling = Sampling(
            inpainter, plan.conf.data.batch_size, observe, interrupts.check,
            lambda text: log(f"warning: {text}"), plan.conf.show_progress and team.is_main,
        )  # fmt: skip
        try:
            parts = _Share(plan, team, sampling, interrupts).make_all()
        except UserError as error:
            if not resume_with:
                raise
            raise type(error)(f"{error}; {resume_hint(plan, team, resume_with)}") from error
        except KeyboardInterrupt:
            hint = resume_hint(plan, team, resume_with) if team.is_main and resume_with else ""
            raise KeyboardInterrupt(hint) from None
    total = Summary(seconds=time.perf_counter() - start)
    for part in parts:
        total.finished += part["finished"]
        total.failures |= part["failures"]
        total.in_float32 += part["in_float32"]
    return total


def conclude(plan: Plan, summary: Summary) -> str:
    """Write record and overview; say in one line where the results are and what they took."""
    _record(plan, "failed" if summary.failures else "finished", summary)
    conf = plan.conf
    if conf.overview:
        pairs = {job.pair.name: job.pair for job in plan.jobs}
        # A file in the place of a result that failed is an earlier run's.
        names = [
            (name, [n for n in result_names(conf, pair) if n not in summary.failures])
            for name, pair in pairs.items()
        ]
        sheet = Path(conf.log_dir) / "overview.png"
        write_overview(sheet, finished_rows(result_folders(conf), names))
    earlier = len(plan.jobs) - len(plan.todo)
    parts = [f"{summary.finished} image{'s' * (summary.finished != 1)}"]
    if earlier:
        parts.append(f"{earlier} finished earlier")
    if summary.failures:
        some = ", ".join(list(summary.failures)[:5]) + ", …" * (len(summary.failures) > 5)
        parts.append(f"{len(summary.failures)} failed ({some}), which --resume tries again")
    if summary.finished:
        steps = count_steps(plan.times)[0]
        if conf.full_size:
            calls = f"{network_calls(plan.todo, conf.data.batch_size, steps):,} network calls,"
        else:
            calls = f"{steps} network calls and"
        parts.append(f"{calls} {summary.seconds / summary.finished:.3g} s an image")
    return " ".join(f"{conf.log_dir}: {', '.join(parts)}".split())


def _record(plan: Plan, state: str, summary: Summary) -> None:
    write_record(
        plan.conf, plan.jobs, count_steps(plan.times)[0], state, checkpoints=plan.checkpoints,
        summary=summary, earlier=plan.earlier,
    )  # fmt: skip


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
class _Share:
    """One process's share of a run, and what it has done."""

    plan: Plan
    team: Team
    sampling: Sampling
    interrupts: Interrupts
    summary: Summary = field(default_factory=Summary)

    def make_all(self) -> list[dict[str, Any]]:
        """Make this process's results; return what each process did, if this is the main one."""
        plan, team = self.plan, self.team
        mine = plan.todo[team.rank :: team.size]
        with self.sampling.progress("images", len(plan.todo), "image", leave=True) as bar:
            refuse_changed(plan)
            for batch in self.sampling.make(mine):
                refuse_changed(plan)
                self._write_batch(batch)
                bar.update(team.count("done", len(batch)) - bar.n)
            self._find_vanished(mine)
            self.summary.in_float32 = self.sampling.in_float32
            own = dataclasses.asdict(self.summary)
            parts = team.from_all("summary", own)
            while team.is_main and parts is None:
                self.interrupts.check()
                time.sleep(0.2)
                bar.update(team.count("done") - bar.n)
                parts = team.from_all("summary", own)
        return parts if team.is_main else []

    def _write_batch(self, batch: Sequence[Made]) -> None:
        """Write results; where one cannot be written, the others still are, and then it raises."""
        refusal = None
        for made in batch:
            if made.problem:
                self._fail(made.job, made.problem)
                continue
            try:
                self._write(made)
            except UserError as error:
                refusal = refusal or error
        if refusal:
            raise refusal

    def _fail(self, job: Job, problem: str) -> None:
        self.summary.failures[job.name] = problem
        log(f"failed: {job.name}: {problem}")

    def _write(self, made: Made) -> None:
        plan, job = self.plan, made.job
        if made.parts and made.frames:
            stem = Path(plan.conf.log_dir) / "process" / Path(job.name).stem
            write_film_strip(f"{stem}.png", made.frames)
            write_gif(f"{stem}.gif", made.frames)
        result, picture = made.result(plan.conf)
        write_result(
            result_folders(plan.conf),
            job.pair.name,
            result,
            picture.pixels,
            picture.mask,
            sample_name=job.name,
            mark=result_mark(plan.settings, job, picture),
        )
        self.summary.finished += 1
        self.team.count("written", 1)

    def _find_vanished(self, jobs: Sequence[Job]) -> None:
        """Count results as failed whose files were written but have disappeared."""
        folders = result_folders(self.plan.conf)
        for job in jobs:
            names = {key: job.name if key == "srs" else job.pair.name for key in folders}
            paths = [result_path(folder, names[key]) for key, folder in folders.items()]
            if job.name not in self.summary.failures and not all(p.exists() for p in paths):
                self.summary.finished -= 1
                self._fail(job, "was written, but its file has been removed")
