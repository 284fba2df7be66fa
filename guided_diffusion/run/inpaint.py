"""A run of test.py: jobs are shared among processes, and results, record and overview written."""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from guided_diffusion.cli import Interrupts
from guided_diffusion.dist_util import Team, is_main
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import remove_leftovers
from guided_diffusion.io.results import write_result
from guided_diffusion.io.sheets import finished_rows, write_film_strip, write_gif, write_overview
from guided_diffusion.run.checks import result_folders
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.run.plan import refuse_changed, result_names
from guided_diffusion.run.record import Summary, result_mark, write_record
from guided_diffusion.run.sampling import Made, Sampling
from guided_diffusion.run.task import Plan


def run(plan: Plan, inpainter: Inpainter, team: Team, resume_with: str) -> Summary:
    """Make all results of ``plan`` that are still to do, this process its share of them.

    A result that fails is noted and the others go on. Returns the sum over all processes in the
    main one; the others need not wait for it and return nothing of their own. Raises UserError
    where nothing more can be written, and KeyboardInterrupt after Ctrl-C; both say how much is done
    and with which command, ``resume_with``, the rest will be.
    """
    if team.is_main:
        log_dir = plan.conf.log_dir
        for folder in {*result_folders(plan.conf).values(), log_dir, f"{log_dir}/process"}:
            remove_leftovers(folder)
        write_record(plan, "started", Summary())
    start = time.perf_counter()
    with Interrupts() as interrupts:
        sampling = Sampling(
            inpainter.with_walk(plan.conf, plan.times), plan.conf.data.batch_size,
            check=interrupts.check, warn=lambda text: log(f"warning: {text}"),
            show_progress=plan.conf.show_progress and team.is_main,
        )  # fmt: skip
        try:
            parts = _make_all(plan, team, sampling, interrupts)
        except UserError as error:
            raise type(error)(f"{error}; {resume_hint(plan, team, resume_with)}") from error
        except KeyboardInterrupt:
            hint = resume_hint(plan, team, resume_with) if team.is_main else ""
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
        calls = f"{plan.steps} network calls and"
        if conf.full_size:
            calls = f"{plan.network_calls(plan.todo):,} network calls,"
        parts.append(f"{calls} {summary.seconds / summary.finished:.3g} s an image")
    return " ".join(f"{conf.log_dir}: {', '.join(parts)}".split())


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


def _make_all(
    plan: Plan, team: Team, sampling: Sampling, interrupts: Interrupts
) -> list[dict[str, Any]]:
    """Make this process's results; return what each process did, if this is the main one."""
    mine = plan.todo[team.rank :: team.size]
    summary = Summary(in_float32=sampling.in_float32)  # a list that sampling fills
    with sampling.progress("images", len(plan.todo), "image", leave=True) as bar:
        refuse_changed(plan)
        for batch in sampling.make(mine):
            refuse_changed(plan)
            refusal = None
            for made in batch:
                if made.problem:
                    _fail(summary, made.job.name, made.problem)
                    continue
                try:
                    _write(plan, made)
                except UserError as error:  # the others of the batch are still written
                    refusal = refusal or error
                else:
                    summary.finished += 1
                    team.count("written", 1)
            if refusal:
                raise refusal
            bar.update(team.count("done", len(batch)) - bar.n)
        for job in mine:
            path = Path(plan.conf.data.paths.srs, job.name)
            if job.name not in summary.failures and not path.exists():
                summary.finished -= 1
                _fail(summary, job.name, "was written, but its file has been removed")
        parts = team.from_all("summary", dataclasses.asdict(summary))
        while team.is_main and parts is None:
            interrupts.check()
            time.sleep(0.2)
            bar.update(team.count("done") - bar.n)
            parts = team.from_all("summary", dataclasses.asdict(summary))
    return parts if team.is_main else []


def _write(plan: Plan, made: Made) -> None:
    job = made.job
    if plan.conf.save_process and made.parts:
        largest = max(made.parts, key=lambda part: part.task.cut.side if part.task.cut else 0)
        stem = Path(plan.conf.log_dir) / "process" / Path(job.name).stem
        write_film_strip(f"{stem}.png", largest.frames)
        write_gif(f"{stem}.gif", largest.frames)
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


def _fail(summary: Summary, name: str, problem: str) -> None:
    summary.failures[name] = problem
    log(f"failed: {name}: {problem}")
