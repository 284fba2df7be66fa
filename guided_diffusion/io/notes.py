"""What is odd about pictures and masks: notes that become warnings, one for each kind."""

import re
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageChops

from guided_diffusion.io.colours import COLOURED, colourfulness, extreme_channel
from guided_diffusion.io.holes import BLACK, WHITE, same_shape, strips
from guided_diffusion.io.images import Origin, Source, name_of, origin_of

_WORTH_A_NOTE = 1e-4  # share of a mask's pixels


def warn_of_kinds(found: Iterable[tuple[Source, str | None]]) -> None:
    """Warn of the notes on files, once for all notes that differ in numbers only."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for source, note in found:
        if note:
            kind = re.sub(r"#[0-9a-f]{6}|[-\d.]+", "", note)
            kinds.setdefault(kind, []).append((name_of(source), note))
    for alike in kinds.values():
        files = {path for path, _ in alike}
        path, note = alike[0]
        others = f" (and {len(files) - 1} more like it)" if len(files) > 1 else ""
        warnings.warn(f"{path}: {note}{others}", stacklevel=3)


def notes_on_picture(
    image: Image.Image, depth: tuple[float, float] | None = None, *, frames: bool = True
) -> list[str]:
    """Return what is odd about a picture that ``to_rgb`` or ``to_gray`` made.

    ``depth`` is what it was made with; ``frames`` says whether to count its frames.
    """
    origin = origin_of(image)
    notes = [note_on_frames(origin) if frames else None, _note_on_range(image, origin, depth)]
    if origin.levels and origin.levels.not_finite:
        count = origin.levels.not_finite
        notes.append(f"has infinite or NaN pixels ({count}), which become white or black")
    if origin.mode == "CMYK" and not origin.has_profile:
        notes.append("is CMYK without a colour profile, so that its colours in RGB are approximate")
    if origin.is_coloured:
        notes.append("is coloured, and becomes gray for a network of one channel")
    return [note for note in notes if note]


def note_on_frames(origin: Origin) -> str | None:
    """Say that only the first of several frames is taken."""
    return f"has {origin.frames} frames, and only the first is used" if origin.frames > 1 else None


def _note_on_range(
    image: Image.Image, origin: Origin, depth: tuple[float, float] | None
) -> str | None:
    """Say where a picture of more than 8 bits uses less than half of its range, or goes below 0."""
    if origin.is_deep_colour and 0 < max(np.ravel(image.getextrema())) < 128:
        return (
            "uses less than half of its 16 bits and will be dark; scale it in 16 bits first, as"
            " ImageMagick's -auto-level does"
        )
    if origin.levels is None or depth is not None:
        return None
    low, high, white = origin.levels.lowest, origin.levels.highest, origin.levels.white
    if low < 0:
        return (
            f"has values of {low:g} to {high:g}, and all below 0 will be black; depth_min and"
            " depth_max say what is black and white"
        )
    if 0 < high < white / 2:
        most = 2 ** int(high).bit_length() - 1 if white > 255 else high
        return f"uses {high:g} of {white:g} and will be dark; depth_max: {most:g} makes that white"
    return None


def notes_on_mask(image: Image.Image, *, invert: bool = False) -> tuple[list[str], int]:
    """Return what is odd about a mask that ``to_rgb`` made, and its darkest level.

    With ``invert`` white is the hole. A mask is odd where it is not black and white; gray rims, a
    JPEG's noise, and nearly white in the place of white are not odd. A note ends with what mends
    it, mostly a key.
    """
    darkest, lightest, coloured = np.zeros((3, 256), int)  # histograms
    for strip in strips(image):
        darkest += extreme_channel(ImageChops.darker, strip).histogram()
        lightest += extreme_channel(ImageChops.lighter, strip).histogram()
        coloured += colourfulness(strip).histogram()
    origin, pixels, note = origin_of(image), image.width * image.height, None
    is_coloured = coloured[COLOURED + 1 :].sum() > max(3, _WORTH_A_NOTE * pixels)
    is_gray = darkest[BLACK + 1 : WHITE].sum() > pixels / 2
    is_black = not darkest[BLACK + 1 :].sum()
    highest, white = int(np.flatnonzero(lightest)[-1]), 255
    if origin.levels is not None:
        highest, white = origin.levels.highest, origin.levels.white
    if origin.is_mostly_transparent and not (invert and darkest[WHITE:].any()):
        note = (
            "is a layer whose ground is transparent; mask_hole: alpha and invert_mask: true make"
            " what is painted the hole"
        )
    elif origin.is_transparent and (is_coloured or is_gray or is_black):
        note = (
            "is not black and white where it is opaque; mask_hole: alpha makes the transparent"
            " parts the hole"
        )
    elif is_coloured:
        colour = _main_colour(image)
        note = (
            f"is coloured ({colour}); draw the hole black on white, or set mask_hole: color (what"
            f" is not gray is hole) or mask_hole: '{colour}' (this colour is hole)"
        )
    elif 0 < highest < white / 2:
        note = (
            f"has no level above {highest:g} of {white:g}, so that nothing is known;"
            " mask_hole: zero makes every pixel known that is not 0"
        )
    elif is_gray:
        note = "is mostly gray, which is half-known; is it a mask? Draw the hole black on white"
    notes = [note_on_frames(origin), note]
    return [note for note in notes if note], int(np.flatnonzero(darkest)[0])


def _main_colour(image: Image.Image) -> str:
    """Return the most frequent colour that is not gray, as #rrggbb."""
    found = []
    for strip in strips(image):
        pixels = np.asarray(strip)[np.asarray(colourfulness(strip)) > COLOURED]
        found.append(pixels[:: max(1, len(pixels) // 10_000)])
    colours, counts = np.unique(np.concatenate(found), axis=0, return_counts=True)
    return "#{:02x}{:02x}{:02x}".format(*colours[counts.argmax()])


def note_on_turning(photo: Origin, mask: Origin) -> str | None:
    """Say that a photo is turned by its EXIF data and its mask is not, where both fit."""
    if photo.orientation == 1 or mask.orientation > 1 or not same_shape(mask.size, photo.stored):
        return None
    return (
        f"its photo is turned by EXIF orientation {photo.orientation}, and the mask is not; if the"
        " mask was made for the pixels as stored, the hole lies elsewhere"
    )
