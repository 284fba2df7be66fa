"""What is odd about masks, and what mends it."""

import numpy as np
import pytest
from picture_cases import photo, square_mask, strokes
from PIL import Image

from guided_diffusion.io import colours, holes, images, notes

RED = (255, 0, 0)


def labels():
    image = Image.fromarray(square_mask(0, 1)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 750)
    return image


SILENT = {
    "254 and 1": square_mask(254, 1),
    "one bit": Image.fromarray(square_mask()).convert("1"),
    "RGBA": Image.fromarray(square_mask()).convert("RGBA"),
    "white with a transparent hole": np.dstack([square_mask(255, 255)] * 3 + [square_mask()]),
    "noise of a JPEG": np.random.default_rng(0).integers(0, 9, (40, 40), dtype=np.uint8)
    ^ square_mask(),
    "16 bits": square_mask(65535),
    "soft rim": Image.fromarray(square_mask()).resize((90, 90)),
    "all black": square_mask(0),
}
ODD = {
    "8 in 16 bits": (square_mask(255, dtype=np.uint16), "255 of 65535", "mask_hole: zero"),
    "labels": (square_mask(3, 0), "above 3 of 255", "mask_hole: zero"),
    "red on white": (strokes(square_mask(255, 255)), "#ff0000", "mask_hole: color"),
    "red on a photo": (strokes(photo()), "coloured", "mask_hole: '#ff0000'"),
    "palette": (labels(), "#800000", "mask_hole: color"),
    "a gray photo": (Image.fromarray(photo()).convert("L"), "mostly gray", "is it a mask?"),
    "a photo with a hole": (
        np.dstack([photo(), square_mask()]), "opaque", "mask_hole: alpha",
    ),
    "half transparent": (
        np.dstack([square_mask()] * 3 + [square_mask(200, 200)]), "opaque", "mask_hole: alpha",
    ),
    "black with a hole": (
        np.dstack([square_mask(0)] * 3 + [square_mask()]), "opaque", "mask_hole: alpha",
    ),
    "black strokes on nothing": (
        np.dstack([square_mask(0)] * 3 + [255 - square_mask()]), "layer", "alpha and invert_mask",
    ),
}  # fmt: skip


def seen(image):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return colours.to_rgb(images.read_upright(image))


def notes_of(image, **options):
    return notes.notes_on_mask(seen(image), **options)[0]


@pytest.mark.parametrize("name", SILENT)
def test_ordinary_masks_are_not_odd(name):
    assert notes_of(SILENT[name]) == []


@pytest.mark.parametrize("name", ODD)
def test_odd_masks_are_told_with_what_mends_them(name):
    image, *words = ODD[name]
    [note] = notes_of(image)
    assert all(word in note for word in words), note
    assert "\n" not in note


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), RED, (90, 90, 90)])
def test_strokes_on_a_transparent_ground_are_told_from_erased_holes(colour):
    def layer(alpha):
        return np.dstack([np.full((40, 40, 3), colour, np.uint8), alpha])

    [note] = notes_of(layer(255 - square_mask()))
    assert "mask_hole: alpha and invert_mask: true" in note
    erased = notes_of(layer(square_mask()))  # transparent parts are less, and become hole
    assert all("invert_mask" not in note for note in erased)
    # What the note advises makes the strokes the hole.
    known = 255 - holes.known_levels(Image.fromarray(layer(255 - square_mask())), "alpha")
    assert np.array_equal(known, square_mask())


def test_white_strokes_are_as_they_should_be_where_white_is_the_hole():
    layer = np.dstack([np.full((40, 40, 3), 255, np.uint8), 255 - square_mask()])
    assert notes_of(layer, invert=True) == []


@pytest.mark.parametrize("name", ["red on a photo", "a gray photo"])
def test_large_masks_are_looked_at_in_strips(monkeypatch, name):
    image, rules = seen(ODD[name][0]), (None, "color", "#ff0000")
    note, *known = notes_of(image), *(holes.known_levels(image, rule) for rule in rules)
    monkeypatch.setattr(holes, "_STRIP", 130)
    assert notes_of(image) == note
    for rule, whole in zip(rules, known, strict=True):
        assert np.array_equal(holes.known_levels(image, rule), whole)
