"""YAML keys that a network of another program decides, because its files describe it."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guided_diffusion.config.schema import shown
from guided_diffusion.errors import UserError
from guided_diffusion.models.foreign import ForeignModel
from guided_diffusion.models.hub import HUB, local_folder

# Keys of guided-diffusion's own network and chain, without effect on those of another program.
NETWORK_KEYS = (
    "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_head_channels",
    "use_scale_shift_norm", "resblock_updown", "norm_groups", "noise_schedule",
)  # fmt: skip
USUAL_STEPS = 250  # of a walk, where the YAML states none
# A name that networks of denoising-diffusion-pytorch have, near the beginning of a checkpoint.
_LUCIDRAINS = b"downs.0.0.block1.proj"


def is_folder(path: object) -> bool:
    """Whether a ``model_path`` names a folder, on this machine or of the hub."""
    return isinstance(path, str) and (path.startswith(HUB) or os.path.isdir(path))  # noqa: PTH112


def is_lucidrains(path: object) -> bool:
    """Whether a ``model_path`` names a checkpoint of denoising-diffusion-pytorch."""
    if not isinstance(path, str) or not os.path.isfile(path):  # noqa: PTH113 - not of a pipe
        return False
    try:
        with Path(path).open("rb") as file:
            return _LUCIDRAINS in file.read(1 << 20)
    except OSError:
        return False


def read_model(path: object) -> ForeignModel | None:
    """Return the network of another program at a ``model_path``; uses no network.

    None for a checkpoint in guided-diffusion's layout, and for a folder of the hub that is not on
    this machine. Raises UserError as ``read_folder`` and ``read_checkpoint``.
    """
    if is_folder(path) and local_folder(path):
        from guided_diffusion.models.diffusers import read_folder

        return read_folder(path)
    if is_lucidrains(path):
        from guided_diffusion.models.lucidrains import read_checkpoint

        return read_checkpoint(path)
    return None


def follow_model(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration's tree with the keys that its ``model_path`` decides.

    Uses no network. Raises UserError as ``read_model``, for a stated key that contradicts the
    model, naming both values, for a key that neither states, and for a side that the network cannot
    halve at each level.
    """
    path = tree.get("model_path")
    model = read_model(os.path.expanduser(path) if isinstance(path, str) else path)  # noqa: PTH111
    if model is None:
        return tree
    for key, value in model.keys.items():
        stated = tree.get(key)
        if stated not in (None, "", value):
            problem = f"contradicts {model.name}, which decides it; leave the key out"
            raise UserError(problem, key=key, expected=shown(value), got=shown(stated))
    for keys, text in model.needed.items():
        if all(tree.get(key) in (None, "") for key in keys):
            problem = f"is missing, and {model.name} does not tell it: {text}"
            raise UserError(problem, key=keys[0])
    unused = [key for key in NETWORK_KEYS if key != "noise_schedule" or model.betas is not None]
    if names := [key for key in unused if tree.get(key) is not None]:
        problem = f"no effect, because {model.name} describes its network"
        warnings.warn(f"{', '.join(names)}: {problem}", stacklevel=2)
    tree = {**{key: value for key, value in tree.items() if key not in unused}, **model.keys}
    side, unit = tree.get("image_size"), 2 ** (model.levels - 1)
    if isinstance(side, int) and side % unit:
        expected = f"a side divisible by {unit}, for the {model.levels} levels of {model.name}"
        raise UserError(key="image_size", expected=expected, got=side)
    return {**tree, **short_walk(tree, tree.get("diffusion_steps"))}


def short_walk(tree: Mapping[str, Any], steps: object) -> dict[str, Any]:
    """Return the keys of a walk over all of a short chain, unless the YAML states a walk."""
    walk = tree.get("schedule_jump_params") or {}
    is_short = isinstance(steps, int) and steps < USUAL_STEPS
    if not is_short or not isinstance(walk, Mapping):
        return {}
    if tree.get("timestep_respacing") is not None or "t_T" in walk:
        return {}
    return {"timestep_respacing": str(steps), "schedule_jump_params": {**walk, "t_T": steps}}
