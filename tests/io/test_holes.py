"""Masks that are not black and white, and holes made larger or hard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from guided_diffusion.errors import UserError
from guided_diffusion.io import colours, holes, images, notes

RED = (255, 0, 0)


def saved(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return str(path)


def mask(white=255, black=0, side=40, dtype=np.uint8):
    """A square hole of ``black`` in the middle of ``white``."""
    array = np.full((side, side), white, dtype)
    array[side // 4 : side // 2, side // 4 : side // 2] = black
    return array


def hole(array):
    return array < 128


def photo(side=40):
    y, x = np.mgrid[0:side, 0:side]
    return np.stack([x * 6, y * 6, (x * y) % 256], -1).astype(np.uint8)


def strokes(below, colour=RED):
    image = Image.fromarray(below).convert("RGB")
    ImageDraw.Draw(image).line([2, 20, 38, 24], fill=colour, width=5)
    return image


# ---- enlarging -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_a_grown_hole_covers_what_is_near_and_nothing_far(pixels, height, width, seed):
    rng = np.random.default_rng(seed)
    known = np.where(rng.random((height, width)) < 0.02, 0, 255).astype(np.uint8)
    grown = holes.grow_hole(known, pixels)
    y, x = np.mgrid[0:height, 0:width]
    places = np.argwhere(known == 0)
    far = np.full((height, width), np.inf)
    for top, left in places:
        far = np.minimum(far, np.hypot(y - top, x - left))
    assert grown.shape == known.shape
    assert set(np.unique(grown)) <= {0, 255}
    # A whole octagon, also at the border; small ones are squares.
    assert (grown[far <= pixels] == 0).all()
    assert (grown[far > pixels * 1.42] == 255).all()
    if pixels >= 3:
        assert (grown[far > pixels * 1.12 + 1] == 255).all()


def test_growing_keeps_soft_values_and_the_original():
    known = np.full((9, 9), 200, np.uint8)
    known[4, 4] = 90
    grown = holes.grow_hole(known, 2)
    assert (grown[2:7, 2:7] == 90).all()
    assert (grown == 200).sum() == 81 - 25
    assert known[4, 3] == 200
    assert holes.grow_hole(known, 0) is known


def test_hard_takes_the_rim_but_not_the_noise_of_a_jpeg():
    known = np.array([[0, 3, 128, 242, 243, 250, 255]], np.uint8)
    assert holes.harden(known).tolist() == [[0, 0, 0, 0, 255, 255, 255]]


def test_a_mask_is_brought_to_the_photos_size_before_it_grows():
    known = mask(side=20)
    shaped = holes.shape_mask(known, (40, 40), grow=3)
    assert set(np.unique(shaped)) == {0, 255}
    assert (shaped == holes.grow_hole(known.repeat(2, 0).repeat(2, 1), 3)).all()
    soft = np.asarray(Image.fromarray(known).resize((30, 30), Image.Resampling.BICUBIC))
    assert not set(np.unique(holes.shape_mask(soft, (45, 45)))) <= {0, 255}
    assert set(np.unique(holes.shape_mask(soft, (45, 45), hard=True))) == {0, 255}


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (None, lambda: mask()),
        ("zero", lambda: mask(1)),
        ("zero", lambda: mask(1, dtype=np.uint16)),
        ("zero", lambda: mask(255, dtype=np.uint16)),
        ("color", lambda: np.dstack([np.full((40, 40), 255, np.uint8), mask(), mask()])),
        ("#ff0000", lambda: np.dstack([np.full((40, 40), 255, np.uint8), mask(), mask()])),
        ("alpha", lambda: np.dstack([photo(), mask()])),
    ],
)
def test_rules_find_the_hole(tmp_path, rule, make):
    image = images.read_upright(saved(tmp_path / "m.png", make()))
    found = holes.known_levels(image, rule)
    assert found.dtype == np.uint8
    assert np.array_equal(found, mask())


def test_a_stroke_over_a_photo_is_found_by_its_colour(tmp_path):
    path = saved(tmp_path / "m.jpg", strokes(photo() // 2), quality=95, subsampling=0)
    found = holes.known_levels(images.read_upright(path), "#ff0000")
    expected = ~np.asarray(strokes(photo() * 0).split()[0]).astype(bool)
    assert (hole(found) != ~expected).mean() < 0.02


def test_alpha_wants_transparency(tmp_path):
    image = images.read_upright(saved(tmp_path / "m.png", photo()))
    with pytest.raises(UserError, match="no transparency"):
        holes.known_levels(image, "alpha")


# ---- what is odd ---------------------------------------------------------------------------------


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


def told_of(tmp_path, make):
    image = colours.to_rgb(images.read_upright(saved(tmp_path / "m.png", make())))
    return "; ".join(notes.notes_on_mask(image)[0]) or None


@pytest.mark.parametrize("name", SILENT)
def test_ordinary_masks_are_not_odd(tmp_path, name):
    assert told_of(tmp_path, SILENT[name]) is None


@pytest.mark.parametrize("name", ODD)
def test_odd_masks_are_told_with_what_mends_them(tmp_path, name):
    make, *words = ODD[name]
    told = told_of(tmp_path, make)
    assert told is not None
    assert all(word in told for word in words), told
    assert "\n" not in told


@pytest.mark.parametrize("name", ["red on a photo", "palette", "a gray photo"])
def test_large_masks_are_looked_at_in_strips(tmp_path, monkeypatch, name):
    make = ODD[name][0]
    image = images.read_rgb(saved(tmp_path / "m.png", make()))
    whole = [notes.notes_on_mask(image)]
    whole += [holes.known_levels(image, rule) for rule in (None, "color", "#ff0000")]
    monkeypatch.setattr(holes, "_STRIP", 130)
    strips = [notes.notes_on_mask(image)]
    strips += [holes.known_levels(image, rule) for rule in (None, "color", "#ff0000")]
    assert strips[0] == whole[0]
    assert all(np.array_equal(a, b) for a, b in zip(whole[1:], strips[1:], strict=True))
