"""Pictures and masks: found, paired, read as a person sees them, and cut to the network's square.

A picture is RGB uint8 (S, S, 3); a mask likewise, 255 = known, 0 = generated. Everything a user
can get wrong about files is an error here, in one line that names the file, and all of it can be
found before a network is loaded: ``pair_images`` does what needs no decoding, ``check_pairs``
decodes everything once.
"""

import dataclasses
import hashlib
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from guided_diffusion import masks
from guided_diffusion.errors import UserError, looked_in
from guided_diffusion.io.images import (
    _blobfile,
    _scale_short_side,
    center_crop,
    load_crop,
    read_rgb,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
# A random crop shows at least this share of the short side: the field's usual augmentation.
_SMALLEST_CROP = 0.8


@dataclasses.dataclass(frozen=True)
class Pair:
    """One image with its mask.

    ``index`` is the image's position in the whole sorted list, ``offset`` counted in; its random
    numbers hang on it. ``name`` is the file name of its results. With ``makes_mask`` the mask is
    drawn, and ``mask_path`` is the name of its family.
    """

    index: int
    gt_path: str
    mask_path: str
    name: str
    makes_mask: bool = False


# ---- finding -----------------------------------------------------------------------------------


def list_images(path: str, *, key: str | None = None) -> list[str]:
    """List the pictures below a folder, or the one file that ``path`` is.

    Folders are searched recursively, links followed; what ends in one of ``IMAGE_SUFFIXES`` (any
    case) counts. Sorted by the full path as a string. A path with ``://`` goes through blobfile.
    Raises ``UserError`` (naming ``key``) for a missing or unreadable path, or nothing found.
    """
    path = os.fspath(path)
    if not path:
        raise UserError("the path is empty", key=key)
    found = sorted(_list_remote(path, key) if "://" in path else _list_local(path, key))
    if not found:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"no pictures in this folder (looked for {suffixes})", path=path, key=key)
    return found


def _list_local(path: str, key: str | None) -> list[str]:
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):  # noqa: PTH116 - a Path would lose "./"
            return list(_walk(path, frozenset()))
    except OSError as error:
        problem = f"no such file or folder{looked_in(path)}"
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            path, problem = error.filename or path, error.strerror or str(error)
        raise UserError(problem, path=path, key=key) from error
    except ValueError as error:  # a null character
        raise UserError(str(error), path=repr(path), key=key) from error
    return [path]


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    """Yield the pictures below ``folder``; a link back to a folder ``above`` is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            # A folder or a pipe called x.png is listed too: reading refuses it by name, which is
            # better than pairing everything after it with the wrong mask.
            if entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield entry.path
            elif entry.is_dir():
                yield from _walk(entry.path, above | {real})


def _list_remote(path: str, key: str | None) -> list[str]:
    bf = _blobfile(path)
    try:
        if not bf.isdir(path):
            if bf.exists(path):
                return [path]
            raise UserError("no such file or folder", path=path, key=key)
        return [
            f"{folder.rstrip('/')}/{name}"
            for folder, _, names in bf.walk(path)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES)
        ]
    except UserError:
        raise
    except Exception as error:  # each storage service has exceptions of its own
        raise UserError(f"cannot be listed: {str(error)[:200]}", path=path, key=key) from error


# ---- pairing -----------------------------------------------------------------------------------


def output_name(path: str) -> str:
    """Name the result of an input: its file name with the last suffix replaced by ``.png``."""
    base = os.path.basename(path.rstrip("/"))  # noqa: PTH119 - also for paths with ://
    stem, dot, _ = base.rpartition(".")
    return f"{stem if dot else base}.png"


def sample_names(name: str, count: int) -> list[str]:
    """Name ``count`` samples of one image: ``a.png`` alone, or ``a_1.png``, ``a_2.png``, …."""
    if count == 1:
        return [name]
    stem = name.removesuffix(".png")
    return [f"{stem}_{number}.png" for number in range(1, count + 1)]


def pair_images(
    gt_path: str,
    mask_path: str,
    *,
    offset: int = 0,
    max_len: int | None = None,
    samples_per_image: int = 1,
) -> list[Pair]:
    """Pair images and masks by sorted position, without opening any of them.

    Both paths may be a folder, a file or a ``://`` path. One mask file serves all images.
    ``mask_path`` may also be one of ``masks.FAMILIES`` where no file or folder has that name.
    ``offset`` drops the first so many, ``max_len`` keeps at most so many of the rest.
    Raises ``UserError`` for missing paths, different numbers, nothing left, and two inputs
    whose results would have the same file name.
    """
    images = list_images(gt_path, key="gt_path")
    makes_mask = mask_path in masks.FAMILIES and not os.path.lexists(mask_path)
    if makes_mask:
        partners = [mask_path] * len(images)
    else:
        partners = _list_masks(mask_path)
        if partners == [mask_path]:
            partners = partners * len(images)
        elif len(partners) != len(images):
            raise UserError(
                "images and masks are paired by position in sorted order, so there must be as"
                " many masks as images (or one mask file for all)",
                path=mask_path,
                key="mask_path",
                expected=f"{len(images)} masks, one for each image in {gt_path}",
                got=len(partners),
            )
        else:
            _warn_if_shifted(images, partners)
    if not 0 <= offset < len(images):
        expected = f"0 to {len(images) - 1}, there being {len(images)} images in {gt_path}"
        raise UserError(key="offset", expected=expected, got=offset)
    if max_len is not None and max_len < 1:
        raise UserError(key="max_len", expected="1 or more", got=max_len)
    pairs = [
        Pair(index, gt, mask, output_name(gt), makes_mask)
        for index, (gt, mask) in enumerate(zip(images, partners, strict=True))
    ]
    pairs = pairs[offset:] if max_len is None else pairs[offset : offset + max_len]
    _refuse_colliding_names(pairs, samples_per_image)
    return pairs


def _list_masks(mask_path: str) -> list[str]:
    try:
        return list_images(mask_path, key="mask_path")
    except UserError as error:
        if "no such" in error.problem:
            families = ", ".join(masks.FAMILIES)
            error = UserError(
                f"no such file or folder, nor a kind of mask that can be drawn ({families})"
                f"{looked_in(mask_path)}",
                path=mask_path,
                key="mask_path",
            )
        raise error from None


def _warn_if_shifted(images: Sequence[str], partners: Sequence[str]) -> None:
    """Warn when an image's mask is not the mask that has its name: the folders do not match."""
    names = {output_name(mask): mask for mask in partners}
    for image, mask in zip(images, partners, strict=True):
        namesake = names.get(output_name(image))
        if namesake is not None and output_name(mask) != output_name(image):
            warnings.warn(
                f"{image} is paired with {mask} by sorted position, although {namesake} has its"
                " name; check that both folders hold the same names",
                stacklevel=3,
            )
            return


def _refuse_colliding_names(pairs: Sequence[Pair], samples_per_image: int) -> None:
    """Refuse two inputs that would write the same file, and names too long for a file system."""
    owners: dict[str, str] = {}
    for pair in pairs:
        for name in {pair.name, *sample_names(pair.name, samples_per_image)}:
            other = owners.setdefault(name, pair.gt_path)
            if other != pair.gt_path:
                raise UserError(
                    f"would write its results to {name}, and so would {other}; rename one of them",
                    path=pair.gt_path,
                )
            if len(os.fsencode(name)) > 255:
                raise UserError(f"its result's name is too long: {name}", path=pair.gt_path)


def load_mask(pair: Pair, size: int, *, invert: bool = False, seed: int = 0) -> np.ndarray:
    """Read or draw the mask of a pair: uint8 (size, size, 3), 255 known, 0 generated.

    A file goes the picture's way, and keeps the soft values that scaling leaves. A drawn mask
    depends on ``seed`` and the pair's index alone, through a generator of its own, so that it
    takes nothing from the sampler's random numbers. ``invert`` exchanges known and generated.
    """
    if pair.makes_mask:
        rng = np.random.default_rng([seed, pair.index])
        try:
            mask = masks.make_mask(pair.mask_path, size, rng)
        except ValueError as error:
            raise UserError(str(error), key="mask_path", got=pair.mask_path) from error
        mask = np.repeat(mask[:, :, None], 3, axis=2)
    else:
        mask = load_crop(pair.mask_path, size)
    return 255 - mask if invert else mask


def load_pair(
    pair: Pair, image_size: int, *, flip: bool = False, invert_mask: bool = False, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Load the picture and the mask of a pair, each uint8 (image_size, image_size, 3).

    ``flip`` mirrors both; ``seed`` is that of drawn masks (see ``load_mask``).
    """
    gt = load_crop(pair.gt_path, image_size)
    mask = load_mask(pair, image_size, invert=invert_mask, seed=seed)
    if flip:
        gt, mask = np.ascontiguousarray(gt[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return gt, mask


# ---- checking ----------------------------------------------------------------------------------


def check_pairs(
    pairs: Sequence[Pair],
    image_size: int,
    *,
    invert_mask: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> list[float]:
    """Decode every picture and mask, and return the share of generated pixels of each pair.

    Threads decode; a mask that serves all is decoded once. Warns of masks that leave
    nothing to generate, or nothing known. Raises ``UserError`` naming the first bad file.
    """
    one_for_all = len({pair.mask_path for pair in pairs}) == 1 and not pairs[0].makes_mask

    def generated_share(pair: Pair) -> float:
        mask = load_mask(pair, image_size, invert=invert_mask, seed=seed)
        return 1 - float(mask.mean()) / 255

    def check(pair: Pair) -> float:
        load_crop(pair.gt_path, image_size)
        return math.nan if one_for_all else generated_share(pair)

    shares = list(_in_threads(check, pairs, "checking pictures", show_progress))
    if one_for_all:
        shares = [generated_share(pairs[0])] * len(pairs)
    for extreme, problem in ((0.0, "nothing to generate"), (1.0, "nothing known to start from")):
        hits = [pair for pair, value in zip(pairs, shares, strict=True) if value == extreme]
        if hits:
            warnings.warn(
                f"{hits[0].mask_path}: this mask leaves {problem} ({len(hits)} of {len(pairs)}"
                " images); in a mask, white is known and black is generated",
                stacklevel=2,
            )
    return shares


def _in_threads(
    work: Callable, items: Iterable, title: str, show_progress: bool
) -> Iterator[object]:
    """Yield ``work(item)`` in order; a progress bar appears when it takes more than 2 s."""
    items = list(items)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        hidden = None if show_progress else True  # None: tqdm hides it where no terminal is
        yield from tqdm(
            pool.map(work, items), title, len(items), leave=False, delay=2, disable=hidden
        )
    finally:
        pool.shutdown(cancel_futures=True)


# ---- training ----------------------------------------------------------------------------------


class TrainingImages:
    """The pictures of a training, decoded once and cut anew for every batch.

    ``paths`` and ``labels`` run over all pictures below ``data_dir`` in sorted order; a label is
    the number of the first-level subfolder in ``class_names`` (only with ``class_cond``).
    ``train`` and ``held_out`` are index arrays; who is held out depends on a picture's relative
    path alone, so that adding pictures moves none from one side to the other.
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
        show_progress: bool = True,
    ) -> None:
        self.image_size, self.random_crop, self.random_flip = image_size, random_crop, random_flip
        self.paths = list_images(data_dir, key="data_dir")
        root = data_dir if data_dir.endswith("/") else data_dir + "/"
        relative = [path.removeprefix(root) for path in self.paths]
        self.class_names, self.labels = self._classes(relative) if class_cond else ([], None)
        self.train, self.held_out = split_by_name(relative, holdout)
        self._cache: dict[int, np.ndarray] = {}
        self._fill_cache(cache_bytes, show_progress)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(
        self, indices: Sequence[int], rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut the pictures ``indices``: uint8 (N, 3, S, S), with int64 labels (N,) or None.

        Every picture takes four numbers from ``rng`` whatever the settings, so the cut depends
        on the generator's state alone: not on what is cached, nor on threads.
        """
        indices = [int(index) for index in indices]
        draws = rng.random((len(indices), 4))
        missing = [index for index in indices if index not in self._cache]
        sources = self._cache
        if missing:
            read = _in_threads(self._decode, missing, "reading pictures", False)
            sources = self._cache | dict(zip(missing, read, strict=True))
        crops = [self._augment(sources[i], draw) for i, draw in zip(indices, draws, strict=True)]
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return images, labels

    def _classes(self, relative: Sequence[str]) -> tuple[list[str], np.ndarray]:
        for path, name in zip(self.paths, relative, strict=True):
            if "/" not in name:
                raise UserError(
                    "with class_cond every picture must lie in a subfolder, one for each class",
                    path=path,
                )
        folders = [name.split("/", 1)[0] for name in relative]
        names = sorted(set(folders))
        numbers = {name: number for number, name in enumerate(names)}
        return names, np.array([numbers[folder] for folder in folders], dtype=np.int64)

    def _fill_cache(self, budget: int, show_progress: bool) -> None:
        """Decode everything once: finds unreadable pictures, keeps what fits into ``budget``."""
        small = 0
        jobs = range(len(self.paths))
        sources = _in_threads(self._decode_noting_size, jobs, "reading pictures", show_progress)
        for index, (pixels, is_small) in enumerate(sources):
            small += is_small
            if pixels.nbytes <= budget:
                budget -= pixels.nbytes
                self._cache[index] = pixels
        if small:
            warnings.warn(
                f"{small} of {len(self.paths)} pictures are smaller than {self.image_size} pixels"
                " and are enlarged, which teaches the network their blur",
                stacklevel=3,
            )

    def _decode_noting_size(self, index: int) -> tuple[np.ndarray, bool]:
        """Read a picture: the finished middle crop, or for random crops as much as they need."""
        image = read_rgb(self.paths[index])
        is_small = min(image.size) < self.image_size
        try:
            if not self.random_crop:
                return center_crop(image, self.image_size), is_small
            largest = math.ceil(self.image_size / _SMALLEST_CROP)
            side = max(self.image_size, min(largest, min(image.size)))
            return np.asarray(_scale_short_side(image, side)), is_small
        except ValueError as error:
            raise UserError(str(error), path=self.paths[index]) from error

    def _decode(self, index: int) -> np.ndarray:
        return self._decode_noting_size(index)[0]

    def _augment(self, pixels: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Cut by four numbers in [0, 1): the short side's length, down, across, mirror."""
        size = self.image_size
        if self.random_crop:
            side = size + int(draw[0] * (min(pixels.shape[:2]) - size + 1))
            pixels = np.asarray(_scale_short_side(Image.fromarray(pixels), side))
            top = int(draw[1] * (pixels.shape[0] - size + 1))
            left = int(draw[2] * (pixels.shape[1] - size + 1))
            pixels = pixels[top : top + size, left : left + size]
        return pixels[:, ::-1] if self.random_flip and draw[3] < 0.5 else pixels


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
