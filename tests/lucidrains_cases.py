"""Tiny networks of denoising-diffusion-pytorch, as its users save them."""

import pytest
import torch

lucidrains = pytest.importorskip(
    "denoising_diffusion_pytorch", reason="needs requirements-lucidrains.txt"
)
STEPS = 30


def tiny(kind=lucidrains.GaussianDiffusion, unet=None, **options):
    """Return the package's diffusion of a tiny network, in which every weight matters."""
    torch.manual_seed(0)
    unet = {"dim": 16, "dim_mults": (1, 2), "full_attn": (False, True)} | (unet or {})
    diffusion = kind(
        lucidrains.Unet(**unet), image_size=8, timesteps=options.pop("timesteps", STEPS), **options
    )
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return diffusion.eval()


def trainer_file(diffusion):
    """Return what the package's Trainer saves, and the averaged network."""
    from ema_pytorch import EMA

    ema = EMA(diffusion)
    with torch.no_grad():
        ema.ema_model.model.final_conv.bias.add_(1)
    optimizer = torch.optim.Adam(diffusion.parameters())
    content = {"step": 1, "model": diffusion.state_dict(), "opt": optimizer.state_dict(),
               "ema": ema.state_dict(), "scaler": None, "version": "2.1.1"}  # fmt: skip
    return content, ema.ema_model.model
