"""Say what a network is: ``python guided_diffusion/tools/inspect_model.py FILE_OR_FOLDER``.

It prints YAML: what the file or folder is in comments, and the keys that it needs.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script its own folder comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.checkpoint_flags import (
    SILENT_FLAGS,
    check_channels,
    classifier_flags,
    model_flags,
    yaml_lines,
)
from guided_diffusion.config.network_keys import CHANNEL_MULT_BY_SIZE
from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import read_weights
from guided_diffusion.io.weights import foreign_form, listed, shapes_of
from guided_diffusion.models.follow import is_folder, is_lucidrains, read_model, short_walk
from guided_diffusion.models.foreign import ForeignModel
from guided_diffusion.models.hub import fetch_configuration


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a checkpoint or folder is, as YAML; raises UserError."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="or hf://owner/name")
    parser.add_argument("--image_size", type=int, metavar="PIXELS",
                        help="side of the pictures, which shapes do not always tell")  # fmt: skip
    args: argparse.Namespace = parser.parse_args(argv)
    if args.image_size is not None and not 1 <= args.image_size <= 8192:
        raise UserError(key="--image_size", expected="1 to 8192", got=args.image_size)
    is_foreign = is_folder(args.path) or is_lucidrains(args.path)
    lines = (_of_foreign if is_foreign else _of_checkpoint)(args.path, args.image_size)
    print("\n".join(lines))
    return 0


def _count(shapes: Mapping[str, tuple[int, ...]]) -> str:
    count = sum(map(math.prod, shapes.values()))
    return f"{count / 1e6:,.1f} million parameters" if count > 1e5 else f"{count:,} parameters"


def _of_foreign(path: str, side: int | None) -> list[str]:
    """Describe a network whose own files decide most keys, and add the usual values of others."""
    fetch_configuration(path)
    model = read_model(path)
    decided = model.keys
    if is_folder(path):
        version = str(model.unet.get("_diffusers_version", "unknown"))[:20]
        lines = [f"# {path}: a UNet2DModel of diffusers {version}"]
        lines += [] if model.betas is None else [_about_chain(model)]
        usual = {"image_size": 256, "noise_schedule": "linear", "predict_v": False}
    else:
        kind = f"denoising-diffusion-pytorch {model.version[:20]}".strip()
        lines = [f"# {path}: a network of {kind}, {_count(model.shapes)}"]
        usual = {"image_size": 64, "noise_schedule": "cosine", "predict_v": True}
        usual |= {} if model.heads else {"num_heads": 4}
    if model.betas is not None:
        del usual["noise_schedule"]
    guesses = {k: v for k, v in {**usual, "diffusion_steps": 1000}.items() if k not in decided}
    stated = {"image_size": side} if side and "image_size" in guesses else {}
    if names := [key for key in guesses if key not in stated]:
        lines.append(f"# warning: the files do not tell {', '.join(names)}; below are guesses")
    lines.append(f"# These follow the files and may be left out: {', '.join(yaml_lines(decided))}")
    walk = short_walk({}, decided.get("diffusion_steps"))
    return [*lines, *yaml_lines({"model_path": path, **guesses, **stated, **walk})]


def _about_chain(model: ForeignModel) -> str:
    keys, betas = model.keys, model.betas
    outputs = "the picture" if keys["predict_xstart"] else "v" if keys["predict_v"] else "noise"
    variance = "learned" if keys["learn_sigma"] else "posterior" if model.fixed_small else "beta"
    clip = f"clipped to {model.clip_range:g}" if keys["clip_denoised"] else "not clipped"
    return (
        f"# chain: {len(betas):,} steps with betas from {betas[0]:.3g} to {betas[-1]:.3g}; "
        f"predicts {outputs}, {clip}; variance: {variance}"
    )


def _of_checkpoint(path: str, side: int | None) -> list[str]:
    weights = read_weights(Path(path))
    shapes = shapes_of(weights.tensors)
    if form := foreign_form(list(shapes)):
        raise UserError(f"holds {form}", path=path)
    check_channels(path, shapes)
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()}
    about = f"{_count(shapes)} in {' and '.join(sorted(types)[:3])}"
    notes = [f"# {weights.note}"] if weights.note else []
    if flags := model_flags(shapes, side or _likely_side(shapes)):
        is_improved = flags.get("resblock_updown") is False
        kind = "improved-diffusion or guided-diffusion" if is_improved else "guided-diffusion"
        lines = _of_network(path, flags, side)
        return [f"# {path}: a network of {kind}, {about}", *notes, *lines]
    if flags := classifier_flags(shapes):
        lines = yaml_lines({"classifier_path": path, **flags})
        return [f"# {path}: a classifier of noisy pictures, {about}", *notes, *lines]
    problem = "is not a whole network of guided-diffusion's kind"
    raise UserError(problem, path=path, got=f"tensors named {listed(list(shapes))}")


def _likely_side(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the side at which attention is on the feature maps that networks usually have."""
    top = 1 << 20
    sides = model_flags(shapes, top).get("attention_resolutions")
    if not sides:
        return 256
    return (32 if len(sides) > 2 else 16) * top // max(sides)


def _of_network(path: str, flags: dict[str, Any], side: int | None) -> list[str]:
    """Return the keys that shapes tell, ``flags``, and the usual values of the others."""
    lines, size = [], side or flags["image_size"]
    flags["image_size"] = size
    is_usual = CHANNEL_MULT_BY_SIZE.get(size) == flags["channel_mult"]
    if side is None and not is_usual:
        lines.append(
            f"# warning: shapes cannot tell image_size; {size} is a guess, and "
            "attention_resolutions go with it (--image_size states another)"
        )
    published = SILENT_FLAGS.get((size, flags["num_channels"], flags["num_res_blocks"]), {})
    if published and flags["class_cond"] and flags["learn_sigma"]:
        lines.append("# the shapes are those of a published checkpoint: below are its keys")
        return [*lines, *yaml_lines({"model_path": path, **flags, **published})]
    guesses = {**_heads(flags), "use_new_attention_order": False, "norm_groups": 32,
               "noise_schedule": "linear", "diffusion_steps": 1000, "predict_xstart": False,
               "predict_v": False, "rescale_timesteps": False}  # fmt: skip
    lines.append(
        f"# warning: shapes cannot tell {', '.join(guesses)}: below are the usual values; if the "
        "results are noise, the training had others"
    )
    return [*lines, *yaml_lines({"model_path": path, **flags, **guesses})]


def _heads(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the usual attention heads of this kind of network that its widths allow."""
    widths = [int(m * flags["num_channels"]) for m in flags["channel_mult"]]
    if flags.get("resblock_updown") is False and all(width % 4 == 0 for width in widths):
        return {"num_heads": 4, "num_head_channels": -1}
    common = math.gcd(*widths)
    return {"num_head_channels": next(n for n in (64, 32, common) if common % n == 0)}


if __name__ == "__main__":
    command_line(main)
