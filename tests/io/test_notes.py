"""What is odd about masks, and what mends it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from guided_diffusion.io import colours, holes, images, notes

RED = (255, 0, 0)


def mask(white=255, black=0, side=40, dtype=np.uint8):
    """A square hole of ``black`` in the middle of ``white``."""
    array = np.full((side, side), white, dtype)
    array[side // 4 : side // 2, side // 4 : side // 2] = black
    return array


def photo(side=40):
    y, x = np.mgrid[0:side, 0:side]
    return np.stack([x * 6, y * 6, (x * y) % 256], -1).astype(np.uint8)


def strokes(below, colour=RED):
    image = Image.fromarray(below).convert("RGB")
    ImageDraw.Draw(image).line([2, 20, 38, 24], fill=colour, width=5)
    return image


def labels():
    image = Image.fromarray(mask(0, 1)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 750)
    return image


def jpeg_noise():
    return np.clip(mask().astype(int) + np.random.default_rng(0).integers(-9, 9, (40, 40)), 0, 255)


SILENT = {
    "black and white": lambda: mask(),
    "254 and 1": lambda: mask(254, 1),
    "one bit": lambda: Image.fromarray(mask()).convert("1"),
    "LA": lambda: Image.fromarray(mask()).convert("LA"),
    "RGBA": lambda: Image.fromarray(mask()).convert("RGBA"),
    "white with a transparent hole": lambda: np.dstack([mask(255, 255)] * 3 + [mask()]),
    "noise": lambda: jpeg_noise().astype(np.uint8),
    "16 bits": lambda: mask(65535, dtype=np.uint16),
    "soft rim": lambda: Image.fromarray(mask()).resize((90, 90)),
    "all black": lambda: mask(0),
}
ODD = {
    "0 and 1": (lambda: mask(1), "above 1 of 255", "mask_hole: zero"),
    "0 and 1 in 16 bits": (lambda: mask(1, dtype=np.uint16), "1 of 65535", "mask_hole: zero"),
    "8 in 16 bits": (lambda: mask(255, dtype=np.uint16), "255 of 65535", "mask_hole: zero"),
    "labels": (lambda: mask(3, 0), "above 3 of 255", "mask_hole: zero"),
    "red on white": (lambda: strokes(mask(255, 255)), "#ff0000", "mask_hole: color"),
    "red on black": (lambda: strokes(mask(0)), "#ff0000", "mask_hole: color"),
    "palette": (labels, "#800000", "mask_hole: color"),
    "red on a photo": (lambda: strokes(photo()), "coloured", "mask_hole: '#ff0000'"),
    "a photo": (lambda: photo(), "coloured", "is it a mask?"),
    "a gray photo": (lambda: Image.fromarray(photo()).convert("L"), "mostly gray", "is it a mask?"),
    "a photo with a hole": (
        lambda: np.dstack([photo(), mask()]), "transparent", "mask_hole: alpha",
    ),
    "black strokes on nothing": (
        lambda: np.dstack([mask(0)] * 3 + [255 - mask()]), "transparent", "alpha and invert_mask",
    ),
}  # fmt: skip


def notes_of(make, **options):
    image = make()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return notes.notes_on_mask(colours.to_rgb(images.read_upright(image)), **options)[0]


@pytest.mark.parametrize("name", SILENT)
def test_ordinary_masks_are_not_odd(name):
    assert notes_of(SILENT[name]) == []


@pytest.mark.parametrize("name", ODD)
def test_odd_masks_are_told_with_what_mends_them(name):
    make, *words = ODD[name]
    [note] = notes_of(make)
    assert all(word in note for word in words), note
    assert "\n" not in note


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), RED, (90, 90, 90)])
def test_strokes_on_a_transparent_ground_are_told_from_erased_holes(colour):
    def layer(alpha):
        return np.dstack([np.full((40, 40, 3), colour, np.uint8), alpha])

    [note] = notes_of(lambda: layer(255 - mask()))
    assert "mask_hole: alpha and invert_mask: true" in note
    erased = notes_of(lambda: layer(mask()))  # transparent parts are less, and become hole
    assert all("invert_mask" not in note for note in erased)
    # What the note advises makes the strokes the hole.
    known = 255 - holes.known_levels(Image.fromarray(layer(255 - mask())), "alpha")
    assert np.array_equal(known, mask())


def test_white_strokes_are_as_they_should_be_where_white_is_the_hole():
    layer = np.dstack([np.full((40, 40, 3), 255, np.uint8), 255 - mask()])
    assert notes_of(lambda: layer, invert=True) == []


@pytest.mark.parametrize("name", ["red on a photo", "palette", "a gray photo"])
def test_large_masks_are_looked_at_in_strips(monkeypatch, name):
    image = ODD[name][0]()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = colours.to_rgb(images.read_upright(image))
    whole = [notes.notes_on_mask(image)]
    whole += [holes.known_levels(image, rule) for rule in (None, "color", "#ff0000")]
    monkeypatch.setattr(holes, "_STRIP", 130)
    strips = [notes.notes_on_mask(image)]
    strips += [holes.known_levels(image, rule) for rule in (None, "color", "#ff0000")]
    assert strips[0] == whole[0]
    assert all(np.array_equal(a, b) for a, b in zip(whole[1:], strips[1:], strict=True))
