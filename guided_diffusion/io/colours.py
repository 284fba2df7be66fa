"""From a picture's own mode, profile and depth to RGB or gray of 8 or 16 bits."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageCms

COLOURED = 32  # levels between a pixel's channels, more than a JPEG makes of gray
_BLOCK = 1 << 20  # pixels whose float64 copies are in memory at once
_SAME_COLOUR = 2  # levels by which a profile may differ from sRGB without any effect
_MODE_OF_PROFILE = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}


@dataclasses.dataclass(frozen=True)
class Levels:
    """The values of a picture with more than 8 bits of gray, and the ``white`` of their range.

    ``not_finite`` pixels are infinite or NaN, and do not count for the others.
    """

    lowest: float
    highest: float
    white: float
    not_finite: int = 0


def is_deep(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits of gray."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_rgb(image: Image.Image, depth: tuple[float, float] | None = None) -> Image.Image:
    """Return an upright picture as RGB over black; ``depth`` as for ``read_rgb``."""
    if is_deep(image):
        gray, levels = _scale_levels(image, depth, 255)
        return _with_origin(Image.fromarray(gray).convert("RGB"), image, levels=levels)
    layers = image
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        layers = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), layers)
    return _with_origin(layers.convert("RGB"), image)


def to_gray(image: Image.Image, depth: tuple[float, float] | None = None) -> Image.Image:
    """Return an upright picture as gray over black: ``L``, or ``I;16`` where it has more levels.

    All levels of 16 bits are kept, and without ``depth`` their values as well. Wider integers and
    floats are scaled so that their white is 65,535; with ``depth`` its white is.
    """
    if is_deep(image):
        gray, levels = _scale_levels(image, depth, 65535)
        return _with_origin(Image.fromarray(gray), image, levels=levels)
    rgb = to_rgb(image)
    is_coloured = colourfulness(rgb).getextrema()[1] > COLOURED
    return _with_origin(rgb.convert("L"), image, is_coloured=is_coloured)


def _with_origin(result: Image.Image, image: Image.Image, **changes: object) -> Image.Image:
    if "origin" in image.info:
        result.info["origin"] = dataclasses.replace(image.info["origin"], **changes)
    return result


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an upright picture with the colours that its profile gives it, in sRGB.

    Without a profile the picture comes back as it is; so does one of more than 8 bits of gray, and
    one whose profile is damaged, is for another mode, or is that of sRGB but for rounding.
    """
    profile = image.info.get("icc_profile")
    if not profile or is_deep(image):
        return image
    try:
        return _through_profile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except Exception:  # Pillow raises anything at all over a damaged profile
        return image


def _through_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    mode = _MODE_OF_PROFILE[profile.profile.xcolor_space.strip()]
    is_gray = image.mode in ("1", "L", "LA")
    if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not is_gray):
        return image
    convert = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB").apply
    if mode != "CMYK":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 1, 3)
        plain = Image.fromarray(grid).convert(mode)
        change = np.asarray(convert(plain)).astype(int) - np.asarray(plain.convert("RGB"))
        if np.abs(change).max() <= _SAME_COLOUR:
            return image
    layers = image.convert("RGBA") if image.has_transparency_data else image
    result = convert(layers.convert(mode))
    if layers.mode == "RGBA":
        result.putalpha(layers.getchannel("A"))
    result.info = {key: value for key, value in image.info.items() if key != "icc_profile"}
    return result


def _scale_levels(
    image: Image.Image, depth: tuple[float, float] | None, most: int
) -> tuple[np.ndarray, Levels]:
    """Scale deep gray so that its format's white, not the picture's brightest pixel, is ``most``.

    Integers count to 65,535 (a 32-bit file may go on to 2^31-1); floats to 1, 255 or 65,535,
    whichever is the first that holds them all. ``depth`` says otherwise what is black and white.
    Infinite pixels become black and white, NaN becomes 0.
    """
    values, is_float = np.asarray(image), image.mode == "F"

    def range_of(block: np.ndarray) -> tuple[float, float, int]:
        finite = block[np.isfinite(block)] if is_float else block
        missing = block.size - finite.size
        return (finite.min(), finite.max(), missing) if finite.size else (0, 0, missing)

    lows, highs, missing = zip(*_in_blocks(range_of, values), strict=True)
    lowest, highest = float(min(lows)), float(max(highs))
    whites = (1.0, 255.0, 65535.0) if is_float else (65535.0, 2.0**31 - 1)
    white = next((white for white in whites if highest <= white), highest)
    black, white = (0.0, white) if depth is None else depth
    scale = most / (white - black)

    def scaled(block: np.ndarray) -> np.ndarray:
        block = np.where(np.isnan(block), 0, block) if is_float else block
        block = block.astype(np.float64).clip(black, white)
        return np.rint((block - black) * scale).astype(np.uint8 if most == 255 else np.uint16)

    return np.concatenate(_in_blocks(scaled, values)), Levels(lowest, highest, white, sum(missing))


def _in_blocks(work: Callable, values: np.ndarray) -> list:
    """Apply ``work`` to some rows at a time: float64 copies of a whole picture take gigabytes."""
    rows = max(1, _BLOCK // values.shape[1])
    return [work(values[top : top + rows]) for top in range(0, len(values), rows)]


def extreme_channel(choose: Callable, rgb: Image.Image) -> Image.Image:
    """Return the lightest or darkest channel of each pixel."""
    first, second, third = rgb.split()
    return choose(choose(first, second), third)


def colourfulness(rgb: Image.Image) -> Image.Image:
    """Return the largest difference between two channels of each pixel."""
    return ImageChops.subtract(
        extreme_channel(ImageChops.lighter, rgb), extreme_channel(ImageChops.darker, rgb)
    )
