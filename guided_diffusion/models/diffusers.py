"""PREDICT by a network that diffusers saved: an unconditional UNet2DModel from its folder.

A folder holds a pipeline (model_index.json, unet/, scheduler/), the same files side by side, as the
first versions saved them, or a network alone. diffusers itself says what its configurations mean.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import check_checkpoint, fingerprint, load_state_dict
from guided_diffusion.io.weights import filled, short
from guided_diffusion.models.foreign import ALLOWED_CHANNELS, ForeignModel
from guided_diffusion.models.hub import HUB, NEEDS, how_to_fetch, local_folder, snapshot

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Names of the attention projections before diffusers 0.12; the published folders are older.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_IS_FIXED_SMALL = {"fixed_small": True, "fixed_small_log": True,
                   "fixed_large": False, "fixed_large_log": False}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelFolder(ForeignModel):
    """A network of diffusers in its folder."""

    unet_path: Path  # of the network's configuration; the weights are beside it
    unet: Mapping[str, Any]  # with diffusers' defaults
    scheduler: Mapping[str, Any]  # as its file states it; empty where the folder has none


class DiffusersUNet(nn.Module):
    """A UNet2DModel that is called and laid out as ``UNetModel`` is."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.dtype, self.memory_format = torch.float32, torch.contiguous_format

    def convert_trunk(self, dtype: torch.dtype) -> None:
        """Compute in ``dtype`` between a float32 input and a float32 output."""
        self.dtype = dtype
        nn.Module.to(self.unet, dtype)  # diffusers' own method warns without need

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """``x`` (N, C, S, S) in [-1, 1], ``timesteps`` and ``y`` (N,) → (N, C or 2C, S, S)."""
        inputs = x.to(self.dtype, memory_format=self.memory_format)
        (output,) = self.unet(inputs, timesteps, class_labels=y, return_dict=False)
        return output.to(x.dtype).contiguous()


# ---- What a folder says --------------------------------------------------------------------------


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
    unet_path = _first("config.json", root / "unet_ema", root / "unet", root)
    if unet_path is None:
        problem = "cannot be read: Is a directory without a network: expected model_index.json and "
        raise UserError(f"{problem}unet/config.json, or config.json of a UNet2DModel", path=name)
    diffusers = _import(name)
    unet = {**_defaults(diffusers.UNet2DModel), **_read_json(unet_path)}
    keys = _network_keys(unet_path, unet)
    places = [root / "scheduler", root]
    if root.name in ("unet", "unet_ema"):  # a part of a pipeline
        places.append(root.parent / "scheduler")
    path = _first("scheduler_config.json", *places)
    scheduler = _read_json(path) if path else {}
    chain_keys, chain = _chain(diffusers, path, scheduler, keys) if path else ({}, {})
    return ModelFolder(
        name=name,
        keys=keys | chain_keys,
        levels=len(unet["block_out_channels"]),
        unet_path=unet_path,
        unet=unet,
        scheduler=scheduler,
        **chain,
    )


def _first(file: str, *folders: Path) -> Path | None:
    """Return the path of ``file`` in the first folder that has it."""
    return next((folder / file for folder in folders if (folder / file).exists()), None)


def _import(name: str) -> ModuleType:
    """Return the package diffusers; raises UserError, for the folder ``name``, without it."""
    try:
        import diffusers

        _ = diffusers.UNet2DModel, diffusers.DDPMScheduler  # which are imported at their first use
        return diffusers
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"needs diffusers: {NEEDS} ({reason})", path=name) from None


def _defaults(kind: type) -> dict[str, Any]:
    """Return the parameters of one of diffusers' classes with their defaults."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the keys and values of a JSON file; raises UserError."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        problem = f"cannot be read as JSON with keys and values: {error}"
        raise UserError(problem, path=path) from None


def _need(is_right: bool, path: Path, key: str, expected: str, got: object) -> None:
    """Raise UserError for a key of a JSON file; ``got`` is written as in the file."""
    if not is_right:
        text = short(json.dumps(got, default=str), 80)
        raise UserError(path=path, key=key, expected=expected, got=text)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise UserError, with what diffusers says, where it cannot use the configuration ``path``."""
    try:
        yield
    except Exception as error:  # diffusers and torch raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
        version = importlib.metadata.version("diffusers")
        raise UserError(f"diffusers {version} cannot use this: {reason}", path=path) from error


def _check_pipeline(path: Path) -> None:
    expected = "a UNet2DModel as unet and a scheduler, which work on pixels alone"
    for part, kind in _read_json(path).items():
        if part != "scheduler" and isinstance(kind, list) and kind[-1:] not in ([], [None]):
            is_right = part == "unet" and kind[-1] == "UNet2DModel"
            _need(is_right, path, part, expected, kind[-1])


def _network_keys(path: Path, unet: Mapping[str, Any]) -> dict[str, Any]:
    """Return the YAML keys that a network's configuration decides.

    Checks what this program relies on; building the network finds whatever else is wrong.
    """

    def need(key: str, expected: str, is_right: bool) -> None:
        _need(is_right, path, key, expected, unet.get(key))

    need("_class_name", "UNet2DModel", unet.get("_class_name") == "UNet2DModel")
    channels, outputs, side = (unet[key] for key in ("in_channels", "out_channels", "sample_size"))
    need("in_channels", ALLOWED_CHANNELS, channels in (1, 3))
    need("out_channels", f"{channels} or {2 * channels}", outputs in (channels, 2 * channels))
    need("time_embedding_type", "positional", unet["time_embedding_type"] == "positional")
    need("class_embed_type", "null", unet["class_embed_type"] is None)
    widths = unet["block_out_channels"]
    need("block_out_channels", "the width of each level", isinstance(widths, list | tuple))
    if isinstance(side, list) and side[1:] == side[:1]:
        side = side[0]
    need("sample_size", "the side of a square, or null", side is None or isinstance(side, int))
    keys = {
        "in_channels": channels,
        "learn_sigma": outputs == 2 * channels,
        "class_cond": unet["num_class_embeds"] is not None,
        "num_classes": unet["num_class_embeds"],
        "image_size": side,
        "rescale_timesteps": False,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _chain(
    diffusers: ModuleType, path: Path, stated: Mapping[str, Any], network: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the YAML keys that a scheduler's configuration decides, and the rest of its chain."""
    name, usual = stated.get("_class_name", "DDPMScheduler"), _defaults(diffusers.DDPMScheduler)
    is_right = "beta_schedule" in _defaults(getattr(diffusers, str(name), object))
    _need(is_right, path, "_class_name", "a scheduler of betas, such as DDPMScheduler", name)
    config = {**usual, **{key: value for key, value in stated.items() if key in usual}}
    if stated.get("predict_epsilon") is False:  # as versions before 0.8 say it
        config["prediction_type"] = "sample"
    with _explained(path):
        betas = diffusers.DDPMScheduler(**config).betas.double().numpy()
    steps, predicts = config["num_train_timesteps"], config["prediction_type"]
    is_right = 0 < len(betas) == steps and bool(((betas > 0) & (betas <= 1)).all())
    key = "trained_betas" if config["trained_betas"] else "beta_start and beta_end"
    got = config["trained_betas"] or [config["beta_start"], config["beta_end"]]
    _need(is_right, path, key, f"{steps} betas above 0 and at most 1", got)
    _need(not config["thresholding"], path, "thresholding", "false, and clip_sample", True)
    allowed = ["learned_range"] if network["learn_sigma"] else list(_IS_FIXED_SMALL)
    variance = stated.get("variance_type") or allowed[0]  # many schedulers state none
    expected = f"{' or '.join(allowed)}, by the number of out_channels"
    _need(variance in allowed, path, "variance_type", expected, variance)
    kinds = ["sample", "v_prediction"]
    if betas[-1] < 1 - 1e-9:  # else the last step is noise alone: predicted noise says nothing
        kinds = ["epsilon", *kinds]
    _need(predicts in kinds, path, "prediction_type", " or ".join(kinds), predicts)
    keys = {
        "diffusion_steps": len(betas),
        "predict_xstart": predicts == "sample",
        "predict_v": predicts == "v_prediction",
        "clip_denoised": bool(config["clip_sample"]),
    }
    chain = {
        "betas": np.minimum(betas, 1 - 1e-15),  # GaussianDiffusion divides by the signal left
        "fixed_small": _IS_FIXED_SMALL.get(variance, False),
        "clip_range": float(config["clip_sample_range"]),
    }
    return keys, chain


# ---- The network and its weights -----------------------------------------------------------------


def check_folder(folder: ModelFolder) -> str:
    """Find what is wrong with a folder before its network is needed; return a fingerprint.

    Raises UserError where diffusers cannot build the network, safetensors is missing, or the file
    of weights is damaged.
    """
    _empty_unet(folder)
    path = _weights(folder)
    check_checkpoint(path)
    if folder.betas is None:
        keys = "noise_schedule, diffusion_steps, predict_xstart and predict_v"
        text = f"has no scheduler_config.json, so that {keys} are as the YAML says or by default"
        warnings.warn(f"{folder.name}: {text}", stacklevel=2)
    parts = (sorted(folder.unet.items()), sorted(folder.scheduler.items()), path.name)
    return hashlib.sha256((repr(parts) + fingerprint(path)).encode()).hexdigest()[:16]


def load_network(folder: ModelFolder, device: torch.device) -> DiffusersUNet:
    """Return the network with its weights on ``device``, in float32, ready to be called.

    Raises UserError where diffusers cannot build it, and where weights do not fit.
    """
    unet = _empty_unet(folder)
    expected, state = unet.state_dict().keys(), {}
    for name, tensor in load_state_dict(_weights(folder)).items():
        newer = ".".join(_OLD_NAMES.get(part, part) for part in name.split("."))
        state[name if name in expected else newer] = tensor
    return DiffusersUNet(filled(folder.name, unet, state, device))


def _empty_unet(folder: ModelFolder) -> nn.Module:
    """Build the network that a configuration describes, without weights; raises UserError."""
    kind = _import(folder.name).UNet2DModel
    with _explained(folder.unet_path), torch.device("meta"):
        return kind.from_config(folder.unet)  # which warns of keys that it does not know


def _weights(folder: ModelFolder) -> Path:
    """Return the file of weights, fetched from the hub if need be; raises UserError."""
    place = folder.unet_path.parent
    part = f"{place.name}/" if place.name in ("unet", "unet_ema") else ""
    for wanted in (None, *_WEIGHTS) if folder.name.startswith(HUB) else (None,):
        if wanted:
            snapshot(folder.name, ["*.json", part + wanted])
        for file in _WEIGHTS:
            if (place / file).exists():
                return place / file
    problem = "holds a configuration without its weights"
    expected = f"{' or '.join(_WEIGHTS)} beside config.json"
    raise UserError(problem, path=folder.name, expected=expected)
