"""Cuts of a photo, and the way back: geometry checked with networks that return what they see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.run.full_size import blend, cut_out, find_cuts, paste


def photo_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(height, width, *holes):
    mask = np.full((height, width), 255, np.uint8)
    for left, top, right, bottom in holes:
        mask[top:bottom, left:right] = 0
    return mask


def filled(photo, mask, size, feather=0, value=77):
    """Fill every cut with one colour."""
    result = photo.copy()
    for cut in find_cuts(mask, size):
        paste(result, mask, cut, np.full((size, size, 3), value, np.uint8), feather)
    return result


def test_without_a_hole_there_is_no_cut():
    assert find_cuts(mask_of(50, 80), 16) == []


HOLES = {
    "inside": (40, 30, 50, 45),
    "in a corner": (0, 0, 9, 7),
    "at the right border": (113, 20, 120, 30),
    "at the lower border": (30, 81, 60, 90),
    "one pixel": (60, 60, 61, 61),
    "everything": (0, 0, 120, 90),
    "as wide as the photo": (0, 40, 120, 44),
}


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("size", [16, 64, 200])
def test_a_cut_has_its_hole_with_context_inside_the_photo(name, size):
    left, top, right, bottom = HOLES[name]
    [cut] = find_cuts(mask_of(90, 120, HOLES[name]), size)
    assert cut.hole == HOLES[name]
    assert cut.left <= left and cut.top <= top
    assert cut.left + cut.side >= right and cut.top + cut.side >= bottom
    longest = max(right - left, bottom - top)
    if longest <= 45 and size <= 90:
        assert cut.side == max(size, 2 * longest)
        assert cut.left >= 0 and cut.top >= 0
        assert cut.left + cut.side <= 120 and cut.top + cut.side <= 90


def test_near_holes_share_a_cut_and_far_ones_do_not():
    near = mask_of(400, 400, (100, 100, 104, 104), (110, 103, 115, 108))
    assert [cut.hole for cut in find_cuts(near, 64)] == [(100, 100, 115, 108)]
    far = mask_of(400, 400, (10, 10, 20, 20), (300, 310, 320, 330), (350, 20, 360, 25))
    cuts = find_cuts(far, 64)
    holes = [(10, 10, 20, 20), (350, 20, 360, 25), (300, 310, 320, 330)]
    assert [cut.hole for cut in cuts] == holes


@given(
    st.tuples(st.integers(5, 90), st.integers(5, 90)),
    st.integers(0, 12),
    st.sampled_from([8, 16, 33, 64]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_known_pixels_stay_and_the_hole_is_filled(shape, feather, size, data):
    height, width = shape
    holes = []
    for _ in range(data.draw(st.integers(1, 4))):
        left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        right = data.draw(st.integers(left + 1, width))
        holes.append((left, top, right, data.draw(st.integers(top + 1, height))))
    photo, mask = photo_of(height, width), mask_of(height, width, *holes)
    result = filled(photo, mask, size, feather)
    assert (result[mask == 0] == 77).all()
    ys, xs = np.nonzero(mask == 0)
    distance = np.full(shape, 10**6)
    for y in range(height):
        for x in range(width):
            distance[y, x] = np.maximum(abs(ys - y), abs(xs - x)).min()
    assert np.array_equal(result[distance > feather], photo[distance > feather])
    if not feather:
        assert np.array_equal(result[mask == 255], photo[mask == 255])


@pytest.mark.parametrize("size", [16, 48, 100])
def test_what_the_network_sees_and_gives_back_unchanged_leaves_a_smooth_photo_as_it_was(size):
    """A gradient: the step across the hole's edge stays below one level."""
    ramp = np.linspace(20, 200, 160)
    exact = np.repeat((ramp[:, None] * 0.5 + ramp[None] * 0.5)[..., None], 3, axis=2)
    photo = exact.round().astype(np.uint8)
    mask = mask_of(160, 160, (40, 50, 70, 80), (120, 10, 135, 22))
    result = photo.copy()
    for cut in find_cuts(mask, size):
        picture, _ = cut_out(photo, mask, cut, size)
        paste(result, mask, cut, picture, 4)
    change = (result.astype(int) - photo)[..., 0]
    for picture in (change, change.T):  # the hole of rows 50 to 80 and columns 40 to 70, and turned
        top, left = (50, 40) if picture is change else (40, 50)
        rows, columns = slice(top, top + 30), slice(left, left + 30)
        for outside, inside in ((left - 1, left), (left + 30, left + 29)):
            assert abs(picture[rows, outside].mean() - picture[rows, inside].mean()) < 1
        assert abs(picture[top - 1, columns].mean() - picture[top, columns].mean()) < 1
    assert abs(result - exact).max() < 3  # each scaling rounds to whole levels


@pytest.mark.parametrize("size", [16, 20, 60])
def test_a_pixel_is_known_only_where_all_that_it_covers_is(size):
    photo, mask = photo_of(90, 120), mask_of(90, 120, (50, 40, 51, 62))
    [cut] = find_cuts(mask, size)
    picture, known = cut_out(photo, mask, cut, size)
    assert picture.shape == known.shape == (size, size, 3)
    assert set(np.unique(known)) == {0, 255}
    scale = size / cut.side
    column, rows = (50.5 - cut.left) * scale, (np.arange(40, 62) + 0.5 - cut.top) * scale
    assert not known[rows.astype(int), int(column)].any()


def test_beyond_the_photo_nothing_is_known():
    photo, mask = photo_of(10, 60), mask_of(10, 60, (5, 0, 55, 10))
    [cut] = find_cuts(mask, 16)
    assert cut.side == 50
    picture, known = cut_out(photo, mask, cut, 50)
    assert not known.any()
    assert np.array_equal(picture[20:30], photo[:, 5:55])
    assert np.array_equal(picture[0], photo[0, 5:55])


def test_soft_masks_mix():
    photo = np.full((40, 40, 3), 100, np.uint8)
    mask = mask_of(40, 40)
    mask[10:20, 10:20] = 51
    result = filled(photo, mask, 16, value=200)
    assert (result[10:20, 10:20] == 180).all()


def test_the_share_falls_evenly_over_the_feather():
    mask = mask_of(60, 60, (20, 20, 40, 40))
    share = blend(mask, 8)[30].astype(int)
    assert (share[20:40] == 255).all()
    assert share[:12].max() == 0
    assert (np.diff(share[11:21]) > 0).all()
    assert (blend(mask, 0) == 255 - mask).all()
