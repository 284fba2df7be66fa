"""Holes found by a rule, enlarged and hardened."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_cases import photo, save, square_mask, strokes
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.io import holes, images


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


def test_growing_beyond_the_mask_costs_no_more_than_its_sides(monkeypatch):
    known = np.full((4, 9), 255, np.uint8)
    known[1, 1] = 0
    sizes, pad = [], np.pad
    monkeypatch.setattr(
        np, "pad", lambda array, width, **k: (sizes.append(width), pad(array, width, **k))[1]
    )
    assert not holes.grow_hole(known, 10_000).any()
    assert sizes == [9]


def test_a_mask_is_brought_to_the_photos_size_before_it_grows():
    known = square_mask(side=20)
    shaped = holes.shape_mask(known, (40, 40), grow=3)
    assert set(np.unique(shaped)) == {0, 255}
    assert (shaped == holes.grow_hole(known.repeat(2, 0).repeat(2, 1), 3)).all()
    soft = np.asarray(Image.fromarray(known).resize((30, 30), Image.Resampling.BICUBIC))
    assert not set(np.unique(holes.shape_mask(soft, (45, 45)))) <= {0, 255}
    assert set(np.unique(holes.shape_mask(soft, (45, 45), hard=True))) == {0, 255}
    levels = np.array([[0, 3, 128, 242, 243, 250, 255]], np.uint8)  # the last are a JPEG's noise
    assert holes.harden(levels).tolist() == [[0, 0, 0, 0, 255, 255, 255]]


@pytest.mark.parametrize(
    ("rule", "stored"),
    [
        (None, square_mask()),
        ("zero", square_mask(1)),
        ("zero", square_mask(255, dtype=np.uint16)),
        ("color", np.dstack([square_mask(255, 255), square_mask(), square_mask()])),
        ("#ff0000", np.dstack([square_mask(255, 255), square_mask(), square_mask()])),
        ("alpha", np.dstack([photo(), square_mask()])),
    ],
)
def test_rules_find_the_hole(tmp_path, rule, stored):
    image = images.read_upright(save(tmp_path / "m.png", stored))
    found = holes.known_levels(image, rule)
    assert found.dtype == np.uint8
    assert np.array_equal(found, square_mask())


def test_a_stroke_over_a_photo_is_found_by_its_colour(tmp_path):
    path = save(tmp_path / "m.jpg", strokes(photo() // 2), quality=95, subsampling=0)
    found = holes.known_levels(images.read_upright(path), "#ff0000")
    expected = ~np.asarray(strokes(photo() * 0).split()[0]).astype(bool)
    assert ((found < 128) != ~expected).mean() < 0.02


def test_alpha_wants_transparency(tmp_path):
    image = images.read_upright(save(tmp_path / "m.png", photo()))
    with pytest.raises(UserError, match="no transparency"):
        holes.known_levels(image, "alpha")
