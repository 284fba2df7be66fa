"""One piece of work: what the network works on, how many calls it takes, how it is put back.

A result is a job. A job takes one task, the square that the network sees; with full_size it takes
one task for each cut of the photo. All results hang on their seed and their picture alone, so jobs
may be divided in any way: into batches, over processes, and again after an interruption.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.image_datasets import Pair, Photo, ReadOptions, load_pair, load_photo
from guided_diffusion.run.full_size import CUT_SEED_STRIDE, Cut, cut_out, find_cuts, known_in, paste
from guided_diffusion.run.windows import window_places

Item = TypeVar("Item")
SAMPLE_SEED_STRIDE = 1_000_003  # sample j of image k: seed + k + j · this, so that none coincide


@dataclass(frozen=True)
class Picture:
    """An image and its mask as results keep them: pixels (H, W, C), 255 = known in the mask.

    ``photo`` is the photo that they come from, with full_size.
    """

    pixels: np.ndarray
    mask: np.ndarray
    photo: Photo | None = None


@dataclass(frozen=True)
class Task:
    """One walk of the network: over the square of a picture, or over one cut of a photo."""

    seed: int
    side: int  # of the square that walks, in pixels
    cut: Cut | None = None  # where it lies in the photo, with full_size
    windows: int = 0  # so many windows, batch_size at once, predict its square; 0: one call does

    def inputs(self, picture: Picture) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels and mask that the network sees of ``picture``, each (side, side, C)."""
        if self.cut is None:
            return picture.pixels, picture.mask
        return cut_out(picture.pixels, picture.photo.known, self.cut, self.side)


@dataclass(frozen=True)
class Job:
    """One result to make: a sample of an image."""

    pair: Pair
    name: str  # of its file
    seed: int  # of its noise
    mask_seed: int  # of its mask, where that is drawn
    tasks: tuple[Task, ...]


def tasks_of(conf: InpaintConf, photo: Photo | None) -> tuple[Task, ...]:
    """Return the tasks of a picture, with the seeds that a job of seed 0 has."""
    size = conf.image_size
    if photo is None:
        return (Task(0, size),)
    tasks = []
    for number, cut in enumerate(find_cuts(photo.known, size)):
        task = Task(number * CUT_SEED_STRIDE, size, cut)
        if conf.windows:
            is_larger = cut.side > size
            known = known_in(photo.known, cut) == 255
            count = len(window_places(known, size)) if is_larger else 1
            task = dataclasses.replace(task, side=max(cut.side, size), windows=count)
        tasks.append(task)
    return tuple(tasks)


def make_job(conf: InpaintConf, pair: Pair, name: str, number: int, tasks: Sequence[Task]) -> Job:
    """Return the job of sample ``number``, from 0, of an image whose tasks are ``tasks``."""
    seed = conf.seed + pair.index + number * SAMPLE_SEED_STRIDE
    seeded = tuple(dataclasses.replace(task, seed=seed + task.seed) for task in tasks)
    return Job(pair, name, seed, conf.seed, seeded)


def load_picture(conf: InpaintConf, pair: Pair, mask_seed: int) -> Picture:
    """Read an image and its mask: as the square that the network sees, or whole with full_size.

    A square is mirrored where ``random_flip`` says so. Raises UserError naming the file.
    """
    options = read_options(conf, mask_seed)
    if conf.full_size:
        photo = load_photo(pair, options)
        mask = np.broadcast_to(photo.known[:, :, None], photo.pixels.shape)
        return Picture(photo.pixels, mask, photo)
    flip = False
    if conf.data.random_flip:
        generator = torch.Generator().manual_seed(mask_seed + pair.index)
        flip = bool(torch.rand((), generator=generator) < 0.5)
    pixels, mask = load_pair(pair, conf.image_size, options, flip=flip)
    return Picture(pixels, mask)


def read_options(conf: InpaintConf, mask_seed: int) -> ReadOptions:
    """Return how the pictures and masks of a run are read."""
    return ReadOptions(
        channels=conf.in_channels,
        depth=conf.depth,
        invert_mask=conf.invert_mask,
        mask_hole=None if conf.mask_hole == "black" else conf.mask_hole,
        mask_grow=conf.mask_grow,
        mask_hard=conf.mask_hard,
        seed=mask_seed,
    )


def put_together(
    picture: Picture, parts: Sequence[tuple[Task, np.ndarray]], feather: int
) -> np.ndarray | Image.Image:
    """Return a result: the square that was made, or the photo with what was made of its cuts.

    ``parts`` are tasks with what was made of each, uint8 (side, side, C). A photo comes as an image
    in its own mode.
    """
    if picture.photo is None:
        [(_, sample)] = parts
        return sample
    pixels = picture.pixels.copy()
    for task, sample in parts:
        paste(pixels, picture.photo.known, task.cut, sample, feather)
    return picture.photo.image_of(pixels)


# ---- Batches -------------------------------------------------------------------------------------


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield ``items`` in order, up to ``size`` at once."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def batches(tasks: Sequence[Task], batch_size: int) -> Iterator[Sequence[Task]]:
    """Yield tasks that go through the network together; one of windows goes alone."""
    together: list[Task] = []
    for task in tasks:
        if together and (task.windows or together[0].windows or len(together) == batch_size):
            yield together
            together = []
        together.append(task)
    if together:
        yield together


def network_calls(jobs: Sequence[Job], batch_size: int, steps: int) -> int:
    """Return how often jobs call the network, where a walk predicts ``steps`` times."""
    calls = 0
    for some in chunks(jobs, batch_size):
        for batch in batches([task for job in some for task in job.tasks], batch_size):
            calls += max(1, -(-batch[0].windows // batch_size))
    return calls * steps
