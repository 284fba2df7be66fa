"""What can be wrong with pictures and masks: everything is decoded once before a run."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import (
    AS_PUBLISHED,
    Pair,
    ReadOptions,
    crop_mask,
    crop_photo,
    is_of_the_square,
    load_mask,
    read_mask,
    read_photo,
)
from guided_diffusion.io.holes import BLACK, WHITE, same_shape
from guided_diffusion.io.images import Origin, memory_to_read, name_of, origin_of
from guided_diffusion.io.limits import in_threads
from guided_diffusion.io.notes import (
    note_on_turning,
    notes_on_mask,
    notes_on_picture,
    warn_of_kinds,
)

# Share of a hole's pixels that may be half-known without a warning: thin strokes have up to 0.22.
_SOFT_RIM = 0.23


@dataclasses.dataclass(frozen=True)
class _MaskFacts:
    """What decoding one mask showed; shares are of the square that the network sees."""

    generated: float  # share of the square's pixels
    is_even: bool  # all pixels have one level
    half_known: float  # share of the hole's pixels
    is_nowhere_hole: bool  # no pixel of the square is plainly hole
    is_gray: bool = False  # no pixel of the file is plainly hole
    notes: tuple[str, ...] = ()
    origin: Origin | None = None  # of the file


def check_pairs(
    pairs: Sequence[Pair],
    image_size: int,
    options: ReadOptions = AS_PUBLISHED,
    *,
    show_progress: bool = True,
) -> list[float]:
    """Decode every picture and mask, and return the share of generated pixels of each pair.

    Threads decode, as many as memory allows; a mask that serves all is decoded once. Warns, once a
    kind, of what is odd: masks that leave nothing to generate, or nothing known, or are not black
    and white, and pictures that use little of their range. Raises ``UserError`` naming the first
    bad file, or the first mask that has another aspect ratio than its picture.
    """
    is_shared = not pairs[0].makes_mask and all(
        pair.mask_path is pairs[0].mask_path for pair in pairs
    )

    def check(pair: Pair) -> tuple[Origin, list[str], _MaskFacts | None]:
        image, facts = read_photo(pair, options), None
        origin = origin_of(image)
        if pair.is_alpha:
            facts = _facts(crop_mask(pair, image, image_size, options, origin.size))
        crop_photo(pair, image, image_size, options)
        notes = notes_on_picture(image, options.depth)
        del image  # before the mask is decoded
        if not (is_shared or pair.is_alpha):
            facts = _look_at_mask(pair, image_size, options, origin.size)
        return origin, notes, facts

    sources = [source for pair in pairs for source in (pair.gt_path, pair.mask_file) if source]
    memory = memory_to_read(sources, show_progress)
    checked = in_threads(check, pairs, "checking pictures", show_progress, memory=memory)
    origins, notes, facts = zip(*checked, strict=True)
    if is_shared:
        facts = [_look_at_mask(pairs[0], image_size, options, origins[0].size)] * len(pairs)
    mask_notes = []
    for pair, origin, each in zip(pairs, origins, facts, strict=True):
        _refuse_other_shape(pair, origin, each, image_size)
        mask_notes += [(pair.mask_path, note) for note in _notes(origin, each, image_size)]
    warn_of_extremes(pairs, [each.generated for each in facts])
    warn_of_kinds(
        (pair.gt_path, note) for pair, some in zip(pairs, notes, strict=True) for note in some
    )
    warn_of_kinds(mask_notes)
    return [each.generated for each in facts]


def _look_at_mask(
    pair: Pair, size: int, options: ReadOptions, photo: tuple[int, int]
) -> _MaskFacts:
    """Read or draw a mask, and judge it."""
    if pair.makes_mask:
        return _facts(load_mask(pair, size, options, photo))
    image = read_mask(pair, options)
    notes: list[str] = []
    is_gray = False
    if options.mask_hole is None:
        notes, darkest = notes_on_mask(image, invert=options.invert_mask)
        is_gray = darkest > BLACK and not options.invert_mask
    facts = _facts(crop_mask(pair, image, size, options, photo))
    return dataclasses.replace(facts, notes=tuple(notes), is_gray=is_gray, origin=origin_of(image))


def _facts(mask: np.ndarray) -> _MaskFacts:
    hole, touched = (mask <= BLACK).sum(), (mask < WHITE).sum()
    return _MaskFacts(
        generated=1 - float(mask.mean()) / 255,
        is_even=bool((mask == mask.flat[0]).all()),
        half_known=1 - hole / max(1, touched),
        is_nowhere_hole=not hole,
    )


def _refuse_other_shape(pair: Pair, origin: Origin, facts: _MaskFacts, size: int) -> None:
    """Raise ``UserError`` for a mask of another aspect ratio, whose hole would be elsewhere."""
    if facts.origin is None or facts.is_even or same_shape(facts.origin.size, origin.size):
        return
    if is_of_the_square(facts.origin.size, origin.size, size):
        return
    turned = ""
    if origin.orientation > 1:
        turned = " (stored {} x {} and turned by its EXIF orientation {})".format(
            *origin.stored, origin.orientation
        )
    raise UserError(
        f"the mask has another shape than its picture {name_of(pair.gt_path)}{turned}; make it for"
        f" the upright picture, or of {size} x {size} pixels for the square that is cut from it",
        path=name_of(pair.mask_path),
        expected="the shape of {} x {}".format(*origin.size),
        got="{} x {}".format(*facts.origin.size),
    )


def warn_of_extremes(pairs: Sequence[Pair], shares: Sequence[float]) -> None:
    """Warn of masks whose share of hole is 0 or 1."""
    for extreme, problem in ((0.0, "nothing to generate"), (1.0, "nothing known to start from")):
        hits = [pair for pair, share in zip(pairs, shares, strict=True) if share == extreme]
        if hits:
            first = name_of(hits[0].mask_file or hits[0].mask_path)
            warnings.warn(
                f"{first}: this mask leaves {problem} ({len(hits)} of {len(pairs)} images);"
                " in a mask, white is known and black is generated",
                stacklevel=3,
            )


def _notes(photo: Origin, facts: _MaskFacts, size: int) -> list[str]:
    """Return what is odd about a mask, with what decoding it at ``size`` showed."""
    notes = list(facts.notes)
    if facts.origin is None or facts.is_even:
        return notes
    if turning := note_on_turning(photo, facts.origin):
        return [*notes, turning]
    if notes or facts.half_known <= _SOFT_RIM:
        return notes
    problem = f"{facts.half_known:.0%} of its hole's pixels are half-known at {size} x {size}"
    if facts.is_gray:
        problem = "its hole is gray, which is half-known, and not black"
    elif facts.is_nowhere_hole:
        problem = f"its hole is thinner than a pixel at {size} x {size}, and all of it half-known"
    mends = "mask_hard: true makes these pixels hole, mask_grow: N enlarges the hole"
    return [f"{problem}, so that part of what should go stays; {mends}"]
