"""What of a mask is hole: masks that are not black and white, and holes made larger or hard.

A mask has one channel here, uint8 (H, W), 255 = known, 0 = hole. ``shape_mask`` works at the size
of the photo, in its pixels, before anything is scaled.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops

from guided_diffusion.errors import UserError
from guided_diffusion.io.images import Levels, as_rgb, is_deep, origin_of

# From these levels on a pixel is hole, and known; the noise of a JPEG lies beyond both.
BLACK, WHITE = 12, 243
_COLOURED = 32  # levels between a pixel's channels, more than a JPEG makes of gray
_SAME_COLOUR = 48  # levels between the pixels of one stroke
_WORTH_TELLING = 1e-4  # share of a mask's pixels


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
    rgb = as_rgb(image)[0]
    if rule == "color":
        return _known(np.asarray(_colourfulness(rgb)) <= _COLOURED)
    if rule == "zero":
        return _known(np.asarray(_extreme(ImageChops.lighter, rgb.split())) > 0)
    if rule is not None:
        stroke = Image.new("RGB", rgb.size, rule)
        unlike = _extreme(ImageChops.lighter, ImageChops.difference(rgb, stroke).split())
        return _known(np.asarray(unlike) > _SAME_COLOUR)
    return np.asarray(_extreme(ImageChops.darker, rgb.split()))


def _known(where: np.ndarray) -> np.ndarray:
    return where.astype(np.uint8) * 255


def _extreme(choose: Callable, channels: tuple[Image.Image, ...]) -> Image.Image:
    """Return the lightest or darkest of three channels, pixel by pixel."""
    first, second, third = channels
    return choose(choose(first, second), third)


def _colourfulness(rgb: Image.Image) -> Image.Image:
    """Return the largest difference between two channels of each pixel."""
    channels = rgb.split()
    return ImageChops.subtract(
        _extreme(ImageChops.lighter, channels), _extreme(ImageChops.darker, channels)
    )


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


def oddity(image: Image.Image) -> str | None:
    """Say what of a mask that ``read_rgb`` read is not black and white, and what would mend it.

    Nothing is odd about gray rims, the noise of a JPEG, or nearly white for white.
    """
    origin, channels = origin_of(image), image.split()
    dim = _dimness(_extreme(ImageChops.lighter, channels), origin.levels)
    coloured = _colourfulness(image)
    many = max(3, _WORTH_TELLING * image.width * image.height)
    if sum(coloured.histogram()[_COLOURED + 1 :]) > many:
        if origin.is_transparent:
            return "is a picture with transparent parts; mask_hole: alpha makes them the hole"
        return _colours(image, coloured)
    if dim:
        return f"{dim}, so that nothing is known; mask_hole: zero makes known what is not 0"
    histogram = _extreme(ImageChops.darker, channels).histogram()
    if sum(histogram[BLACK + 1 : WHITE]) > image.width * image.height / 2:
        if origin.is_transparent:
            return "is gray with transparent parts; mask_hole: alpha makes them the hole"
        return "is mostly gray, which is half-known; is it a mask? Draw the hole black on white"
    if origin.is_transparent and not sum(histogram[BLACK + 1 :]):
        return "is black, and its shape is transparency; mask_hole: alpha makes that the hole"
    return None


def _dimness(brightest: Image.Image, levels: Levels | None) -> str | None:
    """Say how far a mask's levels go, where that is less than half of the way to white."""
    high, white = brightest.getextrema()[1], 255
    if levels is not None:
        high, white = levels.highest, levels.white
    return f"has no level above {high:g} of {white:g}" if 0 < high < white / 2 else None


def _colours(image: Image.Image, coloured: Image.Image) -> str:
    """Say what to do with a mask that has colours: few are strokes or labels, many a photo."""
    pixels = np.asarray(image)[np.asarray(coloured) > _COLOURED]
    pixels = pixels[:: max(1, len(pixels) // 100_000)]
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    main = "#{:02x}{:02x}{:02x}".format(*colours[counts.argmax()])
    told = f"is coloured ({main}), not black and white"
    if len(np.unique(colours >> 4, axis=0)) <= 24:
        return f"{told}; mask_hole: color makes the hole of what is not gray"
    if counts.max() > len(pixels) / 20:
        return f"{told}; mask_hole: '{main}' makes the hole of what has this colour"
    return f"{told}; is it a mask? Draw the hole black on white"
