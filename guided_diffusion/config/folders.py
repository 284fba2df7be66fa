"""What a diffusers folder says of its network and chain, as YAML keys; read without diffusers.

A folder holds a pipeline (model_index.json, unet/, scheduler/), the same side by side, as the first
versions saved it, or a network alone. hf://owner/name is such a folder of the Hugging Face hub.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError

HUB = "hf://"
NEEDS = "pip install -r requirements-diffusers.txt"
# Keys that describe guided-diffusion's own network and have no effect on one from a folder; where
# they are stated they have to be true of it.
NETWORK_KEYS = (
    "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_head_channels",
    "use_scale_shift_norm", "resblock_updown", "norm_groups", "noise_schedule",
)  # fmt: skip
_HUB_NAME = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?/?", re.ASCII)
_MOST_JSON = 1 << 24  # bytes
_MOST_STEPS = 1_000_000
USUAL_STEPS = 250  # of a walk, where the YAML says nothing
_LATENT = ("vae", "vqvae", "text_encoder", "tokenizer", "transformer", "prior", "movq", "bert")
_OTHER_NOISE = re.compile(r"ScoreSde|KarrasVe|CMStochastic|VQDiffusion|FlowMatch|EDM|Amused")
_WEIGHTS = "diffusion_pytorch_model"
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_VARIANCES = {
    "fixed_small": True, "fixed_small_log": True, "fixed_large": False, "fixed_large_log": False,
    "learned_range": False,
}  # fmt: skip
# Every version of diffusers gives a network these where its configuration says nothing.
_UNET_DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": [224, 448, 672, 896], "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "time_embedding_type": "positional", "class_embed_type": None, "num_class_embeds": None,
    "resnet_time_scale_shift": "default", "downsample_type": "conv", "norm_num_groups": 32,
}  # fmt: skip
_SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "variance_type": None, "prediction_type": "epsilon",
    "clip_sample": True, "clip_sample_range": 1.0, "thresholding": False,
    "rescale_betas_zero_snr": False,
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """The diffusion that a folder's network was trained on, as ``GaussianDiffusion`` takes it."""

    betas: np.ndarray  # float64, of all steps
    learn_sigma: bool
    fixed_small: bool
    predict_xstart: bool
    predict_v: bool
    clip_denoised: bool
    clip_range: float


@dataclass(frozen=True)
class ModelFolder:
    """A network of diffusers in its folder. ``scheduler_path`` is None where there is none."""

    name: str  # as the YAML names it
    unet_path: Path  # of the network's configuration; its weights are beside it
    unet: Mapping[str, Any]
    scheduler_path: Path | None
    scheduler: Mapping[str, Any]

    @cached_property
    def weights(self) -> list[Path]:
        """The files of weights; raises UserError where there are none."""
        return _weights(self.unet_path.parent, self.name)

    @cached_property
    def chain(self) -> Chain:
        """The diffusion; raises UserError for one that this program does not know."""
        return _chain(self)

    def keys(self) -> dict[str, Any]:
        """Return the YAML keys that follow the folder."""
        unet, chain = self.unet, self.chain
        classes = unet["num_class_embeds"]
        keys = {"rescale_timesteps": False, "learn_sigma": chain.learn_sigma}
        if (size := _sample_size(self)) is not None:
            keys["image_size"] = size
        keys["class_cond"] = classes is not None or unet["class_embed_type"] is not None
        if classes is not None:
            keys["num_classes"] = classes
        if self.scheduler_path:
            keys |= {
                "diffusion_steps": len(chain.betas),
                "predict_xstart": chain.predict_xstart,
                "predict_v": chain.predict_v,
                "clip_denoised": chain.clip_denoised,
            }
        return keys

    def network_keys(self) -> dict[str, Any]:
        """Return what is true of the network in the words of ``NETWORK_KEYS``."""
        unet, widths = self.unet, self.unet["block_out_channels"]
        keys = {
            "num_channels": widths[0],
            "num_res_blocks": unet["layers_per_block"],
            "channel_mult": ",".join(f"{width / widths[0]:.10g}" for width in widths),
            "use_scale_shift_norm": unet["resnet_time_scale_shift"] == "scale_shift",
            "resblock_updown": unet["downsample_type"] == "resnet"
            or any(str(kind).startswith("Resnet") for kind in unet["down_block_types"]),
            "norm_groups": unet["norm_num_groups"],
        }
        if (size := _sample_size(self)) is not None:
            attends = ["Attn" in str(kind) for kind in unet["down_block_types"]]
            sides = [size >> level for level, is_on in enumerate(attends) if is_on]
            keys["attention_resolutions"] = ",".join(map(str, sides))
        if unet["attention_head_dim"] is not None:
            keys["num_head_channels"] = unet["attention_head_dim"]
        if self.scheduler_path:
            keys["noise_schedule"] = _noise_name(self)
        return keys


def is_folder(path: object) -> bool:
    """Whether a ``model_path`` names a folder, or one of the hub."""
    return isinstance(path, str) and (path.startswith(HUB) or os.path.isdir(path))  # noqa: PTH112


def read_folder(name: str) -> ModelFolder:
    """Read and check what a folder says; weights are not looked at yet.

    Raises UserError where a file is missing, is no JSON, or describes something that this program
    cannot run, naming file, key, and what was found.
    """
    root = _on_disk(name)
    index_path = root / "model_index.json"
    if index_path.exists():
        _check_pipeline(index_path)
    unet_folder = next((root / sub for sub in ("unet_ema", "unet") if (root / sub).is_dir()), root)
    unet_path = unet_folder / "config.json"
    if not unet_path.exists():
        problem = "cannot be read: Is a directory without a network: expected model_index.json and "
        raise UserError(f"{problem}unet/config.json, or config.json of a UNet2DModel", path=name)
    scheduler_path = _scheduler_path(root, unet_folder)
    stated = _json(unet_path)
    unet = {**_UNET_DEFAULTS, **stated}
    scheduler = {**_SCHEDULER_DEFAULTS, **(_json(scheduler_path) if scheduler_path else {})}
    folder = ModelFolder(name, unet_path, unet, scheduler_path, scheduler)
    _check_unet(folder, stated)
    return folder


def _scheduler_path(root: Path, unet_folder: Path) -> Path | None:
    places = [root / "scheduler", root]
    if unet_folder == root and root.name in ("unet", "unet_ema"):  # of a pipeline, stated alone
        places.append(root.parent / "scheduler")
    paths = [place / "scheduler_config.json" for place in places]
    return next((path for path in paths if path.exists()), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise UserError("is no file", path=path)
        if path.stat().st_size > _MOST_JSON:
            raise UserError(path=path, expected="a configuration", got="more than 16 MiB")
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=path) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("is no JSON, or not whole", path=path) from None
    if not isinstance(tree, dict):
        raise UserError(path=path, expected="keys and values", got=type(tree).__name__)
    return tree


def _wrong(
    path: Path | None, key: str, expected: object, got: object, problem: str = ""
) -> UserError:
    text = json.dumps(got, default=str)
    text = text if len(text) <= 80 else f"{text[:80]}…"
    return UserError(problem, path=path, key=key, expected=expected, got=text)


# ---- The pipeline and the network ----------------------------------------------------------------


def _check_pipeline(path: Path) -> None:
    index = _json(path)
    for part in _LATENT:
        if isinstance(index.get(part), list) and index[part][-1:] not in ([], [None]):
            name = str(index.get("_class_name", "a pipeline"))[:60]
            problem = f"{name} has a {part}: it does not work on pixels alone"
            raise _wrong(path, part, "a pipeline of unet and scheduler", index[part], problem)
    unet = index.get("unet")
    if isinstance(unet, list) and unet[-1:] not in ([], ["UNet2DModel"]):
        raise _wrong(path, "unet", "UNet2DModel", unet[-1])


def _check_unet(folder: ModelFolder, stated: Mapping[str, Any]) -> None:
    unet, path = folder.unet, folder.unet_path
    # A configuration without its class is still one of diffusers if it has the blocks.
    kind = unet.get("_class_name", "UNet2DModel" if "block_out_channels" in stated else None)
    if kind != "UNet2DModel":
        raise _wrong(path, "_class_name", "UNet2DModel", kind)
    for key, allowed in (("in_channels", (3,)), ("out_channels", (3, 6))):
        if unet[key] not in allowed or isinstance(unet[key], bool):
            problem = "only 3-channel networks work on pictures"
            raise _wrong(path, key, " or ".join(map(str, allowed)), unet[key], problem)
    if not _is_count(unet["layers_per_block"], 100):
        raise _wrong(path, "layers_per_block", "a number from 1 to 100", unet["layers_per_block"])
    widths = unet["block_out_channels"]
    is_list = isinstance(widths, list) and 0 < len(widths) <= 16
    if not is_list or not all(_is_count(width, 1 << 20) for width in widths):
        raise _wrong(path, "block_out_channels", "the width of each level", widths)
    for key in ("down_block_types", "up_block_types"):
        if not isinstance(unet[key], list) or len(unet[key]) != len(widths):
            expected = f"a block for each of the {len(widths)} block_out_channels"
            raise _wrong(path, key, expected, unet[key])
    if unet["time_embedding_type"] not in ("positional", "learned"):
        problem = "noise levels are given as steps of a chain here, not as those of score_sde"
        raise _wrong(
            path, "time_embedding_type", "positional", unet["time_embedding_type"], problem
        )
    if unet["class_embed_type"] not in (None, "timestep"):
        raise _wrong(path, "class_embed_type", "null or timestep", unet["class_embed_type"])
    head, most = unet["attention_head_dim"], _narrowest_attention(unet)
    if head is not None and not _is_count(head, most):
        raise _wrong(path, "attention_head_dim", f"null or a number from 1 to {most}", head)
    if unet["num_class_embeds"] is not None and not _is_count(unet["num_class_embeds"], 1_000_000):
        raise _wrong(path, "num_class_embeds", "a number of classes", unet["num_class_embeds"])
    _sample_size(folder)


def _narrowest_attention(unet: Mapping[str, Any]) -> int:
    """Return the fewest channels of those levels that have heads; the middle always has."""
    widths = unet["block_out_channels"]
    levels = zip(unet["down_block_types"], widths, strict=True)
    return min([widths[-1], *(width for kind, width in levels if "Attn" in str(kind))])


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _sample_size(folder: ModelFolder) -> int | None:
    """Return the side that the network was trained on, None where nothing tells."""
    size, path = folder.unet["sample_size"], folder.unet_path
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not _is_count(size, 8192):
        raise _wrong(path, "sample_size", "the side of a square in pixels", size)
    check_side(folder, size)
    return size


def check_side(folder: ModelFolder, side: int) -> None:
    """Refuse pictures that the network could not halve as often as it has to."""
    unit = 2 ** (len(folder.unet["block_out_channels"]) - 1)
    if side % unit:
        expected = (
            f"a side divisible by {unit}, for {len(folder.unet['block_out_channels'])} levels"
        )
        raise _wrong(folder.unet_path, "sample_size", expected, side)


def _weights(folder: Path, name: str) -> list[Path]:
    for suffix in ("safetensors", "bin"):
        whole = folder / f"{_WEIGHTS}.{suffix}"
        if whole.exists():
            return [whole]
        index = folder / f"{_WEIGHTS}.{suffix}.index.json"
        if index.exists():
            return _shards(index)
    for suffix in ("safetensors", "bin", "pt"):
        found = sorted(path for path in folder.glob(f"*.{suffix}") if "non_ema" not in path.name)
        if len(found) == 1:
            return found
        if found:
            names = ", ".join(path.name[-60:] for path in found[:3])
            raise UserError(path=folder, expected=f"{_WEIGHTS}.{suffix}", got=names)
    got = "Flax weights only" if list(folder.glob("*.msgpack")) else "no weights"
    raise UserError(
        "holds a configuration without its weights",
        path=name,
        expected=f"{_WEIGHTS}.safetensors or .bin beside config.json",
        got=got,
    )


def _shards(index: Path) -> list[Path]:
    """Return the parts that an index lists, each a file of the same folder."""
    places = _json(index).get("weight_map")
    is_map = isinstance(places, dict) and places
    names = sorted({str(value) for value in places.values()}) if is_map else []
    if not names or len(names) > 1000 or any(Path(name).name != name for name in names):
        raise _wrong(index, "weight_map", "files of this folder by name", places)
    for name in names:
        if not (index.parent / name).exists():
            raise UserError("names a part that is missing", path=index, got=name[:80])
    return [index.parent / name for name in names]


# ---- The chain -----------------------------------------------------------------------------------


def _chain(folder: ModelFolder) -> Chain:
    scheduler, path = folder.scheduler, folder.scheduler_path
    kind = str(scheduler.get("_class_name", "DDPMScheduler"))
    if _OTHER_NOISE.search(kind):
        raise _wrong(path, "_class_name", "a scheduler of betas, such as DDPMScheduler", kind)
    prediction = scheduler["prediction_type"]
    if scheduler.get("predict_epsilon") is False:  # as versions before 0.8 say it
        prediction = "sample"
    if prediction not in _PREDICTIONS:
        raise _wrong(path, "prediction_type", ", ".join(_PREDICTIONS), prediction)
    if scheduler["thresholding"]:
        problem = "dynamic thresholding is not done here; false and clip_sample clip instead"
        raise _wrong(path, "thresholding", "false", scheduler["thresholding"], problem)
    clip_range = scheduler["clip_sample_range"]
    if not _is_number(clip_range) or not 0 < clip_range <= 1000:
        raise _wrong(path, "clip_sample_range", "a number above 0, up to 1000", clip_range)
    variance = _variance(folder)
    betas = _betas(folder)
    known = folder.unet.get("num_train_timesteps")
    if folder.unet["time_embedding_type"] == "learned" and known != len(betas):
        expected = f"{len(betas)}, the steps of the chain, of which each is learned"
        raise _wrong(folder.unet_path, "num_train_timesteps", expected, known)
    if betas[-1] > 1 - 1e-9 and prediction == "epsilon":
        problem = "the last step is noise alone, of which noise as a prediction says nothing"
        raise _wrong(path, "prediction_type", "v_prediction or sample", prediction, problem)
    return Chain(
        betas,
        learn_sigma=variance == "learned_range",
        fixed_small=_VARIANCES[variance],
        predict_xstart=prediction == "sample",
        predict_v=prediction == "v_prediction",
        clip_denoised=bool(scheduler["clip_sample"]),
        clip_range=float(clip_range),
    )


def _variance(folder: ModelFolder) -> str:
    """Return the variance type; one that is not stated is what fits the network's outputs."""
    stated, channels = folder.scheduler["variance_type"], folder.unet["out_channels"]
    variance = stated or ("learned_range" if channels == 6 else "fixed_small")
    path = folder.scheduler_path or folder.unet_path
    if not isinstance(variance, str) or variance not in _VARIANCES:
        raise _wrong(path, "variance_type", ", ".join(_VARIANCES), variance)
    needed = 6 if variance == "learned_range" else 3
    if channels != needed:
        problem = f"contradicts {folder.unet_path}, whose out_channels is {channels}"
        expected = "learned_range" if channels == 6 else "fixed_small or fixed_large"
        raise _wrong(path, "variance_type", expected, variance, problem)
    return variance


def _betas(folder: ModelFolder) -> np.ndarray:
    scheduler, path = folder.scheduler, folder.scheduler_path
    steps, trained = scheduler["num_train_timesteps"], scheduler["trained_betas"]
    if not _is_count(steps, _MOST_STEPS) or steps < 2:
        raise _wrong(path, "num_train_timesteps", f"a number from 2 to {_MOST_STEPS}", steps)
    if trained is not None:
        if not isinstance(trained, list) or not all(_is_number(beta) for beta in trained):
            raise _wrong(path, "trained_betas", "a list of numbers", trained)
        if len(trained) != steps:
            expected = f"{steps} numbers, as num_train_timesteps says"
            raise _wrong(path, "trained_betas", expected, len(trained))
        key, betas = "trained_betas", np.array(trained, dtype=np.float64)
    else:
        for key in ("beta_start", "beta_end"):
            if not _is_number(scheduler[key]) or not 0 <= scheduler[key] <= 1:
                raise _wrong(path, key, "a number from 0 to 1", scheduler[key])
        key, betas = "beta_schedule", _named_betas(folder, steps)
    betas = np.clip(betas, 0, 1).astype(np.float32).astype(np.float64)  # as diffusers keeps them
    if scheduler["rescale_betas_zero_snr"]:
        betas = _rescaled(betas)
    betas = np.minimum(betas, 1 - 1e-15)  # noise alone, but for what no float32 can hold
    if not (np.isfinite(betas).all() and (betas > 0).all()):
        raise _wrong(path, key, "betas between 0 and 1", scheduler[key])
    return betas


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300  # neither NaN nor infinite, nor too large for a float


def _named_betas(folder: ModelFolder, steps: int) -> np.ndarray:
    scheduler = folder.scheduler
    name, start, end = (scheduler[key] for key in ("beta_schedule", "beta_start", "beta_end"))
    if name == "linear":
        return np.linspace(start, end, steps)
    if name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if name == "squaredcos_cap_v2":
        u = np.arange(steps + 1) / steps
        alphas_cumprod = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    if name == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    expected = "linear, scaled_linear, squaredcos_cap_v2, sigmoid, or trained_betas"
    raise _wrong(folder.scheduler_path, "beta_schedule", expected, name)


def _rescaled(betas: np.ndarray) -> np.ndarray:
    """Shift and scale a chain so that its last step is noise alone (Lin et al. 2023, Algorithm 1).

    The first step stays as it is.
    """
    signal = np.sqrt(np.cumprod(1 - betas))
    first, last = signal[0], signal[-1]
    alphas_cumprod = ((signal - last) * first / (first - last)) ** 2
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def _noise_name(folder: ModelFolder) -> str:
    """Name the chain as ``noise_schedule`` does, or in diffusers' words where it is another."""
    scheduler = folder.scheduler
    if scheduler["trained_betas"] is not None:
        return "trained_betas"
    name, start, end = (scheduler[key] for key in ("beta_schedule", "beta_start", "beta_end"))
    if scheduler["rescale_betas_zero_snr"]:
        return f"{name} with rescale_betas_zero_snr"
    if name == "squaredcos_cap_v2":
        return "cosine"
    scale = 1000 / scheduler["num_train_timesteps"]
    if name == "linear" and np.allclose((start, end), (scale * 1e-4, scale * 0.02), rtol=1e-6):
        return "linear"
    return f"{name} from {start:g} to {end:g}"


# ---- Following a folder --------------------------------------------------------------------------


def follow_folder(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration's tree with the keys that its model folder decides.

    A tree whose ``model_path`` is no folder is returned as it is. Raises UserError as
    ``read_folder``, and for a stated key that contradicts the folder, naming both values.
    """
    path = tree.get("model_path")
    path = os.path.expanduser(path) if isinstance(path, str) else path  # noqa: PTH111 - text
    if not is_folder(path):
        return tree
    folder = read_folder(path)
    keys = folder.keys()
    network_keys = folder.network_keys()
    for key, value in {**keys, **network_keys}.items():
        stated = tree.get(key)
        if stated not in (None, "") and _plain(stated) != _plain(value):
            said = json.dumps(value)
            raise UserError(
                f"contradicts the folder {path}; leave the key out and it follows the folder",
                key=key,
                expected=said.strip('"'),
                got=json.dumps(stated, default=str)[:80].strip('"'),
            )
    stated_side = tree.get("image_size")
    if "image_size" not in keys and isinstance(stated_side, int):
        check_side(folder, stated_side)
    tree = {key: value for key, value in tree.items() if key not in network_keys}
    return {**tree, **keys, **_short_walk(tree, len(folder.chain.betas))}


def _short_walk(tree: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the keys of a walk over a whole chain of few steps, where none is stated."""
    walk = tree.get("schedule_jump_params") or {}
    is_stated = tree.get("timestep_respacing") is not None
    if steps >= USUAL_STEPS or is_stated or not isinstance(walk, Mapping) or "t_T" in walk:
        return {}
    return {"timestep_respacing": str(steps), "schedule_jump_params": {**walk, "t_T": steps}}


def _plain(value: object) -> object:
    """Make values comparable that YAML may write in several ways."""
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    texts = [str(item).strip().lower() for item in items]
    try:
        return sorted(float(text) for text in texts if text)
    except ValueError:
        return texts


# ---- The hub -------------------------------------------------------------------------------------


def _on_disk(name: str) -> Path:
    """Return the folder of ``name``; of the hub its configuration files are fetched."""
    if not name.startswith(HUB):
        return Path(name)
    return _fetched(name, ["*.json"])


def fetch_weights(folder: ModelFolder) -> list[Path]:
    """Return the files of weights, fetched from the hub if need be; raises UserError."""
    if not folder.name.startswith(HUB):
        return folder.weights
    try:
        return folder.weights
    except UserError:  # the configuration is there alone
        pass
    name = folder.unet_path.parent.name
    part = f"{name}/" if name in ("unet", "unet_ema") else ""
    for suffix in ("safetensors", "bin"):
        _fetched(folder.name, ["*.json", f"{part}{_WEIGHTS}*.{suffix}"], online=True)
        try:
            return _weights(folder.unet_path.parent, folder.name)
        except UserError as error:
            missing = error
    raise missing


def _fetched(name: str, patterns: list[str], *, online: bool = False) -> Path:
    """Return the hub's folder in its usual cache; what is there already is not asked for again."""
    match = _HUB_NAME.fullmatch(name)
    if not match:
        raise UserError(path=name[:100], expected="hf://owner/name")
    repository, revision = match.groups()
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"needs huggingface_hub: {NEEDS}", path=name) from None
    if not online:
        try:
            root = Path(snapshot_download(repository, revision=revision, local_files_only=True))
            if any(root.glob("**/config.json")):
                return root
        except Exception:  # it is not there yet, which the hub's library tells in many ways
            pass
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of networks its library tells by a dozen types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        directory = repository.partition("/")[2]
        raise UserError(
            f"cannot be fetched ({lines[0][:160]}); on a machine with network: hf download "
            f"{repository} --local-dir {directory}, then state that folder as model_path",
            path=name,
        ) from error
