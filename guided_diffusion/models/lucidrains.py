"""PREDICT by a network of denoising-diffusion-pytorch (github.com/lucidrains).

A checkpoint is what its Trainer saves (results/model-100.pt, of which the averaged weights are
taken), or the state of a GaussianDiffusion or Unet alone. The package itself builds the network.
"""

import contextlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import (
    check_checkpoint,
    fingerprint,
    load_state_dict,
    read_tree,
)
from guided_diffusion.io.weights import filled, find_weights, shapes_of, short
from guided_diffusion.models.foreign import ALLOWED_CHANNELS, ForeignModel

_NAME = "denoising-diffusion-pytorch"
_NEEDS = "pip install -r requirements-lucidrains.txt"
_GROUPS = 8  # of the blocks' GroupNorm before version 2.0, by default; shapes do not tell it


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ForeignModel):
    """A network of denoising-diffusion-pytorch in its file."""

    version: str  # of the package that saved it; empty where the file does not say
    shapes: Mapping[str, tuple[int, ...]]  # of the Unet's tensors
    dim_mults: tuple[int, ...]  # the package's, width of each level over that of the first
    heads: tuple[int, ...]  # of each level's attention; empty where the file does not tell
    self_condition: bool  # takes its last prediction, too


def read_checkpoint(name: str) -> Checkpoint:
    """Read what a checkpoint tells of its network and chain; its weights are not checked.

    Raises UserError as ``read_tree``, and for a network that does not work on pictures.
    """
    tree = read_tree(Path(name))
    shapes = shapes_of(find_weights(Path(name), tree).tensors)
    ends = [shapes.get(f"{layer}.weight", ()) for layer in ("init_conv", "final_conv")]
    if [len(end) for end in ends] != [4, 4] or len(shapes.get("time_mlp.1.weight", ())) != 2:
        raise UserError(f"is no whole Unet of {_NAME} for pictures", path=name)
    if "time_mlp.0.weights" in shapes:
        problem = f"is of a continuous-time diffusion of {_NAME}, which is not done here"
        raise UserError(problem, path=name)
    inputs, outputs = ends[0][1], ends[1][0]
    channels = min(inputs, outputs)
    if channels not in (1, 3) or inputs * outputs not in (channels**2, 2 * channels**2):
        got = f"{inputs} into the network and {outputs} out of it"
        raise UserError(path=name, key="channels", expected=ALLOWED_CHANNELS, got=got)
    # The layer at the end of each level has its width; memory tokens have the number of heads.
    last = [f"downs.{level}.3.{layer}weight" for level in range(16) for layer in ("1.", "")]
    widths = [shapes[layer][0] for layer in last if layer in shapes]
    tokens = [shapes.get(f"downs.{level}.2.mem_kv") for level in range(len(widths))]
    heads = tuple(shape[1] for shape in tokens) if all(tokens) else ()
    tables = _tables(tree)
    keys = _keys(channels, outputs > channels, tables)
    return Checkpoint(
        name=name,
        keys=keys,
        needed=_needed(keys, heads),
        levels=len(widths),
        betas=_betas(tables) if tables else None,
        version=str(tree.get("version", "")) if isinstance(tree, Mapping) else "",
        shapes=shapes,
        dim_mults=tuple(width // shapes["time_mlp.1.weight"][1] for width in widths),
        heads=heads,
        self_condition=inputs > channels,
    )


def _keys(channels: int, learn_sigma: bool, tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the YAML keys that the file decides."""
    keys = {"in_channels": channels, "learn_sigma": learn_sigma, "class_cond": False}
    keys |= {"rescale_timesteps": False, "clip_denoised": True}
    if tables:
        keys["diffusion_steps"] = len(tables["betas"])
    # LearnedGaussianDiffusion takes its output for noise, whatever its objective.
    objective = "pred_noise" if learn_sigma else _objective(tables)
    if objective:
        keys |= {"predict_xstart": objective == "pred_x0", "predict_v": objective == "pred_v"}
    return keys


def _needed(keys: Mapping[str, Any], heads: Sequence[int]) -> dict[tuple[str, ...], str]:
    """Return what the YAML has to state beside ``keys``."""
    needed = {("image_size",): "the side of the pictures in training"}
    if "predict_v" not in keys:
        text = "true for objective pred_v, else false; or predict_xstart: true"
        needed["predict_v", "predict_xstart"] = text
    if "diffusion_steps" not in keys:
        text = "linear or cosine; with the package's default, sigmoid, give a file of "
        needed["diffusion_steps",] = "the package's timesteps, 1000 by default"
        needed["noise_schedule",] = f"{text}GaussianDiffusion, which holds the betas"
    if not heads:
        needed["num_heads",] = "the heads of its attention, in the package 4 by default"
    return needed


def check_lucidrains(checkpoint: Checkpoint) -> str:
    """Find what is wrong before the network is needed; return a fingerprint.

    Raises UserError where the package is missing or has another network, or the file is damaged.
    """
    check_checkpoint(checkpoint.name)
    _unet_of(checkpoint, heads=1)  # heads leave no trace in shapes
    if checkpoint.self_condition:
        problem = "takes its last prediction as input, and gets zeros here, as half of the training"
        warnings.warn(f"{checkpoint.name}: {problem}", stacklevel=2)
    return fingerprint(checkpoint.name)


class LucidrainsUNet(nn.Module):
    """A Unet of denoising-diffusion-pytorch that is called and laid out as ``UNetModel`` is."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.dtype, self.memory_format = torch.float32, torch.contiguous_format

    def convert_trunk(self, dtype: torch.dtype) -> None:
        """Compute convolutions and products in ``dtype``."""
        self.dtype = dtype

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """``x`` (N, C, S, S) in [-1, 1], ``timesteps`` (N,) → (N, C or 2C, S, S)."""
        x = x.contiguous(memory_format=self.memory_format)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.unet(x, timesteps)
        return output.to(x.dtype).contiguous()


def load_lucidrains(checkpoint: Checkpoint, heads: int, device: torch.device) -> LucidrainsUNet:
    """Return the network with its weights on ``device``, in float32, ready to be called.

    ``heads`` counts for a file without memory tokens. Raises UserError as ``check_lucidrains``.
    """
    state = load_state_dict(checkpoint.name)
    return LucidrainsUNet(filled(checkpoint.name, _unet_of(checkpoint, heads), state, device))


# ---- The network ---------------------------------------------------------------------------------


def _unet_of(checkpoint: Checkpoint, heads: int) -> nn.Module:
    """Return the package's Unet without weights.

    Raises UserError where the package is missing, or its network is another one.
    """
    try:
        from denoising_diffusion_pytorch import denoising_diffusion_pytorch as package
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"needs {_NAME}: {_NEEDS} ({reason})", path=checkpoint.name) from None
    shapes = checkpoint.shapes
    levels = range(len(checkpoint.dim_mults))
    hidden = [shapes.get(f"downs.{i}.2.to_qkv.weight", (384,))[0] // 3 for i in levels]
    attn_heads = checkpoint.heads or (heads,) * len(levels)
    options = {
        "dim": shapes["time_mlp.1.weight"][1],
        "init_dim": shapes["init_conv.weight"][0],
        "dim_mults": checkpoint.dim_mults,
        "channels": checkpoint.keys["in_channels"],
        "self_condition": checkpoint.self_condition,
        "learned_variance": checkpoint.keys["learn_sigma"],
        "attn_heads": attn_heads,
        "attn_dim_head": tuple(n // h for n, h in zip(hidden, attn_heads, strict=True)),
        "full_attn": tuple(f"downs.{i}.2.to_out.weight" in shapes for i in levels),
    }
    known = inspect.signature(package.Unet.__init__).parameters
    built: dict[str, tuple[int, ...]] = {}
    with contextlib.suppress(Exception), torch.device("meta"):  # it asserts what it can build
        unet = package.Unet(**{key: value for key, value in options.items() if key in known})
        _adapt(unet, shapes)
        built = shapes_of(unet.state_dict())
    saved, installed = checkpoint.version, importlib.metadata.version(_NAME)
    # Before 1.8 some versions have the same names and compute something else.
    is_old = any(".fn.fn." in name for name in shapes) and saved != installed
    if built != shapes or is_old:
        differing = [name for name in (*shapes, *built) if shapes.get(name) != built.get(name)]
        hint = f"pip install {_NAME}=={saved or 'VERSION'}, the one that saved it"
        problem = f"is not the network of the installed {_NAME} {installed}; {hint}"
        got = short(differing[0]) if differing else f"version {saved or 'unknown'}"
        raise UserError(problem, path=checkpoint.name, got=got)
    return unet


def _adapt(unet: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a network the norms and memory tokens of the version that saved the checkpoint."""
    for name, module in list(unet.named_modules()):
        if f"{name}.norm.bias" in shapes and hasattr(module, "proj"):  # before version 2.0
            module.norm = nn.GroupNorm(_GROUPS, module.proj.out_channels)
        if not hasattr(module, "mem_kv"):
            continue
        if f"{name}.mem_kv" in shapes:
            module.mem_kv = nn.Parameter(torch.empty(shapes[f"{name}.mem_kv"]))
        else:  # before version 1.9 there were none
            shape = list(module.mem_kv.shape)
            shape[3 if isinstance(module.to_out, nn.Sequential) else 2] = 0
            del module.mem_kv
            module.register_buffer("mem_kv", torch.empty(shape, device="cpu"), persistent=False)


# ---- The chain -----------------------------------------------------------------------------------


def _tables(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tables of the first GaussianDiffusion in a file, by name."""
    for branch in (tree, *tree.values()):
        for name, value in branch.items() if isinstance(branch, Mapping) else ():
            if str(name).rpartition(".")[2] == "betas" and isinstance(value, Tensor):
                names = ("betas", "alphas_cumprod", "loss_weight")
                found = {each: branch.get(f"{name.removesuffix('betas')}{each}") for each in names}
                return {k: v.float().numpy() for k, v in found.items() if isinstance(v, Tensor)}
    return {}


def _betas(tables: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the betas; those near 1 by what is left of 1, of which float32 has more digits."""
    betas = tables["betas"].astype(np.float64)
    left = tables.get("alphas_cumprod", np.cumprod(1 - betas)).astype(np.float64)
    return np.where(betas > 0.5, 1 - left / np.append(1.0, left[:-1]), betas)


def _objective(tables: Mapping[str, np.ndarray]) -> str:
    """Return what the loss weights, which follow the objective, tell of it; empty: nothing.

    They are 1 for the noise, the ratio of signal to noise for x_0, and that over itself plus 1 for
    v; where it is small, clipping (Min-SNR, arXiv 2303.09556) leaves them as they are.
    """
    if not {"alphas_cumprod", "loss_weight"} <= tables.keys():
        return ""
    alphas_cumprod, weights = tables["alphas_cumprod"], tables["loss_weight"]
    ratio = alphas_cumprod / np.maximum(1 - alphas_cumprod, 1e-12)
    i = int(np.abs(ratio - 0.5).argmin())
    expected = {"pred_noise": 1.0, "pred_x0": ratio[i], "pred_v": alphas_cumprod[i]}
    fitting = [name for name, each in expected.items() if np.isclose(weights[i], each, rtol=1e-3)]
    return fitting[0] if len(fitting) == 1 else ""
