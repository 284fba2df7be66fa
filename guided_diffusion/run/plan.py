"""What a run of test.py has to do, known before a network is loaded."""

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.errors import StoppedError, UserError
from guided_diffusion.image_datasets import Pair, pair_images, sample_names
from guided_diffusion.io.files import stamp_of
from guided_diffusion.io.limits import in_threads
from guided_diffusion.io.results import JPEG_SUFFIXES, is_written, result_path
from guided_diffusion.run.checks import check_outputs, check_pictures, check_places, result_folders
from guided_diffusion.run.record import (
    read_record,
    refuse_other_settings,
    result_mark,
    settings_of_results,
)
from guided_diffusion.run.task import Job, Plan, bytes_to_load, load_picture, make_job
from guided_diffusion.script_util import check_network, create_gaussian_diffusion, create_schedule


def plan_run(conf: InpaintConf, team: dist_util.Team, *, resume: bool = False) -> Plan:
    """Check everything that can be wrong with a run, cheapest first, and list what is to be done.

    With ``resume``, results that are complete and were made with the same settings are left out.
    Prints what is to be done. Raises UserError for whatever would fail later, and where ``resume``
    meets other settings.
    """
    times = create_schedule(conf, create_gaussian_diffusion(conf))
    device = dist_util.get_device(conf.device)
    checkpoints = checkpoints_of(conf)
    stamps = {path: stamp for path in checkpoints.values() if (stamp := stamp_of(path))}
    check_places(conf)
    pairs = pair_images(
        conf.data.gt_path,
        conf.data.mask_path,
        all_formats=conf.all_formats,
        offset=conf.data.offset,
        max_len=conf.data.max_len,
        samples_per_image=conf.samples_per_image,
    )
    checkpoints = {key: check_network(path) for key, path in checkpoints.items()}
    recorded = read_record(conf) if resume and team.is_main else None
    seed = conf.seed
    if seed is None:
        seed = recorded.seed if recorded else secrets.randbelow(2**31)
    conf = dataclasses.replace(conf, seed=team.from_main("seed", seed))
    settings = settings_of_results(conf, checkpoints, device.type)
    jobs = list_jobs(conf, pairs)
    view = [settings, [job.name for job in jobs]]
    shares, tasks, finished = [], [], []
    if team.is_main:
        check_outputs(conf, jobs)
        if recorded:
            refuse_other_settings(conf, recorded.settings, settings)
        shares, tasks = check_pictures(conf, pairs, [conf.seed] * len(pairs))
        finished = _finished(conf, jobs, settings) if resume else []
    main = team.from_main("work", {"view": view, "finished": dict.fromkeys(finished)})
    if main["view"] != view:
        problem = "this process has other pictures, checkpoints or devices than the first"
        raise UserError(problem, key=f"process {team.rank}")
    todo = [job for job in jobs if job.name not in main["finished"]]
    tasks = {pair.index: some for pair, some in zip(pairs, tasks, strict=team.is_main)}
    earlier = recorded.notes if recorded else {}
    plan = Plan(conf, times, jobs, todo, tasks, checkpoints, stamps, settings, earlier)
    if team.is_main:
        print(_announcement(plan, shares))
    return plan


def _announcement(plan: Plan, shares: Sequence[float]) -> str:
    """Say how much is to be generated, and with full_size in how many network calls."""
    low, mean, high = min(shares), sum(shares) / len(shares), max(shares)
    spread = "" if low == high else f" ({low:.1%} to {high:.1%})"
    images = "1 image" if len(shares) == 1 else f"{len(shares)} images"
    text = f"{images}, {mean:.1%} of the pixels to generate{spread}, seed {plan.conf.seed}"
    if not plan.conf.full_size:
        return text
    cuts = sum(len(plan.tasks[job.pair.index]) for job in plan.jobs)
    noun = "cut" if cuts == 1 else "cuts"
    return f"{text}, {cuts} {noun}, at most {plan.network_calls(plan.jobs):,} network calls"


def refuse_changed(plan: Plan) -> None:
    """Raise ``StoppedError`` where a checkpoint is another file than when the run was planned.

    One that was only removed does no harm: the checked weights are in memory.
    """
    for path, stamp in plan.stamps.items():
        if stamp_of(path) not in (None, stamp):
            raise StoppedError("has changed since this run began to read it", path=path)


def checkpoints_of(conf: InpaintConf) -> dict[str, str]:
    """Return the paths of the checkpoints that a run loads by their YAML keys."""
    keys = ("model_path", "classifier_path") if conf.guided else ("model_path",)
    return {key: getattr(conf, key) for key in keys}


def list_jobs(conf: InpaintConf, pairs: Sequence[Pair]) -> list[Job]:
    """Return all results of a run in the order in which they are made.

    Raises UserError where ``drop_last`` leaves none.
    """
    order = list(pairs)
    if not conf.data.deterministic:
        np.random.default_rng(conf.seed).shuffle(order)
    if conf.data.drop_last:
        order = order[: len(order) - len(order) % conf.data.batch_size]
    if not order:
        key = f"data.eval.{conf.data.name}.drop_last and data.eval.{conf.data.name}.batch_size"
        raise UserError(f"no batch is full with {len(pairs)} images", key=key)
    return [
        make_job(conf.seed, pair, name, number)
        for pair in order
        for number, name in enumerate(result_names(conf, pair))
    ]


def result_names(conf: InpaintConf, pair: Pair) -> list[str]:
    """Return the file names of an image's samples: PNGs, or JPEGs where that is asked for."""
    names = sample_names(pair.name, conf.samples_per_image)
    suffix = Path(pair.gt_path).suffix
    if conf.output_format == "same" and suffix.lower() in JPEG_SUFFIXES:
        return [f"{Path(name).stem}{suffix}" for name in names]
    return names


def _finished(conf: InpaintConf, jobs: Sequence[Job], settings: dict[str, str]) -> list[str]:
    """Return the names of results whose files are all whole and what this run would write."""
    folders = result_folders(conf)

    def is_finished(job: Job) -> bool:
        if not result_path(folders["srs"], job.name).exists():
            return False
        picture = load_picture(conf, job.pair, job.mask_seed)
        mark = result_mark(settings, job, picture)
        return is_written(
            folders, job.pair.name, picture.pixels, picture.mask, sample_name=job.name, mark=mark
        )

    memory = bytes_to_load(conf, [job.pair for job in jobs])
    title = "looking for finished results"
    answers = in_threads(is_finished, jobs, title, conf.show_progress, memory=memory)
    return [job.name for job, answer in zip(jobs, answers, strict=True) if answer]
