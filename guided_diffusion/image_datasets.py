"""Pictures and masks: found, paired, read as a person sees them, and cut to the network's square.

A picture is RGB uint8 (S, S, 3); a mask likewise, 255 = known, 0 = generated. Everything a user
can get wrong about files is an error here, in one line that names the file, and all of it can be
found before a network is loaded: ``pair_images`` does what needs no decoding, ``check_pairs``
decodes everything once.
"""

import dataclasses
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from guided_diffusion import masks
from guided_diffusion.errors import UserError, looked_in
from guided_diffusion.io.holes import (
    BLACK,
    WHITE,
    grow_hole,
    harden,
    known_levels,
    look_at_mask,
    shape_mask,
)
from guided_diffusion.io.images import (
    ROOM,
    Origin,
    as_rgb,
    crop_of,
    is_deep,
    origin_of,
    read_rgb,
    read_upright,
)
from guided_diffusion.io.listing import list_images, output_name, stem_of

# What names of pictures and of masks add to the name they share.
_IMAGE_WORDS = "image|img|photo|picture|gt|orig|original|input"
_MASK_WORDS = "mask|masks|msk|matte|hole|keep|label"
ALPHA = "alpha"  # the mask_path that makes the pictures' own transparency the mask
# Share of a hole's pixels that may be half-known before that is told: thin strokes have up to 0.22.
_SOFT_RIM = 0.23


@dataclasses.dataclass(frozen=True)
class Pair:
    """One image with its mask.

    ``index`` is the image's position in the whole sorted list, ``offset`` counted in; its random
    numbers hang on it. ``name`` is the file name of its results. With ``makes_mask`` the mask is
    drawn, and ``mask_path`` is the name of its family, or ``alpha`` for the image's transparency.
    """

    index: int
    gt_path: str
    mask_path: str
    name: str
    makes_mask: bool = False

    @property
    def is_alpha(self) -> bool:
        """Whether the image's own transparency is the mask."""
        return self.makes_mask and self.mask_path == ALPHA

    @property
    def mask_file(self) -> str | None:
        """The file that the mask is read from; None if it is drawn."""
        if self.is_alpha:
            return self.gt_path
        return None if self.makes_mask else self.mask_path


@dataclasses.dataclass(frozen=True)
class Handling:
    """How files are read where a key asks for it; the default is how the published program does.

    ``hole`` is a rule of ``known_levels``; ``grow`` enlarges holes, in pixels of the photo;
    ``hard`` makes every pixel hole that the hole touches; ``depth`` are the values of deep gray
    that are black and white.
    """

    hole: str | None = None
    grow: int = 0
    hard: bool = False
    depth: tuple[float, float] | None = None


PLAIN = Handling()


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
    """Pair images and masks by sorted position or name (``_pair_up``), opening none of them.

    Both paths may be a folder, a file or a ``://`` path, listed as ``list_images`` does. One mask
    file serves all images. ``mask_path`` may also be one of ``masks.FAMILIES``, or ``alpha`` for
    the transparency of the images themselves, where no file or folder has that name.
    ``offset`` drops the first so many, ``max_len`` keeps at most so many of the rest.
    Raises ``UserError`` for missing paths, different numbers, nothing left, and two inputs
    whose results would have the same file name.
    """
    images = list_images(gt_path, key="gt_path", all_formats=all_formats)
    makes_mask = mask_path in (*masks.FAMILIES, ALPHA) and not os.path.lexists(mask_path)
    if makes_mask:
        partners = [mask_path] * len(images)
    else:
        partners = _list_masks(mask_path, all_formats)
        if partners == [mask_path]:
            partners = partners * len(images)
            real_path = os.path.realpath(mask_path)
            if len(images) > 1 and real_path in map(os.path.realpath, images):
                warnings.warn(f"{mask_path}: this mask is also one of the pictures", stacklevel=2)
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
            partners = _pair_up(images, partners)
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


def _list_masks(mask_path: str, all_formats: bool) -> list[str]:
    try:
        return list_images(mask_path, key="mask_path", all_formats=all_formats)
    except UserError as error:
        if "no such" in error.problem:
            families = ", ".join(masks.FAMILIES)
            error = UserError(
                f"no such file or folder, nor a kind of mask that can be drawn ({families}), nor"
                f" alpha for the pictures' own transparency{looked_in(mask_path)}",
                path=mask_path,
                key="mask_path",
            )
        raise error from None


def _pair_up(images: Sequence[str], mask_files: Sequence[str]) -> Sequence[str]:
    """Return the mask of each image: by name where names leave no doubt, else by sorted position.

    Both are sorted and equally many. Warns where names give other pairs than positions, and where
    they contradict the positions in any other way.
    """
    stems, mask_stems = _plain_stems(images), _plain_stems(mask_files)
    named = _by_common_affix(stems, mask_stems)
    if named is not None:
        partners = [mask_files[number] for number in named]
        if named != sorted(named):
            place = next(place for place, number in enumerate(named) if place != number)
            warnings.warn(
                f"pictures and masks are paired by name ({images[place]} with {partners[place]}),"
                " because their sorted orders differ",
                stacklevel=3,
            )
        return partners
    for place, other in _contradictions(stems, mask_stems):
        warnings.warn(
            f"{images[place]} is paired with {mask_files[place]} by sorted position, although"
            f" {mask_files[other]} has its name; check that both folders hold the same names",
            stacklevel=3,
        )
        break
    return mask_files


def _plain_stems(paths: Sequence[str]) -> list[str]:
    """Return file names without suffix; an accent is one character, however a system wrote it."""
    return [unicodedata.normalize("NFC", stem_of(output_name(path))) for path in paths]


def _by_common_affix(stems: Sequence[str], mask_stems: Sequence[str]) -> list[int] | None:
    """Return the number of each image's mask where one affix common to all makes the names equal.

    ``photo1`` has ``photo1_mask``, or ``photo1_img`` has ``photo1``. None where no affix does.
    """
    if len(stems) == 1 or len({*stems}) < len(stems) or len({*mask_stems}) < len(stems):
        return None
    for plain in (str, str.casefold):
        shorter, longer = [*map(plain, stems)], [*map(plain, mask_stems)]
        if found := _affixed(shorter, longer):
            return found
        if found := _affixed(longer, shorter):
            owners = {number: place for place, number in enumerate(found)}
            return [owners[place] for place in range(len(stems))]
    return None


def _affixed(shorter: Sequence[str], longer: Sequence[str]) -> list[int] | None:
    """Return for each of ``shorter`` which of ``longer`` it is with a common affix put to it."""
    places = {stem: number for number, stem in enumerate(longer)}
    probe = max(shorter, key=len)  # few others hold the longest
    for other in longer:
        for start in range(len(other) - len(probe) + 1):
            if other.startswith(probe, start):
                before, after = other[:start], other[start + len(probe) :]
                if all(f"{before}{stem}{after}" in places for stem in shorter):
                    return [places[f"{before}{stem}{after}"] for stem in shorter]
    return None


def _contradictions(stems: Sequence[str], mask_stems: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield images and masks that have one name without being at one position."""
    for images, others, has_to_match in (
        (stems, mask_stems, False),
        (_bare(stems, _IMAGE_WORDS), _bare(mask_stems, _MASK_WORDS), False),
        (_numbers(stems), _numbers(mask_stems), True),
    ):
        places = {name: number for number, name in enumerate(others)}
        if has_to_match and ({*images} != {*others} or len(places) < len(images)):
            continue
        for place, name in enumerate(images):
            if places.get(name, place) != place and others[place] != name:
                yield place, places[name]


def _bare(stems: Sequence[str], words: str) -> list[str]:
    """Return names in small letters without a word that says what kind of file they are."""
    pattern = re.compile(rf"^(?:{words})[-_. ]+|[-_. ]+(?:{words})[-_. ]?\d*$")
    return [pattern.sub("", stem.casefold()) for stem in stems]


def _numbers(stems: Sequence[str]) -> list[int]:
    """Return the last number in each name; nothing where a name has none."""
    found = [re.findall(r"[0-9]{1,18}", stem) for stem in stems]
    return [int(digits[-1]) for digits in found] if all(found) else []


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


# ---- loading -----------------------------------------------------------------------------------


def load_mask(
    pair: Pair,
    size: int,
    *,
    invert: bool = False,
    seed: int = 0,
    handling: Handling = PLAIN,
    photo: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read or draw the mask of a pair: uint8 (size, size, 3), 255 known, 0 generated.

    A file goes the picture's way, and keeps the soft values that scaling leaves, unless
    ``handling`` says otherwise, which measures in pixels of the ``photo`` (width, height). A drawn
    mask depends on ``seed`` and the pair's index alone, through a generator of its own, so that it
    takes nothing from the sampler's random numbers. ``invert`` exchanges known and generated.
    """
    if pair.mask_file is not None:
        with ROOM.lease():
            image = _read_mask(pair, handling)
            return _cut_mask(pair, image, size, invert, handling, photo)
    rng = np.random.default_rng([seed, pair.index])
    try:
        mask = masks.make_mask(pair.mask_path, size, rng)
    except ValueError as error:
        raise UserError(str(error), key="mask_path", got=pair.mask_path) from error
    mask = 255 - mask if invert else mask
    mask = grow_hole(mask, _scaled(handling.grow, size, photo))
    return np.repeat(mask[:, :, None], 3, axis=2)


def _read_mask(pair: Pair, handling: Handling) -> Image.Image:
    """Read the file of a mask: as RGB, or as it is where a rule looks at what RGB has lost."""
    is_plain = handling.hole is None and not pair.is_alpha
    return read_rgb(pair.mask_file) if is_plain else read_upright(pair.mask_file)


def _cut_mask(
    pair: Pair,
    image: Image.Image,
    size: int,
    invert: bool,
    handling: Handling,
    photo: tuple[int, int] | None,
) -> np.ndarray:
    """Make of a mask that was read what ``load_mask`` returns."""
    path, rule = pair.mask_file, ALPHA if pair.is_alpha else handling.hole
    if rule is None and not handling.grow and not handling.hard:
        mask = crop_of(path, image, size)
        return 255 - mask if invert else mask
    try:
        known = known_levels(image, rule)
    except UserError as error:
        raise UserError(error.problem, path=path, key="mask_path") from None
    known = 255 - known if invert else known
    if handling.grow or handling.hard:
        grow = handling.grow
        if photo is None or _is_of_the_square(image.size, photo, size):
            photo, grow = image.size, _scaled(grow, min(image.size), photo)
        known = shape_mask(known, photo, grow=grow, hard=handling.hard)
    mask = crop_of(path, Image.fromarray(known), size)
    # Scaling has made the rim soft again.
    mask = harden(mask, 255) if handling.hard else mask
    return np.repeat(mask[:, :, None], 3, axis=2)


def _scaled(pixels: int, side: int, photo: tuple[int, int] | None) -> int:
    """Turn pixels of a photo into those of a picture of it whose short side is ``side``."""
    return pixels if photo is None or not pixels else max(1, round(pixels * side / min(photo)))


def _is_of_the_square(mask: tuple[int, int], photo: tuple[int, int], size: int) -> bool:
    """Whether a mask was made for the square that the network sees, and not for the photo."""
    return mask == (size, size) and not _same_shape(mask, photo)


def _same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, but for rounding to whole pixels and 1 %."""
    (a_width, a_height), (b_width, b_height) = sorted((first, second))
    return abs(a_width - b_width * a_height / b_height) <= 1 + 0.01 * a_width


def _read_photo(pair: Pair, handling: Handling) -> Image.Image:
    if pair.is_alpha:
        return read_upright(pair.gt_path)  # with its transparency
    if handling.depth is None:
        return read_rgb(pair.gt_path)
    return read_rgb(pair.gt_path, handling.depth)


def _cut_photo(pair: Pair, image: Image.Image, size: int) -> np.ndarray:
    if image.mode == "RGB":
        return crop_of(pair.gt_path, image, size)
    # Scaled with their transparency, colours at the hole's rim do not mix with what is below it.
    return np.ascontiguousarray(crop_of(pair.gt_path, image.convert("RGBA"), size)[:, :, :3])


def load_pair(
    pair: Pair,
    image_size: int,
    *,
    flip: bool = False,
    invert_mask: bool = False,
    seed: int = 0,
    handling: Handling = PLAIN,
) -> tuple[np.ndarray, np.ndarray]:
    """Load the picture and the mask of a pair, each uint8 (image_size, image_size, 3).

    ``flip`` mirrors both; ``seed`` is that of drawn masks (see ``load_mask``).
    """
    with ROOM.lease():
        image = _read_photo(pair, handling)
        photo = origin_of(image).size
        if pair.is_alpha:
            mask = _cut_mask(pair, image, image_size, invert_mask, handling, photo)
        gt = _cut_photo(pair, image, image_size)
        del image
    if not pair.is_alpha:
        mask = load_mask(
            pair, image_size, invert=invert_mask, seed=seed, handling=handling, photo=photo
        )
    if flip:
        gt, mask = np.ascontiguousarray(gt[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return gt, mask


_TO_8_BITS = "has more than 8 bits a channel, and its result has 8"


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo as it is: ``pixels`` uint8 (H, W, 3), ``known`` uint8 (H, W), 255 = known.

    ``mode`` is what it is given back as, L, LA, RGB or RGBA, with ``alpha`` uint8 (H, W) or None;
    ``info`` what its file holds besides (``metadata_of``). ``odd`` says what is odd about the mask,
    ``dim`` why the photo will be dark, and ``lost`` what it loses all over, each if there is
    anything to say.
    """

    pixels: np.ndarray
    known: np.ndarray
    mode: str
    alpha: np.ndarray | None
    info: dict[str, object]
    odd: str | None = None
    dim: str | None = None
    lost: str | None = None

    def image_of(self, pixels: np.ndarray) -> Image.Image:
        """Return other pixels (H, W, 3) as the photo's mode, with its transparency."""
        image = Image.fromarray(pixels).convert(self.mode[:1] if self.mode[0] == "L" else "RGB")
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        image.info.update(self.info)
        return image


def load_photo(
    pair: Pair, *, invert_mask: bool = False, seed: int = 0, handling: Handling = PLAIN
) -> Photo:
    """Read a photo and its mask at the photo's own size; raises ``UserError`` naming the file.

    A mask of the photo's shape is scaled to it. Levels as near to black and white as JPEG leaves
    them are black and white.
    """
    with ROOM.lease():
        image = read_upright(pair.gt_path, whole=True)
        known, odd = _known_of_photo(pair, image, invert_mask, seed, handling)
        info = image.info["metadata"]
        if is_deep(image):
            gray = _noted_rgb(image, handling.depth)
            dim = dim_picture(gray, handling.depth)
            return Photo(np.asarray(gray), known, "L", None, info, odd, dim, _TO_8_BITS)
        dim = dim_picture(image, handling.depth)
        lost = _TO_8_BITS if origin_of(image).is_deep_colour else None
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        if not image.has_transparency_data:
            return Photo(np.asarray(image.convert("RGB")), known, mode, None, info, odd, dim, lost)
        layers = image.convert("RGBA")
        alpha = None if pair.is_alpha else np.asarray(layers.getchannel("A"))
        suffix = "" if alpha is None else "A"
        pixels = np.asarray(layers.convert("RGB"))
        return Photo(pixels, known, mode + suffix, alpha, info, odd, dim, lost)


def _known_of_photo(
    pair: Pair, photo: Image.Image, invert: bool, seed: int, handling: Handling
) -> tuple[np.ndarray, str | None]:
    """Return the mask of a photo at its size, uint8 (H, W), and what is odd about its file."""
    odd = None
    if pair.mask_file is None:
        known = _drawn_for(pair, photo.size, seed)
    else:
        mask = photo if pair.is_alpha else read_upright(pair.mask_file, whole=True)
        if not _same_shape(mask.size, photo.size):
            raise UserError(
                f"with full_size a mask has the shape of its photo {pair.gt_path}",
                path=pair.mask_file,
                expected="the shape of {} x {}".format(*photo.size),
                got="{} x {}".format(*mask.size),
            )
        try:
            known = known_levels(mask, ALPHA if pair.is_alpha else handling.hole)
        except UserError as error:
            raise UserError(error.problem, path=pair.mask_file, key="mask_path") from None
        if not pair.is_alpha:
            known = np.where(known >= WHITE, 255, np.where(known <= BLACK, 0, known))
            known = known.astype(np.uint8)
            odd = look_at_mask(_noted_rgb(mask))[0] if handling.hole is None else None
    known = 255 - known if invert else known
    return shape_mask(known, photo.size, grow=handling.grow, hard=handling.hard), odd


def _noted_rgb(image: Image.Image, depth: tuple[float, float] | None = None) -> Image.Image:
    """Return an upright picture as ``read_rgb`` gives it."""
    rgb, levels = as_rgb(image, depth)
    rgb.info["origin"] = dataclasses.replace(origin_of(image), levels=levels)
    return rgb


def _drawn_for(pair: Pair, size: tuple[int, int], seed: int) -> np.ndarray:
    """Draw a mask of a family for a photo of ``size`` (width, height): the middle of a square."""
    side = max(size)
    try:
        mask = masks.make_mask(pair.mask_path, side, np.random.default_rng([seed, pair.index]))
    except ValueError as error:
        raise UserError(str(error), key="mask_path", got=pair.mask_path) from error
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    return mask[top : top + size[1], left : left + size[0]]


# ---- checking ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Look:
    """What decoding one mask showed."""

    generated: float  # share of the square's pixels
    is_even: bool  # all of one level
    half_known: float  # share of the hole's pixels
    is_nowhere_hole: bool  # no pixel of the square is plainly hole
    is_gray: bool = False  # nor any of the file
    odd: str | None = None
    size: tuple[int, int] | None = None  # of the file


def check_pairs(
    pairs: Sequence[Pair],
    image_size: int,
    *,
    invert_mask: bool = False,
    seed: int = 0,
    show_progress: bool = True,
    handling: Handling = PLAIN,
) -> list[float]:
    """Decode every picture and mask, and return the share of generated pixels of each pair.

    Threads decode; a mask that serves all is decoded once. Warns, once a kind, of masks that leave
    nothing to generate, or nothing known, or are not black and white, and of pictures that use
    little of their range. Raises ``UserError`` naming the first bad file, or the first mask
    that has another aspect ratio than its picture.
    """
    one_for_all = len({pair.mask_path for pair in pairs}) == 1 and not pairs[0].makes_mask

    def look(pair: Pair, photo: tuple[int, int]) -> _Look:
        if pair.makes_mask:
            names = {"invert": invert_mask, "seed": seed, "handling": handling, "photo": photo}
            return _look(load_mask(pair, image_size, **names))
        with ROOM.lease():
            image = _read_mask(pair, handling)
            odd, is_gray = None, False
            if handling.hole is None:
                odd, darkest = look_at_mask(image)
                is_gray = darkest > BLACK and not invert_mask
            mask = _cut_mask(pair, image, image_size, invert_mask, handling, photo)
            return dataclasses.replace(
                _look(mask), odd=odd, is_gray=is_gray, size=origin_of(image).size
            )

    def check(pair: Pair) -> tuple[Origin, str | None, _Look | None]:
        with ROOM.lease():
            image = _read_photo(pair, handling)
            origin, note, seen = origin_of(image), dim_picture(image, handling.depth), None
            if pair.is_alpha:
                cut = _cut_mask(pair, image, image_size, invert_mask, handling, origin.size)
                seen = _look(cut)
            _cut_photo(pair, image, image_size)
            del image
        if not (one_for_all or pair.is_alpha):
            seen = look(pair, origin.size)
        return origin, note, seen

    checked = list(in_threads(check, pairs, "checking pictures", show_progress))
    origins, notes, looks = zip(*checked, strict=True)
    if one_for_all:
        looks = [look(pairs[0], origins[0].size)] * len(pairs)
    for pair, origin, seen in zip(pairs, origins, looks, strict=True):
        _refuse_other_shape(pair, origin, seen, image_size)
    warn_of_extremes(pairs, [seen.generated for seen in looks])
    warn_of_kinds((pair.gt_path, note) for pair, note in zip(pairs, notes, strict=True))
    said = (_said_of_mask(seen, image_size) for seen in looks)
    warn_of_kinds((pair.mask_path, text) for pair, text in zip(pairs, said, strict=True))
    return [seen.generated for seen in looks]


def _look(mask: np.ndarray) -> _Look:
    hole, touched = (mask <= BLACK).sum(), (mask < WHITE).sum()
    return _Look(
        generated=1 - float(mask.mean()) / 255,
        is_even=bool((mask == mask.flat[0]).all()),
        half_known=1 - hole / max(1, touched),
        is_nowhere_hole=not hole,
    )


def _refuse_other_shape(pair: Pair, origin: Origin, look: _Look, size: int) -> None:
    """Raise ``UserError`` for a mask of another aspect ratio, whose hole would be elsewhere."""
    if look.size is None or look.is_even or _same_shape(look.size, origin.size):
        return
    if _is_of_the_square(look.size, origin.size, size):
        return
    turned = ""
    if origin.orientation > 1:
        turned = " (stored {} x {} and turned by its EXIF orientation {})".format(
            *origin.stored, origin.orientation
        )
    raise UserError(
        f"the mask has another shape than its picture {pair.gt_path}{turned}; make it for the"
        f" upright picture, or of {size} x {size} pixels for the square that is cut from it",
        path=pair.mask_path,
        expected="the shape of {} x {}".format(*origin.size),
        got="{} x {}".format(*look.size),
    )


def warn_of_extremes(pairs: Sequence[Pair], shares: Sequence[float]) -> None:
    """Warn of masks whose share of hole is 0 or 1."""
    for extreme, problem in ((0.0, "nothing to generate"), (1.0, "nothing known to start from")):
        hits = [pair for pair, share in zip(pairs, shares, strict=True) if share == extreme]
        if hits:
            first = hits[0].mask_file or hits[0].mask_path
            warnings.warn(
                f"{first}: this mask leaves {problem} ({len(hits)} of {len(pairs)} images);"
                " in a mask, white is known and black is generated",
                stacklevel=3,
            )


def _said_of_mask(look: _Look, size: int) -> str | None:
    if look.odd or look.size is None or look.is_even or look.half_known <= _SOFT_RIM:
        return look.odd
    told = f"{look.half_known:.0%} of its hole's pixels are half-known at {size} x {size}"
    if look.is_gray:
        told = "its hole is gray, which is half-known, and not black"
    elif look.is_nowhere_hole:
        told = f"its hole is thinner than a pixel at {size} x {size}, and all of it half-known"
    mends = "mask_hard: true makes these pixels hole, mask_grow: N enlarges the hole"
    return f"{told}, so that part of what should go stays; {mends}"


def dim_picture(image: Image.Image, depth: tuple[float, float] | None) -> str | None:
    """Say where a picture of more than 8 bits uses less than half of its range, or goes below 0."""
    origin = origin_of(image)
    if origin.is_deep_colour and 0 < max(high for _, high in image.getextrema()) < 128:
        return (
            "uses less than half of its 16 bits and will be dark; scale it in 16 bits first, as"
            " ImageMagick's -auto-level does"
        )
    if origin.levels is None or depth is not None:
        return None
    low, high, white = origin.levels.lowest, origin.levels.highest, origin.levels.white
    if low < 0:
        told, state = "all below 0 will be black", f"has values of {low:g} to {high:g}"
        return f"{state}, and {told}; depth_min and depth_max say what is black and white"
    if 0 < high < white / 2:
        most = 2 ** int(high).bit_length() - 1 if white > 255 else high
        return f"uses {high:g} of {white:g} and will be dark; depth_max: {most:g} makes that white"
    return None


def warn_of_kinds(found: Iterable[tuple[str, str | None]]) -> None:
    """Warn of what was found in files, once for each text that differs in numbers only."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for path, text in found:
        if text:
            kinds.setdefault(re.sub(r"#[0-9a-f]{6}|[-\d.]+", "", text), []).append((path, text))
    for alike in kinds.values():
        files = {path for path, _ in alike}
        path, text = alike[0]
        others = f" (and {len(files) - 1} more like it)" if len(files) > 1 else ""
        warnings.warn(f"{path}: {text}{others}", stacklevel=3)


def in_threads(
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
