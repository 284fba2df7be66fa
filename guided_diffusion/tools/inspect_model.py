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
    yaml_text,
)
from guided_diffusion.config.network_keys import CHANNEL_MULT_BY_SIZE
from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import read_weights
from guided_diffusion.io.weights import Weights, foreign_form, listed
from guided_diffusion.models.folders import read_folder
from guided_diffusion.models.follow import is_folder, is_lucidrains, short_walk
from guided_diffusion.models.hub import fetch_configuration
from guided_diffusion.models.lucidrains import read_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a checkpoint or folder is, as YAML; raises UserError."""
    parser = OptionParser(description="Say what a checkpoint or a diffusers folder is, and which "
                          "YAML keys it needs. The output is YAML.")  # fmt: skip
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="or hf://owner/name")
    parser.add_argument("--image_size", type=_side, metavar="PIXELS",
                        help="side of the pictures, which shapes do not always tell")  # fmt: skip
    args: argparse.Namespace = parser.parse_args(argv)
    if is_folder(args.path):
        lines = _of_folder(args.path)
    elif is_lucidrains(args.path):
        lines = _of_lucidrains(args.path, args.image_size)
    else:
        lines = _of_checkpoint(args.path, args.image_size)
    print("\n".join(lines))
    return 0


def _side(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 8192):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 8192, found {text!r}")
    return int(text)


def _yaml(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {yaml_text(key, value)}" for key, value in keys.items()]


def _count(shapes: Mapping[str, tuple[int, ...]]) -> str:
    count = sum(map(math.prod, shapes.values()))
    return f"{count / 1e6:,.1f} million parameters" if count > 1e5 else f"{count:,} parameters"


# ---- A folder ------------------------------------------------------------------------------------


def _of_folder(path: str) -> list[str]:
    fetch_configuration(path)
    folder = read_folder(path)
    chain, version = folder.chain, str(folder.unet.get("_diffusers_version", "unknown"))[:20]
    outputs = "the picture" if chain.predict_xstart else "v" if chain.predict_v else "noise"
    variance = "learned" if chain.learn_sigma else "posterior" if chain.fixed_small else "beta"
    clip = f"clipped to {chain.clip_range:g}" if chain.clip_denoised else "not clipped"
    lines = [
        f"# {path}: a UNet2DModel of diffusers {version}",
        f"# chain: {len(chain.betas):,} steps with betas from {chain.betas[0]:.3g} to "
        f"{chain.betas[-1]:.3g}; predicts {outputs}, {clip}; variance: {variance}",
    ]
    keys: dict[str, Any] = {"model_path": path}
    if "image_size" not in folder.keys():  # noqa: SIM118 - not a dictionary
        lines.append("# warning: config.json has no sample_size; 256 is a guess")
        keys["image_size"] = 256
    if not folder.scheduler_path:
        lines.append("# warning: has no scheduler_config.json; the chain's keys are a guess")
        keys |= {"diffusion_steps": 1000, "noise_schedule": "linear"}
        keys |= {"predict_xstart": False, "predict_v": False}
    follow = ", ".join(_yaml(folder.keys()))
    lines.append(f"# These follow the folder and may be left out: {follow}")
    return [*lines, *_yaml({**keys, **short_walk({}, len(chain.betas))})]


def _of_lucidrains(path: str, side: int | None) -> list[str]:
    checkpoint = read_checkpoint(path)
    decided = checkpoint.keys()
    version = f" {checkpoint.version[:20]}" if checkpoint.version else ""
    keys: dict[str, Any] = {"model_path": path, "image_size": side or 64}
    if "predict_v" not in decided:
        keys["predict_v"] = True
    if not checkpoint.has_chain:
        keys |= {"diffusion_steps": 1000, "noise_schedule": "cosine"}
    if not checkpoint.heads:
        keys["num_heads"] = 4
    guesses = [key for key in list(keys)[1:] if not (side and key == "image_size")]
    lines = [f"# {path}: a network of denoising-diffusion-pytorch{version}, "
             f"{_count(checkpoint.shapes)}"]  # fmt: skip
    if guesses:
        lines.append(f"# warning: the file does not tell {', '.join(guesses)}; below are guesses")
    lines.append(f"# These follow the file and may be left out: {', '.join(_yaml(decided))}")
    steps = decided.get("diffusion_steps")
    return [*lines, *_yaml({**keys, **short_walk({}, steps)})]


# ---- A checkpoint --------------------------------------------------------------------------------


def _of_checkpoint(path: str, side: int | None) -> list[str]:
    weights = read_weights(Path(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    if form := foreign_form(list(shapes)):
        raise UserError(f"holds {form}", path=path)
    check_channels(path, shapes)
    flags = model_flags(shapes, side or _likely_side(shapes))
    if flags:
        return _of_network(path, weights, shapes, flags, side)
    flags = classifier_flags(shapes, side or 256)
    if flags:
        about = f"# {path}: a classifier of noisy pictures, {_about(weights, shapes)}"
        return [about, *_note(weights), *_yaml({"classifier_path": path, **flags})]
    problem = "is not a whole network of guided-diffusion's kind"
    raise UserError(problem, path=path, got=f"tensors named {listed(list(shapes))}")


def _likely_side(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the side at which attention is on the feature maps that networks usually have."""
    top = 1 << 20
    sides = model_flags(shapes, top).get("attention_resolutions")
    if not sides:
        return 256
    return (32 if len(sides) > 2 else 16) * top // max(sides)


def _about(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> str:
    types = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()}
    )
    return f"{_count(shapes)} in {' and '.join(sorted(types)[:3])}"


def _note(weights: Weights) -> list[str]:
    return [f"# {weights.note}"] if weights.note else []


def _of_network(
    path: str,
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    flags: dict[str, Any],
    side: int | None,
) -> list[str]:
    is_improved = flags.get("resblock_updown") is False
    kind = "improved-diffusion or guided-diffusion" if is_improved else "guided-diffusion"
    lines = [f"# {path}: a network of {kind}, {_about(weights, shapes)}", *_note(weights)]
    mult, size = flags["channel_mult"], flags["image_size"]
    if flags["in_channels"] == 3:  # as by default
        del flags["in_channels"]
    if side is not None:
        flags["image_size"] = size = side
    elif CHANNEL_MULT_BY_SIZE.get(size) != mult:
        lines.append(
            f"# warning: shapes cannot tell image_size; {size} is a guess, and "
            "attention_resolutions go with it (--image_size states another)"
        )
    if CHANNEL_MULT_BY_SIZE.get(size) == mult:
        del flags["channel_mult"]
    published = SILENT_FLAGS.get((size, flags["num_channels"], flags["num_res_blocks"]), {})
    if published and flags["class_cond"] and flags["learn_sigma"]:
        lines.append("# the shapes are those of a published checkpoint: below are its keys")
        return [*lines, *_yaml({"model_path": path, **flags, **published})]
    guesses = {**_heads(flags, mult, is_improved), "use_new_attention_order": False}
    guesses |= {"norm_groups": 32, "noise_schedule": "linear", "diffusion_steps": 1000,
                "predict_xstart": False, "predict_v": False,
                "rescale_timesteps": False}  # fmt: skip
    lines.append(
        f"# warning: shapes cannot tell {', '.join(guesses)}: below are the usual values; if the "
        "results are noise, the training had others"
    )
    return [*lines, *_yaml({"model_path": path, **flags, **guesses})]


def _heads(flags: Mapping[str, Any], mult: Sequence[float], is_improved: bool) -> dict[str, Any]:
    """Return the usual attention heads of this kind of network that its widths allow."""
    widths = [int(m * flags["num_channels"]) for m in mult]
    if is_improved and all(width % 4 == 0 for width in widths):
        return {"num_heads": 4, "num_head_channels": -1}
    common = math.gcd(*widths)
    return {"num_head_channels": next(n for n in (64, 32, common) if common % n == 0)}


if __name__ == "__main__":
    command_line(main)
