"""TRAIN: the pictures of each step, read by processes beside the training.

What a step sees hangs on the seed and the step's number alone: not on how many processes read, nor
on what is in memory.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.dist_util import is_main, local_world_size, rank, world_size
from guided_diffusion.errors import UserError
from guided_diffusion.training.checkpoints import check_classes, last_saved
from guided_diffusion.training.pictures import TrainingImages, list_of_bad
from guided_diffusion.training.timesteps import CUT, batch_indices, generator
from guided_diffusion.training.trainer import share

Tensor = torch.Tensor
# More readers than this wait for the disk, or compete with the training on a CPU.
MOST_READERS = 4
# How torch begins to say that a reader is dead; it tells otherwise of what a reader raises.
_DEAD = "DataLoader worker (pid"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def load_images(conf: TrainConf) -> TrainingImages:
    """Find the pictures, and read as many of this process's share as its memory may hold."""
    images = TrainingImages(
        conf.data_dir,
        conf.image_size,
        class_cond=conf.class_cond,
        random_crop=conf.random_crop,
        random_flip=conf.random_flip,
        holdout=conf.holdout,
        cache_bytes=int(conf.cache_gb * 2**30 / local_world_size()),
        share=slice(rank(), None, world_size()),
        depth=conf.depth,
        all_formats=conf.all_formats,
        show_progress=is_main(),
    )
    check_classes(conf, images)
    return images


def readers_for(images: TrainingImages) -> int:
    """Return how many processes are to read pictures; 0 where there is next to nothing to do.

    They are forked, so that they share the pictures in memory. Where forking is not safe (macOS)
    or not known (Windows), the training reads its pictures itself.
    """
    if (images.is_all_in_memory and not images.random_crop) or sys.platform != "linux":
        return 0
    cores = len(os.sched_getaffinity(0)) // local_world_size()
    return max(1, min(MOST_READERS, cores - 1))


class _Steps(Dataset):
    """This process's part of each step's batch, by the step's number.

    An item has the pictures, uint8 (n, 3, S, S), or None where too many are bad; labels, int64 (n,)
    or None; and the reasons why pictures could not be read so far, by index. Arrays are handed
    over through a pipe: the shared memory that tensors would take is short in containers.
    """

    def __init__(self, images: TrainingImages, conf: TrainConf) -> None:
        self.images, self.conf = images, conf

    def __getitem__(
        self, step: int
    ) -> tuple[np.ndarray | None, np.ndarray | None, dict[int, UserError]]:
        images, conf, mine = self.images, self.conf, share(self.conf.batch_size)
        chosen = batch_indices(len(images.train), step, conf.batch_size, conf.seed)[mine]
        rng = generator(conf.seed, CUT, step)
        rng.random((mine.start, 4))  # the cuts of the processes before this one
        try:
            pixels, labels = images.batch(images.train[chosen], rng)
        except UserError:
            return None, None, images.bad
        return pixels.numpy(), None if labels is None else labels.numpy(), images.bad


def _prepare_reader(number: int) -> None:
    """Leave signals to the training, which ends its readers itself, and end when it is killed.

    Otherwise a reader whose pictures nobody takes any more would wait for ever.
    """
    del number
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nothing does this
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def batches(
    images: TrainingImages, conf: TrainConf, steps: range, readers: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield this process's part of each step's batch; ``readers`` processes read ahead.

    Pictures are uint8 (n, 3, S, S), labels int64 (n,) or None. A picture that cannot be read any
    more is replaced by the next, with a warning. Raises UserError where more of them than
    ``TrainingImages.most_bad`` are bad.
    """
    readers = readers_for(images) if readers is None else readers
    images.divide_memory(max(1, readers))
    loader = DataLoader(
        _Steps(images, conf),
        batch_size=None,
        sampler=steps,
        num_workers=readers,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare_reader,
        multiprocessing_context="fork" if readers else None,
        generator=torch.Generator(),  # its own, so that the training's is left alone
    )
    told: set[int] = set()
    for pixels, labels, bad in _told_of_dead_readers(loader, conf):
        for index in bad.keys() - told:
            warnings.warn(f"{bad[index]}; another picture takes its place", stacklevel=2)
            told.add(index)
        if pixels is None or len(told) > images.most_bad:
            raise UserError(
                f"too many pictures cannot be read any more: {list_of_bad(list(bad.values()))}; "
                f"{last_saved(conf)}",
                path=conf.data_dir,
                expected=f"at most {images.most_bad} of {len(images.train)}",
                got=len(bad),
            )
        yield torch.from_numpy(pixels), None if labels is None else torch.from_numpy(labels)


def _told_of_dead_readers(loader: DataLoader, conf: TrainConf) -> Iterator[tuple]:
    """Yield the loader's items; raises UserError where the system ended a reader."""
    items = _items(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if _DEAD not in str(error):
                raise
            raise UserError(
                "a process that reads pictures was killed, perhaps because memory is short; lower "
                f"it, and go on with --resume; {last_saved(conf)}",
                key="cache_gb",
            ) from error
        yield item


def _items(loader: DataLoader) -> Iterator[tuple]:
    """Yield the loader's items; RuntimeError where a reader is dead, but only while one is awaited.

    torch raises wherever the news finds the main thread: within a step, or a checkpoint.
    """
    others = set(multiprocessing.active_children())
    items, is_awaited = iter(loader), False
    readers = set(multiprocessing.active_children()) - others

    def look(*_: object) -> None:
        if is_awaited and any(reader.exitcode for reader in readers):
            raise RuntimeError(f"{_DEAD} unknown) is dead")

    with _on_ended_process(look) if readers else contextlib.nullcontext():
        try:
            while True:
                is_awaited = True
                look()
                item = next(items, None)
                is_awaited = False
                if item is None:
                    return
                yield item
        finally:
            is_awaited = False
            if readers:
                items._shutdown_workers()  # now, though a traceback may hold them
            for reader in readers:
                reader.kill()  # one that did not end in time: it ignores what torch sends


@contextlib.contextmanager
def _on_ended_process(handler: Callable[..., None]) -> Iterator[None]:
    """Call ``handler`` when a child ends; only the main thread is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, earlier)


def _as_it_is(item: tuple) -> tuple:
    return item
