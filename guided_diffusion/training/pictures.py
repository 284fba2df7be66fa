"""TRAIN: the pictures below a folder, and each step's batch, cut by threads beside the training.

What a step sees depends on the seed and the number of the step alone: not on the number of threads
or processes, nor on which pictures are in memory.
"""

import collections
import hashlib
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from PIL import Image

from guided_diffusion.cli import place
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.dist_util import is_main, rank, world_size
from guided_diffusion.errors import UserError, printable
from guided_diffusion.io.colours import to_gray, to_srgb
from guided_diffusion.io.images import (
    Header,
    center_crop,
    read_header,
    read_rgb,
    read_upright,
    scale_short_side,
)
from guided_diffusion.io.limits import in_threads, threads_within
from guided_diffusion.io.listing import list_images
from guided_diffusion.io.notes import notes_on_picture, warn_of_kinds
from guided_diffusion.io.results import as_image
from guided_diffusion.training.timesteps import CUT, batch_indices, generator
from guided_diffusion.training.trainer import share

Tensor = torch.Tensor
THREADS = 4  # that cut batches: more would wait for the disk, or slow a training on a CPU
# A random crop shows at least this share of the short side: the field's usual augmentation.
_SMALLEST_CROP = 0.8
_MOST_BAD = 0.01  # share of the pictures that may become unreadable; one always may
_NAMED = 5  # things that a message names; it counts the others


class TrainingImages:
    """The pictures of a training, cut anew for every batch.

    ``names`` are the files relative to ``data_dir``, in sorted order. ``paths`` has the file of
    each picture: with ``all_frames`` a file gives as many pictures as it has frames. With
    ``class_cond`` ``labels`` are int64 (N,) into ``class_names``, else None; ``recorded_classes``
    are those of a training that goes on. ``train`` and ``held_out`` are the indices of the pictures
    whose files ``split_by_name`` puts there.

    At the start this process reads the headers of its share of the pictures, and decodes those for
    which ``cache_gb`` has room. Raises UserError naming the bad ones. A picture that becomes
    unreadable later is noted in ``bad``, and the next one takes its place. Decoding a picture
    takes up to ``memory`` bytes.
    """

    def __init__(self, conf: TrainConf, recorded_classes: Sequence[str] = ()) -> None:
        self.conf = conf
        files = list_images(conf.data_dir, key="data_dir", all_formats=conf.all_formats)
        self.names = names_below(conf.data_dir, files)
        self.class_names, self.labels = list(recorded_classes), None
        headers = self._headers(files)
        self.memory = max((h.memory for h in headers if isinstance(h, Header)), default=0)
        frames = [h.frames if isinstance(h, Header) and conf.all_frames else [0] for h in headers]
        file_of = np.repeat(np.arange(len(files)), [len(numbers) for numbers in frames])
        self.paths = [files[number] for number in file_of]
        self.frames = [frame for numbers in frames for frame in numbers]
        if conf.class_cond:
            self.labels = self._labels(files)[file_of]
        train, held_out = split_by_name(self.names, conf.holdout)
        self.train = np.flatnonzero(np.isin(file_of, train))
        self.held_out = np.flatnonzero(np.isin(file_of, held_out))
        self.bad: dict[int, UserError] = {}
        self._cache: dict[int, np.ndarray] = {}
        self._free_bytes = int(conf.cache_gb * 2**30 / place().local_world_size)
        self._lock = threading.Lock()
        self._check([headers[number] for number in file_of])

    def __len__(self) -> int:
        return len(self.paths)

    def batch(
        self, indices: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Cut the pictures ``indices``: levels (N, C, S, S), with int64 labels (N,) or None.

        Levels are uint8, or float32 in [0, 255] where a gray picture has 16 bits. Every picture
        takes four numbers from ``rng`` whatever the settings, so that the cut depends on the
        generator alone. Raises UserError where too many pictures have become unreadable.
        """
        draws = rng.random((len(indices), 4))
        found = [self._readable(int(index)) for index in indices]
        crops = [
            self._augment(pixels, draw) for (_, pixels), draw in zip(found, draws, strict=True)
        ]
        levels = [crop if crop.dtype == np.uint8 else np.float32(crop / 257) for crop in crops]
        images = torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2).contiguous()
        used = [index for index, _ in found]
        labels = None if self.labels is None else torch.from_numpy(self.labels[used])
        return images, labels

    def middle(self, index: int) -> np.ndarray:
        """Return the middle crop of a picture, uint8 or uint16 (S, S, C)."""
        return center_crop(self._read(index), self.conf.image_size, self.paths[index])

    def _readable(self, index: int) -> tuple[int, np.ndarray]:
        """Return picture ``index``, or the next of the same side of the split that can be read."""
        while index not in self._cache:
            if index not in self.bad:
                try:
                    pixels = self._scale(index, self._read(index))
                except UserError as error:
                    self._note_bad(index, error)
                else:
                    self._keep(index, pixels)
                    return index, pixels
            side = self.train if index in self.train else self.held_out
            index = int(side[(np.searchsorted(side, index) + 1) % len(side)])
        return index, self._cache[index]

    def _note_bad(self, index: int, error: UserError) -> None:
        """Warn of a picture that has become unreadable; raise UserError if there are too many."""
        with self._lock:
            is_new = index not in self.bad
            self.bad[index] = error
        most = max(1, int(_MOST_BAD * len(self.train)))
        if len(self.bad) > most:
            listed = first_of(self.bad.values(), "; ")
            problem = f"too many pictures have become unreadable: {listed}"
            expected, got = f"at most {most} of {len(self.train)}", len(self.bad)
            raise UserError(problem, path=self.conf.data_dir, expected=expected, got=got)
        if is_new:
            warnings.warn(f"{error}; another takes its place", stacklevel=2)

    def _labels(self, files: Sequence[str]) -> np.ndarray:
        """Return each file's label, its first-level subfolder, and determine the order of these."""
        conf = self.conf
        for path, name in zip(files, self.names, strict=True):
            if "/" not in name:
                problem = "with class_cond each picture must lie in a subfolder, one for each class"
                raise UserError(problem, path=path)
        folders, number = sorted({name.split("/", 1)[0] for name in self.names}), conf.num_classes
        if len(folders) != number:
            problem = f"{conf.data_dir} has another number of subfolders, one for each class"
            raise UserError(problem, key="num_classes", expected=len(folders), got=number)
        if not self.class_names:
            are_numbers = all(name.isdecimal() for name in folders)
            self.class_names = sorted(folders, key=int) if are_numbers else folders
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = [numbers[name.split("/", 1)[0]] for name in self.names]
        return np.array(labels, dtype=np.int64)

    def _headers(self, files: Sequence[str]) -> list[Header | UserError | None]:
        """Read the headers of this process's share, or of all where frames have to be counted."""
        share = slice(None) if self.conf.all_frames else slice(rank(), None, world_size())
        headers: list[Header | UserError | None] = [None] * len(files)
        headers[share] = in_threads(_header, files[share], "looking at pictures", is_main())
        return headers

    def _check(self, headers: Sequence[Header | UserError | None]) -> None:
        """Raise UserError naming the bad pictures of this process's share; warn of odd ones.

        ``headers`` are those of all pictures.
        """
        chosen = range(len(headers))[rank() :: world_size()]
        items = [(index, headers[index]) for index in chosen]
        looks = in_threads(self._look, items, "reading pictures", is_main(), memory=self.memory)
        bad = [look for look in looks if isinstance(look, UserError)]
        if bad:
            listed = first_of(bad, "; ")
            counted = UserError(f"{len(bad)} of {len(looks)} pictures are bad: {listed}")
            raise bad[0] if len(bad) == 1 else counted
        size = self.conf.image_size
        if small := sum(min(headers[index].size) < size for index in chosen):
            text = f"{small} of {len(looks)} pictures are smaller than {size} pixels"
            hint = "which teaches the network their blur"
            warnings.warn(f"{text} and are enlarged, {hint}", stacklevel=3)
        warn_of_kinds(
            (self.paths[index], note)
            for index, notes in zip(chosen, looks, strict=True)
            for note in notes
        )

    def _look(self, item: tuple[int, Header | UserError]) -> list[str] | UserError:
        """Return what is odd about a picture; decode it if there is room."""
        index, header = item
        if isinstance(header, UserError):
            return header
        notes: list[str] = []
        if len(header.frames) > 1 and not self.conf.all_frames:
            count = len(header.frames)
            notes.append(f"has {count} frames, and the first is taken; all_frames: true takes all")
        try:
            if self._free_bytes > 0:
                image = self._read(index)
                notes += notes_on_picture(image, self.conf.depth, frames=False)
                self._keep(index, self._scale(index, image))
        except UserError as error:
            return error
        return notes

    def _keep(self, index: int, pixels: np.ndarray) -> None:
        """Keep a decoded picture, unless the memory for them is full: then no other is kept."""
        with self._lock:
            self._free_bytes -= pixels.nbytes
            if self._free_bytes >= 0:
                self._cache[index] = pixels

    def _read(self, index: int) -> Image.Image:
        """Read a picture as RGB, or as gray of 8 or 16 bits where the network has one channel."""
        path, frame, depth = self.paths[index], self.frames[index], self.conf.depth
        if self.conf.in_channels == 3:
            return read_rgb(path, depth, frame=frame)
        return to_gray(to_srgb(read_upright(path, frame=frame)), depth)

    def _scale(self, index: int, image: Image.Image) -> np.ndarray:
        """Return the middle crop (S, S, C), or for random crops all that they are cut from."""
        size = self.conf.image_size
        if not self.conf.random_crop:
            return center_crop(image, size, self.paths[index])
        side = max(size, min(math.ceil(size / _SMALLEST_CROP), min(image.size)))
        return np.atleast_3d(scale_short_side(image, side, self.paths[index]))

    def _augment(self, pixels: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Cut by four numbers in [0, 1): the short side's length, down, across, mirror."""
        size = self.conf.image_size
        if self.conf.random_crop:
            side = size + int(draw[0] * (min(pixels.shape[:2]) - size + 1))
            pixels = np.atleast_3d(scale_short_side(as_image(pixels), side))
            top = int(draw[1] * (pixels.shape[0] - size + 1))
            left = int(draw[2] * (pixels.shape[1] - size + 1))
            pixels = pixels[top : top + size, left : left + size]
        return pixels[:, ::-1] if self.conf.random_flip and draw[3] < 0.5 else pixels


def _header(path: str) -> Header | UserError:
    try:
        return read_header(path)
    except UserError as error:
        return error


def names_below(folder: str, paths: Sequence[str]) -> list[str]:
    """Return paths as ``list_images`` gives them relative to ``folder``, however it is spelled."""
    if list(paths) == [folder]:  # it is one file
        return [folder.rstrip("/").rpartition("/")[2]]
    root = folder if folder.endswith("/") else folder + "/"
    return [path.removeprefix(root) for path in paths]


def split_by_name(names: Sequence[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (train, held out), by a hash of the name: new names move no old ones.

    ``share`` of the names is held out. With a share above 0 each side gets at least one of two or
    more; a single one is trained on.
    """
    digests = [hashlib.sha256(os.fsencode(name)).digest()[:8] for name in names]
    places = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
    out = places < share
    if share > 0 and names:
        out[places.argmin()] = True
        out[places.argmax()] = False
    return np.flatnonzero(~out), np.flatnonzero(out)


def first_of(things: Iterable[object], separator: str = ", ") -> str:
    """Name the first few things, such as bad files with their problems, and count the others."""
    texts = list(map(str, things))
    rest = [f"and {len(texts) - _NAMED} more"] if len(texts) > _NAMED else []
    return printable(separator.join(texts[:_NAMED] + rest))


# ---- The batch of a step -------------------------------------------------------------------------


def batches(
    images: TrainingImages, steps: range, threads: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield this process's part of each step's batch, as ``TrainingImages.batch`` gives it.

    ``threads`` cut the batches of the next steps meanwhile. Raises as ``TrainingImages.batch``.
    """
    threads = threads or threads_within(images.memory, THREADS)
    pool, todo = ThreadPoolExecutor(threads), iter(steps)
    ahead = collections.deque(pool.submit(_cut, images, n) for n in islice(todo, 2 * threads))
    try:
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(_cut, images, step) for step in islice(todo, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _cut(images: TrainingImages, step: int) -> tuple[Tensor, Tensor | None]:
    """Cut this process's part of the batch of ``step``."""
    conf, part = images.conf, share(images.conf.batch_size)
    chosen = batch_indices(len(images.train), step, conf.batch_size, conf.seed)[part]
    rng = generator(conf.seed, CUT, step)
    rng.random((part.start, 4))  # the cuts of the processes before this one
    return images.batch(images.train[chosen], rng)
