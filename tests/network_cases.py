"""Small networks with random weights, and how far apart two outputs are."""

import torch
from torch import nn

from guided_diffusion.unet import TrunkConfig, UNetModel

SMALL = TrunkConfig(16, 32, (1, 2), 1, (8,), num_heads=4, num_head_channels=16)


def randomised(network):
    """Fill all weights, also those that begin at 0, and freeze them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval().requires_grad_(False)


def unet(out_channels=6, num_classes=None, **changes):
    """Return SMALL with other values of some of its fields."""
    cfg = TrunkConfig(**{**vars(SMALL), **changes})
    return randomised(UNetModel(cfg, out_channels, num_classes))


def relative(output, reference):
    """Return the largest difference over the largest value of the reference."""
    return ((output - reference).abs().max() / reference.abs().max()).item()
