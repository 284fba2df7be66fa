"""Cuts of a photo around its holes, and the way back: a photo keeps its size and its known pixels.

A photo is uint8 (H, W, 3), its mask uint8 (H, W), 255 = known, 0 = hole. A cut is a square of the
photo that the network sees; it may reach beyond the photo, where nothing is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from guided_diffusion.io.holes import grow_hole
from guided_diffusion.io.images import center_crop

Box = tuple[int, int, int, int]  # left, top, right and bottom, in pixels of the photo

_CELLS = 32  # of the grid on which near holes are found, along the longer side of the photo
# Between the seeds of a photo's cuts: beyond those of 7,000 samples, so that none coincide.
CUT_SEED_STRIDE = 7_368_787_297


@dataclass(frozen=True)
class Cut:
    """A square around a hole, in pixels of the photo.

    ``hole`` is the box (left, top, right, bottom) of the hole pixels that the cut fills.
    """

    left: int
    top: int
    side: int
    hole: Box

    @property
    def box(self) -> Box:
        """Left, top, right and bottom in the photo; some may lie outside of it."""
        return self.left, self.top, self.left + self.side, self.top + self.side


# ---- Where to cut --------------------------------------------------------------------------------


def find_cuts(mask: np.ndarray, image_size: int) -> list[Cut]:
    """Return the cuts that fill a mask (H, W), from the top left on; none where nothing is hole.

    Each has its hole within the middle half where the photo allows, and is never smaller than
    ``image_size``, again where the photo allows. Holes that share a cut's middle are one.
    """
    boxes = _merge(list(_hole_boxes(mask, image_size)), image_size)
    return [
        _cut_around(box, mask.shape, image_size) for box in sorted(boxes, key=lambda b: b[1::-1])
    ]


def _hole_boxes(mask: np.ndarray, image_size: int) -> Iterator[Box]:
    """Yield the boxes of the holes; neighbours on a coarse grid are one hole."""
    height, width = mask.shape
    cell = max(1, image_size // 16, -(-max(height, width) // (8 * _CELLS)))
    rows, columns = -(-height // cell), -(-width // cell)
    padded = np.full((rows * cell, columns * cell), 255, np.uint8)
    padded[:height, :width] = mask
    is_hole = padded.reshape(rows, cell, columns, cell).min(axis=(1, 3)) < 255
    for cells in _connected(is_hole):
        ys, xs = cells[:, 0], cells[:, 1]
        top, left = ys.min() * cell, xs.min() * cell
        part = mask[top : (ys.max() + 1) * cell, left : (xs.max() + 1) * cell] < 255
        down, across = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        yield (
            int(left + across[0]),
            int(top + down[0]),
            int(left + across[-1] + 1),
            int(top + down[-1] + 1),
        )


def _connected(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the (row, column) pairs of each connected part of a bool grid, corners included."""
    left = {(int(y), int(x)) for y, x in np.argwhere(cells)}
    while left:
        found, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            found.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        yield np.array(found)


def _merge(boxes: list[Box], image_size: int) -> list[Box]:
    """Join boxes that overlap, or that one cut of the smallest side has in its middle half."""
    done: list[Box] = []
    while boxes:
        box = boxes.pop()
        near = [other for other in done if _belong_together(box, other, image_size)]
        if not near:
            done.append(box)
            continue
        done.remove(near[0])
        boxes.append(_joined(box, near[0]))  # which may now reach others
    return done


def _joined(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _belong_together(a: Box, b: Box, image_size: int) -> bool:
    left, top, right, bottom = _joined(a, b)
    widths, heights = a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]
    overlap = right - left < widths and bottom - top < heights
    return overlap or max(right - left, bottom - top) <= image_size // 2


def _cut_around(hole: Box, shape: tuple[int, int], image_size: int) -> Cut:
    """Return the cut of a hole: as large as its context needs and as much inside as it can be."""
    left, top, right, bottom = hole
    longest = max(right - left, bottom - top)
    side = max(image_size, 2 * longest)
    side = max(min(side, *shape), longest)  # inside the photo, unless the hole itself is too long
    height, width = shape
    return Cut(_start(left, right, side, width), _start(top, bottom, side, height), side, hole)


def _start(low: int, high: int, side: int, length: int) -> int:
    """Return where a cut of ``side`` begins that has low to high in its middle, if it can."""
    middle = (low + high - side) // 2
    return (length - side) // 2 if side > length else min(max(middle, 0), length - side)


# ---- What the network sees -----------------------------------------------------------------------


def cut_out(
    photo: np.ndarray, mask: np.ndarray, cut: Cut, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a cut scaled to the network: picture and mask, each uint8 (size, size, 3).

    A pixel is known only where all that it covers is known. Beyond the photo its rim goes on, as
    hole.
    """
    inside, around = _inside(mask, cut)
    pixels = np.pad(photo[inside], (*around, (0, 0)), mode="edge")
    known = known_in(mask, cut)
    picture = center_crop(Image.fromarray(pixels), size)
    is_known = _shrink_known(known, size)
    return picture, np.repeat(is_known[:, :, None], 3, axis=2)


def known_in(mask: np.ndarray, cut: Cut) -> np.ndarray:
    """Return the part of a mask (H, W) that a cut sees, (side, side)."""
    inside, around = _inside(mask, cut)
    return np.pad(mask[inside], around)


def _inside(mask: np.ndarray, cut: Cut) -> tuple[tuple[slice, slice], tuple]:
    """Return the part of a cut that the photo has, and how much is missing on each side."""
    left, top, right, bottom = cut.box
    height, width = mask.shape
    rows, columns = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    above_below = max(-top, 0), max(bottom - height, 0)
    return (rows, columns), (above_below, (max(-left, 0), max(right - width, 0)))


def _shrink_known(known: np.ndarray, size: int) -> np.ndarray:
    """Scale a square mask; hard ones stay hard, and a pixel with any hole in it is hole."""
    side = len(known)
    if side == size:
        return known
    if not ((known == 0) | (known == 255)).all():
        return np.asarray(Image.fromarray(known).resize((size, size), Image.Resampling.BOX))
    if side < size:
        return np.asarray(Image.fromarray(known).resize((size, size), Image.Resampling.NEAREST))
    share = np.asarray(
        Image.fromarray(known).convert("F").resize((size, size), Image.Resampling.BOX)
    )
    return np.where(share >= 254.99, 255, 0).astype(np.uint8)


# ---- And back ------------------------------------------------------------------------------------


def paste(photo: np.ndarray, mask: np.ndarray, cut: Cut, sample: np.ndarray, feather: int) -> None:
    """Put what was made of a cut, uint8 (size, size, 3), into the hole of ``photo``, in place.

    ``feather`` pixels of the known rim around the hole are a mixture; all others stay as they are.
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
    """Return a part of a sample at the photo's size: ``box`` of the photo."""
    if len(sample) != cut.side:
        side = (cut.side, cut.side)
        sample = np.asarray(Image.fromarray(sample).resize(side, Image.Resampling.LANCZOS))
    x0, y0, x1, y1 = box
    return sample[y0 - cut.top : y1 - cut.top, x0 - cut.left : x1 - cut.left]


def _share(mask: np.ndarray, cut: Cut, feather: int, box: Box) -> np.ndarray:
    """Return the share of new pixels in ``box``, (H, W); holes of other cuts count as known."""
    left, top, right, bottom = cut.hole
    around = np.full((bottom - top + 4 * feather, right - left + 4 * feather), 255, np.uint8)
    end = len(around) - 2 * feather, around.shape[1] - 2 * feather
    around[2 * feather : end[0], 2 * feather : end[1]] = mask[top:bottom, left:right]
    y0, x0 = top - 2 * feather, left - 2 * feather
    return blend(around, feather)[box[1] - y0 : box[3] - y0, box[0] - x0 : box[2] - x0]


def blend(mask: np.ndarray, feather: int) -> np.ndarray:
    """Return the share of the new pixels, uint8 (H, W): 255 in the hole, 0 beyond its rim.

    Over the ``feather`` pixels around the hole it falls evenly. Half-known pixels are mixed.
    """
    hole = 255 - mask
    if not feather:
        return hole
    # A box mean of the hole grown by its radius is 1 on the hole, and 0 twice the radius away.
    # Where half of an odd number is no whole one, the radius is the larger half.
    growth = feather // 2
    radius = feather - growth
    grown = np.pad(255 - grow_hole(mask, growth), radius, mode="edge")
    soft = np.asarray(Image.fromarray(grown).filter(ImageFilter.BoxBlur(radius)))
    return np.maximum(hole, soft[radius:-radius, radius:-radius])
