"""Pictures and masks: found, paired, read as a person sees them, and cut to the network's square.

A picture is uint8 (S, S, 3); a mask likewise, 255 = known, 0 = generated. For a network of one
channel both are (S, S, 1), and a picture of more than 8 bits is uint16. ``pair_images`` finds what
is wrong without decoding anything; run/checks.py decodes everything once before a run.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from guided_diffusion import masks
from guided_diffusion.errors import UserError
from guided_diffusion.io.colours import is_deep, to_gray, to_rgb, to_srgb
from guided_diffusion.io.holes import BLACK, WHITE, harden, known_levels, same_shape, shape_mask
from guided_diffusion.io.images import (
    Source,
    center_crop,
    name_of,
    origin_of,
    read_rgb,
    read_upright,
)
from guided_diffusion.io.listing import list_images, output_name
from guided_diffusion.io.notes import note_on_turning, notes_on_mask, notes_on_picture
from guided_diffusion.io.pairing import pair_up

ALPHA = "alpha"  # the mask_path that makes the pictures' own transparency the mask
_LONGEST_NAME = 255  # bytes, in most file systems


@dataclass(frozen=True)
class Pair:
    """One image with its mask.

    ``gt_path`` and ``mask_path`` are paths, or Pillow images in memory. ``index`` is the image's
    position in the whole sorted list, ``offset`` included; its random numbers depend on it.
    ``name`` is the file name of its results. With ``makes_mask`` the mask is drawn, and
    ``mask_path`` is the name of its family, or ``alpha`` for the image's transparency.
    """

    index: int
    gt_path: Source
    mask_path: Source
    name: str
    makes_mask: bool = False

    @property
    def is_alpha(self) -> bool:
        """Whether the image's own transparency is the mask."""
        return self.makes_mask and self.mask_path == ALPHA

    @property
    def mask_file(self) -> Source | None:
        """What the mask is read from; None if it is drawn."""
        if self.is_alpha:
            return self.gt_path
        return None if self.makes_mask else self.mask_path


@dataclass(frozen=True)
class ReadOptions:
    """How pictures and masks are read; the defaults read them as the published program does.

    A drawn mask depends on ``seed`` and the pair's index alone, through a generator of its own, so
    that it takes nothing from the sampler's random numbers.
    """

    channels: int = 3  # of pictures and masks: 1 or 3
    depth: tuple[float, float] | None = None  # values of deep gray that are black and white
    invert_mask: bool = False  # exchange known and generated
    mask_hole: str | None = None  # a rule of ``known_levels``
    mask_grow: int = 0  # enlarge holes by so many pixels of the photo
    mask_hard: bool = False  # make every pixel hole that the hole touches
    seed: int = 0  # of drawn masks


AS_PUBLISHED = ReadOptions()


# ---- pairing -----------------------------------------------------------------------------------


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
    all_formats: bool = False,
) -> list[Pair]:
    """Pair images and masks by name or by sorted position, opening none of them.

    Both paths may be a folder, a file or a ``://`` path, listed as ``list_images`` does. One mask
    file serves all images. ``mask_path`` may also be one of ``masks.FAMILIES``, or ``alpha`` for
    the transparency of the images themselves, where no file or folder has that name. Masks in a
    subfolder of the images' folder are no images, and the other way round.
    ``offset`` drops the first so many, ``max_len`` keeps at most so many of the rest.
    Raises ``UserError`` for missing paths, different numbers, nothing left, files that are both
    image and mask, and two inputs whose results would have the same file name.
    """
    images = list_images(gt_path, key="gt_path", all_formats=all_formats)
    makes_mask = mask_path in (*masks.FAMILIES, ALPHA) and not os.path.lexists(mask_path)
    if makes_mask:
        partners = [mask_path] * len(images)
    else:
        images, partners = _partners(images, gt_path, mask_path, all_formats)
    if offset >= len(images):
        expected = f"0 to {len(images) - 1}, as {gt_path} has {len(images)} images"
        raise UserError(key="offset", expected=expected, got=offset)
    pairs = [
        Pair(index, gt, mask, output_name(gt), makes_mask)
        for index, (gt, mask) in enumerate(zip(images, partners, strict=True))
    ]
    pairs = pairs[offset:] if max_len is None else pairs[offset : offset + max_len]
    _refuse_colliding_names(pairs, samples_per_image)
    return pairs


def _partners(
    images: Sequence[str], gt_path: str, mask_path: str, all_formats: bool
) -> tuple[Sequence[str], Sequence[str]]:
    """Return the images, and the mask file of each."""
    families = ", ".join(masks.FAMILIES)
    nor = f", nor a kind of mask that can be drawn ({families}), nor {ALPHA} for the pictures' own"
    mask_files = list_images(
        mask_path, key="mask_path", all_formats=all_formats, nor=f"{nor} transparency"
    )
    images, mask_files = _separate(images, mask_files, mask_path)
    if mask_files == [mask_path]:
        if len(images) > 1 and os.path.realpath(mask_path) in map(os.path.realpath, images):
            warnings.warn(f"{mask_path}: this mask is also one of the pictures", stacklevel=3)
        return images, mask_files * len(images)
    if len(mask_files) != len(images):
        order = "images and masks are paired by position in sorted order"
        problem = f"{order}, so there must be as many masks as images (or one mask file for all)"
        expected, got = f"{len(images)} masks, one for each image in {gt_path}", len(mask_files)
        raise UserError(problem, path=mask_path, key="mask_path", expected=expected, got=got)
    return images, pair_up(images, mask_files)


def _separate(
    images: Sequence[str], mask_files: Sequence[str], mask_path: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Take files that are in both lists out of the one whose folder holds the other's folder."""
    files = {os.path.realpath(path): path for path in images}
    common = files.keys() & set(map(os.path.realpath, mask_files))
    if not common or (mask_files == [mask_path] and len(images) > 1):
        return images, mask_files
    if len(common) == len(mask_files) < len(images):
        return [path for path in images if os.path.realpath(path) not in common], mask_files
    if len(common) == len(images) < len(mask_files):
        return images, [path for path in mask_files if os.path.realpath(path) not in common]
    some = f"{len(common)} files, such as {files[min(common)]}"
    hint = "put pictures and masks into folders of their own"
    problem = f"gt_path and mask_path overlap: {some}, are in both; {hint}"
    raise UserError(problem, path=mask_path, key="mask_path")


def _refuse_colliding_names(pairs: Sequence[Pair], samples_per_image: int) -> None:
    """Refuse two inputs that would write the same file, and names too long for a file system."""
    owners: dict[str, str] = {}
    for pair in pairs:
        for name in {pair.name, *sample_names(pair.name, samples_per_image)}:
            other = owners.setdefault(name, pair.gt_path)
            if other != pair.gt_path:
                problem = f"would write its results to {name}, as would {other}; rename one of them"
                raise UserError(problem, path=pair.gt_path)
            if len(os.fsencode(name)) > _LONGEST_NAME:
                raise UserError(f"its result's name is too long: {name}", path=pair.gt_path)


# ---- loading a square --------------------------------------------------------------------------


def load_pair(
    pair: Pair, image_size: int, options: ReadOptions = AS_PUBLISHED, *, flip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Load the picture and the mask of a pair, each (image_size, image_size, C).

    Both are uint8 but for deep gray (see ``ReadOptions.channels``). ``flip`` mirrors both. Raises
    ``UserError`` naming a file that cannot be read.
    """
    image = read_photo(pair, options)
    photo = origin_of(image).size
    gt = crop_photo(pair, image, image_size, options)
    if not pair.is_alpha:
        del image  # before the mask is decoded
        image = read_mask(pair, options, image_size)
    mask = crop_mask(pair, image, image_size, options, photo)
    if flip:
        gt, mask = np.ascontiguousarray(gt[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return gt, mask


def read_photo(pair: Pair, options: ReadOptions) -> Image.Image:
    """Read the picture of a pair as the network sees its colours: RGB, or gray of 8 or 16 bits.

    Where its transparency is the mask, it comes in its own mode.
    """
    if pair.is_alpha:
        return to_srgb(read_upright(pair.gt_path))
    if options.channels == 1:
        return to_gray(to_srgb(read_upright(pair.gt_path)), options.depth)
    return read_rgb(pair.gt_path, options.depth)


def crop_photo(pair: Pair, image: Image.Image, size: int, options: ReadOptions) -> np.ndarray:
    """Cut what ``read_photo`` returned to (size, size, C)."""
    if not pair.is_alpha:
        return center_crop(image, size, pair.gt_path)
    # Scaled with their transparency, colours at the hole's rim do not mix with what is below it.
    mode = "RGBA" if options.channels == 3 else "LA"
    pixels = center_crop(image.convert("RGBA").convert(mode), size, pair.gt_path)
    return np.ascontiguousarray(pixels[:, :, :-1])


def read_mask(pair: Pair, options: ReadOptions, size: int) -> Image.Image:
    """Read the file of a mask, as RGB, or in its own mode where a rule needs that; or draw it."""
    image = read_upright(pair.mask_file) if pair.mask_file else _drawn(pair, (size, size), options)
    return to_rgb(image) if pair.makes_mask or options.mask_hole is None else image


def crop_mask(
    pair: Pair, image: Image.Image, size: int, options: ReadOptions, photo: tuple[int, int]
) -> np.ndarray:
    """Cut what ``read_mask`` returned as the picture is: uint8 (size, size, C), 255 known.

    The soft values that scaling leaves stay, unless ``options`` say otherwise. ``photo`` is the
    picture's (width, height), in whose pixels ``mask_grow`` is.
    """
    is_shaped = options.mask_grow or options.mask_hard
    has_rule = pair.is_alpha or options.mask_hole is not None
    if options.channels == 3 and not is_shaped and not has_rule:  # its channels may differ
        mask = center_crop(image, size, pair.mask_file)
        return 255 - mask if options.invert_mask else mask
    known = _known(pair, image, options)
    if is_shaped:
        grow = options.mask_grow
        if pair.mask_file is None or is_of_the_square(image.size, photo, size):
            grow = grow and max(1, round(grow * min(image.size) / min(photo)))
            photo = image.size
        known = shape_mask(known, photo, grow=grow, hard=options.mask_hard)
    mask = center_crop(Image.fromarray(known), size, pair.mask_file)[:, :, 0]
    # Scaling has made the rim soft again.
    mask = harden(mask, 255) if options.mask_hard else mask
    return np.repeat(mask[:, :, None], options.channels, axis=2)


def _known(pair: Pair, image: Image.Image, options: ReadOptions) -> np.ndarray:
    """Return what is known by the rule of the options, uint8 (H, W); raises UserError."""
    rule = options.mask_hole if not pair.makes_mask else ALPHA if pair.is_alpha else None
    try:
        known = known_levels(image, rule)
    except UserError as error:
        path = name_of(pair.mask_file)
        raise UserError(error.problem, path=path, key="mask_path") from None
    return 255 - known if options.invert_mask else known


def _drawn(pair: Pair, size: tuple[int, int], options: ReadOptions) -> Image.Image:
    """Draw the mask of a pair, (width, height): the middle of a square."""
    (width, height), side = size, max(size)
    try:
        mask = masks.make_mask(
            pair.mask_path, side, np.random.default_rng([options.seed, pair.index])
        )
    except ValueError as error:
        raise UserError(str(error), key="mask_path", got=pair.mask_path) from error
    left, top = (side - width) // 2, (side - height) // 2
    return Image.fromarray(mask[top : top + height, left : left + width])


def is_of_the_square(mask: tuple[int, int], photo: tuple[int, int], size: int) -> bool:
    """Whether a mask was made for the square that the network sees, and not for the photo."""
    return mask == (size, size) and not same_shape(mask, photo)


# ---- loading a whole photo ---------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """A photo at its own size: ``pixels`` (H, W, C), ``known`` uint8 (H, W), 255 = known.

    ``mode`` is Pillow's of the result: L, LA, RGB, RGBA or I;16, with ``alpha`` uint8 (H, W) or
    None; ``info`` is what its file holds besides (``metadata_of``). ``notes`` and ``mask_notes``
    say what is odd about photo and mask.
    """

    pixels: np.ndarray
    known: np.ndarray
    mode: str
    alpha: np.ndarray | None
    info: dict[str, object]
    notes: list[str]
    mask_notes: list[str]

    def image_of(self, pixels: np.ndarray) -> Image.Image:
        """Return other pixels (H, W, C) in the photo's mode, with its transparency."""
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        image = image.convert(self.mode.removesuffix("A"))
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        image.info.update(self.info)
        return image


def load_photo(pair: Pair, options: ReadOptions = AS_PUBLISHED) -> Photo:
    """Read a photo and its mask at the photo's own size; raises ``UserError`` naming the file.

    Colours stay in the space of the photo's profile, which its result keeps; CMYK becomes RGB. A
    mask of the photo's shape is scaled to it. Levels as near to black and white as JPEG leaves them
    are black and white.
    """
    image = read_upright(pair.gt_path, whole=True)
    known, mask_notes = _known_of_photo(pair, image, options)
    info, origin = image.info["metadata"], origin_of(image)
    image = to_srgb(image) if image.mode == "CMYK" else image
    alpha, is_gray = None, image.mode in ("1", "L", "LA") or is_deep(image)
    if options.channels == 1:
        seen = to_gray(image, options.depth)
        mode = seen.mode
    else:
        seen = to_rgb(image, options.depth)
        mode = "L" if is_gray else "RGB"
    if mode[0] != "R" and not is_gray:  # the profile describes colours
        info.pop("icc_profile", None)
    notes = notes_on_picture(seen, options.depth)
    if origin.mode == "CMYK":
        notes.append("is CMYK, and its result is RGB")
    if origin.is_deep_colour or (is_deep(image) and options.channels == 3):
        notes.append("has more than 8 bits a channel, and its result has 8")
    if image.has_transparency_data and not is_deep(image):
        layers = image.convert("RGBA")  # whose colours below transparent parts stay
        seen = layers.convert("RGB" if options.channels == 3 else "L")
        if not pair.is_alpha:
            alpha = np.asarray(layers.getchannel("A"))
            mode += "A"
    return Photo(np.atleast_3d(seen), known, mode, alpha, info, notes, mask_notes)


def _known_of_photo(
    pair: Pair, photo: Image.Image, options: ReadOptions
) -> tuple[np.ndarray, list[str]]:
    """Return the mask of a photo at its size, uint8 (H, W), and what is odd about its file."""
    notes: list[str] = []
    if pair.makes_mask:
        image = photo if pair.is_alpha else _drawn(pair, photo.size, options)
        known = _known(pair, image, options)
    else:
        mask = read_upright(pair.mask_file, whole=True)
        if not same_shape(mask.size, photo.size):
            problem = f"with full_size a mask has the shape of its photo {name_of(pair.gt_path)}"
            expected, got = "the shape of {} x {}".format(*photo.size), "{} x {}".format(*mask.size)
            raise UserError(problem, path=name_of(pair.mask_file), expected=expected, got=got)
        known = _known(pair, mask, options)
        known = np.where(known >= WHITE, 255, np.where(known <= BLACK, 0, known)).astype(np.uint8)
        if options.mask_hole is None:
            notes = notes_on_mask(to_rgb(mask), invert=options.invert_mask)[0]
        turning = note_on_turning(origin_of(photo), origin_of(mask))
        notes += [turning] if turning and known.min() < known.max() else []
    return shape_mask(known, photo.size, grow=options.mask_grow, hard=options.mask_hard), notes
