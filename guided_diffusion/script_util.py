"""From a configuration to the things that run: diffusion, networks, and their weights.

The network is built without weights (on torch's meta device) and takes the checkpoint's tensors as
they are mapped from the file, so that there is never more than one copy in memory. A checkpoint
that does not fit says by its shapes which YAML keys have to change.
"""

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from guided_diffusion import UserError, fast
from guided_diffusion.conf import (
    CHANNEL_MULT_BY_SIZE,
    CLASSIFIER_CLASSES,
    CLASSIFIER_HEAD_CHANNELS,
    InpaintConf,
    ModelConf,
)
from guided_diffusion.dist_util import get_device, is_main, load_state_dict
from guided_diffusion.fused import (
    FusedDiffusion,
    FusedUNet,
    fuse_convolutions,
    fused_noise,
    load_gpu_kernels,
    load_kernels,
)
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    Step,
    classifier_gradient,
    get_named_beta_schedule,
)
from guided_diffusion.respace import respaced_betas, space_timesteps
from guided_diffusion.scheduler import count_steps, get_schedule_jump
from guided_diffusion.unet import EncoderUNetModel, Trunk, TrunkConfig, UNetModel

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
    conf: ModelConf,
    key: str = "timestep_respacing",
    kind: Callable[..., GaussianDiffusion] = GaussianDiffusion,
) -> GaussianDiffusion:
    """Build the chain of the steps that ``key`` keeps; raises UserError where it is impossible."""
    respacing = getattr(conf, key)
    betas = get_named_beta_schedule(conf.noise_schedule, conf.diffusion_steps)
    try:
        kept = space_timesteps(conf.diffusion_steps, respacing)
        return kind(
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
        raise UserError(str(error), key=key, got=repr(respacing)) from error


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
    path = conf.model_path
    state = load_state_dict(path)
    shapes = _shapes(state)
    with torch.device("meta"):
        model = create_model(conf)
    if _shapes(model.state_dict()) != shapes:
        if _has_any(shapes, "middle_block") and not _has_any(shapes, "output_blocks"):
            raise UserError("holds a classifier, which belongs in classifier_path", path=path)
        mult = conf.channel_mult_list if conf.channel_mult else None
        flags = model_flags(shapes, conf.image_size, mult)
        raise _misfit(path, create_model, shapes, conf, flags)
    _warn_of_silent_flags(conf)
    return _filled(path, model, state, device)


def load_classifier(conf: InpaintConf, device: torch.device) -> EncoderUNetModel:
    """Return the classifier with the weights of ``classifier_path``, as ``load_model``."""
    path = conf.classifier_path
    state = load_state_dict(path)
    shapes = _shapes(state)
    with torch.device("meta"):
        classifier = create_classifier(conf)
    if _shapes(classifier.state_dict()) != shapes:
        if _has_any(shapes, "output_blocks"):
            raise UserError("holds a diffusion network, which belongs in model_path", path=path)
        flags = classifier_flags(shapes, conf.image_size)
        raise _misfit(path, create_classifier, shapes, conf, flags)
    return _filled(path, classifier, state, device)


def _filled(path: str, model: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> Any:
    """Give an empty network its weights; half precision on disk becomes float32, views whole."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise UserError(
                path=path, expected=f"{name} as plain floating-point numbers", got=tensor.dtype
            )
    tensors = {name: tensor.to(device).float().contiguous() for name, tensor in state.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _warn_of_silent_flags(conf: ModelConf) -> None:
    shape = (conf.image_size, conf.num_channels, conf.num_res_blocks)
    published = _SILENT_FLAGS.get(shape, {})
    wrong = {key: value for key, value in published.items() if getattr(conf, key) != value}
    if wrong and conf.class_cond and conf.learn_sigma:
        warnings.warn(
            f"{conf.model_path}: has the shapes of the published {conf.image_size}x"
            f"{conf.image_size} checkpoint, which needs {_quoted(wrong)}; without, results are "
            "garbage",
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
        if self.device.type == "cpu":
            fast.keep_freed_memory()
        torch.backends.cudnn.benchmark = True  # all calls have the same shapes
        is_fused = self.device.type == "cpu" and conf.compile is not False
        self._kernels = load_kernels() if is_fused else None  # on CPUs
        kind = partial(FusedDiffusion, self._kernels) if self._kernels else GaussianDiffusion
        self.diffusion = create_gaussian_diffusion(conf, kind=kind)
        self.model = load_model(conf, self.device)
        self.model.convert_trunk(fast.set_arithmetic(conf.precision, conf.use_fp16, self.device))
        self.network = self._fast_network()
        self.classifier = self.gradient = None
        if conf.guided:
            self.classifier = load_classifier(conf, self.device)
            self.classifier.convert_trunk(
                fast.set_arithmetic(conf.precision, conf.classifier_use_fp16, self.device)
            )
            self.gradient = self._fast_gradient()
        networks = [self.model, *([self.classifier] if self.classifier else [])]
        weights = sum(p.nbytes for network in networks for p in network.parameters())
        self._memory: fast.CallMemory | None = fast.CallMemory(self.device, weights)

    def _fast_network(self) -> Callable[..., Tensor]:
        """Return what computes ``self.model`` fastest on its device."""
        if self._kernels and self.model.dtype == torch.float32:
            return FusedUNet(self._kernels, self.model)
        if self.device.type == "cuda" and self.conf.compile == "auto":
            kernels = load_gpu_kernels(self.device, self.model.dtype)
            if kernels:
                fast.lay_out(self.model, self.device)
                fused = FusedUNet(kernels, self.model)
                return fast.Accelerated(fused, self.model, recorded=True)
        return self._accelerated(self.model, self.model)

    def _fast_gradient(self) -> Callable[..., Tensor]:
        """Return what computes the classifier's gradient fastest."""
        if self._kernels and self.classifier.dtype == torch.float32:
            fuse_convolutions(self._kernels, self.classifier)
            return self._classifier_gradient
        return self._accelerated(self._classifier_gradient, self.classifier)

    def _accelerated(self, function: Callable[..., Tensor], network: Trunk) -> fast.Accelerated:
        calls, _ = count_steps(self.times)
        compiled = fast.is_compiled(self.conf.compile, self.device, calls)
        fast.lay_out(network, self.device, at_once=compiled)
        recorded = self.device.type == "cuda" and self.conf.compile is not False
        return fast.Accelerated(function, network, compiled=compiled, recorded=recorded)

    def _classifier_gradient(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        return classifier_gradient(self.classifier, y, self.conf.classifier_scale)(x, timesteps)

    def _advise(self, batch_size: int) -> None:
        """Say once what memory a call takes, and what ``batch_size`` it would allow."""
        if self._memory and (known := self._memory.after_call()):
            self._memory = None
            taken, free = known
            most = max(batch_size, int(0.9 * free * batch_size / taken))  # a tenth is for gaps
            if is_main():
                tqdm.write(
                    f"batch_size {batch_size}: takes up to {taken / 1e9:.2g} GB beside the "
                    f"weights; free memory would hold about {most}"
                )

    @property
    def is_reduced(self) -> bool:
        """Whether any network computes in less than float32."""
        networks = [self.model, *([self.classifier] if self.classifier else [])]
        return any(network.dtype != torch.float32 for network in networks)

    def in_float32(self) -> "Inpainter":
        """Return the same with every network in float32, loaded anew."""
        # No precision is stated, as that would change how the other network multiplies float32.
        exact = {"precision": None, "use_fp16": False, "classifier_use_fp16": False}
        return Inpainter(dataclasses.replace(self.conf, **exact), self.times)

    def steps(self, gt: Tensor, gt_keep_mask: Tensor, seeds: Sequence[int]) -> Iterator[Step]:
        """Inpaint ``gt`` where the mask is 0, both (N, 3, S, S) on the device, from N seeds.

        Each image has a generator of its own, so that its result does not depend on the batch. It
        draws the label first, then noise. Yields a ``Step`` after every transition.
        """
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        y = self._labels(generators)

        def model(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.network(x, timesteps, *([y] if self.conf.class_cond else []))

        def cond_fn(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.gradient(x, timesteps, y)

        walk = self.diffusion.repaint(
            model,
            gt,
            gt_keep_mask,
            self.times,
            self.noise_source(generators, gt.shape),
            cond_fn=cond_fn if self.conf.guided else None,
            use_ddim=self.conf.use_ddim,
            inpa_inj_sched_prev=self.conf.inpa_inj_sched_prev,
            inpa_inj_sched_prev_cumnoise=self.conf.inpa_inj_sched_prev_cumnoise,
            inpa_inj_time_shift=self.conf.inpa_inj_time_shift,
        )
        for step in walk:
            yield step
            if step.pred_xstart is not None:
                self._advise(len(gt))

    def noise_source(
        self, generators: Sequence[torch.Generator], shape: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Return a function that draws standard normal noise (N, 3, S, S), a generator an image."""
        if self._kernels and (fused := fused_noise(self._kernels, generators, shape)):
            return fused

        def draw_noise() -> Tensor:
            noise = torch.empty(shape, device=self.device)
            for own, generator in zip(noise.unbind(), generators, strict=True):
                own.normal_(generator=generator)
            return noise

        return draw_noise

    def _labels(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a class label (N,) for each image: ``cond_y``, or drawn."""
        if self.conf.cond_y is not None:
            return torch.full((len(generators),), self.conf.cond_y, device=self.device)
        high = self.conf.num_classes
        return torch.cat(
            [torch.randint(0, high, (1,), generator=g, device=g.device) for g in generators]
        )


# ---- What shapes tell ----------------------------------------------------------------------------


def model_flags(
    shapes: Shapes, image_size: int, channel_mult: Sequence[float] | None = None
) -> dict[str, Any]:
    """Return the YAML keys of the network whose ``state_dict`` has these shapes.

    ``image_size`` says which side each level has. Where it is a published size, but the widths are
    those of another one and not those of ``channel_mult``, that one is meant and named. Empty where
    this is no such network, or an incomplete one.
    """
    up = _resizing_outputs(shapes)
    blocks, levels = _count(shapes, "output_blocks"), len(up) + 1
    if blocks < 2 * levels or blocks % levels:
        return {}
    per_level = blocks // levels
    starts = range(blocks - per_level, -1, -per_level)  # of each level's blocks, from the top
    first = [f"output_blocks.{start}" for start in starts]
    try:
        width = shapes["time_embed.0.weight"][1]
        widths = [shapes[f"{name}.0.out_layers.3.weight"][0] for name in first]
        out_channels = shapes["out.2.weight"][0]
        num_classes = shapes.get("label_emb.weight", (None,))[0]
        has_scale_shift = _has_scale_shift(shapes)
        mult = tuple(_multiplier(level_width, width) for level_width in widths)
    except (KeyError, IndexError, ZeroDivisionError):
        return {}
    if not (width and all(widths) and num_classes != 0):
        return {}
    if channel_mult and [int(m * width) for m in channel_mult] == widths:
        mult = tuple(channel_mult)
    elif image_size in CHANNEL_MULT_BY_SIZE:
        sizes = [size for size, table in CHANNEL_MULT_BY_SIZE.items() if table == mult]
        image_size = sizes[0] if sizes else image_size
    attends = [f"{name}.1.qkv.weight" in shapes for name in first]
    flags = {
        "image_size": image_size,
        "num_channels": width,
        "num_res_blocks": per_level - 1,
        "channel_mult": mult,
        "attention_resolutions": {
            image_size >> i for i, attending in enumerate(attends) if attending
        },
        "learn_sigma": out_channels == 6,
        "class_cond": num_classes is not None,
        "use_scale_shift_norm": has_scale_shift,
    }
    if num_classes is not None:
        flags["num_classes"] = num_classes
    if up:
        flags["resblock_updown"] = any("in_layers" in name for name in up)
    return flags


def classifier_flags(shapes: Shapes, image_size: int) -> dict[str, Any]:
    """Return the YAML keys of the classifier whose ``state_dict`` has these shapes, or nothing.

    Its widths are always those of the published table; ``image_size`` is named first if it fits.
    """
    blocks = _count(shapes, "input_blocks")
    for size in (image_size, *CHANNEL_MULT_BY_SIZE):
        table = CHANNEL_MULT_BY_SIZE.get(size, ())
        if blocks < 2 * len(table) or not table or blocks % len(table):
            continue
        depth = blocks // len(table) - 1
        first = [f"input_blocks.{1 + level * (depth + 1)}" for level in range(len(table))]
        try:
            width = shapes["time_embed.0.weight"][1]
            convs = [shapes.get(f"{name}.0.out_layers.3.weight", (0,)) for name in first]
            widths = [conv[0] for conv in convs]
            has_scale_shift = _has_scale_shift(shapes)
        except (KeyError, IndexError):
            return {}
        if width and widths == [int(mult * width) for mult in table]:
            break
    else:
        return {}
    if "out.2.positional_embedding" in shapes:
        pool = "attention"
    elif len(shapes.get("out.3.weight", ())) == 4:
        pool = "adaptive"
    else:
        pool = "spatial_v2" if "out.3.weight" in shapes else "spatial"
    attends = [f"{name}.1.qkv.weight" in shapes for name in first]
    return {
        "image_size": size,
        "classifier_width": width,
        "classifier_depth": depth,
        "classifier_attention_resolutions": {size >> i for i, is_on in enumerate(attends) if is_on},
        "classifier_use_scale_shift_norm": has_scale_shift,
        "classifier_resblock_updown": f"input_blocks.{depth + 1}.0.op.weight" not in shapes,
        "classifier_pool": pool,
    }


def _has_any(shapes: Shapes, list_name: str) -> bool:
    return any(name.startswith(f"{list_name}.") for name in shapes)


def _count(shapes: Shapes, list_name: str) -> int:
    """Return how many blocks a list has, 0 where one is missing."""
    found = [re.match(rf"{list_name}\.(\d{{1,4}})\.", name) for name in shapes]
    numbers = {int(match[1]) for match in found if match}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _resizing_outputs(shapes: Shapes) -> list[str]:
    """Names of one parameter of each output block's resizing layer, which comes last in it."""
    resizing = re.compile(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight")
    return [name for name in shapes if resizing.fullmatch(name)]


def _has_scale_shift(shapes: Shapes) -> bool:
    block = "middle_block.0"
    out = shapes[f"{block}.out_layers.3.weight"][0]
    return shapes[f"{block}.emb_layers.1.weight"][0] == 2 * out


def _multiplier(level_width: int, width: int) -> float:
    """Return the shortest number whose product with ``width`` has this whole part."""
    exact = level_width / width
    rounded = [math.ceil(exact * 10**digits) / 10**digits for digits in range(8)]
    return next((mult for mult in rounded if int(mult * width) == level_width), exact)


def _misfit(
    path: str,
    create: Callable[[Any], nn.Module],
    shapes: Shapes,
    conf: InpaintConf,
    flags: Mapping[str, Any],
) -> UserError:
    """Say which YAML keys make the checkpoint fit, or how it differs where none does.

    ``create`` builds the network that was asked for; ``flags`` is what the shapes tell of it. A key
    is named only where a network that is built with it fits, and one without it does not.
    """
    changes = {key: _text(value) for key, value in flags.items()}
    changes = {key: value for key, value in changes.items() if getattr(conf, key) != value}
    closest = _empty_shapes(create, conf, changes) or _empty_shapes(create, conf, {})
    if closest == shapes:
        for key in reversed(list(changes)):
            fewer = {name: value for name, value in changes.items() if name != key}
            if _empty_shapes(create, conf, fewer) == shapes:
                changes = fewer
        return UserError(f"does not fit the configuration; set {_quoted(changes)}", path=path)
    for name, shape in closest.items():
        if shape != shapes.get(name):
            return UserError(
                "is damaged, or not a checkpoint of this kind of network",
                path=path,
                expected=f"{name} of shape {shape}",
                got=shapes.get(name, "no such tensor"),
            )
    extra = next(name for name in shapes if name not in closest)
    return UserError("holds a tensor that the network does not have", path=path, got=extra)


def _empty_shapes(
    create: Callable[[Any], nn.Module], conf: InpaintConf, changes: Mapping[str, Any]
) -> Shapes | None:
    """Return the shapes of the network of the changed configuration; None if it cannot be."""
    changed = copy.copy(conf)
    # Heads leave no trace in shapes, and with one channel each they are possible in any width.
    vars(changed).update({**changes, "num_head_channels": 1})
    try:
        with torch.device("meta"):
            return _shapes(create(changed).state_dict())
    except (ValueError, RuntimeError, KeyError):
        return None


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _text(value: Any) -> Any:
    """Write several numbers as a configuration holds them; anything else stays."""
    if isinstance(value, set | tuple):
        items = sorted(value, reverse=True) if isinstance(value, set) else value
        return ",".join(f"{item:.10g}" for item in items)
    return value


def _quoted(flags: Mapping[str, Any]) -> str:
    """Write flags as in a YAML file, with commas between them."""
    is_list = ("channel_mult", "attention_resolutions", "classifier_attention_resolutions")
    values = {
        key: f"'{value}'" if key in is_list else str(value).lower() for key, value in flags.items()
    }
    return ", ".join(f"{key}: {value}" for key, value in values.items())
