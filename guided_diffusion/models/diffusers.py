"""PREDICT by a network that diffusers saved: an unconditional UNet2DModel from its folder."""

import contextlib
import hashlib
import importlib.metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import check_checkpoint, fingerprint, load_state_dict
from guided_diffusion.io.weights import check_fits, short
from guided_diffusion.models.folders import (
    ModelFolder,
    built,
    defaults,
    import_diffusers,
    read_json,
    wrong,
)
from guided_diffusion.models.hub import HUB, fetch

_WEIGHTS = "diffusion_pytorch_model"
# Names of the attention projections before diffusers 0.12; the published folders are older.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Keys of config.json that say how the weights were made.
_MADE_BY = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power", "_class_name", "_diffusers_version", "_name_or_path", "architectures", "model_type",
)  # fmt: skip


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
        """``x`` (N, 3, S, S) in [-1, 1], ``timesteps`` and ``y`` (N,) → (N, 3 or 6, S, S)."""
        inputs = x.to(self.dtype, memory_format=self.memory_format)
        (output,) = self.unet(inputs, timesteps, class_labels=y, return_dict=False)
        return output.to(x.dtype).contiguous()


def check_folder(folder: ModelFolder) -> str:
    """Find what is wrong with a folder before its network is needed; return a fingerprint.

    Raises UserError where diffusers cannot run the network, safetensors is missing, or a file is
    damaged.
    """
    with torch.device("meta"):
        _unet_of(folder)
    files = _weight_files(folder)
    for path in files:
        check_checkpoint(path)
    if folder.scheduler_path is None:
        warnings.warn(
            f"{folder.name}: has no scheduler_config.json, so that noise_schedule, "
            "diffusion_steps, predict_xstart and predict_v are as the YAML says or by default",
            stacklevel=2,
        )
    parts = (sorted(folder.unet.items()), sorted(folder.scheduler.items()), files[0].name)
    text = repr(parts) + "".join(map(fingerprint, files))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_network(folder: ModelFolder, device: torch.device) -> DiffusersUNet:
    """Return the network with its weights on ``device``, in float32, ready to be called.

    Raises UserError where diffusers cannot run it, and where weights do not fit.
    """
    with torch.device("meta"):
        unet = _unet_of(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in load_state_dict(path).items():
            newer = ".".join(_OLD_NAMES.get(part, part) for part in name.split("."))
            state[name if name in expected else newer] = tensor
    check_fits(folder.name, state, expected)
    if any(name not in state for name, _ in unet.named_buffers()):
        unet = _unet_of(folder)  # buffers that no file holds have to be computed
    tensors = {name: tensor.to(device).float().contiguous() for name, tensor in state.items()}
    unet.load_state_dict(tensors, assign=True)
    return DiffusersUNet(nn.Module.to(unet, device).eval().requires_grad_(False))


def _unet_of(folder: ModelFolder) -> nn.Module:
    """Build the network that a configuration describes; without weights, call it once, too."""
    kind = import_diffusers(folder.name).UNet2DModel
    config = {key: folder.unet[key] for key in defaults(kind)}
    others = sorted(folder.unet.keys() - config.keys() - set(_MADE_BY))
    if names := [short(key) for key in others if folder.unet[key] is not None]:
        version = importlib.metadata.version("diffusers")
        problem = f"diffusers {version} does not know {', '.join(names[:4])}, and goes on without"
        warnings.warn(f"{folder.unet_path}: {problem}", stacklevel=2)

    def build(config: Mapping[str, Any]) -> nn.Module:
        unet = kind(**config)
        if next(unet.parameters()).is_meta:
            _try(unet, 4 * 2 ** (len(unet.config.block_out_channels) - 1))
        return unet

    return built(build, config, folder.unet_path)


def _try(unet: nn.Module, side: int) -> None:
    """Call a network without weights: much of what a configuration says is used there first."""
    takes_labels = getattr(unet, "class_embedding", None) is not None
    y = torch.zeros(1, dtype=torch.long) if takes_labels else None
    x = torch.zeros(1, unet.config.in_channels, side, side)
    with contextlib.suppress(NotImplementedError):  # not all that runs can do so without weights
        unet(x, torch.zeros(1, dtype=torch.long), class_labels=y)


# ---- The files of weights ------------------------------------------------------------------------


def _weight_files(folder: ModelFolder) -> list[Path]:
    """Return the files of weights, fetched from the hub if need be; raises UserError."""
    place, problem = folder.unet_path.parent, None
    part = f"{place.name}/" if place.name in ("unet", "unet_ema") else ""
    formats = ("safetensors", "bin") if folder.name.startswith(HUB) else ()
    for suffix in (None, *formats):
        if suffix:
            fetch(folder.name, ["*.json", f"{part}{_WEIGHTS}*.{suffix}"])
        try:
            return _weights_in(place, folder.name)
        except UserError as error:
            problem = error
    raise problem


def _weights_in(place: Path, name: str) -> list[Path]:
    for suffix in ("safetensors", "bin"):
        whole, index = place / f"{_WEIGHTS}.{suffix}", place / f"{_WEIGHTS}.{suffix}.index.json"
        if whole.exists() or index.exists():
            return [whole] if whole.exists() else _parts(index)
    for suffix in ("safetensors", "bin", "pt"):  # a variant such as fp16
        found = sorted(path for path in place.glob(f"*.{suffix}") if "non_ema" not in path.name)
        if len(found) > 1:
            names = ", ".join(path.name[-60:] for path in found[:3])
            raise UserError(path=place, expected=f"{_WEIGHTS}.{suffix}", got=names)
        if found:
            return found
    expected = f"{_WEIGHTS}.safetensors or .bin beside config.json"
    raise UserError("holds a configuration without its weights", path=name, expected=expected)


def _parts(index: Path) -> list[Path]:
    """Return the files that an index lists, each in the index's folder."""
    files = read_json(index).get("weight_map")
    names = sorted({str(file) for file in files.values()}) if isinstance(files, dict) else []
    if not names or len(names) > 1000 or any(Path(name).name != name for name in names):
        raise wrong(index, "weight_map", "files of this folder by name", files)
    for name in names:
        if not (index.parent / name).exists():
            raise UserError("names a part that is missing", path=index, got=name[:80])
    return [index.parent / name for name in names]
