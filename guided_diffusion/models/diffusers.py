"""PREDICT by a network that diffusers saved: an unconditional UNet2DModel from its folder."""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.config.folders import NEEDS, ModelFolder, fetch_weights
from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import (
    SAFETENSORS,
    check_checkpoint,
    fingerprint,
    is_plain,
    load_state_dict,
    short,
)

# What attention called its projections before version 0.12; the published folders are older.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Keys that say how weights were made, beside those of the network.
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
        nn.Module.to(self.unet, dtype)  # diffusers' own warns of what is no matter here

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """``x`` (N, 3, S, S) in [-1, 1], ``timesteps`` and ``y`` (N,) → (N, 3 or 6, S, S)."""
        inputs = x.to(self.dtype, memory_format=self.memory_format)
        (output,) = self.unet(inputs, timesteps, class_labels=y, return_dict=False)
        return output.to(x.dtype).contiguous()


def check_folder(folder: ModelFolder) -> str:
    """Find what is wrong with a folder's weights before they are needed; return a fingerprint.

    Raises UserError where diffusers or safetensors is missing, or a file is damaged.
    """
    files = fetch_weights(folder)
    needed = ["diffusers", *["safetensors"] * any(path.suffix == SAFETENSORS for path in files)]
    for module in needed:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"needs {module}: {NEEDS}", path=folder.name)
    for path in files:
        check_checkpoint(path)
    if folder.scheduler_path is None:
        warnings.warn(
            f"{folder.name}: has no scheduler_config.json, so that noise_schedule, "
            "diffusion_steps, predict_xstart and predict_v are as the YAML says or by default",
            stacklevel=2,
        )
    said = repr((sorted(folder.unet.items()), sorted(folder.scheduler.items()), files[0].name))
    return hashlib.sha256((said + "".join(map(fingerprint, files))).encode()).hexdigest()[:16]


def load_network(folder: ModelFolder, device: torch.device) -> DiffusersUNet:
    """Return the network with its weights on ``device``, in float32, ready to be called.

    Raises UserError where diffusers is missing or cannot build it, and where weights do not fit.
    """
    state: dict[str, Tensor] = {}
    for path in fetch_weights(folder):
        state |= load_state_dict(path)
    with torch.device("meta"):
        unet = _built(folder)
        _try(folder, unet)
    state = _renamed(state, unet.state_dict())
    _check_fits(folder, state, unet.state_dict())
    if len(list(unet.buffers())) > sum(1 for name, _ in unet.named_buffers() if name in state):
        unet = _built(folder)  # what is in no file has to be computed
    tensors = {name: tensor.to(device).float().contiguous() for name, tensor in state.items()}
    unet.load_state_dict(tensors, assign=True)
    return DiffusersUNet(nn.Module.to(unet, device).eval().requires_grad_(False))


def _built(folder: ModelFolder) -> nn.Module:
    """Build the network that a configuration describes, as the installed diffusers has it."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        first = str(error).splitlines()[0][:160]
        raise UserError(f"needs diffusers: {NEEDS} ({first})", path=folder.name) from None
    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    config = {key: value for key, value in folder.unet.items() if key in known}
    others = folder.unet.keys() - known - set(_MADE_BY)
    unknown = [key for key in sorted(others) if folder.unet[key] is not None]
    version = importlib.metadata.version("diffusers")
    if unknown:
        names = ", ".join(short(key) for key in unknown[:4])
        warnings.warn(
            f"{folder.unet_path}: diffusers {version} does not know {names}; go on without",
            stacklevel=2,
        )
    try:
        return UNet2DModel(**config)
    except Exception as error:  # a wrong configuration fails wherever it is used first
        raise _not_runnable(folder, error) from error


def _try(folder: ModelFolder, unet: nn.Module) -> None:
    """Call a network without weights: much of what a configuration says is used there first."""
    side = 4 * 2 ** (len(folder.unet["block_out_channels"]) - 1)
    takes_labels = getattr(unet, "class_embedding", None) is not None
    y = torch.zeros(1, dtype=torch.long) if takes_labels else None
    try:
        unet(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.long), class_labels=y)
    except NotImplementedError:  # not everything that runs can do so without weights
        pass
    except Exception as error:
        raise _not_runnable(folder, error) from error


def _not_runnable(folder: ModelFolder, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    version = importlib.metadata.version("diffusers")
    problem = f"diffusers {version} cannot run this network: {first[:240]}"
    return UserError(problem, path=folder.unet_path)


def _renamed(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names and shapes that this version of diffusers has for them."""
    renamed = {}
    for name, tensor in state.items():
        if name not in expected:
            parts = [OLD_NAMES.get(part, part) for part in name.split(".")]
            name = ".".join(parts) if ".".join(parts) in expected else name
        wanted = expected.get(name)
        if wanted is not None and tensor.shape != wanted.shape:
            plain = [[side for side in each.shape if side != 1] for each in (tensor, wanted)]
            if plain[0] == plain[1]:  # a product that was a convolution over one pixel
                tensor = tensor.reshape(wanted.shape)
        renamed[name] = tensor
    return renamed


def _check_fits(
    folder: ModelFolder, state: Mapping[str, Tensor], expected: Mapping[str, Any]
) -> None:
    for name in (*expected, *state):
        found = tuple(state[name].shape) if name in state else "no such tensor"
        wanted = tuple(expected[name].shape) if name in expected else "no such tensor"
        if found != wanted:
            raise UserError(
                f"has other weights than its config.json says: {short(name)}",
                path=folder.name,
                expected=wanted,
                got=found,
            )
        if not is_plain(state[name]):
            text = f"{short(name)} as plain floating-point numbers"
            raise UserError(path=folder.name, expected=text, got=state[name].dtype)
