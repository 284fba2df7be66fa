"""What of a mask is hole: masks that are not black and white, and holes made larger or hard.

A mask has one channel here, uint8 (H, W), 255 = known, 0 = hole. ``shape_mask`` works at the size
of the photo, in its pixels, before anything is scaled.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageChops

from guided_diffusion.errors import UserError
from guided_diffusion.io.images import as_rgb, is_deep, origin_of

# From these levels on a pixel is hole, and known; the noise of a JPEG lies beyond both.
BLACK, WHITE = 12, 243
_COLOURED = 32  # levels between a pixel's channels, more than a JPEG makes of gray
_SAME_COLOUR = 48  # levels between the pixels of one stroke
_WORTH_TELLING = 1e-4  # share of a mask's pixels
_STRIP = 1 << 20  # pixels


# ---- reading -----------------------------------------------------------------------------------


def known_levels(image: Image.Image, rule: str | None = None) -> np.ndarray:
    """Return what an upright mask says of each pixel: uint8 (H, W), 255 = known, 0 = hole.

    By ``rule``: ``None``, its brightness, of the darkest channel; ``zero``, hole is what is exactly
    black; ``alpha``, what is transparent, as far as it is; ``color``, what is not gray;
    ``#rrggbb``, what has about this colour. Raises ``UserError`` where there is no transparency.
    """
    if rule == "alpha":
        if is_deep(image) or not image.has_transparency_data:
            raise UserError("has no transparency, which would say where the hole is")
        return np.asarray(image.convert("RGBA").getchannel("A"))
    if rule == "zero" and is_deep(image):
        return _known(np.nan_to_num(np.asarray(image)) != 0)
    parts = [_known_of_rgb(part, rule) for part in _strips(as_rgb(image)[0])]
    return np.concatenate(parts)


def _known_of_rgb(rgb: Image.Image, rule: str | None) -> np.ndarray:
    if rule == "color":
        return _known(np.asarray(_colourfulness(rgb)) <= _COLOURED)
    if rule == "zero":
        return _known(np.asarray(_extreme(ImageChops.lighter, rgb)) > 0)
    if rule is not None:
        unlike = ImageChops.difference(rgb, Image.new("RGB", rgb.size, rule))
        return _known(np.asarray(_extreme(ImageChops.lighter, unlike)) > _SAME_COLOUR)
    return np.asarray(_extreme(ImageChops.darker, rgb))


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """Yield an image in strips, whose channels and differences take little memory."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _known(where: np.ndarray) -> np.ndarray:
    return where.astype(np.uint8) * 255


def _extreme(choose: Callable, rgb: Image.Image) -> Image.Image:
    """Return the lightest or darkest channel of each pixel."""
    first, second, third = rgb.split()
    return choose(choose(first, second), third)


def _colourfulness(rgb: Image.Image) -> Image.Image:
    """Return the largest difference between two channels of each pixel."""
    return ImageChops.subtract(_extreme(ImageChops.lighter, rgb), _extreme(ImageChops.darker, rgb))


# ---- shaping -----------------------------------------------------------------------------------


def shape_mask(
    known: np.ndarray, size: tuple[int, int], *, grow: int = 0, hard: bool = False
) -> np.ndarray:
    """Bring a mask to a photo's ``size`` (width, height), harden it, and enlarge its hole.

    ``known`` is uint8 (H, W), 255 = known. With ``hard`` everything that is not plainly known is
    hole; ``grow`` is in pixels of the photo. Black and white stay so when they are scaled.
    """
    if known.shape != size[::-1]:
        is_hard = bool(((known == 0) | (known == 255)).all())
        how = Image.Resampling.NEAREST if is_hard else Image.Resampling.BICUBIC
        known = np.asarray(Image.fromarray(known).resize(size, how))
    if hard:
        known = harden(known)
    return grow_hole(known, grow)


def harden(known: np.ndarray, white: int = WHITE) -> np.ndarray:
    """Make a hole of every pixel below ``white``, and known of the others: uint8 of one shape."""
    return _known(known >= white)


def grow_hole(known: np.ndarray, pixels: int) -> np.ndarray:
    """Enlarge the hole of a mask, uint8 (H, W), by so many pixels to every side.

    Each pixel gets the darkest level within an octagon around it; soft values stay soft.
    """
    if not pixels:
        return known
    diagonal = round((pixels - 1) * (1 - 2**-0.5))
    straight = pixels - 2 * diagonal
    grown = np.pad(known, pixels, constant_values=255)  # ways from hole to pixel may lead outside
    # An octagon is the sum of four lines, and the darkest along a line is that of few shifts.
    lines = (((0, 1), straight), ((1, 0), straight), ((1, 1), diagonal), ((1, -1), diagonal))
    for step, reach in lines:
        grown = _darkest_along(grown, step, reach)
    return grown[pixels:-pixels, pixels:-pixels].copy()


def _darkest_along(known: np.ndarray, step: tuple[int, int], reach: int) -> np.ndarray:
    """Return the darkest level of the pixels up to ``reach`` steps to either side of each."""
    for sign in (1, -1):
        done, left = 1, reach + 1  # so many pixels on this side are looked at, and are to be
        while done < left:
            shift = min(done, left - done)
            known = _darker_of_shifted(known, sign * shift * step[0], sign * shift * step[1])
            done += shift
    return known


def _darker_of_shifted(known: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = known.shape
    if abs(down) >= height or abs(right) >= width:
        return known
    here = (slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0)))
    there = (
        slice(max(-down, 0), height + min(-down, 0)),
        slice(max(-right, 0), width + min(-right, 0)),
    )
    darker = known.copy()
    np.minimum(known[here], known[there], out=darker[here])
    return darker


# ---- what is odd -------------------------------------------------------------------------------


def look_at_mask(image: Image.Image) -> tuple[str | None, int]:
    """Look at a mask that ``read_rgb`` read; return what is odd about it, and its darkest level.

    Odd is what is not black and white; gray rims, the noise of a JPEG, and nearly white for white
    are not. What is said ends with what would mend it, which is mostly a key.
    """
    darkest, brightest, coloured = (
        np.sum([_extreme_or_colour(kind, part).histogram() for part in _strips(image)], axis=0)
        for kind in (ImageChops.darker, ImageChops.lighter, None)
    )
    first, last = np.flatnonzero(darkest)[0], np.flatnonzero(brightest)[-1]
    return _oddity(image, darkest, int(last), coloured), int(first)


def _extreme_or_colour(kind: Callable | None, rgb: Image.Image) -> Image.Image:
    return _colourfulness(rgb) if kind is None else _extreme(kind, rgb)


def _oddity(
    image: Image.Image, darkest: np.ndarray, brightest: int, coloured: np.ndarray
) -> str | None:
    """Say what is odd, by histograms of the darkest channel and of colourfulness."""
    origin, pixels = origin_of(image), image.width * image.height
    if coloured[_COLOURED + 1 :].sum() > max(3, _WORTH_TELLING * pixels):
        if origin.is_transparent:
            return "is a picture with transparent parts; mask_hole: alpha makes them the hole"
        return _colours(image)
    high, white = brightest, 255
    if origin.levels is not None:
        high, white = origin.levels.highest, origin.levels.white
    if 0 < high < white / 2:
        told = f"has no level above {high:g} of {white:g}, so that nothing is known"
        return f"{told}; mask_hole: zero makes known what is not 0"
    if darkest[BLACK + 1 : WHITE].sum() > pixels / 2:
        if origin.is_transparent:
            return "is gray with transparent parts; mask_hole: alpha makes them the hole"
        return "is mostly gray, which is half-known; is it a mask? Draw the hole black on white"
    if origin.is_transparent and not darkest[BLACK + 1 :].sum():
        return "is black, and its shape is transparency; mask_hole: alpha makes that the hole"
    return None


def _colours(image: Image.Image) -> str:
    """Say what to do with a mask that has colours: few are strokes or labels, many a photo."""
    found = []
    for part in _strips(image):
        pixels = np.asarray(part)[np.asarray(_colourfulness(part)) > _COLOURED]
        found.append(pixels[:: max(1, len(pixels) // 10_000)])
    pixels = np.concatenate(found)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    main = "#{:02x}{:02x}{:02x}".format(*colours[counts.argmax()])
    told = f"is coloured ({main}), not black and white"
    if len(np.unique(colours >> 4, axis=0)) <= 24:
        return f"{told}; mask_hole: color makes the hole of what is not gray"
    if counts.max() > len(pixels) / 20:
        return f"{told}; mask_hole: '{main}' makes the hole of what has this colour"
    return f"{told}; is it a mask? Draw the hole black on white"
