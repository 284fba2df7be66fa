"""The work of a run: a plan lists jobs, and a job takes tasks.

A result is a job. A job takes one task, the square that the network sees; with full_size it takes
one task for each cut of the photo. All results hang on their seed and their picture alone, so jobs
may be divided in any way: into batches, over processes, and again after an interruption.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.image_datasets import Pair, Photo, ReadOptions, load_pair, load_photo
from guided_diffusion.io.files import FileStamp
from guided_diffusion.io.images import memory_to_read
from guided_diffusion.run import full_size
from guided_diffusion.run.windows import window_places
from guided_diffusion.scheduler import count_steps

SAMPLE_SEED_STRIDE = 1_000_003  # sample j of image k: seed + k + j · this, so that none coincide


@dataclass(frozen=True)
class Picture:
    """An image and its mask as results keep them: pixels (H, W, C), 255 = known in the mask.

    ``photo`` is the photo that they come from, with full_size.
    """

    pixels: np.ndarray
    mask: np.ndarray
    photo: Photo | None = None


@dataclass(frozen=True, eq=False)  # two pictures may have equal tasks
class Task:
    """One walk of the network: over the square of a picture, or over one cut of a photo."""

    seed: int
    side: int  # of the square that walks, in pixels
    cut: full_size.Cut | None = None  # where it lies in the photo, with full_size
    windows: int = 0  # so many windows, batch_size at once, predict its square; 0: one call does

    def inputs(self, picture: Picture) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels and mask that the network sees of ``picture``, each (side, side, C)."""
        if self.cut is None:
            return picture.pixels, picture.mask
        return full_size.cut_out(picture.pixels, picture.photo.known, self.cut, self.side)


@dataclass(frozen=True)
class Job:
    """One result to make: a sample of an image."""

    pair: Pair
    name: str  # of its file
    seed: int  # of its noise
    mask_seed: int  # of its mask, where that is drawn


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    conf: InpaintConf  # with its seed
    times: list[int]
    jobs: list[Job]  # all of the run
    todo: list[Job]  # without those that an earlier run has finished
    tasks: dict[int, Sequence[Task]]  # of each picture by its index, in the main process
    checkpoints: dict[str, str]  # the fingerprint of each, by its YAML key
    stamps: dict[str, FileStamp]  # their size, time and inode before they were read, by path
    settings: dict[str, str]  # all that results depend on, but for seeds and pictures
    earlier: dict[str, Any]  # the notes in the record of the run that is resumed

    @property
    def steps(self) -> int:
        """How often one walk calls the network."""
        return count_steps(self.times)[0]

    def network_calls(self, jobs: Sequence[Job]) -> int:
        """Return how often ``jobs`` call the network at most, in the main process."""
        calls, size = 0, self.conf.data.batch_size
        for start in range(0, len(jobs), size):
            indices = [job.pair.index for job in jobs[start : start + size]]
            together = [task for index in indices for task in self.tasks[index]]
            calls += sum(max(1, -(-some[0].windows // size)) for some in batches(together, size))
        return calls * self.steps


def make_job(seed: int, pair: Pair, name: str, number: int) -> Job:
    """Return the job of sample ``number``, from 0, of an image in a run with ``seed``."""
    return Job(pair, name, seed + pair.index + number * SAMPLE_SEED_STRIDE, seed)


def tasks_of(conf: InpaintConf, photo: Photo | None, seed: int) -> tuple[Task, ...]:
    """Return the tasks of a job with ``seed``; ``photo`` is its picture, with full_size."""
    size = conf.image_size
    if photo is None:
        return (Task(seed, size),)
    tasks = []
    for number, cut in enumerate(full_size.find_cuts(photo.known, size)):
        side, windows = size, 0
        if conf.windows:
            side = max(cut.side, size)
            known = full_size.known_in(photo.known, cut) == 255
            windows = len(window_places(known, size)) if cut.side > size else 1
        tasks.append(Task(seed + number * full_size.CUT_SEED_STRIDE, side, cut, windows))
    return tuple(tasks)


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


def bytes_to_load(conf: InpaintConf, pairs: Iterable[Pair]) -> int:
    """Return how many bytes ``load_picture`` takes at most, by the headers of the files."""
    if conf.full_size:
        return 1 << 40  # a photo may fill the memory: it is read alone
    return memory_to_read(
        [source for pair in pairs for source in (pair.gt_path, pair.mask_file) if source],
        conf.show_progress,
    )


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
