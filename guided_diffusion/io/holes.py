"""The hole of a mask: found by a rule, enlarged, and made hard.

A mask has one channel here, uint8 (H, W), 255 = known, 0 = hole. ``shape_mask`` works at the size
of the photo, in its pixels, before anything is scaled.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops

from guided_diffusion.errors import UserError
from guided_diffusion.io.colours import COLOURED, colourfulness, extreme_channel, is_deep, to_rgb

# A pixel is hole up to BLACK and known from WHITE on; a JPEG's noise is smaller.
BLACK, WHITE = 12, 243
_SAME_COLOUR = 48  # levels between the pixels of one stroke
_STRIP = 1 << 20  # pixels


def known_levels(image: Image.Image, rule: str | None = None) -> np.ndarray:
    """Return what an upright mask says of each pixel: uint8 (H, W), 255 = known, 0 = hole.

    ``rule`` says what is hole: ``None``, dark pixels, by the level of their darkest channel;
    ``zero``, pixels that are exactly black; ``alpha``, transparent pixels, by their transparency;
    ``color``, pixels that are not gray; ``#rrggbb``, pixels of about this colour. Raises
    ``UserError`` for ``alpha`` where the image has no transparency.
    """
    if rule == "alpha":
        if is_deep(image) or not image.has_transparency_data:
            raise UserError("has no transparency, which mask_hole: alpha makes the hole")
        return np.asarray(image.convert("RGBA").getchannel("A"))
    if rule == "zero" and is_deep(image):
        return _known(np.nan_to_num(np.asarray(image)) != 0)
    parts = [_known_of_rgb(part, rule) for part in strips(to_rgb(image))]
    return np.concatenate(parts)


def _known_of_rgb(rgb: Image.Image, rule: str | None) -> np.ndarray:
    if rule == "color":
        return _known(np.asarray(colourfulness(rgb)) <= COLOURED)
    if rule == "zero":
        return _known(np.asarray(extreme_channel(ImageChops.lighter, rgb)) > 0)
    if rule is not None:
        unlike = ImageChops.difference(rgb, Image.new("RGB", rgb.size, rule))
        return _known(np.asarray(extreme_channel(ImageChops.lighter, unlike)) > _SAME_COLOUR)
    return np.asarray(extreme_channel(ImageChops.darker, rgb))


def strips(image: Image.Image) -> Iterator[Image.Image]:
    """Yield an image in strips of about a million pixels, so that copies take little memory."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _known(where: np.ndarray) -> np.ndarray:
    return where.astype(np.uint8) * 255


def shape_mask(
    known: np.ndarray, size: tuple[int, int], *, grow: int = 0, hard: bool = False
) -> np.ndarray:
    """Bring a mask to a photo's ``size`` (width, height), harden it, and enlarge its hole.

    ``known`` is uint8 (H, W), 255 = known. With ``hard`` every pixel below ``WHITE`` becomes hole;
    ``grow`` is in pixels of the photo. A black and white mask stays black and white.
    """
    if known.shape != size[::-1]:
        is_hard = bool(((known == 0) | (known == 255)).all())
        how = Image.Resampling.NEAREST if is_hard else Image.Resampling.BICUBIC
        known = np.asarray(Image.fromarray(known).resize(size, how))
    if hard:
        known = harden(known)
    return grow_hole(known, grow)


def same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, but for rounding to whole pixels and 1 %."""
    (a_width, a_height), (b_width, b_height) = sorted((first, second))
    return abs(a_width - b_width * a_height / b_height) <= 1 + 0.01 * a_width


def harden(known: np.ndarray, white: int = WHITE) -> np.ndarray:
    """Make every pixel below ``white`` hole, and the others known: uint8 of the same shape."""
    return _known(known >= white)


def grow_hole(known: np.ndarray, pixels: int) -> np.ndarray:
    """Enlarge the hole of a mask, uint8 (H, W), by so many pixels to every side.

    Each pixel gets the darkest level within an octagon around it; soft values stay soft.
    """
    if not pixels:
        return known
    pixels = min(pixels, max(known.shape))
    diagonal = round((pixels - 1) * (1 - 2**-0.5))
    straight = pixels - 2 * diagonal
    # Octagons reach over the border. What np.roll brings back in is this padding.
    grown = np.pad(known, pixels, constant_values=255)
    # An octagon is the sum of four lines, and the darkest along a line is that of few shifts.
    lines = (((0, 1), straight), ((1, 0), straight), ((1, 1), diagonal), ((1, -1), diagonal))
    for step, reach in lines:
        grown = _darkest_along(grown, step, reach)
    return grown[pixels:-pixels, pixels:-pixels].copy()


def _darkest_along(known: np.ndarray, step: tuple[int, int], reach: int) -> np.ndarray:
    """Return the darkest level of the pixels up to ``reach`` steps to either side of each."""
    for sign in (1, -1):
        covered = 1  # pixels on this side, itself counted, whose darkest is known
        while covered <= reach:
            shift = min(covered, reach + 1 - covered)
            offset = (sign * shift * step[0], sign * shift * step[1])
            known = np.minimum(known, np.roll(known, offset, axis=(0, 1)))
            covered += shift
    return known
