"""Cuts of a photo, and the way back: geometry checked with networks that return what they see."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_cases import noise
from PIL import Image
from run_cases import load_yaml, write_run

from guided_diffusion.io import limits
from guided_diffusion.run.full_size import blend, cut_out, find_cuts, merge_boxes, paste


def mask_of(height, width, *holes):
    mask = np.full((height, width), 255, np.uint8)
    for left, top, right, bottom in holes:
        mask[top:bottom, left:right] = 0
    return mask


def filled(photo, mask, size, feather=0, value=77):
    """Fill every cut with one colour."""
    result = photo.copy()
    for cut in find_cuts(mask, size):
        sample = np.full((size, size, photo.shape[2]), value, photo.dtype)
        paste(result, mask, cut, sample, feather)
    return result


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
    first, reach = (100, 100, 104, 104), 32  # the middle half of a cut
    near = mask_of(400, 400, first, (100 + reach - 5, 103, 100 + reach, 108))
    assert [cut.hole for cut in find_cuts(near, 64)] == [(100, 100, 100 + reach, 108)]
    assert len(find_cuts(mask_of(400, 400, first, (100 + reach, 103, 101 + reach, 108)), 64)) == 2
    far = mask_of(400, 400, (10, 10, 20, 20), (300, 310, 320, 330), (350, 20, 360, 25))
    cuts = find_cuts(far, 64)
    holes = [(10, 10, 20, 20), (350, 20, 360, 25), (300, 310, 320, 330)]
    assert [cut.hole for cut in cuts] == holes


@pytest.mark.parametrize(("longest", "seed"), [(3, 0), (12, 1), (200, 2)])
def test_joined_holes_hold_all_and_no_two_belong_together(longest, seed):
    rng = np.random.default_rng(seed)
    left, top = rng.integers(0, 400, 200), rng.integers(0, 300, 200)
    ends = left + rng.integers(1, longest, 200), top + rng.integers(1, 5, 200)
    boxes = np.stack([left, top, *ends], axis=1)
    joined = np.array(merge_boxes(map(tuple, boxes.tolist()), 16))
    assert 1 < len(joined) < 200
    for box in boxes:
        assert ((joined[:, :2] <= box[:2]) & (joined[:, 2:] >= box[2:])).all(axis=1).sum() == 1
    for k, box in enumerate(joined):
        others = np.delete(joined, k, axis=0)
        low, high = np.minimum(others[:, :2], box[:2]), np.maximum(others[:, 2:], box[2:])
        overlap = np.minimum(others[:, 2:], box[2:]) - np.maximum(others[:, :2], box[:2])
        assert not (overlap > 0).all(axis=1).any()
        assert ((high - low).max(axis=1) > 16).all()


LONG = [((60, 3000), (0, 20, 3000, 30)), ((3000, 60), (20, 0, 30, 3000)),
        ((60, 3000), (0, 0, 3000, 60)), ((100, 1300), (0, 99, 1300, 100))]  # fmt: skip


@pytest.mark.parametrize(("shape", "hole"), LONG)
@pytest.mark.parametrize("size", [16, 128])
def test_a_hole_much_longer_than_the_photo_is_high_is_divided(shape, hole, size):
    mask = mask_of(*shape, hole)
    cuts = find_cuts(mask, size)
    assert {cut.side for cut in cuts} == {max(min(shape), size)}
    assert len(cuts) < 2 * max(shape) / cuts[0].side
    assert cuts[0].fade == (0, 0)
    assert all(sum(cut.fade) >= cut.side // 4 for cut in cuts[1:])
    photo = noise(*shape, 3)
    result = filled(photo, mask, size, feather=5)
    assert (result[mask == 0] == 77).all()
    far = np.ones(shape, bool)
    left, top, right, bottom = hole
    far[max(0, top - 5) : bottom + 5, max(0, left - 5) : right + 5] = False
    assert np.array_equal(result[far], photo[far])


def test_the_cuts_of_a_long_hole_fade_into_each_other():
    mask = mask_of(64, 2000, (0, 20, 2000, 40))
    photo, cuts = noise(64, 2000, 3), find_cuts(mask, 64)
    for number, cut in enumerate(cuts):
        paste(photo, mask, cut, np.full((64, 64, 3), 5 * number, np.uint8), 0)
    hole = photo[20:40].astype(int)
    assert (hole == hole[:1, :, :1]).all()
    steps = np.diff(hole[0, :, 0])
    assert hole[0, -1, 0] == 5 * (len(cuts) - 1)
    assert set(steps) == {0, 1}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [16, 48])
def test_gray_photos_keep_every_level_outside_the_hole(dtype, size):
    most = np.iinfo(dtype).max
    photo = np.random.default_rng(0).integers(0, most, (60, 90, 1), dtype, endpoint=True)
    mask = mask_of(60, 90, (30, 20, 45, 35))
    result = filled(photo, mask, size, value=most)
    assert result.dtype == dtype
    assert (result[mask == 0] == most).all()
    assert np.array_equal(result[mask == 255], photo[mask == 255])
    [cut] = find_cuts(mask, size)
    seen, known = cut_out(photo, mask, cut, size)
    assert seen.shape == known.shape == (size, size, 1)
    assert (seen.dtype, known.dtype) == (dtype, np.uint8)
    assert seen.max() > most / 2


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
    photo, mask = noise(height, width, 3), mask_of(height, width, *holes)
    result = filled(photo, mask, size, feather)
    assert (result[mask == 0] == 77).all()
    near = mask.copy()
    for left, top, right, bottom in holes:
        near[max(0, top - feather) : bottom + feather, max(0, left - feather) : right + feather] = 0
    assert np.array_equal(result[near == 255], photo[near == 255])


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
    # The hole of rows 50 to 80 and columns 40 to 70, and the picture turned.
    for picture, top, left in ((change, 50, 40), (change.T, 40, 50)):
        for outside, inside in ((left - 1, left), (left + 30, left + 29)):
            step = picture[top : top + 30, outside].mean() - picture[top : top + 30, inside].mean()
            assert abs(step) < 1
    assert abs(result - exact).max() < 3  # each scaling rounds to whole levels


@pytest.mark.parametrize("size", [16, 20, 60])
def test_a_pixel_is_known_only_where_all_that_it_covers_is(size):
    photo, mask = noise(90, 120, 3), mask_of(90, 120, (50, 40, 51, 62))
    [cut] = find_cuts(mask, size)
    picture, known = cut_out(photo, mask, cut, size)
    assert picture.shape == known.shape == (size, size, 3)
    assert set(np.unique(known)) == {0, 255}
    scale = size / cut.side
    column, rows = (50.5 - cut.left) * scale, (np.arange(40, 62) + 0.5 - cut.top) * scale
    assert not known[rows.astype(int), int(column)].any()


def test_beyond_the_photo_nothing_is_known():
    photo, mask = noise(10, 60, 3), mask_of(10, 60, (5, 0, 55, 10))
    [cut] = find_cuts(mask, 16)
    picture, known = cut_out(photo, mask, cut, 50)
    assert cut.side == 50 and not known.any()
    assert np.array_equal(picture[20:30], photo[:, 5:55])
    assert np.array_equal(picture[0], photo[0, 5:55])


def test_soft_masks_mix():
    mask = np.where(mask_of(40, 40, (10, 10, 20, 20)), 255, 51).astype(np.uint8)
    result = filled(np.full((40, 40, 3), 100, np.uint8), mask, 16, value=200)
    assert (result[10:20, 10:20] == 180).all()


@pytest.mark.parametrize("feather", [0, 1, 2, 3, 8, 9])
def test_the_share_falls_evenly_over_as_many_pixels_as_the_key_says(feather):
    share = blend(mask_of(60, 60, (20, 20, 40, 40)), feather)[30].astype(int)
    assert (share[20:40] == 255).all()
    mixed = np.flatnonzero((share > 0) & (share < 255))
    assert mixed.tolist() == [*range(20 - feather, 20), *range(40, 40 + feather)]
    slope = np.diff(share[19 - feather : 21])
    assert feather % 2 or np.abs(slope - 255 / (feather + 1)).max() <= 1


# ---- runs ----------------------------------------------------------------------------------------

HOLES_OF_RUN = [(5, 4, 9, 8), (28, 20, 33, 26)]


def write_photo(tmp_path, mode="RGB", suffix=".png", images=1, *, data=None, **changes):
    """Write a run over photos of 40 x 30 pixels with two holes, and return its options."""
    options = write_run(tmp_path, images, data=data, **{"full_size": True, "feather": 0} | changes)
    for number in range(images):
        for folder in ("gt", "mask"):
            (tmp_path / folder / f"{number:02d}.png").unlink()
        image = Image.fromarray(noise(30, 40, 3, seed=number)).convert(mode)
        if mode.endswith("A"):
            image.putalpha(Image.fromarray(noise(30, 40, 3, seed=9)[:, :, 0]))
        kept = {"icc_profile": b"a profile", "dpi": (300, 300)}
        image.save(tmp_path / "gt" / f"{number:02d}{suffix}", **kept)
        mask = mask_of(30, 40, *HOLES_OF_RUN)
        Image.fromarray(mask).save(tmp_path / "mask" / f"{number:02d}.png")
    return options


@pytest.mark.parametrize(
    ("mode", "windows"), [("RGB", False), ("RGB", True), ("L", True), ("RGBA", False), ("LA", True)]
)
def test_a_photo_comes_back_in_its_mode_with_its_known_pixels(here, tmp_path, mode, windows):
    ended = here(*write_photo(tmp_path, mode, windows=windows))
    assert ended.status == 0, ended.err
    calls = re.search(r"2 cuts, at most (\d+) network calls", ended.out)[1]
    assert re.search(rf"1 image, {calls} network calls, [0-9.]+ s an image", ended.out)
    assert load_yaml("log/run/run.yml")["record"]["steps"] == 6
    with Image.open("gt/00.png") as before, Image.open("log/run/inpainted/00.png") as after:
        assert after.mode == mode
        assert after.info["icc_profile"] == b"a profile"
        assert round(after.info["dpi"][0]) == 300
        known = mask_of(30, 40, *HOLES_OF_RUN) == 255
        old, new = np.asarray(before), np.asarray(after)
    assert np.array_equal(old[known], new[known])
    assert not np.array_equal(old[~known], new[~known])
    if mode == "RGBA":
        assert np.array_equal(old[..., 3], new[..., 3])
    with Image.open("log/run/gt/00.png") as gt, Image.open("log/run/gt_masked/00.png") as masked:
        assert gt.mode == masked.mode == mode
        assert gt.info["icc_profile"] == masked.info["icc_profile"] == b"a profile"
        assert np.array_equal(np.asarray(gt), old)


@pytest.mark.parametrize(
    ("format", "mode", "kept"), [("JPEG", "RGB", "RGB"), ("PNG", "RGBA", "RGB"), ("PNG", "LA", "L")]
)
def test_what_is_called_a_jpeg_comes_back_as_one_upright(here, tmp_path, format, mode, kept):
    options = write_photo(tmp_path, suffix=".jpg", output_format="same")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise(40, 30, 3)).convert(mode).save("gt/00.jpg", format=format, exif=turned)
    assert here(*options).status == 0
    with Image.open("log/run/inpainted/00.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", kept, (40, 30))
        assert image.getexif().get(0x0112, 1) == 1
    before = Path("log/run/inpainted/00.jpg").stat().st_mtime_ns
    assert "1 finished earlier" in here(*options, "--resume").out
    assert Path("log/run/inpainted/00.jpg").stat().st_mtime_ns == before


@pytest.mark.parametrize("format", ["same", "png"])
def test_what_is_too_long_for_a_jpeg_is_told_before_any_work(here, tmp_path, format):
    options = write_photo(tmp_path, suffix=".jpg", output_format=format)
    Image.new("RGB", (65_501, 1)).save("gt/00.jpg", format="PNG")
    Image.fromarray(mask_of(1, 65_501, (3, 0, 6, 1))).save("mask/00.png")
    ended = here(*options)
    told = "gt/00.jpg: .*output_format: png.* at most 65500 .* found 65501 x 1"
    assert bool(re.search(told, ended.err)) == (format == "same")
    assert (ended.status, Path("log").exists()) == ((2, False) if format == "same" else (0, True))


def test_results_depend_on_no_batch_and_resume_goes_on(here, tmp_path):
    options = write_photo(tmp_path, images=3, samples_per_image=2, save_process=2)
    assert here(*options).status == 0
    first = {path.name: path.read_bytes() for path in Path("log/run/inpainted").iterdir()}
    assert len(first) == len(set(first.values())) == 6
    Path("log/run/inpainted/01_2.png").unlink()
    ended = here(*options, "--resume", "--set", "data.batch_size=4")
    assert "1 image, 5 finished earlier" in ended.out
    again = {path.name: path.read_bytes() for path in Path("log/run/inpainted").iterdir()}
    assert again == first
    assert Path("log/run/process/00_1.gif").exists()


def test_a_profile_of_other_colours_and_a_resolution_of_0_are_left_behind(here, tmp_path):
    options = write_photo(tmp_path, data={"mask_path": "m.png"}, suffix=".jpg")
    Path("gt/00.jpg").unlink()
    photo = Image.fromarray(noise(30, 40, 3))
    photo.convert("CMYK").save("gt/a.jpg", icc_profile=b"for inks", dpi=(300, 300))
    photo.save("gt/b.tif", x_resolution=0, y_resolution=0, resolution_unit=2)
    Image.fromarray(mask_of(30, 40, (3, 3, 6, 6))).save("m.png")
    ended = here(*options, "--set", "all_formats=true")
    assert ended.status == 0, ended.err
    with Image.open("log/run/inpainted/a.png") as a, Image.open("log/run/inpainted/b.png") as b:
        assert (a.mode, "icc_profile" in a.info, round(a.info["dpi"][0])) == ("RGB", False, 300)
        assert "dpi" not in b.info


def test_a_cut_that_does_not_fit_into_memory_is_told(here, tmp_path, monkeypatch):
    options = write_photo(tmp_path)
    Image.fromarray(mask_of(30, 40, (2, 2, 38, 28))).save("mask/00.png")
    monkeypatch.setattr(limits, "free_memory", lambda: 30_000)  # enough to read the photo
    ended = here(*options)
    assert ended.status == 2
    assert "gt/00.png: the photo with its largest cut does not fit into the memory" in ended.err


def test_a_scaled_mask_a_drawn_one_and_the_photos_own_transparency(here, tmp_path):
    options = write_photo(tmp_path, "RGBA")
    Image.fromarray(mask_of(15, 20, (5, 5, 7, 9))).save("mask/00.png")
    assert here(*options).status == 0
    with Image.open("log/run/gt_keep_mask/00.png") as mask:
        hole = np.asarray(mask)[..., 0] == 0
    assert hole.sum() == 4 * 2 * 4
    assert hole[10:18, 10:14].all()
    assert here(*options, "--mask", "thick", "--out", "drawn").status == 0
    assert here(*options, "--mask", "alpha", "--out", "own").status == 0
    with Image.open("own/inpainted/00.png") as image:
        assert image.mode == "RGB"


def test_without_a_hole_the_photo_is_the_result(here, tmp_path):
    options = write_photo(tmp_path)
    Image.fromarray(mask_of(30, 40)).save("mask/00.png")
    ended = here(*options)
    assert ended.status == 0
    assert "nothing to generate" in ended.err
    with Image.open("gt/00.png") as before, Image.open("log/run/inpainted/00.png") as after:
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_no_cut_of_a_photo_has_the_seed_of_another_pictures_cut(here, tmp_path, calls):
    assert here(*write_photo(tmp_path, images=2, samples_per_image=2)).status == 0
    assert len(calls) == len({seed for [seed] in calls}) == 2 * 2 * 2  # photos, samples, holes
