"""Small networks with random weights, the golden ones, and how far apart two outputs are."""

from pathlib import Path

import numpy as np
import torch
import yaml
from run_cases import write_run
from torch import nn

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import conf_from_dict
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from guided_diffusion.respace import respaced_betas, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.unet import EncoderUNetModel, TrunkConfig, UNetModel

GOLDEN = Path(__file__).parent / "golden"
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


def chain(respacing="12", noise_schedule="linear", steps=1000, **flags):
    """Return the steps that are kept of a diffusion."""
    kept = space_timesteps(steps, respacing)
    betas = respaced_betas(get_named_beta_schedule(noise_schedule, steps), kept)
    return GaussianDiffusion(betas, kept, **flags)


def step_inputs(channels=6):
    """Return what a network of this many channels gives, x, its noise, and a gradient."""
    generator = torch.Generator().manual_seed(1)
    x, noise, gradient = torch.randn(3, 2, 3, 4, 4, generator=generator)
    return torch.randn(2, channels, 4, 4, generator=generator) * 0.5, x, noise, gradient


def golden_networks(name):
    """Return a golden case: configuration, expected tensors, network and classifier, or None."""
    conf = yaml.safe_load((GOLDEN / name / "conf.yml").read_text())
    expect = {
        key: torch.tensor(value) for key, value in np.load(GOLDEN / name / "expect.npz").items()
    }

    def load(network, file):
        network.load_state_dict(torch.load(GOLDEN / name / file, weights_only=True))
        return network.eval()

    trunk = TrunkConfig(
        conf["image_size"], conf["num_channels"], (1, 2), conf["num_res_blocks"],
        (int(conf["attention_resolutions"]),), conf["num_heads"], conf["num_head_channels"],
    )  # fmt: skip
    model = load(UNetModel(trunk, 6, 1000 if conf["class_cond"] else None), "model.pt")
    if "classifier_path" not in conf:
        return conf, expect, model, None
    trunk = TrunkConfig(
        conf["image_size"], conf["classifier_width"], (1, 2, 3, 4), conf["classifier_depth"],
        (int(conf["classifier_attention_resolutions"]),), num_head_channels=64,
    )  # fmt: skip
    classifier = EncoderUNetModel(trunk, 1000, conf["classifier_pool"])
    return conf, expect, model, load(classifier, "classifier.pt")


# Keys of guided-diffusion's network, and those that networks of other programs decide.
NETWORK = ("image_size", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions",
           "num_head_channels", "learn_sigma", "diffusion_steps")  # fmt: skip


def write_foreign(folder, **changes):
    """Write a tiny run whose YAML states none of these keys, unless ``changes`` do."""
    return write_run(folder, 2, **{**dict.fromkeys(NETWORK), **changes})


def chain_of(model_path):
    """Return the whole diffusion that a network of another program was trained on."""
    data = {"eval": {"set": {"gt_path": "gt", "mask_path": "mask"}}}
    tree = {"name": "run", "model_path": str(model_path), "image_size": 8, "num_heads": 4}
    tree |= {"timestep_respacing": "", "data": data}  # before 1.9 a file tells no heads
    return create_gaussian_diffusion(conf_from_dict(tree, InpaintConf))
