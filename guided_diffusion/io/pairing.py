"""Which mask belongs to which picture, by the names of the files."""

import os
import re
import unicodedata
import warnings
from collections.abc import Sequence

from guided_diffusion.io.listing import output_name, stem_of


def pair_up(images: Sequence[str], mask_files: Sequence[str]) -> Sequence[str]:
    """Return the mask of each image: by name where names leave no doubt, else by sorted position.

    Both are sorted and equally many. Warns where names give other pairs than positions, and where
    positions pair a picture with another mask than that of its name or number.
    """
    stems, mask_stems = _plain_stems(images), _plain_stems(mask_files)
    named = _by_common_affix(stems, mask_stems)
    if named is not None:
        partners = [mask_files[number] for number in named]
        if named != sorted(named):
            place = next(place for place, number in enumerate(named) if place != number)
            text = f"pictures and masks are paired by name ({images[place]} with {partners[place]})"
            warnings.warn(f"{text}, because their sorted orders differ", stacklevel=4)
        return partners
    contradiction = _contradiction(stems, mask_stems)
    if contradiction:
        place, other = contradiction
        text = f"{images[place]} is paired with {mask_files[place]} by sorted position, although"
        hint = "check that both folders hold the same names"
        warnings.warn(f"{text} {mask_files[other]} has its name; {hint}", stacklevel=4)
    return mask_files


def _plain_stems(paths: Sequence[str]) -> list[str]:
    """Return file names without suffix; an accent is one character, however a system wrote it."""
    return [unicodedata.normalize("NFC", stem_of(output_name(path))) for path in paths]


def _by_common_affix(stems: Sequence[str], mask_stems: Sequence[str]) -> list[int] | None:
    """Return the number of each image's mask where names are equal but for one common affix.

    ``photo1`` has ``photo1_mask``, or ``photo1_img`` has ``photo1``. None where that is not so.
    """
    if len(stems) == 1 or len({*stems}) < len(stems) or len({*mask_stems}) < len(stems):
        return None
    if found := _affixed(stems, mask_stems):
        return found
    if found := _affixed(mask_stems, stems):
        return [found.index(place) for place in range(len(stems))]
    return None


def _affixed(shorter: Sequence[str], longer: Sequence[str]) -> list[int] | None:
    """Return for each of ``shorter`` its place in ``longer``, whose names add one common affix."""
    places = {stem: number for number, stem in enumerate(longer)}
    probe = max(shorter, key=len)  # few others hold the longest
    for other in longer:
        for start in range(len(other) - len(probe) + 1):
            if other.startswith(probe, start):
                before, after = other[:start], other[start + len(probe) :]
                if all(f"{before}{stem}{after}" in places for stem in shorter):
                    return [places[f"{before}{stem}{after}"] for stem in shorter]
    return None


def _contradiction(stems: Sequence[str], mask_stems: Sequence[str]) -> tuple[int, int] | None:
    """Return the first image and mask of one name, or number, that are at different positions."""
    for images, others, has_to_match in (
        (stems, mask_stems, False),
        (_differing_parts(stems), _differing_parts(mask_stems), False),
        (_numbers(stems), _numbers(mask_stems), True),
    ):
        places = {name: number for number, name in enumerate(others)}
        if has_to_match and ({*images} != {*others} or len(places) < len(images)):
            continue
        for place, name in enumerate(images):
            if places.get(name, place) != place and others[place] != name:
                return place, places[name]
    return None


def _differing_parts(stems: Sequence[str]) -> list[str]:
    """Return names without what they all begin with, and without what they all end with."""
    start = len(os.path.commonprefix(stems))  # noqa: RUF071 - characters are meant
    reversed_rests = [stem[start:][::-1] for stem in stems]
    end = len(os.path.commonprefix(reversed_rests))  # noqa: RUF071
    return [rest[end:][::-1] for rest in reversed_rests]


def _numbers(stems: Sequence[str]) -> list[int]:
    """Return the last number in each name; nothing where a name has none."""
    found = [re.findall(r"[0-9]{1,18}", stem) for stem in stems]
    return [int(digits[-1]) for digits in found] if all(found) else []
