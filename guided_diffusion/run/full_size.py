"""Cuts of a photo around its holes, and their results pasted back: known pixels stay as they are.

A photo is (H, W, C), uint8 or uint16; its mask uint8 (H, W), 255 = known, 0 = hole. A cut is a
square of the photo that the network sees. It may reach beyond the photo, where nothing is known.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from guided_diffusion.io.holes import grow_hole
from guided_diffusion.io.images import center_crop
from guided_diffusion.io.results import as_image
from guided_diffusion.run.windows import window_starts

Box = tuple[int, int, int, int]  # left, top, right and bottom, in pixels of the photo

_GRID = 256  # cells along the longer side of the photo, on which neighbouring holes are joined
_LARGEST_SQUARE = 1024  # pixels a side; a square of this size fits into memory anywhere
# Between the seeds of a photo's cuts: beyond those of 7,000 samples, so that none coincide.
CUT_SEED_STRIDE = 7_368_787_297


@dataclass(frozen=True)
class Cut:
    """A square around a hole, in pixels of the photo; some may lie outside of it.

    ``hole`` is the box (left, top, right, bottom) of the hole pixels that the cut fills. A long
    hole is filled by several cuts, whose boxes overlap: over ``fade`` pixels from the left and from
    the top of its box, a cut is mixed with the cut before it.
    """

    left: int
    top: int
    side: int
    hole: Box
    fade: tuple[int, int] = (0, 0)


# ---- Where to cut --------------------------------------------------------------------------------


def find_cuts(mask: np.ndarray, image_size: int) -> list[Cut]:
    """Return the cuts that fill a mask (H, W), from the top left on; none if there is no hole.

    Each has its hole within the middle half and is not smaller than ``image_size``, where the photo
    allows both. Holes that share a cut's middle are one. A hole that is long and much longer than
    the photo's short side is divided along its length.
    """
    boxes = merge_boxes(_hole_boxes(mask, image_size), image_size // 2)
    cuts = []
    for box in sorted(boxes, key=lambda box: box[1::-1]):
        cuts += _cuts_of(box, mask.shape, image_size)
    return cuts


def _hole_boxes(mask: np.ndarray, image_size: int) -> Iterator[Box]:
    """Yield the boxes of the holes; neighbours on a coarse grid are one hole."""
    height, width = mask.shape
    cell = max(1, image_size // 16, -(-max(height, width) // _GRID))
    rows, columns = -(-height // cell), -(-width // cell)
    padded = np.full((rows * cell, columns * cell), 255, np.uint8)
    padded[:height, :width] = mask
    is_hole = padded.reshape(rows, cell, columns, cell).min(axis=(1, 3)) < 255
    for cells in _connected(is_hole):
        top, left = map(int, cells.min(axis=0) * cell)
        bottom, right = cells.max(axis=0) * cell + cell
        x0, y0, x1, y1 = Image.fromarray(255 - mask[top:bottom, left:right]).getbbox()
        yield left + x0, top + y0, left + x1, top + y1


def _connected(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the (row, column) pairs of each connected part of a bool grid, corners included."""
    remaining = {(int(y), int(x)) for y, x in np.argwhere(cells)}
    while remaining:
        found, edge = [], [remaining.pop()]
        while edge:
            y, x = edge.pop()
            found.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & remaining
            remaining -= near
            edge += near
        yield np.array(found)


def merge_boxes(boxes: Iterable[Box], reach: int) -> list[Box]:
    """Join boxes that overlap, or that fit into one square of ``reach`` pixels.

    No two boxes of the result belong together.
    """
    boxes = list(boxes)
    found, count = np.empty((4, len(boxes)), int), 0
    while boxes:
        x0, y0, x1, y1 = boxes.pop()
        left, top, right, bottom = found[:, :count]
        width = np.maximum(right, x1) - np.minimum(left, x0)
        height = np.maximum(bottom, y1) - np.minimum(top, y0)
        overlaps = (width < right - left + x1 - x0) & (height < bottom - top + y1 - y0)
        near = np.flatnonzero(overlaps | (np.maximum(width, height) <= reach))
        if len(near):  # with the larger box, the others may not belong together any more
            left, top, right, bottom = found[:, near[0]].tolist()
            boxes.append((min(left, x0), min(top, y0), max(right, x1), max(bottom, y1)))
            found[:, near[0] : count - 1] = found[:, near[0] + 1 : count]
            count -= 1
        else:
            found[:, count] = x0, y0, x1, y1
            count += 1
    return [tuple(box) for box in found[:, :count].T.tolist()]


def _cuts_of(hole: Box, shape: tuple[int, int], image_size: int) -> Iterator[Cut]:
    """Yield the cut of a hole, or several along a hole too long for one square.

    A square's side is at most twice the photo's short side, or twice the network's, or 1,024
    pixels. So a large square has no more pixels than two photos.
    """
    left, top, right, bottom = hole
    width, height, shortest = right - left, bottom - top, max(min(shape), image_size)
    length = max(width, height)
    if length <= max(2 * shortest, _LARGEST_SQUARE):
        yield _cut_around(hole, shape, image_size)
        return
    starts = window_starts(length, shortest, shortest - shortest // 4)
    for number, start in enumerate(starts):
        shared = starts[number - 1] + shortest - start if number else 0
        if width == length:
            part, fade = (left + start, top, left + start + shortest, bottom), (shared, 0)
        else:
            part, fade = (left, top + start, right, top + start + shortest), (0, shared)
        yield _cut_around(part, shape, shortest, fade)


def _cut_around(
    hole: Box, shape: tuple[int, int], image_size: int, fade: tuple[int, int] = (0, 0)
) -> Cut:
    """Return the cut of a hole: as large as its context needs and as much inside as it can be."""
    left, top, right, bottom = hole
    longest = max(right - left, bottom - top)
    side = max(image_size, 2 * longest)
    side = max(min(side, *shape), longest)  # inside the photo, unless the hole itself is too long
    height, width = shape
    start = _start(left, right, side, width), _start(top, bottom, side, height)
    return Cut(*start, side, hole, fade)


def _start(low: int, high: int, side: int, length: int) -> int:
    """Return where a cut of ``side`` begins that has low to high in its middle, if it can."""
    middle = (low + high - side) // 2
    return (length - side) // 2 if side > length else min(max(middle, 0), length - side)


# ---- What the network sees -----------------------------------------------------------------------


def cut_out(
    photo: np.ndarray, mask: np.ndarray, cut: Cut, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a cut scaled to the network: picture (size, size, C), and its mask, uint8.

    A pixel is known only where all that it covers is known. Beyond the photo its border pixels are
    repeated, as hole.
    """
    inside, around = _inside(mask, cut)
    pixels = np.pad(photo[inside], (*around, (0, 0)), mode="edge")
    picture = center_crop(as_image(pixels), size)
    is_known = _shrink_known(known_in(mask, cut), size)
    return picture, np.repeat(is_known[:, :, None], photo.shape[2], axis=2)


def known_in(mask: np.ndarray, cut: Cut) -> np.ndarray:
    """Return the part of a mask (H, W) that a cut sees, (side, side)."""
    inside, around = _inside(mask, cut)
    return np.pad(mask[inside], around)


def _inside(mask: np.ndarray, cut: Cut) -> tuple[tuple[slice, slice], tuple]:
    """Return the part of a cut that the photo has, and how much is missing on each side."""
    left, top, right, bottom = cut.left, cut.top, cut.left + cut.side, cut.top + cut.side
    height, width = mask.shape
    rows, columns = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    above_below = max(-top, 0), max(bottom - height, 0)
    return (rows, columns), (above_below, (max(-left, 0), max(right - width, 0)))


def _shrink_known(known: np.ndarray, size: int) -> np.ndarray:
    """Scale a square mask; hard ones stay hard, and a pixel with any hole in it is hole."""
    image, is_hard = Image.fromarray(known), ((known == 0) | (known == 255)).all()
    image = image.convert("F") if is_hard else image  # bytes would round 254.6 to known
    is_enlarged = is_hard and len(known) < size
    how = Image.Resampling.NEAREST if is_enlarged else Image.Resampling.BOX
    share = np.asarray(image.resize((size, size), how))
    return np.where(share >= 254.99, 255, 0).astype(np.uint8) if is_hard else share


# ---- Back into the photo -------------------------------------------------------------------------


def paste(photo: np.ndarray, mask: np.ndarray, cut: Cut, sample: np.ndarray, feather: int) -> None:
    """Put a cut's result, (size, size, C) of the photo's type, into its hole, in place.

    The ``feather`` known pixels around the hole are mixed with the result; all others stay as they
    are. The cuts of a photo are pasted in the order of ``find_cuts``.
    """
    height, width = mask.shape
    left, top, right, bottom = cut.hole
    # The box of all pixels that may change: of the photo and of the cut.
    x0, y0 = max(left - feather, cut.left, 0), max(top - feather, cut.top, 0)
    x1 = min(right + feather, cut.left + cut.side, width)
    y1 = min(bottom + feather, cut.top + cut.side, height)
    made = _scaled_part(sample, cut, (x0, y0, x1, y1))
    share = _share(mask, cut, feather, (x0, y0, x1, y1))[:, :, None].astype(np.uint32)
    part = photo[y0:y1, x0:x1]
    part[:] = (part * (255 - share) + made * share + 127) // 255


def _scaled_part(sample: np.ndarray, cut: Cut, box: Box) -> np.ndarray:
    """Return the part of a sample in ``box`` of the photo, at the photo's size."""
    if len(sample) != cut.side:
        is_deep = sample.dtype == np.uint16  # which Pillow scales as floats only
        image = Image.fromarray(sample[:, :, 0].astype(np.float32)) if is_deep else as_image(sample)
        scaled = np.asarray(image.resize((cut.side, cut.side), Image.Resampling.LANCZOS))
        scaled = np.rint(scaled).clip(0, 65_535).astype(np.uint16) if is_deep else scaled
        sample = scaled.reshape(cut.side, cut.side, -1)
    x0, y0, x1, y1 = box
    return sample[y0 - cut.top : y1 - cut.top, x0 - cut.left : x1 - cut.left]


def _share(mask: np.ndarray, cut: Cut, feather: int, box: Box) -> np.ndarray:
    """Return the share of new pixels in ``box``, uint8 (H, W); holes of other cuts are known."""
    left, top, right, bottom = cut.hole
    around = np.pad(mask[top:bottom, left:right], 2 * feather, constant_values=255)
    y0, x0 = top - 2 * feather, left - 2 * feather
    share = blend(around, feather)[box[1] - y0 : box[3] - y0, box[0] - x0 : box[2] - x0]
    rows, columns = np.arange(box[1], box[3]) + 0.5 - top, np.arange(box[0], box[2]) + 0.5 - left
    for distance, fade in ((columns[None], cut.fade[0]), (rows[:, None], cut.fade[1])):
        if fade:
            share = np.rint(share * (distance / fade).clip(0, 1)).astype(np.uint8)
    return share


def blend(mask: np.ndarray, feather: int) -> np.ndarray:
    """Return the share of new pixels, uint8 (H, W): 255 in the hole, 0 away from it.

    It falls evenly over the ``feather`` pixels around the hole. Half-known pixels are mixed.
    """
    hole = 255 - mask
    if not feather:
        return hole
    # The box mean of a hole that was grown by the radius is 1 on the hole. It falls to 0 over twice
    # the radius, which is half the feather, rounded up.
    growth = feather // 2
    radius = feather - growth
    grown = np.pad(255 - grow_hole(mask, growth), radius, mode="edge")
    soft = np.asarray(Image.fromarray(grown).filter(ImageFilter.BoxBlur(radius)))
    return np.maximum(hole, soft[radius:-radius, radius:-radius])
