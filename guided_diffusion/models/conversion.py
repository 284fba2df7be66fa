"""Weights of diffusers under guided-diffusion's names, where both networks compute the same.

A training goes on from such a network. Those that the published DDPM was ported to compute the
embedding of time and halve their maps otherwise; for them there is no conversion.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.config.folders import ModelFolder, fetch_weights, is_folder, read_folder
from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import load_state_dict, short
from guided_diffusion.models.diffusers import OLD_NAMES

# What guided-diffusion's network always has; diffusers has it too where nothing is said.
_NEEDED: dict[str, tuple] = {
    "flip_sin_to_cos": (True,), "freq_shift": (0,), "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,), "center_input_sample": (False,), "class_embed_type": (None,),
    "downsample_type": ("conv",), "upsample_type": ("conv",), "downsample_padding": (1,),
    "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,),
    "add_attention": (True,), "act_fn": ("silu", "swish"), "norm_eps": (1e-5,),
    "norm_num_groups": (32, 16, 8, 4, 2, 1),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}  # fmt: skip
_INNER = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    "group_norm": "norm", "to_qkv": "qkv", "to_out.0": "proj_out",
}  # fmt: skip
_OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip


def initial_state_dict(path: str, *, new_attention_order: bool) -> dict[str, Tensor]:
    """Return the weights that a training starts from: of a checkpoint, or of a diffusers folder.

    Raises UserError as ``load_state_dict`` and ``guided_state_dict``.
    """
    if is_folder(path):
        return guided_state_dict(read_folder(path), new_attention_order=new_attention_order)
    return load_state_dict(path)


def guided_state_dict(folder: ModelFolder, *, new_attention_order: bool) -> dict[str, Tensor]:
    """Return a folder's weights as ``UNetModel`` has them; raises UserError where it cannot.

    ``new_attention_order`` is the YAML key ``use_new_attention_order``.
    """
    _check(folder)
    state: dict[str, Tensor] = {}
    for path in fetch_weights(folder):
        for name, tensor in load_state_dict(path).items():
            state[".".join(OLD_NAMES.get(part, part) for part in name.split("."))] = tensor
    state = _with_joined_products(folder, state, new_attention_order=new_attention_order)
    named = {}
    for name, tensor in state.items():
        part, kind = name.rpartition(".")[::2]
        converted = f"{_converted(folder, part)}.{kind}"
        is_product = converted.endswith(("qkv.weight", "proj_out.weight"))
        named[converted] = tensor[..., None] if is_product and tensor.ndim == 2 else tensor
    return named


def _check(folder: ModelFolder) -> None:
    unet = folder.unet
    for key, allowed in _NEEDED.items():
        if unet.get(key, allowed[0]) not in allowed:
            raise _impossible(folder, key, " or ".join(map(str, allowed)), unet[key])
    groups, in_attention = unet["norm_num_groups"], unet.get("attn_norm_num_groups")
    attends_without = in_attention is None and unet["resnet_time_scale_shift"] != "default"
    if attends_without or in_attention not in (None, groups):
        raise _impossible(folder, "attn_norm_num_groups", groups, in_attention)
    down = ["DownBlock2D", "AttnDownBlock2D"]
    if not all(kind in down for kind in unet["down_block_types"]):
        raise _impossible(folder, "down_block_types", " and ".join(down), unet["down_block_types"])
    mirrored = [kind.replace("Down", "Up") for kind in reversed(unet["down_block_types"])]
    if list(unet["up_block_types"]) != mirrored:
        raise _impossible(folder, "up_block_types", mirrored, unet["up_block_types"])


def _impossible(folder: ModelFolder, key: str, expected: object, got: object) -> UserError:
    problem = "is no network that this program trains; test.py runs it, and diffusers trains it"
    return UserError(problem, path=folder.unet_path, key=key, expected=expected, got=short(got))


def _with_joined_products(
    folder: ModelFolder, state: Mapping[str, Tensor], *, new_attention_order: bool
) -> dict[str, Tensor]:
    """Join queries, keys and values to one product: head by head, or in the new order as wholes."""
    joined, head_channels = {}, folder.unet["attention_head_dim"]
    for name, tensor in state.items():
        if ".to_q." in name:
            parts = _products(folder, state, name)
            width = len(tensor)
            heads = 1 if new_attention_order or not head_channels else width // head_channels
            stacked = torch.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], 1)
            tensor = stacked.reshape(3 * width, *tensor.shape[1:])
            name = name.replace(".to_q.", ".to_qkv.")
        if not re.search(r"\.to_[kv]\.", name):
            joined[name] = tensor
    return joined


def _products(folder: ModelFolder, state: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Return the tensors of queries, keys and values; ``name`` is the queries'.

    Raises UserError where one is missing or of another shape, or queries are not of whole heads.
    """
    names = [name.replace(".to_q.", f".to_{part}.") for part in "qkv"]
    shapes = [tuple(state[each].shape) if each in state else "no such tensor" for each in names]
    wanted, rows = shapes[0], shapes[0][0] if shapes[0] else 0
    if not rows or rows % (folder.unet["attention_head_dim"] or rows):
        wanted = f"whole heads of {folder.unet['attention_head_dim']} channels"
    for each, shape in zip(names, shapes, strict=True):
        if shape != wanted:
            problem = f"has other weights than its config.json says: {short(each)}"
            raise UserError(problem, path=folder.name, expected=wanted, got=shape)
    return [state[each] for each in names]


def _converted(folder: ModelFolder, name: str) -> str:
    """Return guided-diffusion's name of a layer, or the name itself where there is none."""
    per_level = folder.unet["layers_per_block"] + 1
    if name in _OUTER:
        return _OUTER[name]
    for outer, new in _OUTER.items():
        if name.startswith(f"{outer}."):
            return f"{new}.{_INNER.get(name.removeprefix(f'{outer}.'), name)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.([\w.]+)", name)
    if not match:
        return name
    way, level, kind, number, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * per_level}.0.op"
    if kind == "upsamplers":
        attends = folder.unet["up_block_types"][level].startswith("Attn")
        return f"output_blocks.{(level + 1) * per_level - 1}.{2 if attends else 1}.conv"
    block = level * per_level + number + (way == "down")
    place = f"{'input' if way == 'down' else 'output'}_blocks.{block}"
    return f"{place}.{int(kind == 'attentions')}.{_INNER.get(inner, inner)}"


def training_keys(folder: ModelFolder) -> dict[str, Any]:
    """Return the YAML keys of a training that goes on from a folder; raises UserError."""
    _check(folder)
    keys = {**folder.keys(), **folder.network_keys(), "resblock_updown": False}
    keys.pop("noise_schedule", None)
    if folder.unet["attention_head_dim"] is None:
        keys |= {"num_head_channels": -1, "num_heads": 1}
    return keys
