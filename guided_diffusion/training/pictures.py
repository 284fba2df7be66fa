"""TRAIN: the pictures below a folder, decoded once where memory allows and cut anew for a batch."""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import dim_picture, in_threads, warn_of_kinds
from guided_diffusion.io.images import (
    ROOM,
    crop_of,
    open_bytes,
    open_image,
    origin_of,
    read_rgb,
    scale_short_side,
)
from guided_diffusion.io.listing import list_images

# A random crop shows at least this share of the short side: the field's usual augmentation.
_SMALLEST_CROP = 0.8
# A training goes on while at most this share of its pictures (and always one) turn bad.
_MOST_BAD = 0.01
_NAMED = 5  # so many bad files are named, and the others counted


class TrainingImages:
    """The pictures of a training, cut anew for every batch.

    ``paths`` and ``labels`` run over all pictures below ``data_dir`` in sorted order; a label is
    the number of the first-level subfolder in ``class_names`` (only with ``class_cond``).
    ``train`` and ``held_out`` are index arrays; who is held out depends on a picture's relative
    path alone, so that adding pictures moves none from one side to the other.

    At the start the headers of this process's ``share`` are read, and as many pictures decoded as
    ``cache_bytes`` holds. Raises UserError that names the bad ones. A picture that turns bad later
    is noted in ``bad``, and the next one takes its place, until there are more than ``most_bad``.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int,
        *,
        class_cond: bool = False,
        random_crop: bool = False,  # a window of 0.8 to 1 of the short side instead of the middle
        random_flip: bool = True,
        holdout: float = 0.0,  # share of the pictures that training never sees
        cache_bytes: int = 4 * 2**30,  # memory for decoded pictures; the rest is read again
        share: slice = slice(None),  # of ``paths``: what this process looks at at the start
        depth: tuple[float, float] | None = None,  # as for read_rgb
        all_formats: bool = False,  # as for list_images
        show_progress: bool = True,
    ) -> None:
        self.image_size, self.random_crop, self.random_flip = image_size, random_crop, random_flip
        self.depth = depth
        self.paths = list_images(data_dir, key="data_dir", all_formats=all_formats)
        self.names = names_below(data_dir, self.paths)
        self.class_names, self.labels = self._classes() if class_cond else ([], None)
        self.train, self.held_out = split_by_name(self.names, holdout)
        self.bad: dict[int, UserError] = {}
        self.most_bad = max(1, int(_MOST_BAD * len(self.train)))
        self._cache: dict[int, np.ndarray] = {}
        self._room = cache_bytes
        self._look_at(range(len(self.paths))[share], show_progress)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def is_all_in_memory(self) -> bool:
        """Whether nothing has to be read again."""
        return len(self._cache) == len(self.paths)

    def divide_memory(self, processes: int) -> None:
        """Leave each of so many processes its part of the memory that is still free."""
        self._room //= processes

    def batch(
        self, indices: Sequence[int], rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut the pictures ``indices``: uint8 (N, 3, S, S), with int64 labels (N,) or None.

        Every picture takes four numbers from ``rng`` whatever the settings, so the cut depends
        on the generator's state alone: not on what is in memory. Raises UserError where more
        pictures than ``most_bad`` cannot be read.
        """
        draws = rng.random((len(indices), 4))
        found = [self._readable(int(index)) for index in indices]
        crops = [
            self._augment(pixels, draw) for (_, pixels), draw in zip(found, draws, strict=True)
        ]
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        used = [index for index, _ in found]
        labels = None if self.labels is None else torch.from_numpy(self.labels[used])
        return images, labels

    def _readable(self, index: int) -> tuple[int, np.ndarray]:
        """Return picture ``index``, or the next of the same side of the split that can be read."""
        while True:
            if index in self._cache:
                return index, self._cache[index]
            if index not in self.bad:
                try:
                    pixels = self._decode(index)
                except UserError as error:
                    self.bad[index] = error
                    if len(self.bad) > self.most_bad:
                        raise
                else:
                    self._keep(index, pixels)
                    return index, pixels
            side = self.train if index in self.train else self.held_out
            index = int(side[(np.searchsorted(side, index) + 1) % len(side)])

    def _classes(self) -> tuple[list[str], np.ndarray]:
        for path, name in zip(self.paths, self.names, strict=True):
            if "/" not in name:
                raise UserError(
                    "with class_cond every picture must lie in a subfolder, one for each class",
                    path=path,
                )
        folders = [name.split("/", 1)[0] for name in self.names]
        names = sorted(set(folders))
        numbers = {name: number for number, name in enumerate(names)}
        return names, np.array([numbers[folder] for folder in folders], dtype=np.int64)

    def _look_at(self, indices: Sequence[int], show_progress: bool) -> None:
        """Find what is bad or too small, and decode what there is room for."""
        look = in_threads(_or_error(self._size), indices, "looking at pictures", show_progress)
        sizes = dict(zip(indices, look, strict=True))
        bad = {index: size for index, size in sizes.items() if isinstance(size, UserError)}
        chosen, room = [], self._room
        for index, size in sizes.items():
            if index not in bad and self._bytes(size) <= room:
                room -= self._bytes(size)
                chosen.append(index)
        read = _or_error(self._decode_with_note)
        decoded = in_threads(read, chosen, "reading pictures", show_progress)
        notes = []
        for index, result in zip(chosen, decoded, strict=True):
            if isinstance(result, UserError):
                bad[index] = result
            else:
                self._keep(index, result[0])
                notes.append((self.paths[index], result[1]))
        if bad:
            raise _error_of_bad([bad[index] for index in sorted(bad)], len(indices))
        small = sum(min(size) < self.image_size for size in sizes.values())
        if small:
            warnings.warn(
                f"{small} of {len(indices)} pictures are smaller than {self.image_size} pixels"
                " and are enlarged, which teaches the network their blur",
                stacklevel=3,
            )
        warn_of_kinds(notes)

    def _size(self, index: int) -> tuple[int, int]:
        """Return a picture's width and height, from its header alone where that can be read."""
        path = self.paths[index]
        try:
            with open_bytes(path) as stream, open_image(stream) as image:
                return image.size
        except Exception:  # whatever it is, reading all of it says it better
            with ROOM.lease():
                return origin_of(read_rgb(path)).size

    def _bytes(self, size: tuple[int, int]) -> int:
        """Return about how much memory a decoded picture of this width and height takes."""
        short, long = min(size), max(size)
        side = self._side(short) if self.random_crop else self.image_size
        return 3 * side * (round(long / short * side) if self.random_crop else side)

    def _side(self, short: int) -> int:
        """Return how long the short side of a picture has to be for random crops."""
        return max(self.image_size, min(math.ceil(self.image_size / _SMALLEST_CROP), short))

    def _keep(self, index: int, pixels: np.ndarray) -> None:
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._cache[index] = pixels

    def _decode(self, index: int) -> np.ndarray:
        return self._decode_with_note(index)[0]

    def _decode_with_note(self, index: int) -> tuple[np.ndarray, str | None]:
        """Read a picture: the finished middle crop, or for random crops as much as they need.

        Also returned is what is odd about it.
        """
        path = self.paths[index]
        with ROOM.lease():
            image = read_rgb(path) if self.depth is None else read_rgb(path, self.depth)
            note = dim_picture(image, self.depth)
            if not self.random_crop:
                return crop_of(path, image, self.image_size), note
            try:
                return np.asarray(scale_short_side(image, self._side(min(image.size)))), note
            except ValueError as error:
                raise UserError(str(error), path=path) from error

    def _augment(self, pixels: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Cut by four numbers in [0, 1): the short side's length, down, across, mirror."""
        size = self.image_size
        if self.random_crop:
            side = size + int(draw[0] * (min(pixels.shape[:2]) - size + 1))
            pixels = np.asarray(scale_short_side(Image.fromarray(pixels), side))
            top = int(draw[1] * (pixels.shape[0] - size + 1))
            left = int(draw[2] * (pixels.shape[1] - size + 1))
            pixels = pixels[top : top + size, left : left + size]
        return pixels[:, ::-1] if self.random_flip and draw[3] < 0.5 else pixels


def names_below(folder: str, paths: Sequence[str]) -> list[str]:
    """Return the paths relative to the folder that was listed, however the folder is spelled."""
    if list(paths) == [folder]:  # it is one file
        return [folder.rstrip("/").rpartition("/")[2]]
    root = folder if folder.endswith("/") else folder + "/"
    return [path.removeprefix(root) for path in paths]


def _or_error(work: Callable) -> Callable:
    """Return ``work``, with a UserError returned instead of raised."""

    def attempt(item: object) -> object:
        try:
            return work(item)
        except UserError as error:
            return error

    return attempt


def list_of_bad(errors: Sequence[UserError]) -> str:
    """Name the first few of several bad files, with their problems."""
    rest = f"; and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
    return "; ".join(str(error) for error in errors[:_NAMED]) + rest


def _error_of_bad(errors: Sequence[UserError], count: int) -> UserError:
    if len(errors) == 1:
        return errors[0]
    return UserError(f"{len(errors)} of {count} pictures are bad: {list_of_bad(errors)}")


def split_by_name(names: Sequence[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (kept, held out), holding out ``share`` of them by a hash of the name.

    With a share above 0 each side gets at least one of two or more; a single one is kept.
    """
    digests = [hashlib.sha256(os.fsencode(name)).digest()[:8] for name in names]
    places = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
    out = places < share
    if share > 0 and names:
        out[places.argmin()] = True
        out[places.argmax()] = False
    return np.flatnonzero(~out), np.flatnonzero(out)
