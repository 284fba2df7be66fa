"""A folder's weights under guided-diffusion's names compute what diffusers computes."""

import pytest
import torch
from diffusers_cases import edit, save, tiny_unet

from guided_diffusion.config.folders import read_folder
from guided_diffusion.config.schema import conf_from_dict
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.errors import UserError
from guided_diffusion.models.conversion import guided_state_dict, training_keys
from guided_diffusion.script_util import create_model
from guided_diffusion.training import files

ALIKE = {"block_out_channels": (32, 64), "norm_num_groups": 32, "sample_size": 16}


def conf_of(folder, **keys):
    return conf_from_dict(
        {"name": "x", "data_dir": "y", **training_keys(read_folder(str(folder))), **keys}, TrainConf
    )


@pytest.mark.parametrize("new_order", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 2, "attention_head_dim": 16},
        {"norm_num_groups": 8},
        {"num_class_embeds": 5, "out_channels": 6, "resnet_time_scale_shift": "scale_shift",
         "attn_norm_num_groups": 32},
        {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "attention_head_dim": None,
         "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
    ],
    ids=str,
)  # fmt: skip
def test_a_converted_network_computes_the_same(tmp_path, changes, new_order):
    unet = tiny_unet(**{**ALIKE, **changes})
    unet.save_pretrained(tmp_path)
    conf = conf_of(tmp_path, use_new_attention_order=new_order)
    model = create_model(conf).eval()
    files.load_initial(model, str(tmp_path))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    y = torch.tensor([1, 4]) if conf.class_cond else None
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), unet(x, t, y).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"freq_shift": 1},
        {"flip_sin_to_cos": False},
        {"downsample_padding": 0},
        {"norm_eps": 1e-6},
        {"attn_norm_num_groups": None, "resnet_time_scale_shift": "scale_shift"},
        {"attn_norm_num_groups": 16},
        {"norm_num_groups": 64},
        {"act_fn": "gelu"},
        {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
        {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
    ],
    ids=str,
)
def test_networks_that_compute_something_else_are_refused_by_key(tmp_path, changes):
    save(tmp_path, tiny_unet(**ALIKE))
    edit(tmp_path / "unet" / "config.json", **changes)
    with pytest.raises(UserError, match=next(iter(changes))) as caught:
        guided_state_dict(read_folder(str(tmp_path)), new_attention_order=False)
    assert len(str(caught.value)) < 600


def test_keys_that_do_not_fit_the_folder_are_named(tmp_path):
    tiny_unet(**ALIKE).save_pretrained(tmp_path)
    conf = conf_of(tmp_path, channel_mult="1")
    with pytest.raises(UserError, match="init_from: does not fit the network"):
        files.load_initial(create_model(conf), str(tmp_path))
