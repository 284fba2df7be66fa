"""TRAIN: the files of a training: checkpoints, the YAML that runs them, and what resuming needs.

Checkpoints have guided-diffusion's names: ``model001000.pt``, ``ema_0.9999_001000.pt`` and
``opt001000.pt`` after 1,000 steps.
"""

import copy
import dataclasses
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from guided_diffusion.config.network_keys import ModelConf
from guided_diffusion.config.schema import conf_to_dict, shown
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.dist_util import is_main, world_size
from guided_diffusion.errors import UserError, printable
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io.checkpoints import load_state_dict, read_tree, write_weights
from guided_diffusion.io.files import remove_leftovers, write_checkpoint, write_text_atomic
from guided_diffusion.io.listing import list_images
from guided_diffusion.io.paths import check_folder, refuse_inside
from guided_diffusion.io.weights import check_fits, foreign_form, shapes_of
from guided_diffusion.training.pictures import TrainingImages, first_of, names_below
from guided_diffusion.training.trainer import Trainer
from guided_diffusion.unet import UNetModel

# What a resumed training may change: how far it goes, how fast and how visibly; not what it learns.
FREE_KEYS = (
    *("name", "data_dir", "out_dir", "init_from", "iterations", "cache_gb", "clip_denoised"),
    *("log_interval", "save_interval", "sample_interval", "sample_mask", "sample_count"),
    *("sample_respacing", "device", "compile", "microbatch", "use_checkpoint"),
)
# What an optimizer's file holds.
_PARTS = {"step", "settings", "pictures", "classes", "optimizer", "sampler"}


# ---- Names ---------------------------------------------------------------------------------------


def checkpoint_path(conf: TrainConf, kind: str, step: int) -> Path:
    """Return the file of ``kind`` (model, ema_<rate>_, opt) after ``step`` steps."""
    return Path(conf.out_dir) / f"{kind}{step:06d}.pt"


def weight_paths(conf: TrainConf, step: int) -> list[Path]:
    """Return the files of the weights and of their averages after ``step`` steps."""
    kinds = ("model", *(f"ema_{rate}_" for rate in conf.ema_rates))
    return [checkpoint_path(conf, kind, step) for kind in kinds]


def _saved_steps(conf: TrainConf) -> list[int]:
    """Return the steps of all optimizer's files in ``out_dir``, in order."""
    paths = Path(conf.out_dir).glob("opt*.pt")
    matches = [re.fullmatch(r"opt(\d{6,})\.pt", path.name) for path in paths]
    return sorted(int(match[1]) for match in matches if match)


def newest_step(conf: TrainConf) -> int | None:
    """Return the last step of which all files exist, or None."""
    steps = _saved_steps(conf)
    whole = [step for step in steps if all(path.exists() for path in weight_paths(conf, step))]
    return whole[-1] if whole else None


def last_saved(conf: TrainConf) -> str:
    """Return which checkpoint a training can go on from, for a message."""
    step = newest_step(conf)
    return "nothing was saved yet" if step is None else f"the last checkpoint is of step {step}"


# ---- Saving --------------------------------------------------------------------------------------


def save(trainer: Trainer, images: TrainingImages) -> None:
    """Write the checkpoints of this step, and the YAML that runs them.

    The optimizer's file comes last: where it exists, the others do.
    """
    conf, step = trainer.conf, trainer.step
    check_disk(conf, sum(p.numel() for p in trainer.parameters))
    networks = (trainer.model, *trainer.emas.values())
    for path, network in zip(weight_paths(conf, step), networks, strict=True):
        state = network.state_dict()
        write_checkpoint(path, {name: v.cpu().contiguous() for name, v in state.items()})
    test = test_yaml(conf, trainer.diffusion, images, step)
    write_text_atomic(Path(conf.out_dir) / "test.yml", test)
    state = {
        "step": step,
        "settings": run_settings(conf, images.names),
        "pictures": images.names,
        "classes": images.class_names,
        "optimizer": trainer.optimizer.state_dict(),
        "sampler": trainer.sampler.state_dict() if trainer.sampler else {},
    }
    write_checkpoint(checkpoint_path(conf, "opt", step), state)


def run_settings(conf: TrainConf, names: Sequence[str]) -> dict[str, object]:
    """Return what has to stay the same for a training to be resumed: keys, and the pictures."""
    kept = {name: v for name, v in conf_to_dict(conf).items() if name not in FREE_KEYS}
    # The published form of the list begins each name with a slash, as paths below a folder do.
    text = "\0".join(f"/{name}" for name in names)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return {**kept, "data_dir": f"{len(names)} pictures (list {digest})"}


def check_disk(conf: TrainConf, parameters: int) -> None:
    """Raise UserError where the disk has no room for the next checkpoints; also as check_folder."""
    needed = 4 * parameters * (len(conf.ema_rates) + 3) + 2**20  # Adam keeps two numbers for each
    free = shutil.disk_usage(check_folder(conf.out_dir)).free
    if free < needed:
        problem = "the disk is too full for the next checkpoint"
        expected, got = f"{needed / 1e6:,.0f} MB free", f"{free / 1e6:,.0f} MB"
        raise UserError(problem, path=conf.out_dir, expected=expected, got=got)


def test_yaml(
    conf: TrainConf, diffusion: GaussianDiffusion, images: TrainingImages, step: int
) -> str:
    """Return the YAML with which test.py runs the first average after ``step`` steps."""
    kept = conf.timestep_respacing
    if diffusion.num_timesteps == conf.diffusion_steps:  # trained on all: fewer are enough
        kept = str(min(250, conf.diffusion_steps))
    steps = int(kept) if kept.isdecimal() else diffusion.num_timesteps
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConf)}
    tree = conf_to_dict(conf)
    changed = {k: tree[k] for k, v in defaults.items() if k in tree and tree[k] != v}
    checkpoint = checkpoint_path(conf, f"ema_{conf.ema_rates[0]}_", step)
    data = {"gt_path": conf.data_dir, "mask_path": conf.sample_mask, "batch_size": 4, "max_len": 8}
    test = {
        "name": conf.name,
        "model_path": str(checkpoint),
        **changed,
        "timestep_respacing": kept,
        "schedule_jump_params": {"t_T": steps},
        "data": {"eval": {conf.name: data}},
    }
    notes = [
        "Runs what was trained last: python test.py --conf_path, then this file's path.",
        f"Faster, at a price: schedule_jump_params: {{t_T: {steps}, jump_n_sample: 3}}",
    ]
    if len(images.held_out):
        notes.append("gt_path has the training's pictures too; see held_out.txt for the others.")
    notes += class_notes(images)
    lines = "".join(f"# {printable(' '.join(note.split()))}\n" for note in notes)
    return lines + yaml.safe_dump(test, sort_keys=False, allow_unicode=True)


def class_notes(images: TrainingImages) -> list[str]:
    """Return the folder that each ``cond_y`` stands for, in words."""
    return [f"cond_y: {number} is {name}" for number, name in enumerate(images.class_names)]


# ---- Loading -------------------------------------------------------------------------------------


def load(trainer: Trainer, step: int) -> None:
    """Let ``trainer`` go on from the checkpoints of ``step``; raises UserError as ``load_into``."""
    networks = (trainer.model, *trainer.emas.values())
    for path, network in zip(weight_paths(trainer.conf, step), networks, strict=True):
        load_into(network, path)
    state = load_opt(trainer.conf, step)
    trainer.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it will change
    if trainer.sampler:
        trainer.sampler.load_state_dict(state["sampler"])
    trainer.step = step


def load_into(network: UNetModel, path: str | os.PathLike, *, key: str | None = None) -> None:
    """Give a network the weights of a checkpoint; raises UserError where they do not fit.

    ``key`` is the YAML key of ``path``.
    """
    state = load_state_dict(path)
    if form := foreign_form(list(state)):
        expected = "a checkpoint in guided-diffusion's layout"
        raise UserError(path=path, key=key, expected=expected, got=form)
    check_fits(path, state, shapes_of(network.state_dict()), key=key)
    network.load_state_dict(state)


def load_opt(conf: TrainConf, step: int) -> dict:
    """Return the optimizer's file of ``step``, its tensors mapped from the file.

    Raises UserError if it is damaged or another's.
    """
    path = checkpoint_path(conf, "opt", step)
    try:
        state = read_tree(path)
    except UserError as error:
        hint = "without this file --resume goes on from an earlier checkpoint"
        raise UserError(f"{error.problem}; {hint}", path=path) from error
    if not isinstance(state, dict) or not state.keys() >= _PARTS or state["step"] != step:
        raise UserError(f"is not an optimizer's file of step {step} of this program", path=path)
    return state


def export(conf: TrainConf, path: str) -> str:
    """Write the newest first average in half precision to ``path``; return what was done.

    Tensors that half precision cannot hold stay as they are. Raises UserError where there is no
    checkpoint, and where ``path`` exists and is not an earlier export.
    """
    if not path:
        raise UserError("--export: the path is empty")
    step = newest_step(conf)
    if step is None:
        raise UserError("no complete checkpoint to export", path=conf.out_dir)
    source = checkpoint_path(conf, f"ema_{conf.ema_rates[0]}_", step)
    weights = load_state_dict(source)
    if os.path.lexists(path) and not _is_export(path, weights):
        problem = "exists, and is not an earlier export of this network; choose another name"
        raise UserError(problem, path=path, key="--export")
    state = {name: value.half() for name, value in weights.items()}
    large = [name for name, value in state.items() if not value.isfinite().all()]
    write_weights(path, state | {name: weights[name] for name in large})
    exceptions = f" but for {', '.join(large)}, too large for it," if large else ""
    size = Path(path).stat().st_size / 1e6
    return f"{source} in half precision{exceptions} is {path}, {size:.1f} MB"


def _is_export(path: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether ``path`` holds weights of this network in half precision."""
    try:
        earlier = load_state_dict(path)
    except UserError:
        return False
    is_half = any(value.dtype == torch.float16 for value in earlier.values())
    return is_half and shapes_of(earlier) == shapes_of(weights)


# ---- Checks --------------------------------------------------------------------------------------


def check(conf: TrainConf, device: torch.device, *, resume: bool) -> int:
    """Find what is wrong before anything is built; return the step to go on from, 0 for the start.

    Files that a killed training left half-written are removed. Raises UserError where a batch
    cannot be divided, a new training would mix with an old one, or an old one would go on with
    other settings or pictures. Warns of settings without effect on this device.
    """
    if not is_main():
        warnings.simplefilter("ignore")  # the main process warns for all
    if conf.precision == "tf32" and device.type != "cuda":
        warnings.warn("precision: tf32 is for GPUs; this is float32", stacklevel=2)
    count, rest = divmod(conf.batch_size, world_size())
    if rest:
        problem = f"cannot be divided among {world_size()} processes"
        raise UserError(problem, key="batch_size", got=conf.batch_size)
    if 0 < conf.microbatch < count and count % conf.microbatch:
        problem = f"{count} pictures a process cannot be divided into parts of {conf.microbatch}"
        raise UserError(problem, key="batch_size and microbatch")
    refuse_inside(conf.out_dir, conf.data_dir, key="data_dir")
    check_folder(conf.out_dir)
    saved, newest = _saved_steps(conf), newest_step(conf)
    if saved and not resume:
        hint = "add --resume to go on with it, or choose another name or out_dir"
        problem = f"already holds a training, of {saved[-1]} steps; {hint}"
        raise UserError(problem, path=conf.out_dir)
    if saved:
        _check_settings(conf, newest or saved[-1])
        if newest is None:
            problem = "files of every checkpoint are missing; choose another name or out_dir"
            raise UserError(problem, path=conf.out_dir)
    if is_main():
        remove_leftovers(conf.out_dir)
    return newest or 0


def _check_settings(conf: TrainConf, step: int) -> None:
    """Raise UserError where the training of ``step`` had other settings or pictures."""
    state = load_opt(conf, step)
    paths = list_images(conf.data_dir, key="data_dir", all_formats=conf.all_formats)
    names = names_below(conf.data_dir, paths)
    defaults = {field.name: field.default for field in dataclasses.fields(conf)}  # of newer keys
    then, now = defaults | state["settings"], run_settings(conf, names)
    changed = [name for name in now if then[name] != now[name]]
    if changed:
        before, after = set(state["pictures"]), set(names)
        lists = {"missing": before - after, "new": after - before}
        parts = [f"{word}: {first_of(sorted(some))}" for word, some in lists.items() if some]
        pictures = f" ({'; '.join(parts)})" if parts else ""
        raise UserError(
            f"cannot be resumed with other settings{pictures}; put them back, or start anew in "
            "another out_dir, with init_from",
            path=checkpoint_path(conf, "opt", step),
            key=" and ".join(changed),
            expected=", ".join(shown(then[name]) for name in changed),
            got=", ".join(shown(now[name]) for name in changed),
        )
