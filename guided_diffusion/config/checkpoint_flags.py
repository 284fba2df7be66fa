"""What the shapes of a checkpoint tell: the YAML keys of its network."""

import copy
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.network_keys import CHANNEL_MULT_BY_SIZE, ModelConf
from guided_diffusion.errors import UserError
from guided_diffusion.io.weights import check_fits, foreign_form, shapes_of
from guided_diffusion.models.foreign import ALLOWED_CHANNELS

_LISTS = ("channel_mult", "attention_resolutions", "classifier_attention_resolutions")
Shapes = Mapping[str, tuple[int, ...]]
# What shapes cannot tell, of published checkpoints that differ from the defaults: by what they can.
SILENT_FLAGS = {
    (64, 192, 3): {"use_new_attention_order": True, "noise_schedule": "cosine"},
    (128, 256, 2): {"num_heads": 4, "num_head_channels": -1},
}


def warn_of_silent_flags(conf: ModelConf) -> None:
    """Warn of published checkpoints whose shapes say less than they need."""
    shape = (conf.image_size, conf.num_channels, conf.num_res_blocks)
    published = SILENT_FLAGS.get(shape, {})
    wrong = {key: value for key, value in published.items() if getattr(conf, key) != value}
    if wrong and conf.class_cond and conf.learn_sigma:
        side, needed = conf.image_size, ", ".join(yaml_lines(wrong))
        text = f"has the shapes of the published {side}x{side} checkpoint, which needs {needed}"
        warnings.warn(f"{conf.model_path}: {text}; without, results are garbage", stacklevel=3)


# ---- What shapes tell ----------------------------------------------------------------------------


def model_flags(
    shapes: Shapes, image_size: int, channel_mult: Sequence[float] | None = None
) -> dict[str, Any]:
    """Return the YAML keys of the network whose ``state_dict`` has these shapes.

    ``image_size`` says which side each level has. Where it is a published size, but the widths are
    those of another one and not those of ``channel_mult``, that one is meant and named. Empty where
    this is no such network, or an incomplete one.
    """
    # One parameter of each output block's resizing layer, which comes last in it.
    resizing = re.compile(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight")
    up = [name for name in shapes if resizing.fullmatch(name)]
    blocks, levels = _count(shapes, "output_blocks"), len(up) + 1
    if blocks < 2 * levels or blocks % levels:
        return {}
    per_level = blocks // levels
    starts = range(blocks - per_level, -1, -per_level)  # of each level's blocks, from the top
    first = [f"output_blocks.{start}" for start in starts]
    try:
        width = shapes["time_embed.0.weight"][1]
        widths = [shapes[f"{name}.0.out_layers.3.weight"][0] for name in first]
        out_channels = shapes["out.2.weight"][0]
        in_channels = shapes["input_blocks.0.0.weight"][1]
        num_classes = shapes.get("label_emb.weight", (None,))[0]
        has_scale_shift = _has_scale_shift(shapes)
        mult = tuple(_multiplier(level_width, width) for level_width in widths)
    except (KeyError, IndexError, ZeroDivisionError):
        return {}
    if not (width and all(widths) and num_classes != 0):
        return {}
    if channel_mult and [int(m * width) for m in channel_mult] == widths:
        mult = tuple(channel_mult)
    elif image_size in CHANNEL_MULT_BY_SIZE:
        sizes = [size for size, table in CHANNEL_MULT_BY_SIZE.items() if table == mult]
        image_size = sizes[0] if sizes else image_size
    attends = [f"{name}.1.qkv.weight" in shapes for name in first]
    sides = {image_size >> i for i, is_on in enumerate(attends) if is_on}
    flags = {
        "image_size": image_size,
        "num_channels": width,
        "num_res_blocks": per_level - 1,
        "channel_mult": mult,
        "attention_resolutions": sides,
        "in_channels": in_channels,
        "learn_sigma": out_channels == 2 * in_channels,
        "class_cond": num_classes is not None,
        "use_scale_shift_norm": has_scale_shift,
    }
    if num_classes is not None:
        flags["num_classes"] = num_classes
    if up:
        flags["resblock_updown"] = any("in_layers" in name for name in up)
    return flags


def classifier_flags(shapes: Shapes) -> dict[str, Any]:
    """Return the YAML keys of the classifier whose ``state_dict`` has these shapes, or nothing.

    Its widths are always those of the published table.
    """
    blocks = _count(shapes, "input_blocks")
    try:
        width, has_scale_shift = shapes["time_embed.0.weight"][1], _has_scale_shift(shapes)
    except (KeyError, IndexError):
        return {}
    for size, table in CHANNEL_MULT_BY_SIZE.items():
        depth, rest = blocks // len(table) - 1, blocks % len(table)
        first = [f"input_blocks.{1 + level * (depth + 1)}" for level in range(len(table))]
        convs = [shapes.get(f"{name}.0.out_layers.3.weight", ()) for name in first]
        widths = [(int(mult * width),) for mult in table]
        if not width or depth < 1 or rest or [conv[:1] for conv in convs] != widths:
            continue
        attends = [f"{name}.1.qkv.weight" in shapes for name in first]
        sides = {size >> i for i, is_on in enumerate(attends) if is_on}
        return {
            "image_size": size,
            "classifier_width": width,
            "classifier_depth": depth,
            "classifier_attention_resolutions": sides,
            "classifier_use_scale_shift_norm": has_scale_shift,
            "classifier_resblock_updown": f"input_blocks.{depth + 1}.0.op.weight" not in shapes,
            "classifier_pool": _pool(shapes),
        }
    return {}


def _pool(shapes: Shapes) -> str:
    """Return what ``classifier_pool`` has to be."""
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if len(shapes.get("out.3.weight", ())) == 4:
        return "adaptive"
    return "spatial_v2" if "out.3.weight" in shapes else "spatial"


def _count(shapes: Shapes, list_name: str) -> int:
    """Return how many blocks a list has, 0 where one is missing."""
    found = [re.match(rf"{list_name}\.(\d{{1,4}})\.", name) for name in shapes]
    numbers = {int(match[1]) for match in found if match}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _has_scale_shift(shapes: Shapes) -> bool:
    block = "middle_block.0"
    out = shapes[f"{block}.out_layers.3.weight"][0]
    return shapes[f"{block}.emb_layers.1.weight"][0] == 2 * out


def _multiplier(level_width: int, width: int) -> float:
    """Return the shortest number whose product with ``width`` has this whole part."""
    exact = level_width / width
    rounded = [math.ceil(exact * 10**digits) / 10**digits for digits in range(8)]
    return next((mult for mult in rounded if int(mult * width) == level_width), exact)


def fitting(
    path: str,
    create: Callable[[Any], nn.Module],
    conf: InpaintConf,
    state: Mapping[str, Tensor],
    flags: Mapping[str, Any],
) -> nn.Module:
    """Return the network that ``create`` builds of ``conf``, without weights.

    ``flags`` is what the shapes of a checkpoint's ``state`` tell. Raises UserError where the state
    does not fit: it names the keys to change, each of which is needed, or the first tensor that
    differs where no key helps.
    """
    with torch.device("meta"):
        network = create(conf)
    shapes = shapes_of(state)
    own = shapes_of(network.state_dict())
    if own == shapes:
        return network
    check_channels(path, shapes)
    changes = {key: _text(value) for key, value in flags.items()}
    changes = {key: value for key, value in changes.items() if getattr(conf, key) != value}
    closest = _shapes_with(changes, create, conf)
    if closest != shapes:
        if form := foreign_form(list(shapes)):
            raise UserError(f"holds {form}", path=path)
        check_fits(path, state, closest or own)
    for key in reversed(list(changes)):
        fewer = {name: value for name, value in changes.items() if name != key}
        if _shapes_with(fewer, create, conf) == shapes:
            changes = fewer
    wanted = ", ".join(yaml_lines(changes))
    raise UserError(f"does not fit the configuration; set {wanted}", path=path)


def _shapes_with(
    changes: Mapping[str, Any], create: Callable[[Any], nn.Module], conf: InpaintConf
) -> Shapes | None:
    """Return the shapes of the network of the changed configuration; None if it cannot be."""
    changed = copy.copy(conf)
    # Heads leave no trace in shapes, and with one channel each they are possible in any width.
    vars(changed).update({**changes, "num_head_channels": 1})
    try:
        with torch.device("meta"):
            return shapes_of(create(changed).state_dict())
    except (ValueError, RuntimeError, KeyError):
        return None


def _text(value: Any) -> Any:
    """Write several numbers as a configuration holds them; anything else stays."""
    if isinstance(value, set | tuple):
        items = sorted(value, reverse=True) if isinstance(value, set) else value
        return ",".join(f"{item:.10g}" for item in items)
    return value


def yaml_lines(keys: Mapping[str, Any]) -> list[str]:
    """Write keys and values as a YAML file has them: lists of numbers as quoted text."""
    return [f"{key}: {_yaml_text(key, value)}" for key, value in keys.items()]


def _yaml_text(key: str, value: Any) -> str:
    value = _text(value)
    if isinstance(value, str) and key in _LISTS:
        return f"'{value}'"
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def check_channels(path: str, shapes: Shapes) -> None:
    """Raise UserError for a network of other than one or three channels."""
    channels = shapes.get("input_blocks.0.0.weight", (0, 3))[1:2]
    if channels and channels[0] not in (1, 3):
        raise UserError(path=path, key="in_channels", expected=ALLOWED_CHANNELS, got=channels[0])
