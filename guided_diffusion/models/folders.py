"""What a folder of diffusers says of its network and chain, as YAML keys.

A folder holds a pipeline (model_index.json, unet/, scheduler/), the same files side by side, as the
first versions saved them, or a network alone. diffusers itself says what its configurations mean.
"""

import contextlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.models.foreign import ALLOWED_CHANNELS, Chain
from guided_diffusion.models.hub import NEEDS, how_to_fetch, local_folder

_MAX_JSON_BYTES = 1 << 24
_MAX_STEPS = 1_000_000
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_IS_FIXED_SMALL = {"fixed_small": True, "fixed_small_log": True,
                   "fixed_large": False, "fixed_large_log": False}  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """A network of diffusers in its folder."""

    name: str  # as the YAML names it
    unet_path: Path  # of the network's configuration; the weights are beside it
    unet: Mapping[str, Any]  # with diffusers' defaults
    scheduler_path: Path | None  # None: the folder has no scheduler
    scheduler: Mapping[str, Any]

    @property
    def has_chain(self) -> bool:
        """Whether the folder has a scheduler."""
        return self.scheduler_path is not None

    @cached_property
    def chain(self) -> Chain:
        """The diffusion; raises UserError for one that this program does not have."""
        return _chain(self)

    def keys(self) -> dict[str, Any]:
        """Return the YAML keys that the folder decides."""
        chain, classes = self.chain, self.unet["num_class_embeds"]
        keys = {"rescale_timesteps": False, "learn_sigma": chain.learn_sigma}
        keys["in_channels"] = self.unet["in_channels"]
        keys["class_cond"] = classes is not None or self.unet["class_embed_type"] is not None
        if (size := _sample_size(self)) is not None:
            keys["image_size"] = size
        if classes is not None:
            keys["num_classes"] = classes
        if self.has_chain:
            keys |= {
                "diffusion_steps": len(chain.betas),
                "predict_xstart": chain.predict_xstart,
                "predict_v": chain.predict_v,
                "clip_denoised": chain.clip_denoised,
            }
        return keys

    def check_stated(self, tree: Mapping[str, Any]) -> None:
        """Raise UserError for an ``image_size`` that the network cannot have."""
        side = tree.get("image_size")
        if self.unet["sample_size"] is None and isinstance(side, int):
            _check_side(self, side)


def read_folder(name: str) -> ModelFolder:
    """Read and check the configurations of a folder, without its weights; uses no network.

    Raises UserError where a file is missing, is no JSON, or describes something that this program
    cannot run, naming file, key and value; and where diffusers is missing.
    """
    root = local_folder(name)
    if root is None:
        raise UserError(f"is not on this machine; {how_to_fetch(name)}", path=name)
    if (root / "model_index.json").exists():
        _check_pipeline(root / "model_index.json")
    unet_folder = next((root / sub for sub in ("unet_ema", "unet") if (root / sub).is_dir()), root)
    unet_path = unet_folder / "config.json"
    if not unet_path.exists():
        problem = "cannot be read: Is a directory without a network: expected model_index.json and "
        raise UserError(f"{problem}unet/config.json, or config.json of a UNet2DModel", path=name)
    places = [root / "scheduler", root]
    if root.name in ("unet", "unet_ema"):  # a part of a pipeline
        places.append(root.parent / "scheduler")
    paths = [place / "scheduler_config.json" for place in places]
    scheduler_path = next((path for path in paths if path.exists()), None)
    unet = read_json(unet_path)
    # A configuration without its class is still one of diffusers if it has the blocks.
    kind = unet.get("_class_name", "UNet2DModel" if "block_out_channels" in unet else None)
    if kind != "UNet2DModel":
        raise wrong(unet_path, "_class_name", "UNet2DModel", kind)
    unet = {**defaults(import_diffusers(name).UNet2DModel), **unet}
    scheduler = read_json(scheduler_path) if scheduler_path else {}
    folder = ModelFolder(name, unet_path, unet, scheduler_path, scheduler)
    _check_unet(folder)
    return folder


def import_diffusers(name: str) -> ModuleType:
    """Return the package diffusers; raises UserError, for the folder ``name``, without it."""
    try:
        import diffusers

        _ = diffusers.UNet2DModel, diffusers.DDPMScheduler  # which are imported at their first use
        return diffusers
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"needs diffusers: {NEEDS} ({reason})", path=name) from None


def defaults(kind: type) -> dict[str, Any]:
    """Return the parameters of one of diffusers' classes with their defaults."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def read_json(path: Path) -> dict[str, Any]:
    """Return the keys and values of a JSON file; raises UserError."""
    try:
        with path.open("rb") as file:
            tree = json.loads(file.read(_MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=path) from None
    except (ValueError, RecursionError):
        raise UserError("is no JSON, or not whole", path=path) from None
    if not isinstance(tree, dict):
        raise UserError(path=path, expected="keys and values", got=type(tree).__name__)
    return tree


def wrong(
    path: Path | None, key: str, expected: object, got: object, problem: str = ""
) -> UserError:
    """Return the error for a key of a JSON file; ``got`` is written as in the file."""
    text = json.dumps(got, default=str)
    text = text if len(text) <= 80 else f"{text[:80]}…"
    return UserError(problem, path=path, key=key, expected=expected, got=text)


def built(build: Callable[[Mapping[str, Any]], Any], config: Mapping[str, Any], path: Path) -> Any:
    """Return ``build(config)``, an object of diffusers.

    Raises UserError where it fails, naming the key at fault: the one without which it succeeds.
    """

    def is_possible(without: str) -> bool:
        with contextlib.suppress(Exception):
            build({key: value for key, value in config.items() if key != without})
            return True
        return False

    try:
        return build(config)
    except Exception as error:  # diffusers and torch raise many types for a wrong configuration
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
        problem = f"diffusers {importlib.metadata.version('diffusers')} cannot use this: {reason}"
        if key := next(filter(is_possible, config), None):
            raise wrong(path, key, None, config[key], problem) from error
        raise UserError(problem, path=path) from error


def _check_pipeline(path: Path) -> None:
    for part, kind in read_json(path).items():
        if part == "scheduler" or not isinstance(kind, list) or kind[-1:] in ([], [None]):
            continue
        if part != "unet" or kind[-1] != "UNet2DModel":
            problem = "is of a pipeline that does not work on pixels alone"
            raise wrong(path, part, "a UNet2DModel as unet, and a scheduler", kind[-1], problem)


def _check_unet(folder: ModelFolder) -> None:
    """Check what this program relies on; building the network finds whatever else is wrong."""
    unet, widths = folder.unet, folder.unet["block_out_channels"]
    levels = len(widths) if isinstance(widths, list | tuple) else 0

    def need(key: str, expected: str, is_right: bool) -> None:
        if not is_right:
            raise wrong(folder.unet_path, key, expected, unet[key])

    channels = unet["in_channels"]
    need("in_channels", ALLOWED_CHANNELS, channels in (1, 3) and not isinstance(channels, bool))
    outputs = [channels, 2 * channels]
    need("out_channels", " or ".join(map(str, outputs)), unet["out_channels"] in outputs)
    need("layers_per_block", "a number from 1 to 100", _is_count(unet["layers_per_block"], 100))
    is_right = 0 < levels <= 16 and all(_is_count(width, 1 << 20) for width in widths)
    need("block_out_channels", "the width of each level, of 16 levels at most", is_right)
    for key in ("down_block_types", "up_block_types"):
        is_right = isinstance(unet[key], list | tuple) and len(unet[key]) == levels
        need(key, f"a block for each of the {levels} block_out_channels", is_right)
    is_right = unet["time_embedding_type"] in ("positional", "learned")
    need("time_embedding_type", "positional or learned", is_right)
    need("class_embed_type", "null or timestep", unet["class_embed_type"] in (None, "timestep"))
    is_right = unet["num_class_embeds"] is None or _is_count(unet["num_class_embeds"], 1_000_000)
    need("num_class_embeds", "null or a number of classes", is_right)
    _sample_size(folder)


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _sample_size(folder: ModelFolder) -> int | None:
    """Return the side that the network was trained on, None where the folder does not say."""
    size = folder.unet["sample_size"]
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is not None and not _is_count(size, 8192):
        raise wrong(folder.unet_path, "sample_size", "the side of a square in pixels", size)
    if size is not None:
        _check_side(folder, size)
    return size


def _check_side(folder: ModelFolder, side: int) -> None:
    """Raise UserError for a side that the network cannot halve at each level but the last."""
    levels = len(folder.unet["block_out_channels"])
    if side % 2 ** (levels - 1):
        expected = f"a side divisible by {2 ** (levels - 1)}, for {levels} levels"
        raise wrong(folder.unet_path, "sample_size", expected, side)


# ---- The chain -----------------------------------------------------------------------------------


def _chain(folder: ModelFolder) -> Chain:
    unet, path = folder.unet, folder.scheduler_path
    scheduler = _scheduler(folder)
    config, betas = scheduler.config, scheduler.betas.double().numpy()
    prediction, clip_range = config.prediction_type, config.clip_sample_range
    if prediction not in _PREDICTIONS:
        raise wrong(path, "prediction_type", ", ".join(_PREDICTIONS), prediction)
    if config.thresholding:
        problem = "dynamic thresholding is not done here; false and clip_sample clip instead"
        raise wrong(path, "thresholding", "false", config.thresholding, problem)
    if not (isinstance(clip_range, int | float) and 0 < clip_range <= 1000):
        raise wrong(path, "clip_sample_range", "a number above 0, up to 1000", clip_range)
    is_learned = unet["out_channels"] == 2 * unet["in_channels"]
    allowed = ["learned_range"] if is_learned else list(_IS_FIXED_SMALL)
    variance = folder.scheduler.get("variance_type") or allowed[0]  # many schedulers state none
    if variance not in allowed:
        problem = f"{folder.unet_path} has out_channels {unet['out_channels']}"
        raise wrong(path, "variance_type", " or ".join(allowed), variance, problem)
    steps = unet["num_train_timesteps"]
    if unet["time_embedding_type"] == "learned" and steps != len(betas):
        expected = f"{len(betas)}, the steps of the chain, each of which has an embedding"
        raise wrong(folder.unet_path, "num_train_timesteps", expected, steps)
    if betas[-1] > 1 - 1e-9 and prediction == "epsilon":
        problem = "the last step is noise alone, of which predicted noise says nothing"
        raise wrong(path, "prediction_type", "v_prediction or sample", prediction, problem)
    return Chain(
        np.minimum(betas, 1 - 1e-15),  # GaussianDiffusion divides by the signal that is left
        learn_sigma=is_learned,
        fixed_small=_IS_FIXED_SMALL.get(variance, False),
        predict_xstart=prediction == "sample",
        predict_v=prediction == "v_prediction",
        clip_denoised=bool(config.clip_sample),
        clip_range=float(clip_range),
    )


def _scheduler(folder: ModelFolder) -> Any:
    """Return the DDPMScheduler of diffusers that the folder's scheduler configures."""
    stated, path = folder.scheduler, folder.scheduler_path
    diffusers = import_diffusers(folder.name)
    name = stated.get("_class_name", "DDPMScheduler")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(kind) or "beta_schedule" not in defaults(kind):
        raise wrong(path, "_class_name", "a scheduler of betas, such as DDPMScheduler", name)
    usual = defaults(diffusers.DDPMScheduler)
    config = {key: value for key, value in stated.items() if key in usual}
    if stated.get("predict_epsilon") is False:  # as versions before 0.8 say it
        config["prediction_type"] = "sample"
    steps, trained = ({**usual, **config}[key] for key in ("num_train_timesteps", "trained_betas"))
    if not _is_count(steps, _MAX_STEPS) or steps < 2:
        raise wrong(path, "num_train_timesteps", f"a number from 2 to {_MAX_STEPS}", steps)
    if trained is not None and not (isinstance(trained, list) and len(trained) == steps):
        expected = f"a list of {steps} numbers, as num_train_timesteps says"
        raise wrong(path, "trained_betas", expected, trained)

    def build(config: Mapping[str, Any]) -> Any:
        scheduler = diffusers.DDPMScheduler(**config)
        if not ((scheduler.betas > 0) & (scheduler.betas <= 1)).all():
            raise ValueError("betas have to be above 0 and at most 1")
        return scheduler

    return built(build, config, path)
