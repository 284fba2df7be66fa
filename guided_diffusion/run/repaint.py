"""The library: pictures in Python. ``from guided_diffusion import RePaint``; see docs/python.md."""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from guided_diffusion.config.checkpoint_flags import model_flags
from guided_diffusion.config.keys import FAST, DataConf, InpaintConf
from guided_diffusion.config.reading import read_yaml
from guided_diffusion.config.schema import conf_from_dict, conf_to_dict, keys_of
from guided_diffusion.dist_util import is_out_of_memory
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import ALPHA, Pair, sample_names
from guided_diffusion.io.checkpoints import state_dict_shapes
from guided_diffusion.masks import FAMILIES
from guided_diffusion.models.follow import is_folder, is_lucidrains
from guided_diffusion.models.hub import fetch_configuration
from guided_diffusion.run.checks import check_pictures
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.run.plan import checkpoints_of
from guided_diffusion.run.sampling import Observer, Sampling
from guided_diffusion.run.task import Job, make_job
from guided_diffusion.script_util import check_network, create_gaussian_diffusion, create_schedule

Picture: TypeAlias = Image.Image | np.ndarray | str | os.PathLike


class RePaint:
    """Inpaints pictures with the networks of one configuration, which are loaded once.

    ``source`` is a YAML of test.py, a checkpoint, a folder of diffusers, or a configuration;
    ``keys`` are YAML keys that replace those of ``source``. Raises UserError for a file, key or
    device that cannot be used. Nothing is printed, and no setting of the process is changed.
    """

    def __init__(self, source: str | os.PathLike | InpaintConf, **keys: Any) -> None:
        self.conf = _read_conf(source, keys)
        if fetch_configuration(self.conf.model_path):  # of a model on the hub
            self.conf = _read_conf(source, keys)
        if not isinstance(source, InpaintConf):  # else the plan of a run has checked it
            create_schedule(self.conf, create_gaussian_diffusion(self.conf))
            for path in checkpoints_of(self.conf).values():
                check_network(path)
        try:
            self.inpainter = Inpainter(self.conf, [])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = "the network does not fit into memory"
            raise UserError(problem, path=self.conf.model_path, key="device") from error

    def __call__(
        self,
        pictures: Picture | Sequence[Picture],
        masks: Picture | Sequence[Picture],
        *,
        seed: int | torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        fast: bool = False,
        progress: Observer | None = None,
        **keys: Any,
    ) -> Any:
        """Return ``pictures`` with what ``masks`` leave open made anew, each as its picture came.

        Args:
            pictures: one picture or several: Pillow images, arrays uint8 (H, W, 3) or (H, W), or
                paths of files. An array comes back as an array, everything else as an image.
            masks: one for all pictures, or one for each: images or paths, white is known; arrays
                (H, W) or (H, W, 3), uint8 or bool, where 255 or True is known; or the name of a
                family of masks that are drawn, such as "thick"; or "alpha".
            seed: of the first picture; picture k uses seed + k, as in test.py. A generator draws
                one. Absent: the seed of the configuration, or one drawn at random.
            seeds: in place of ``seed`` one for each picture.
            fast: as ``--fast``: few network calls, by DDNM.
            progress: called after each network call with its number in the walk, from 1, and with x
                and the predicted pictures, tensors (N, C, S, S) in [-1, 1]. Where it returns True
                the walk ends with that prediction; what it raises passes through.
            keys: YAML keys of this call, such as ``full_size=True``. Those that describe a network
                belong to the constructor.

        One picture gives one result, a sequence a list of them. Where the call says
        ``samples_per_image``, and more than 1, the result of each picture is a list. Raises
        UserError for a picture, a mask or a key that cannot be used, and where a result has no
        finite numbers.
        """
        is_one = not isinstance(pictures, list | tuple)
        pictures = [pictures] if is_one else list(pictures)
        conf = self.with_keys({"samples_per_image": 1, **(FAST if fast else {}), **keys})
        jobs = _jobs(conf, pictures, masks, _seeds(conf, len(pictures), seed, seeds))
        times = create_schedule(conf, create_gaussian_diffusion(conf))
        sampling = Sampling(self.inpainter.with_walk(conf, times), conf.data.batch_size, progress)
        made = [each for batch in sampling.make(jobs) for each in batch]
        if problems := [f"{each.job.name}: {each.problem}" for each in made if each.problem]:
            raise UserError("; ".join(problems))
        count, answers = conf.samples_per_image, []
        for k, picture in enumerate(pictures):
            samples = made[k * count : (k + 1) * count]
            results = [_like(picture, each.result(conf)[0]) for each in samples]
            answers.append(results[0] if count == 1 else results)
        return answers[0] if is_one else answers

    def with_keys(self, keys: Mapping[str, Any]) -> InpaintConf:
        """Return the configuration with other ``keys``; UserError for one of the networks."""
        conf = _with_keys(conf_to_dict(self.conf), keys) if keys else self.conf
        for name, value in conf.network.items():
            if value != self.conf.network[name]:
                problem = "belongs to the networks, which are loaded: make another RePaint"
                raise UserError(problem, key=name)
        return conf


# ---- Pictures ------------------------------------------------------------------------------------


def _seeds(
    conf: InpaintConf, count: int, seed: int | torch.Generator | None, seeds: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Return for each picture the seed of the run that it belongs to, and its place in that run."""
    if seeds is not None:
        if seed is not None or len(seeds) != count:
            expected = f"{count} seeds, one for each picture, and no seed beside them"
            raise UserError(key="seeds", expected=expected, got=f"{len(seeds)} and seed: {seed}")
        return [(each, 0) for each in seeds]
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**31, (), generator=seed, device=seed.device))
    if seed is None:
        seed = secrets.randbelow(2**31) if conf.seed is None else conf.seed
    return [(seed, k) for k in range(count)]


def _jobs(
    conf: InpaintConf, pictures: Sequence[Picture], masks: Any, seeds: Sequence[tuple[int, int]]
) -> list[Job]:
    """Return a job for each sample of each picture, checked as a run of test.py checks them."""
    masks = list(masks) if isinstance(masks, list | tuple) else [masks] * len(pictures)
    if not pictures or len(masks) != len(pictures):
        expected = "one picture or more, and one mask for all or one for each"
        raise UserError(expected=expected, got=f"{len(pictures)} pictures and {len(masks)} masks")
    pairs = []
    for k, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        is_drawn = isinstance(mask, str) and mask in (*FAMILIES, ALPHA)
        mask = mask if is_drawn else _image(mask, f"mask {k}")
        pairs.append(Pair(seeds[k][1], _image(picture, f"picture {k}"), mask, f"{k}.png", is_drawn))
    for seed, _ in seeds:
        _with_keys(conf_to_dict(conf), {"seed": seed})  # raises for what is no seed
    check_pictures(conf, pairs, [seed for seed, _ in seeds])
    return [
        make_job(seed, pair, name, number)
        for (seed, _), pair in zip(seeds, pairs, strict=True)
        for number, name in enumerate(sample_names(pair.name, conf.samples_per_image))
    ]


def _image(value: Any, name: str) -> Image.Image | str:
    """Return a picture or mask as Pillow's image, or as the path that it is."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    array = np.asarray(value)
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    is_gray = array.ndim == 2 and array.dtype in (np.uint8, np.uint16, np.float32)
    is_colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (is_gray or is_colour) or not array.size:
        expected = "uint8 (H, W, 3), or uint8, uint16, float32 or bool (H, W)"
        raise UserError(key=name, expected=expected, got=f"{array.dtype} {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _like(picture: Picture, result: np.ndarray | Image.Image) -> np.ndarray | Image.Image:
    """Return a result as an array where its picture is one, else as an image."""
    if isinstance(result, np.ndarray) and result.shape[2:] == (1,):
        result = result[:, :, 0]
    if not isinstance(picture, np.ndarray):
        return Image.fromarray(result) if isinstance(result, np.ndarray) else result
    array = np.asarray(result)
    return array[:, :, None] if picture.shape[2:] == (1,) and array.ndim == 2 else array


# ---- Configurations ------------------------------------------------------------------------------


def _read_conf(source: str | os.PathLike | InpaintConf, keys: Mapping[str, Any]) -> InpaintConf:
    if isinstance(source, InpaintConf):
        return _with_keys(conf_to_dict(source), keys) if keys else source
    path = os.path.expanduser(source)  # noqa: PTH111 - messages name the path as it was written
    if Path(path).suffix.lower() in (".yml", ".yaml"):
        return _with_keys(read_yaml(path), keys, path)
    tree: dict[str, Any] = {"name": "python", "model_path": path}
    if not is_folder(path) and not is_lucidrains(path):  # those say it themselves
        flags = model_flags(state_dict_shapes(path), keys.get("image_size", 256))
        tree |= {key: sorted(v)[::-1] if isinstance(v, set) else v for key, v in flags.items()}
    return _with_keys(tree, keys, path)


def _with_keys(tree: Any, keys: Mapping[str, Any], source: object = None) -> InpaintConf:
    """Return a configuration with ``keys`` in the place of the tree's; pictures come otherwise."""
    if not isinstance(tree, dict):
        raise UserError(path=source, expected="keys and values", got=type(tree).__name__)
    [(name, data), *_] = (tree.get("data") or {"eval": {"python": {}}})["eval"].items()
    data = {**data, "gt_path": "given", "mask_path": "given"}
    tree = {**tree, "data": {"eval": {name: data}}}
    for key, value in keys.items():
        place = data if key in keys_of(DataConf) and key not in keys_of(InpaintConf) else tree
        place[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return conf_from_dict(tree, InpaintConf, source)
