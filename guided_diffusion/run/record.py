"""The record of a run, ``run.yml``, the marks of its results, and what resuming makes of them."""

import contextlib
import hashlib
import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from guided_diffusion import dist_util
from guided_diffusion.accel.accelerate import precision_on
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import read_yaml
from guided_diffusion.config.schema import conf_from_dict, conf_to_dict, result_settings
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.run.task import Job, Picture, Plan


@dataclass
class Summary:
    """What a run did."""

    finished: int = 0  # results written
    seconds: float = 0.0  # of sampling and writing
    failures: dict[str, str] = field(default_factory=dict)  # the reason, by the result's name
    in_float32: list[str] = field(default_factory=list)  # results that reduced precision lost


@dataclass(frozen=True)
class Record:
    """What an earlier run wrote about itself."""

    seed: int
    settings: dict[str, str]
    notes: dict[str, Any]


def record_path(conf: InpaintConf) -> Path:
    """Return where the record of a run is."""
    return Path(conf.log_dir) / "run.yml"


def settings_of_results(
    conf: InpaintConf, checkpoints: Mapping[str, str], device_type: str
) -> dict[str, str]:
    """Return what results depend on by dotted key; ``checkpoints`` are fingerprints by key."""
    settings = {**result_settings(conf), **checkpoints, "device": device_type}
    return dict(sorted(settings.items()))


def result_mark(settings: Mapping[str, str], job: Job, picture: Picture) -> str:
    """Return the fingerprint of everything that a result is made from."""
    digest = hashlib.sha256(repr((settings, job.seed)).encode())
    for pixels in (picture.pixels, picture.mask):
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def refuse_replacing_a_configuration(conf: InpaintConf) -> None:
    """Raise UserError where the record would replace a YAML that somebody wrote."""
    path, tree = record_path(conf), None
    if os.path.lexists(path):
        with contextlib.suppress(UserError):
            tree = read_yaml(path)
    if isinstance(tree, dict) and "model_path" in tree and "record" not in tree:
        problem = "the record of this run would overwrite this configuration; rename it"
        raise UserError(problem, path=path)


def read_record(conf: InpaintConf) -> Record | None:
    """Return the record of an earlier run into the same folder; None where there is none.

    Raises UserError where the file is something else.
    """
    path = record_path(conf)
    if not os.path.lexists(path):
        return None
    try:
        tree = read_yaml(path)
        earlier, notes = conf_from_dict(tree, InpaintConf, path, is_complete=True), tree["record"]
        checkpoints = {key: str(value) for key, value in notes["checkpoints"].items()}
        settings = settings_of_results(earlier, checkpoints, str(notes["device_type"]))
        if earlier.seed is None:
            raise KeyError("seed")
        return Record(earlier.seed, settings, notes)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = "is not the record of a run; remove it or run without --resume"
        raise UserError(problem, path=path) from error


def refuse_other_settings(
    conf: InpaintConf, earlier: Mapping[str, str], settings: Mapping[str, str]
) -> None:
    """Raise UserError where an earlier run's results were made with other settings."""
    keys = sorted(settings.keys() | earlier.keys())
    differing = [key for key in keys if settings.get(key) != earlier.get(key)]
    if differing:
        raise UserError(
            "the results there were made with other settings, and a run does not mix them; run "
            "without --resume to overwrite them, or set back",
            path=record_path(conf),
            key=" and ".join(differing),
            expected=", ".join(earlier.get(key, "nothing") for key in differing),
            got=", ".join(settings.get(key, "nothing") for key in differing),
        )


def write_record(plan: Plan, state: str, summary: Summary) -> None:
    """Write ``run.yml``: a configuration that repeats the run, and notes about it."""
    conf, device = plan.conf, dist_util.get_device(plan.conf.device)
    is_cuda = device.type == "cuda"
    speed = {key: plan.earlier[key] for key in ("made", "seconds_an_image") if key in plan.earlier}
    if summary.finished:
        seconds = round(summary.seconds / summary.finished, 3)
        speed = {"made": summary.finished, "seconds_an_image": seconds}
    record = {
        "state": state,
        "device_type": device.type,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "processes": dist_util.world_size(),
        "precision": precision_on(device, conf.precision, conf.use_fp16)
        or "float32, torch's default",
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "checkpoints": plan.checkpoints,
        "steps": plan.steps,
        **speed,
        "failures": summary.failures,
        "again_in_float32": summary.in_float32,
        "seeds": {job.name: job.seed for job in plan.jobs},
    }
    path = record_path(conf)
    text = yaml.safe_dump({**conf_to_dict(conf), "record": record}, sort_keys=False, width=1000)
    command = f"python test.py --conf_path {shlex.quote(str(path))}"
    write_text_atomic(path, f"# {command} repeats this run.\n{text}")
