"""Tiny networks of diffusers, as its users save them."""

import json
import shutil

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs requirements-diffusers.txt")
pytest.importorskip("safetensors.torch", reason="needs requirements-diffusers.txt")

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
STEPS = 20


def tiny_unet(**changes):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def scheduler(**changes):
    return diffusers.DDPMScheduler(**{"num_train_timesteps": STEPS, "beta_end": 0.3, **changes})


def save(folder, unet=None, noise=None, **options):
    """Save a pipeline, and return the network and its scheduler."""
    unet, noise = unet or tiny_unet(), noise or scheduler()
    diffusers.DDPMPipeline(unet=unet, scheduler=noise).save_pretrained(folder, **options)
    return unet, noise


def edit(path, **changes):
    """Change keys of a JSON file; ``...`` takes one away."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not ...}))


def flattened(folder):
    """Put the files where the first versions of diffusers had them: all in one folder."""
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        shutil.rmtree(folder / part)
