"""The six mask families of the paper's tables (section 5), for any picture size.

In a mask 255 is known and 0 is generated. Run as a program it writes a folder of masks:

    python guided_diffusion/masks.py --kind thick --count 8 --size 256 --seed 0 --out DIR
"""

import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FAMILIES = ("thin", "thick", "ev2li", "nn2", "ex64", "genhalf")
KNOWN, GENERATED = 255, 0
# Below this a stroke of one pixel is a large part of the picture, and redrawing need not end soon.
MIN_SIZE = 8
MAX_SIZE = 16384


@dataclass(frozen=True)
class _Strokes:
    """The published settings of a random family; lengths in pixels of a 256 px picture."""

    min_lines: int
    max_lines: int
    max_length: int
    max_width: int
    box_probability: float


_STROKES = {
    "thin": _Strokes(4, 50, max_length=40, max_width=10, box_probability=0.0),
    "thick": _Strokes(1, 5, max_length=200, max_width=100, box_probability=0.3),
}
_REFERENCE_SIZE = 256
_MAX_SEGMENTS = 5
_MIN_LENGTH, _MIN_WIDTH = 10, 5
_MAX_ANGLE = 4
_MAX_BOXES, _MIN_BOX, _MAX_BOX, _BOX_MARGIN = 3, 30, 150, 10


def make_mask(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one mask of a family.

    Returns uint8 of shape (``size``, ``size``): 255 known, 0 generated. ``thin`` and ``thick``
    draw from ``rng`` and leave at least half of the picture known; their lengths and widths grow
    with ``size``, so that one state of ``rng`` gives the same drawing at every size, but for
    rounding, which may also decide whether a drawing leaves enough and is kept. The other four are
    fixed patterns and leave ``rng`` alone. At an odd ``size`` the middle column of ``genhalf`` is
    generated.

    Raises:
        ValueError: ``kind`` is not in ``FAMILIES``, or ``size`` is not in 8..16384.
    """
    if kind not in FAMILIES:
        raise ValueError(f"mask family {kind!r} is unknown, expected one of {', '.join(FAMILIES)}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"mask size must be in {MIN_SIZE}..{MAX_SIZE}, found {size}")
    if kind in _STROKES:
        return _random_mask(_STROKES[kind], size, rng)
    mask = np.full((size, size), GENERATED, np.uint8)
    if kind == "ev2li":
        mask[::2] = KNOWN
    elif kind == "nn2":
        mask[::2, ::2] = KNOWN
    elif kind == "ex64":
        side = (size + 2) // 4  # a quarter, to the nearest pixel
        start = (size - side) // 2
        mask[start : start + side, start : start + side] = KNOWN
    else:
        mask[:, : size // 2] = KNOWN
    return mask


def generated_share(mask: np.ndarray) -> float:
    """Return the share, in [0, 1], of a mask's pixels that are to be generated."""
    return float(np.mean(mask == GENERATED))


def _random_mask(strokes: _Strokes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw strokes or boxes after LaMa's published settings until at most half is generated."""
    while True:
        picture = Image.new("L", (size, size), KNOWN)
        draw = ImageDraw.Draw(picture)
        if rng.random() < strokes.box_probability:
            _draw_boxes(draw, size, rng)
        else:
            _draw_lines(draw, strokes, size, rng)
        mask = np.array(picture)
        if generated_share(mask) <= 0.5:
            return mask


def _draw_lines(
    draw: ImageDraw.ImageDraw, strokes: _Strokes, size: int, rng: np.random.Generator
) -> None:
    """Draw poly-lines of one to five segments, each with its own angle, length and width."""
    scale = size / _REFERENCE_SIZE
    for line in range(rng.integers(strokes.min_lines, strokes.max_lines, endpoint=True)):
        x, y = rng.random(2) * size
        for _ in range(rng.integers(1, _MAX_SEGMENTS, endpoint=True)):
            angle = 0.01 + rng.integers(_MAX_ANGLE)
            if line % 2 == 0:
                angle = 2 * math.pi - angle
            length = scale * (_MIN_LENGTH + rng.integers(strokes.max_length))
            width = max(1, round(scale * (_MIN_WIDTH + rng.integers(strokes.max_width))))
            end_x = min(max(x + length * math.sin(angle), 0), size - 1)
            end_y = min(max(y + length * math.cos(angle), 0), size - 1)
            _draw_segment(draw, (int(x), int(y)), (int(end_x), int(end_y)), width)
            x, y = end_x, end_y


def _draw_segment(
    draw: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], width: int
) -> None:
    """Draw one straight stroke with a disc of its width at either end."""
    draw.line([start, end], fill=GENERATED, width=width)
    for x, y in (start, end):
        left, top = x - width // 2, y - width // 2
        draw.ellipse([left, top, left + width - 1, top + width - 1], fill=GENERATED)


def _draw_boxes(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    """Draw one to three boxes that keep off the border."""
    scale = size / _REFERENCE_SIZE
    for _ in range(rng.integers(1, _MAX_BOXES, endpoint=True)):
        sides = rng.integers(_MIN_BOX, _MAX_BOX, size=2, endpoint=True)
        starts = rng.integers(_BOX_MARGIN, _REFERENCE_SIZE - _BOX_MARGIN - sides, endpoint=True)
        left, top = (round(scale * int(start)) for start in starts)
        width, height = (max(1, round(scale * int(side))) for side in sides)
        draw.rectangle([left, top, left + width - 1, top + height - 1], fill=GENERATED)


if __name__ == "__main__":  # the program lies in tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module("guided_diffusion.tools.make_masks", run_name="__main__")
