"""A training's files: which there are, what must be true before there can be more, and the test.

Checkpoints are named as guided-diffusion names them: ``model001000.pt``, ``ema_0.9999_001000.pt``
and ``opt001000.pt`` after 1,000 steps.
"""

import dataclasses
import functools
import hashlib
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from guided_diffusion.config.checkpoint_flags import shapes_of
from guided_diffusion.config.network_keys import ModelConf
from guided_diffusion.config.schema import conf_to_dict, shown
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.dist_util import is_main, is_out_of_memory, world_size
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io.checkpoints import check_fits, foreign_form, load_state_dict, write_weights
from guided_diffusion.io.files import (
    check_folder,
    refuse_inside,
    refuse_overwriting,
    remove_leftovers,
    write_checkpoint,
    write_text_atomic,
)
from guided_diffusion.io.listing import list_images
from guided_diffusion.models.follow import is_folder
from guided_diffusion.training.pictures import TrainingImages, names_below
from guided_diffusion.training.trainer import Trainer
from guided_diffusion.unet import UNetModel

# What a resumed training may change: how far it goes, how fast and how visibly; not what it learns.
FREE_KEYS = (
    *("name", "data_dir", "out_dir", "init_from", "iterations", "cache_gb", "clip_denoised"),
    *("log_interval", "save_interval", "sample_interval", "sample_mask", "sample_count"),
    *("sample_respacing", "device", "compile", "microbatch", "use_checkpoint"),
)

# What a training writes into its folder; a file that was exported to there may be written anew.
_OWN_FILES = re.compile(
    r"(model|ema_.+_|opt)\d{6,}\.pt|(samples|inpainted)_\d{6,}\.png"
    r"|log\.csv(\.\d+)?|loss\.png|test\.yml|held_out\.txt"
)
_NAMED = 5  # so many pictures are named, and the others counted


# ---- Names ---------------------------------------------------------------------------------------


def checkpoint_path(conf: TrainConf, kind: str, step: int) -> Path:
    """Return the file of ``kind`` (model, ema_<rate>_, opt) after ``step`` steps."""
    return Path(conf.out_dir) / f"{kind}{step:06d}.pt"


def _saved_steps(conf: TrainConf) -> list[int]:
    """Return the steps after which something was saved, whatever the settings were."""
    paths = Path(conf.out_dir).glob("opt*.pt")
    matches = [re.fullmatch(r"opt(\d{6,})\.pt", path.name) for path in paths]
    return sorted(int(match[1]) for match in matches if match)


def newest_step(conf: TrainConf) -> int | None:
    """Return the last step of which all files are there, or None."""
    kinds = ["model", *(f"ema_{rate}_" for rate in conf.ema_rates)]
    steps = _saved_steps(conf)
    complete = [n for n in steps if all(checkpoint_path(conf, k, n).exists() for k in kinds)]
    return max(complete, default=None)


def last_saved(conf: TrainConf) -> str:
    """Return which checkpoint there is to go back to, in words."""
    step = newest_step(conf)
    return "nothing was saved yet" if step is None else f"the last checkpoint is of step {step}"


def load_opt(path: Path, mmap: bool = True) -> dict:
    """Return the optimizer's file; raises UserError if it is unreadable, damaged or another's.

    Mapped from the file it is good for a look; what will be changed is read into memory.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        is_ours = {"step", "settings", "optimizer", "sampler"} <= set(state)
        if is_ours and isinstance(state["settings"], dict):
            return state
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", path=path) from error
    except Exception as error:  # a damaged file makes torch raise nearly anything
        if is_out_of_memory(error):
            raise
        raise UserError("is damaged and cannot be resumed", path=path) from error
    raise UserError("is not an optimizer's file of this program", path=path)


def run_settings(conf: TrainConf, names: Sequence[str]) -> dict[str, object]:
    """Return what has to stay the same for a training to be resumed: keys, and the pictures."""
    kept = {name: v for name, v in conf_to_dict(conf).items() if name not in FREE_KEYS}
    # The published form of the list begins each name with a slash, as paths below a folder do.
    text = "\0".join(f"/{name}" for name in names)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return {**kept, "data_dir": f"{len(names)} pictures (list {digest})"}


def check_disk(conf: TrainConf, parameters: int) -> None:
    """Raise UserError where the disk has no room for the next set of checkpoints."""
    needed = 4 * parameters * (len(conf.ema_rates) + 3) + 2**20  # Adam keeps two numbers for each
    folder = Path(conf.out_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk is too full for the next checkpoint; {last_saved(conf)}",
            path=conf.out_dir,
            expected=f"{needed / 1e6:,.0f} MB free",
            got=f"{free / 1e6:,.0f} MB",
        )


def printable(text: str) -> str:
    """Return ``text`` with an escape for what UTF-8 or YAML lacks: file names may be any bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def test_yaml(
    conf: TrainConf, diffusion: GaussianDiffusion, images: TrainingImages, step: int
) -> str:
    """Return the YAML with which test.py runs the first average after ``step`` steps."""
    kept = conf.timestep_respacing
    if diffusion.num_timesteps == conf.diffusion_steps:  # trained on all, so a part will do
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
    notes += [f"cond_y: {number} is {name}" for number, name in enumerate(images.class_names)]
    lines = "".join(f"# {printable(' '.join(note.split()))}\n" for note in notes)
    return lines + yaml.safe_dump(test, sort_keys=False, allow_unicode=True)


# ---- Saving and loading --------------------------------------------------------------------------


def save(trainer: Trainer, images: TrainingImages) -> None:
    """Write the set of checkpoints of this step, and the YAML that tests it.

    The optimizer's file comes last: where it exists, the set is complete.
    """
    conf, step = trainer.conf, trainer.step
    check_disk(conf, sum(p.numel() for p in trainer.parameters))
    path = functools.partial(checkpoint_path, conf, step=step)
    write_checkpoint(path("model"), _state_dict(trainer, trainer.parameters))
    for rate, averages in trainer.emas.items():
        write_checkpoint(path(f"ema_{rate}_"), _state_dict(trainer, averages))
    test = test_yaml(conf, trainer.diffusion, images, step)
    write_text_atomic(Path(conf.out_dir) / "test.yml", test)
    state = {
        "step": step,
        "settings": run_settings(conf, images.names),
        "pictures": images.names,
        "optimizer": trainer.optimizer.state_dict(),
        "sampler": trainer.sampler.state_dict() if trainer.sampler else {},
    }
    write_checkpoint(path("opt"), state)


def _state_dict(trainer: Trainer, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name parameters as the network's ``state_dict`` does, in memory of their own."""
    plain = (value.detach().cpu().contiguous() for value in values)
    return dict(zip(trainer.names, plain, strict=True))


def load(trainer: Trainer, step: int) -> None:
    """Let ``trainer`` go on from the set of checkpoints of ``step``."""
    path = functools.partial(checkpoint_path, trainer.conf, step=step)
    state = load_opt(path("opt"), mmap=False)
    trainer.model.load_state_dict(load_state_dict(path("model")))
    for rate, averages in trainer.emas.items():
        saved = load_state_dict(path(f"ema_{rate}_"))
        for name, average in zip(trainer.names, averages, strict=True):
            average.copy_(saved[name])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.sampler:
        trainer.sampler.load_state_dict(state["sampler"])
    trainer.step = step


def export(conf: TrainConf, path: str) -> str:
    """Write the newest first average in half precision to ``path``; return what was done.

    Raises UserError where there is no checkpoint, and where ``path`` is a file of the training.
    """
    if not path:
        raise UserError("--export: the path is empty")
    step = newest_step(conf)
    if step is None:
        raise UserError("no complete checkpoint to export", path=conf.out_dir)
    own = (file for file in Path(conf.out_dir).iterdir() if _OWN_FILES.fullmatch(file.name))
    refuse_overwriting([path], own)
    source = checkpoint_path(conf, f"ema_{conf.ema_rates[0]}_", step)
    state = {name: value.half() for name, value in load_state_dict(source).items()}
    write_weights(path, state)
    return f"{source} in half precision is {path}, {Path(path).stat().st_size / 1e6:.1f} MB"


def load_initial(model: UNetModel, path: str) -> None:
    """Give ``model`` the weights of a checkpoint; raises UserError where they do not fit."""
    expected = "a checkpoint in guided-diffusion's layout"
    if is_folder(path):
        raise UserError(path=path, key="init_from", expected=expected, got="a folder")
    state = load_state_dict(path)
    if form := foreign_form(list(state)):
        raise UserError(path=path, key="init_from", expected=expected, got=form)
    check_fits(path, state, shapes_of(model.state_dict()), key="init_from")
    model.load_state_dict(state)


def check_set(conf: TrainConf, model: UNetModel, step: int) -> None:
    """Raise UserError naming the file of the set of ``step`` that is not this network's."""
    wanted = shapes_of(model.state_dict())
    for kind in ("model", *(f"ema_{rate}_" for rate in conf.ema_rates)):
        path = checkpoint_path(conf, kind, step)
        check_fits(path, load_state_dict(path), wanted)
    path = checkpoint_path(conf, "opt", step)
    if not _is_optimizer_of(load_opt(path), list(wanted.values()), step):
        raise UserError(f"is not the optimizer's file of step {step} of this network", path=path)


def _is_optimizer_of(state: dict, shapes: list[tuple[int, ...]], step: int) -> bool:
    try:
        [group] = state["optimizer"]["param_groups"]
        moments = state["optimizer"]["state"]
        numbers = group["params"] if moments else []  # before the first step there are none
        pairs = [(moments[i]["exp_avg"].shape, moments[i]["exp_avg_sq"].shape) for i in numbers]
        fits = pairs == [(shape, shape) for shape in shapes[: len(pairs)]]
        return state["step"] == step and len(group["params"]) == len(shapes) and fits
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


# ---- Checks --------------------------------------------------------------------------------------


def check(conf: TrainConf, device: torch.device, *, resume: bool) -> int:
    """Find what is wrong before anything is built; return the step to go on from, 0 for the start.

    What a killed training left half-written is removed. Raises UserError where a batch cannot be
    divided, a new training would mix with an old one, or an old one is to go on with other settings
    or pictures. Warns of settings without effect on this device.
    """
    if not is_main():
        warnings.simplefilter("ignore")  # one process says it for all
    if conf.precision == "tf32" and device.type != "cuda":
        warnings.warn("precision: tf32 is for GPUs; this is float32", stacklevel=2)
    own, rest = divmod(conf.batch_size, world_size())
    if rest:
        problem = f"cannot be divided among {world_size()} processes"
        raise UserError(problem, key="batch_size", got=conf.batch_size)
    if 0 < conf.microbatch < own and own % conf.microbatch:
        problem = f"{own} pictures a process cannot be divided into parts of {conf.microbatch}"
        raise UserError(problem, key="batch_size and microbatch")
    refuse_inside(conf.out_dir, conf.data_dir, key="data_dir")
    check_folder(conf.out_dir)
    saved, newest = _saved_steps(conf), newest_step(conf)
    if saved:
        _check_resume(conf, saved[-1], resume)
        if newest is None:
            problem = "files of every checkpoint are missing; choose another name or out_dir"
            raise UserError(problem, path=conf.out_dir)
    if is_main():
        remove_leftovers(conf.out_dir)
    return newest or 0


def _check_resume(conf: TrainConf, newest: int, resume: bool) -> None:
    if not resume:
        raise UserError(
            f"already holds a training, of {newest} steps; add --resume to go on with it, or "
            "choose another name or out_dir",
            path=conf.out_dir,
        )
    path = checkpoint_path(conf, "opt", newest)
    state = load_opt(path)
    paths = list_images(conf.data_dir, key="data_dir", all_formats=conf.all_formats)
    names = names_below(conf.data_dir, paths)
    then, now = state["settings"], run_settings(conf, names)
    changed = [name for name in now if name in then and then[name] != now[name]]
    if changed:
        told = _changed_pictures(state.get("pictures"), names) if "data_dir" in changed else ""
        raise UserError(
            f"cannot be resumed with other settings{told}; put them back, or start anew in another "
            "out_dir, with init_from",
            path=path,
            key=" and ".join(changed),
            expected=", ".join(shown(then[name]) for name in changed),
            got=", ".join(shown(now[name]) for name in changed),
        )


def _changed_pictures(then: Sequence[str] | None, now: Sequence[str]) -> str:
    """Say which pictures are missing or new; nothing where the file does not have their names."""
    if then is None:
        return ""
    told = []
    for word, names in (("missing", set(then) - set(now)), ("new", set(now) - set(then))):
        few = sorted(names)[:_NAMED]
        rest = f" and {len(names) - len(few)} more" if len(names) > len(few) else ""
        told += [f"{word}: {', '.join(map(printable, few))}{rest}"] if names else []
    return f" ({'; '.join(told)})"


def check_classes(conf: TrainConf, images: TrainingImages) -> None:
    """Raise UserError where ``num_classes`` is not the number of the pictures' subfolders."""
    if conf.class_cond and conf.num_classes != len(images.class_names):
        raise UserError(
            f"{conf.data_dir} has another number of subfolders, one for each class",
            key="num_classes",
            expected=len(images.class_names),
            got=conf.num_classes,
        )
