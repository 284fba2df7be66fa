"""What is wrong in a folder of diffusers is told in one line, before diffusers is needed."""

import json

import pytest
import torch

from guided_diffusion.config.folders import read_folder
from guided_diffusion.errors import UserError
from guided_diffusion.models.conversion import guided_state_dict

CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    "attention_head_dim": 8,
    "freq_shift": 0,
}
ATTENTION = "mid_block.attentions.0"


def write_folder(folder, rows=None, **changes):
    """Write a network's configuration, and of its weights the middle's products of ``rows``."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    rows = dict.fromkeys("qkv", 64) | (rows or {})
    state = {f"{ATTENTION}.to_{part}.weight": torch.ones(n, 64) for part, n in rows.items() if n}
    others = {"conv_in.weight": (32, 3, 3, 3), "time_embedding.linear_1.weight": (128, 32)}
    state |= {name: torch.ones(shape) for name, shape in others.items()}
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    return str(folder)


@pytest.mark.parametrize("head", ["8", [8, 8], 33, 0, 8.5, True])
def test_heads_of_no_possible_width_are_refused(tmp_path, head):
    message = r"config\.json: attention_head_dim: expected null or a number from 1 to 32, found "
    with pytest.raises(UserError, match=message):
        read_folder(write_folder(tmp_path, attention_head_dim=head))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"k": 0}, r"to_k\.weight; expected \(64, 64\), found no such tensor"),
        ({"v": 0}, r"to_v\.weight; expected \(64, 64\), found no such tensor"),
        ({"v": 32}, r"to_v\.weight; expected \(64, 64\), found \(32, 64\)"),
        ({"q": 12}, r"to_q\.weight; expected whole heads of 8 channels, found \(12, 64\)"),
        ({"q": 4}, r"to_q\.weight; expected whole heads of 8 channels, found \(4, 64\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("new_order", [True, False])
def test_products_that_do_not_belong_together_are_told(tmp_path, rows, message, new_order):
    folder = read_folder(write_folder(tmp_path, rows))
    with pytest.raises(UserError, match=f"has other weights than its config.json .*{message}"):
        guided_state_dict(folder, new_attention_order=new_order)


@pytest.mark.parametrize("head", [None, 1, 32])
def test_products_that_belong_together_are_joined(tmp_path, head):
    folder = read_folder(write_folder(tmp_path, attention_head_dim=head))
    state = guided_state_dict(folder, new_attention_order=False)
    assert state["middle_block.1.qkv.weight"].shape == (192, 64, 1)
