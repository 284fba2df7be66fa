"""YAML keys that a network of another program decides, because its files describe it."""

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.models.hub import HUB, local_folder

# Keys of guided-diffusion's own network and chain, without effect on those of a folder.
NETWORK_KEYS = (
    "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_head_channels",
    "use_scale_shift_norm", "resblock_updown", "norm_groups", "noise_schedule",
)  # fmt: skip
USUAL_STEPS = 250  # of a walk, where the YAML states none


def is_folder(path: object) -> bool:
    """Whether a ``model_path`` names a folder, on this machine or of the hub."""
    return isinstance(path, str) and (path.startswith(HUB) or os.path.isdir(path))  # noqa: PTH112


def follow_model(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration's tree with the keys that its ``model_path`` decides.

    A tree is returned as it is if ``model_path`` is a checkpoint in guided-diffusion's layout, or a
    folder of the hub that is not on this machine. Uses no network. Raises UserError as
    ``read_folder``, and for a stated key that contradicts the model, naming both values.
    """
    path = tree.get("model_path")
    path = os.path.expanduser(path) if isinstance(path, str) else path  # noqa: PTH111 - text
    if not is_folder(path) or not local_folder(path):
        return tree
    from guided_diffusion.models.folders import check_side, read_folder

    folder = read_folder(path)
    keys = folder.keys()
    for key, value in keys.items():
        stated = tree.get(key)
        if stated not in (None, "") and _comparable(stated) != _comparable(value):
            raise UserError(
                f"contradicts the folder {path}; leave the key out and it follows the folder",
                key=key,
                expected=json.dumps(value).strip('"'),
                got=json.dumps(stated, default=str)[:80].strip('"'),
            )
    side = tree.get("image_size")
    if "image_size" not in keys and isinstance(side, int):
        check_side(folder, side)
    unused = [key for key in NETWORK_KEYS if key != "noise_schedule" or folder.scheduler_path]
    if names := [key for key in unused if tree.get(key) is not None]:
        problem = "no effect on the network of a folder, which describes it"
        warnings.warn(f"{', '.join(names)}: {problem}", stacklevel=2)
    tree = {key: value for key, value in tree.items() if key not in unused}
    return {**tree, **keys, **short_walk(tree, len(folder.chain.betas))}


def short_walk(tree: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the keys of a walk over all of a short chain, unless the YAML states a walk."""
    walk = tree.get("schedule_jump_params") or {}
    is_stated = tree.get("timestep_respacing") is not None
    if steps >= USUAL_STEPS or is_stated or not isinstance(walk, Mapping) or "t_T" in walk:
        return {}
    return {"timestep_respacing": str(steps), "schedule_jump_params": {**walk, "t_T": steps}}


def _comparable(value: object) -> object:
    """Make values equal that YAML may write in several ways, such as '1,2' and [1, 2]."""
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    texts = [str(item).strip().lower() for item in items]
    try:
        return sorted(float(text) for text in texts if text)
    except ValueError:
        return texts
