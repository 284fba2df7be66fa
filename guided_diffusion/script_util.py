"""From a configuration to the things that run: diffusion, networks, and their weights.

The network is built without weights (on torch's meta device) and takes the checkpoint's tensors as
they are mapped from the file, so that there is never more than one copy in memory. A checkpoint
that does not fit says by its shapes which YAML keys have to change.
"""

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import nn

from guided_diffusion.config.checkpoint_flags import (
    classifier_flags,
    fitting,
    model_flags,
    warn_of_silent_flags,
)
from guided_diffusion.config.keys import CLASSIFIER_CLASSES, CLASSIFIER_HEAD_CHANNELS, InpaintConf
from guided_diffusion.config.network_keys import CHANNEL_MULT_BY_SIZE, ModelConf
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Sampler, get_named_beta_schedule
from guided_diffusion.io.checkpoints import check_checkpoint, fingerprint, load_state_dict
from guided_diffusion.io.weights import filled, shapes_of
from guided_diffusion.models.diffusers import check_folder, load_network, read_folder
from guided_diffusion.models.follow import is_folder, is_lucidrains, read_model
from guided_diffusion.models.lucidrains import check_lucidrains, load_lucidrains, read_checkpoint
from guided_diffusion.respace import respaced_betas, space_timesteps
from guided_diffusion.samplers import Ddim, Ddnm, Repaint
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.unet import EncoderUNetModel, TrunkConfig, UNetModel

# ---- Building ------------------------------------------------------------------------------------


def create_model(conf: ModelConf) -> UNetModel:
    """Build the network with fresh weights, as training starts with; float32, on the CPU."""
    # Most keys have the names of the network's options.
    names = {field.name for field in dataclasses.fields(TrunkConfig)} & vars(conf).keys()
    others = {
        "model_channels": conf.num_channels,
        "channel_mult": conf.channel_mult_list,
        "attention_resolutions": conf.attention_sides,
    }
    cfg = TrunkConfig(**{name: getattr(conf, name) for name in names} | others)
    num_classes = conf.num_classes if conf.class_cond else None
    out_channels = conf.in_channels * (2 if conf.learn_sigma else 1)
    return UNetModel(cfg, out_channels, num_classes)


def create_classifier(conf: InpaintConf) -> EncoderUNetModel:
    """Build the noisy classifier with fresh weights; float32, on the CPU."""
    cfg = TrunkConfig(
        image_size=conf.image_size,
        model_channels=conf.classifier_width,
        channel_mult=CHANNEL_MULT_BY_SIZE[conf.image_size],
        num_res_blocks=conf.classifier_depth,
        attention_resolutions=conf.classifier_attention_sides,
        num_head_channels=CLASSIFIER_HEAD_CHANNELS,
        use_scale_shift_norm=conf.classifier_use_scale_shift_norm,
        resblock_updown=conf.classifier_resblock_updown,
    )
    return EncoderUNetModel(cfg, CLASSIFIER_CLASSES, conf.classifier_pool)


def create_gaussian_diffusion(
    conf: ModelConf, key: str = "timestep_respacing"
) -> GaussianDiffusion:
    """Build the chain of the steps that ``key`` keeps; raises UserError where it is impossible."""
    respacing = getattr(conf, key)
    model = read_model(conf.model_path) if conf.follows_model else None
    betas = model.betas if model else None
    if betas is None:
        betas = get_named_beta_schedule(conf.noise_schedule, conf.diffusion_steps)
    try:
        kept = space_timesteps(conf.diffusion_steps, respacing)
        return GaussianDiffusion(
            respaced_betas(betas, kept),
            kept,
            learn_sigma=conf.learn_sigma,
            fixed_small=model.fixed_small if model else False,
            predict_xstart=conf.predict_xstart,
            predict_v=conf.predict_v,
            clip_denoised=conf.clip_denoised,
            clip_range=model.clip_range if model else 1.0,
            time_scale=1000 / conf.diffusion_steps if conf.rescale_timesteps else 1.0,
            rescale_learned_sigmas=conf.rescale_learned_sigmas,
            use_kl=conf.use_kl,
        )
    except ValueError as error:
        raise UserError(str(error), key=key, got=repr(respacing)) from error


def create_schedule(conf: InpaintConf, diffusion: GaussianDiffusion) -> list[int]:
    """Return the walk's times; raises UserError where it leaves the chain of the kept steps.

    Warns where it starts below the chain's top: what is there is not pure noise.
    """
    params, kept = conf.schedule_jump_params, diffusion.num_timesteps
    if params.t_T > kept:
        problem = "the walk cannot start above the kept steps"
        keys = "schedule_jump_params.t_T and timestep_respacing"
        expected = f"t_T of at most {kept}, the steps that {conf.timestep_respacing!r} keeps"
        raise UserError(problem, key=keys, expected=expected, got=params.t_T)
    if params.t_T < kept:
        warnings.warn(
            f"schedule_jump_params.t_T: {params.t_T} starts the walk below the top of the "
            f"{kept} kept steps, where a picture is not yet pure noise; write "
            f"timestep_respacing: '{params.t_T}' with it",
            stacklevel=2,
        )
    try:
        times = get_schedule_jump(**vars(params))
    except ValueError as error:
        raise UserError(str(error), key="schedule_jump_params") from error
    try:
        diffusion.check_times(times, conf.inpa_inj_time_shift)
    except ValueError as error:
        got = conf.inpa_inj_time_shift
        raise UserError(str(error), key="inpa_inj_time_shift", got=got) from error
    return times


def _repaint(conf: InpaintConf) -> Sampler:
    sampler = Ddim if conf.use_ddim else Repaint
    return sampler(conf.inpa_inj_sched_prev, conf.inpa_inj_sched_prev_cumnoise)


# What the key ``sampler`` may be.
SAMPLERS: dict[str, Callable[[InpaintConf], Sampler]] = {
    "repaint": _repaint,
    "ddnm": lambda c: Ddnm(c.ddnm_eta, c.ddnm_overshoot, c.inpa_inj_sched_prev),
}


def create_sampler(conf: InpaintConf) -> Sampler:
    """Build what puts the known pixels in, as the key ``sampler`` says."""
    return SAMPLERS[conf.sampler](conf)


# ---- Loading -------------------------------------------------------------------------------------


def check_network(path: str) -> str:
    """Find what is wrong with a checkpoint or folder; return its fingerprint; raises UserError."""
    if is_folder(path):
        return check_folder(read_folder(path))
    if is_lucidrains(path):
        return check_lucidrains(read_checkpoint(path))
    check_checkpoint(path)
    return fingerprint(path)


def load_model(conf: InpaintConf, device: torch.device) -> nn.Module:
    """Return the network with the weights of ``model_path`` on ``device``, ready to be called.

    Raises UserError as ``load_state_dict``, and where the weights do not fit.
    """
    path = conf.model_path
    if is_folder(path):
        return load_network(read_folder(path), device)
    if is_lucidrains(path):
        return load_lucidrains(read_checkpoint(path), conf.num_heads, device)
    state = load_state_dict(path)
    blocks = {name.partition(".")[0] for name in state}
    if "middle_block" in blocks and "output_blocks" not in blocks:
        raise UserError("holds a classifier, which belongs in classifier_path", path=path)
    mult = conf.channel_mult_list if conf.channel_mult else None
    flags = model_flags(shapes_of(state), conf.image_size, mult)
    model = fitting(path, create_model, conf, state, flags)
    warn_of_silent_flags(conf)
    return filled(path, model, state, device)


def load_classifier(conf: InpaintConf, device: torch.device) -> EncoderUNetModel:
    """Return the classifier with the weights of ``classifier_path``, as ``load_model``."""
    path = conf.classifier_path
    state = load_state_dict(path)
    if any(name.startswith("output_blocks.") for name in state):
        raise UserError("holds a diffusion network, which belongs in model_path", path=path)
    flags = classifier_flags(shapes_of(state))
    classifier = fitting(path, create_classifier, conf, state, flags)
    return filled(path, classifier, state, device)
