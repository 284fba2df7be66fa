"""What the tests of training share: pictures of a few blocks, and the smallest network."""

import numpy as np
import torch
import yaml
from PIL import Image

from guided_diffusion.config.schema import conf_from_dict
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.training.trainer import Trainer, seeded

TINY = """
name: tiny
device: cpu
image_size: 8
num_channels: 32
channel_mult: '1'
num_res_blocks: 1
attention_resolutions: '4'
num_head_channels: 32
holdout: 0.25
batch_size: 4
lr: 1e-3
iterations: 6
log_interval: 1
save_interval: 3
sample_interval: 0
sample_count: 2
sample_respacing: '2'
"""


def write_pictures(folder, count=12, side=16, blocks=2):
    """Write pictures of ``blocks``² random colours each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        colours = rng.integers(0, 256, (blocks, blocks, 3))
        pixels = np.kron(colours, np.ones((side // blocks, side // blocks, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def tiny_tree(tmp_path, **changes):
    """Return a YAML tree that trains in a second."""
    folder = tmp_path / "pictures"
    if not folder.exists():
        write_pictures(folder)
    tree = yaml.safe_load(TINY)
    tree |= {"data_dir": str(folder), "out_dir": str(tmp_path / "out")}
    return {**tree, **changes}


def tiny_conf(tmp_path, **changes):
    return conf_from_dict(tiny_tree(tmp_path, **changes), TrainConf)


def make_trainer(conf, device="cpu"):
    with seeded(conf.seed):
        model = create_model(conf)
    diffusion = create_gaussian_diffusion(conf)
    return Trainer(conf, model, diffusion, torch.device(device))


def sample_diffusion(conf):
    return create_gaussian_diffusion(conf, "sample_respacing")
