"""From a configuration to the things that run: diffusion, networks, and their weights.

The network is built without weights (on torch's meta device) and takes the checkpoint's tensors as
they are mapped from the file, so that there is never more than one copy in memory. A checkpoint
that does not fit says by its shapes which YAML keys have to change.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion import UserError
from guided_diffusion.conf import (
    CHANNEL_MULT_BY_SIZE,
    CLASSIFIER_CLASSES,
    CLASSIFIER_HEAD_CHANNELS,
    InpaintConf,
    ModelConf,
)
from guided_diffusion.dist_util import get_device, load_state_dict
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    Step,
    classifier_gradient,
    get_named_beta_schedule,
)
from guided_diffusion.respace import respaced_betas, space_timesteps
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.unet import EncoderUNetModel, TrunkConfig, UNetModel

Shapes = Mapping[str, tuple[int, ...]]

# What shapes cannot tell, of published checkpoints that differ from the defaults: by what they can.
_SILENT_FLAGS = {
    (64, 192, 3): {"use_new_attention_order": True, "noise_schedule": "cosine"},
    (128, 256, 2): {"num_heads": 4, "num_head_channels": -1},
}

# ---- Building ------------------------------------------------------------------------------------


def create_model(conf: ModelConf) -> UNetModel:
    """Build the network with fresh weights, as training starts with; float32, on the CPU."""
    cfg = TrunkConfig(
        image_size=conf.image_size,
        model_channels=conf.num_channels,
        channel_mult=conf.channel_mult_list,
        num_res_blocks=conf.num_res_blocks,
        attention_resolutions=conf.attention_sides,
        num_heads=conf.num_heads,
        num_head_channels=conf.num_head_channels,
        num_heads_upsample=conf.num_heads_upsample,
        use_scale_shift_norm=conf.use_scale_shift_norm,
        resblock_updown=conf.resblock_updown,
        use_new_attention_order=conf.use_new_attention_order,
        dropout=conf.dropout,
        use_checkpoint=conf.use_checkpoint,
    )
    num_classes = conf.num_classes if conf.class_cond else None
    return UNetModel(cfg, 6 if conf.learn_sigma else 3, num_classes)


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
    conf: ModelConf, timestep_respacing: str | None = None
) -> GaussianDiffusion:
    """Build the chain of the kept steps; raises UserError naming the key that makes it impossible.

    ``timestep_respacing`` stands in for the configuration's.
    """
    respacing = conf.timestep_respacing if timestep_respacing is None else timestep_respacing
    betas = get_named_beta_schedule(conf.noise_schedule, conf.diffusion_steps)
    try:
        kept = space_timesteps(conf.diffusion_steps, respacing)
        return GaussianDiffusion(
            respaced_betas(betas, kept),
            kept,
            learn_sigma=conf.learn_sigma,
            predict_xstart=conf.predict_xstart,
            clip_denoised=conf.clip_denoised,
            time_scale=1000 / conf.diffusion_steps if conf.rescale_timesteps else 1.0,
            rescale_learned_sigmas=conf.rescale_learned_sigmas,
            use_kl=conf.use_kl,
        )
    except ValueError as error:
        raise UserError(str(error), key="timestep_respacing", got=repr(respacing)) from error


def create_schedule(conf: InpaintConf, diffusion: GaussianDiffusion) -> list[int]:
    """Return the walk's times; raises UserError where it leaves the chain of the kept steps.

    Warns where it starts below the chain's top: what is there is not pure noise.
    """
    params, kept = conf.schedule_jump_params, diffusion.num_timesteps
    if params.t_T > kept:
        raise UserError(
            "the walk cannot start above the kept steps",
            key="schedule_jump_params.t_T and timestep_respacing",
            expected=f"t_T of at most {kept}, the steps that {conf.timestep_respacing!r} keeps",
            got=params.t_T,
        )
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


# ---- Loading -------------------------------------------------------------------------------------


def load_model(conf: InpaintConf, device: torch.device) -> UNetModel:
    """Return the network with the weights of ``model_path`` on ``device``, ready to be called.

    Raises UserError as ``dist_util.load_state_dict``, and where the weights do not fit.
    """
    state = load_state_dict(conf.model_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with torch.device("meta"):
        model = create_model(conf)
    if not _fits(model, shapes):
        raise _misfit(conf.model_path, model, shapes, conf, model_flags(shapes, conf.image_size))
    _warn_of_silent_flags(conf)
    return _filled(model, state, device)


def load_classifier(conf: InpaintConf, device: torch.device) -> EncoderUNetModel:
    """Return the classifier with the weights of ``classifier_path``, as ``load_model``."""
    state = load_state_dict(conf.classifier_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with torch.device("meta"):
        classifier = create_classifier(conf)
    if not _fits(classifier, shapes):
        flags = classifier_flags(shapes, conf.image_size)
        raise _misfit(conf.classifier_path, classifier, shapes, conf, flags)
    return _filled(classifier, state, device)


def _filled(model: nn.Module, state: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    """Give an empty network its weights; half precision on disk becomes float32."""
    tensors = {name: tensor.to(device).float() for name, tensor in state.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _fits(model: nn.Module, shapes: Shapes) -> bool:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


def _warn_of_silent_flags(conf: ModelConf) -> None:
    shape = (conf.image_size, conf.num_channels, conf.num_res_blocks)
    published = _SILENT_FLAGS.get(shape, {})
    wrong = {key: value for key, value in published.items() if getattr(conf, key) != value}
    if wrong and conf.class_cond and conf.learn_sigma:
        keys = ", ".join(f"{key}: {_yaml(value)}" for key, value in wrong.items())
        warnings.warn(
            f"{conf.model_path}: has the shapes of the published {conf.image_size}x"
            f"{conf.image_size} checkpoint, which needs {keys}; without, results are garbage",
            stacklevel=3,
        )


# ---- Running -------------------------------------------------------------------------------------


class Inpainter:
    """The networks on their device, and the walk over ``times`` that makes them inpaint.

    Raises UserError for a device or checkpoint that cannot be used.
    """

    def __init__(self, conf: InpaintConf, times: list[int]) -> None:
        self.conf, self.times = conf, times
        self.device = get_device(conf.device)
        self.diffusion = create_gaussian_diffusion(conf)
        self.model = load_model(conf, self.device)
        self.model.convert_trunk(_trunk_type(conf, self.device))
        self.classifier = None
        if conf.guided:
            self.classifier = load_classifier(conf, self.device)
            if conf.classifier_use_fp16 and self.device.type == "cuda":
                self.classifier.convert_trunk(torch.float16)

    @property
    def is_reduced(self) -> bool:
        """Whether any network computes in less than float32."""
        networks = [self.model, *([self.classifier] if self.classifier else [])]
        return any(network.dtype != torch.float32 for network in networks)

    def in_float32(self) -> "Inpainter":
        """Return the same with every network in float32, loaded anew."""
        exact = {"precision": "float32", "use_fp16": False, "classifier_use_fp16": False}
        return Inpainter(dataclasses.replace(self.conf, **exact), self.times)

    def steps(self, gt: Tensor, gt_keep_mask: Tensor, seeds: Sequence[int]) -> Iterator[Step]:
        """Inpaint ``gt`` where the mask is 0, both (N, 3, S, S) on the device, from N seeds.

        Each image has a generator of its own, so that its result does not depend on the batch. It
        draws the label first, then noise. Yields a ``Step`` after every transition.
        """
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        y = self._labels(generators)
        noise_shape = (1, *gt.shape[1:])

        def draw_noise() -> Tensor:
            parts = [torch.randn(noise_shape, generator=g, device=g.device) for g in generators]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        def model(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.model(x, timesteps, y)

        cond_fn = None
        if self.classifier is not None:
            cond_fn = classifier_gradient(self.classifier, y, self.conf.classifier_scale)
        yield from self.diffusion.repaint(
            model,
            gt,
            gt_keep_mask,
            self.times,
            draw_noise,
            cond_fn=cond_fn,
            use_ddim=self.conf.use_ddim,
            inpa_inj_sched_prev=self.conf.inpa_inj_sched_prev,
            inpa_inj_sched_prev_cumnoise=self.conf.inpa_inj_sched_prev_cumnoise,
            inpa_inj_time_shift=self.conf.inpa_inj_time_shift,
        )

    def _labels(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a class label (N,) for each image: ``cond_y``, or drawn."""
        if self.conf.cond_y is not None:
            return torch.full((len(generators),), self.conf.cond_y, device=self.device)
        high = self.conf.num_classes
        return torch.cat(
            [torch.randint(0, high, (1,), generator=g, device=g.device) for g in generators]
        )


def _trunk_type(conf: InpaintConf, device: torch.device) -> torch.dtype:
    """Return the type of the trunk's convolutions, and set how torch multiplies float32."""
    precision = conf.precision or ("float16" if conf.use_fp16 else None)
    if precision in ("float32", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision == "float16" and device.type == "cpu":
        warnings.warn("half precision is for GPUs; on this CPU it runs in float32", stacklevel=3)
        return torch.float32
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision, torch.float32)


# ---- What shapes tell ----------------------------------------------------------------------------


def model_flags(shapes: Shapes, image_size: int) -> dict[str, Any]:
    """Return the YAML keys of the network whose ``state_dict`` has these shapes.

    ``image_size`` says which side each level has; where the widths are those of another size in the
    published table, that one is meant and named. Empty where this is no such network.
    """
    up = _resizing_outputs(shapes)
    blocks = _count(shapes, "output_blocks")
    levels = len(up) + 1
    if "time_embed.0.weight" not in shapes or not blocks or blocks % levels:
        return {}
    width, per_level = shapes["time_embed.0.weight"][1], blocks // levels
    starts = range(blocks - per_level, -1, -per_level)  # of each level's blocks, from the top
    first = [f"output_blocks.{start}" for start in starts]
    mult = tuple(shapes[f"{name}.0.out_layers.3.weight"][0] / width for name in first)
    sizes = [size for size, table in CHANNEL_MULT_BY_SIZE.items() if table == mult]
    side = sizes[0] if sizes else image_size
    attends = [f"{name}.1.qkv.weight" in shapes for name in first]
    flags = {
        "image_size": side,
        "num_channels": width,
        "num_res_blocks": per_level - 1,
        "channel_mult_list": mult,
        "attention_sides": {side >> i for i, attending in enumerate(attends) if attending},
        "learn_sigma": shapes["out.2.weight"][0] == 6,
        "class_cond": "label_emb.weight" in shapes,
        "use_scale_shift_norm": _has_scale_shift(shapes),
    }
    if flags["class_cond"]:
        flags["num_classes"] = shapes["label_emb.weight"][0]
    if up:
        flags["resblock_updown"] = any("in_layers" in name for name in up)
    return flags


def classifier_flags(shapes: Shapes, image_size: int) -> dict[str, Any]:
    """Return the YAML keys of the classifier whose ``state_dict`` has these shapes, or nothing."""
    levels = len(CHANNEL_MULT_BY_SIZE[image_size])
    blocks = _count(shapes, "input_blocks")
    if "time_embed.0.weight" not in shapes or _count(shapes, "output_blocks") or blocks < levels:
        return {}
    if "out.2.positional_embedding" in shapes:
        tokens = shapes["out.2.positional_embedding"][1] - 1
        sizes = [s for s, t in CHANNEL_MULT_BY_SIZE.items() if (s >> (len(t) - 1)) ** 2 == tokens]
        image_size = image_size if image_size in sizes or not sizes else sizes[0]
        levels = len(CHANNEL_MULT_BY_SIZE[image_size])
    depth = blocks // levels - 1
    level_starts = [1 + level * (depth + 1) for level in range(levels)]
    attends = [f"input_blocks.{start}.1.qkv.weight" in shapes for start in level_starts]
    if "out.2.positional_embedding" in shapes:
        pool = "attention"
    elif len(shapes.get("out.3.weight", ())) == 4:
        pool = "adaptive"
    else:
        pool = "spatial_v2" if "out.3.weight" in shapes else "spatial"
    flags = {
        "image_size": image_size,
        "classifier_width": shapes["time_embed.0.weight"][1],
        "classifier_depth": depth,
        "classifier_attention_sides": {
            image_size >> level for level, attending in enumerate(attends) if attending
        },
        "classifier_use_scale_shift_norm": _has_scale_shift(shapes),
        "classifier_pool": pool,
    }
    if levels > 1:
        op = f"input_blocks.{level_starts[1] - 1}.0.op.weight"
        flags["classifier_resblock_updown"] = op not in shapes
    return flags


def _count(shapes: Shapes, list_name: str) -> int:
    numbers = [re.match(rf"{list_name}\.(\d+)\.", name) for name in shapes]
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def _resizing_outputs(shapes: Shapes) -> list[str]:
    """Names of one parameter of each output block's resizing layer, which comes last in it."""
    resizing = re.compile(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight")
    return [name for name in shapes if resizing.fullmatch(name)]


def _has_scale_shift(shapes: Shapes) -> bool:
    block = "middle_block.0"
    out = shapes[f"{block}.out_layers.3.weight"][0]
    return shapes[f"{block}.emb_layers.1.weight"][0] == 2 * out


def _misfit(
    path: str, model: nn.Module, shapes: Shapes, conf: InpaintConf, flags: dict[str, Any]
) -> UserError:
    """Say which YAML keys make the checkpoint fit, or how it differs where none does."""
    wanted = [
        f"{_YAML_NAMES.get(key, key)}: {_yaml(value)}"
        for key, value in flags.items()
        if _comparable(getattr(conf, key), value, conf.image_size) != value
    ]
    if wanted:
        return UserError(f"does not fit the configuration; set {', '.join(wanted)}", path=path)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in own:
        if own[name] != shapes.get(name):
            return UserError(
                f"is not a checkpoint of this kind of network ({type(model).__name__})",
                path=path,
                expected=f"{name} of shape {own[name]}",
                got=shapes.get(name, "no such tensor"),
            )
    extra = next(name for name in shapes if name not in own)
    return UserError("holds a tensor that the network does not have", path=path, got=extra)


def _comparable(current: Any, value: Any, image_size: int) -> Any:
    """Leave out of listed sides what no level has, as the network does."""
    if not isinstance(value, set):
        return current
    return {image_size >> level for level in range(image_size.bit_length())} & set(current)


_YAML_NAMES = {
    "channel_mult_list": "channel_mult",
    "attention_sides": "attention_resolutions",
    "classifier_attention_sides": "classifier_attention_resolutions",
}


def _yaml(value: Any) -> str:
    """Write a flag as a YAML file would."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, set | tuple):
        items = sorted(value, reverse=True) if isinstance(value, set) else value
        return "'" + ",".join(f"{item:g}" for item in items) + "'"
    return str(value)
