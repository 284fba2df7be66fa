"""What is checked before a run: every picture and mask is decoded, and what is odd is told."""

import warnings

import numpy as np
import pytest
from picture_cases import folder_of, mask_of, picture, save
from PIL import Image
from run_cases import GOLDEN, ROOT, tiny_tree

from guided_diffusion import image_datasets
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import conf_from_dict
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import Pair, pair_images
from guided_diffusion.run.checks import check_pictures


def check_pairs(pairs, size=16, **keys):
    conf = conf_from_dict(tiny_tree(image_size=size, **keys), InpaintConf)
    return check_pictures(conf, pairs, [0] * len(pairs))[0]


def check(gt, mask, size=16, **keys):
    """Return the shares of a check, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shares = check_pairs(pair_images(gt, mask), size, **keys)
    return shares, [str(one.message) for one in caught]


def test_check_returns_the_share_of_generated_pixels(tmp_path, monkeypatch):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png"])
    for name, known in (("1.png", 8), ("2.png", 24)):
        mask = np.zeros((32, 32, 3), np.uint8)
        mask[:known] = 255
        save(tmp_path / "mask" / name, mask)
    pairs = pair_images(gt, str(tmp_path / "mask"))
    assert check_pairs(pairs, 32) == [0.75, 0.25]
    assert check_pairs(pairs, 32, invert_mask=True) == [0.25, 0.75]
    one = pair_images(gt, str(tmp_path / "mask" / "1.png"))
    paths, real = [], image_datasets.read_upright
    read = lambda path, **options: (paths.append(path), real(path, **options))[1]  # noqa: E731
    monkeypatch.setattr(image_datasets, "read_upright", read)
    assert check_pairs(one, 32) == [0.75, 0.75]
    assert paths == [f"{tmp_path}/mask/1.png"]  # it serves both, and is decoded once
    assert check_pairs(pair_images(gt, "genhalf"), 32) == [0.5, 0.5]


@pytest.mark.parametrize("folder", ["gt", "mask"])
def test_check_names_the_first_bad_file(tmp_path, folder):
    names = [f"{number}.png" for number in range(9)]
    gt, mask = folder_of(tmp_path / "gt", names), folder_of(tmp_path / "mask", names)
    for bad in ("3.png", "7.png"):
        (tmp_path / folder / bad).write_text("no")
    with pytest.raises(UserError, match=f"{folder}/3.png"):
        check(gt, mask)
    if folder == "mask":
        with pytest.raises(UserError, match=r"7\.png"):
            check(gt, f"{mask}/7.png")  # which serves all


@pytest.mark.parametrize("level", [0, 255])
def test_check_warns_once_of_masks_without_effect(tmp_path, level):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    [told] = check(gt, save(tmp_path / "m.png", np.full((9, 9, 3), level, np.uint8)))[1]
    problem = "nothing to generate" if level else "nothing known to start from"
    assert f"m.png: this mask leaves {problem} (3 of 3 images)" in told


def test_golden_cases_and_the_demo_are_silent():
    data = ROOT / "data" / "datasets"
    folders = [(GOLDEN / case / "gt", GOLDEN / case / "mask") for case in ("plain", "guided")]
    for gt, mask in (*folders, (data / "gts" / "demo", data / "gt_keep_masks" / "demo")):
        assert check(str(gt), str(mask), 64)[1] == []


@pytest.mark.parametrize(
    ("photo", "mask", "fits"),
    [
        ((60, 40), (60, 40), True),
        ((400, 300), (133, 100), True),  # sides are whole numbers
        ((60, 40), (40, 60), False),
        ((60, 40), (40, 40), False),
        ((40, 40), (60, 40), False),
        ((60, 40), (16, 16), True),  # the network's square, as the published program is fed
        ((60, 40), (64, 40), False),
    ],
)
def test_a_mask_has_its_pictures_shape(tmp_path, photo, mask, fits):
    gt = save(tmp_path / "p.png", picture(*photo))
    box = (4, 4, mask[0] - 4, mask[1] - 4)
    path = save(tmp_path / "m.png", mask_of(*mask, box))
    if fits:
        assert check(gt, path)[1] == []
        return
    with pytest.raises(UserError) as caught:
        check(gt, path)
    for part in ("p.png", "m.png", "{} x {}".format(*photo), "{} x {}".format(*mask)):
        assert part in str(caught.value)
    assert "EXIF" not in str(caught.value)
    even = save(tmp_path / "even.png", mask_of(*mask, (0, 0, 0, 0)))  # which has no shape
    assert "nothing to generate" in check(gt, even)[1][0]


def test_a_mask_of_the_stored_pixels_names_the_rotation(tmp_path):
    gt = save(tmp_path / "p.jpg", picture(48, 32), turned=6)
    mask = save(tmp_path / "m.png", mask_of(48, 32, (4, 4, 20, 20)))
    with pytest.raises(UserError, match=r"stored 48 x 32 .*EXIF orientation 6.*32 x 48") as caught:
        check(gt, mask)
    assert "\n" not in str(caught.value)
    upright = save(tmp_path / "u.png", mask_of(32, 48, (4, 4, 24, 24)))
    assert check(gt, upright)[1] == []


def test_one_mask_for_all_has_to_fit_each(tmp_path):
    save(tmp_path / "gt" / "a.png", picture(60, 40))
    save(tmp_path / "gt" / "b.png", picture(40, 60))
    mask = save(tmp_path / "m.png", mask_of(60, 40, (4, 4, 20, 20)))
    with pytest.raises(UserError, match=r"b\.png"):
        check(str(tmp_path / "gt"), mask)


def test_thin_holes_and_soft_rims_are_told_and_mended(tmp_path):
    gt = save(tmp_path / "p.png", picture(160, 160))
    thin = save(tmp_path / "thin.png", mask_of(160, 160, (20, 80, 140, 83)))
    shares, told = check(gt, thin)
    assert len(told) == 1
    for fact in (
        "thin.png: ",
        "thinner than a pixel at 16 x 16",
        "mask_hard: true",
        "mask_grow: N",
    ):
        assert fact in told[0]
    hard, told = check(gt, thin, mask_hard=True)
    assert told == []
    assert hard[0] > 2 * shares[0]
    small = save(tmp_path / "small.png", mask_of(160, 160, (73, 73, 127, 127)))
    assert "half-known at 16 x 16" in check(gt, small)[1][0]
    gray = save(tmp_path / "gray.png", mask_of(160, 160, (40, 40, 120, 120), black=90))
    assert "its hole is gray" in check(gt, gray)[1][0]
    assert check(gt, gray, mask_hard=True)[1] == []
    large = save(tmp_path / "large.png", mask_of(160, 160, (23, 23, 147, 147)))
    assert check(gt, large, 40)[1] == []


def test_masks_from_transparency_are_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.dstack([picture(32, 32), mask_of(32, 32, (8, 8, 24, 24))])
    save(tmp_path / "gt" / "a.png", array)
    assert check("gt", "alpha", 32) == ([0.25], [])
    assert 0.54 < check("gt", "alpha", 32, mask_grow=4)[0][0] <= 24 * 24 / 32**2
    save(tmp_path / "gt" / "b.jpg")
    with pytest.raises(UserError, match=r"gt/b\.jpg.*no transparency"):
        check("gt", "alpha")


def test_odd_masks_are_told_once_a_kind(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    for name, white in (("a", 1), ("b", 2), ("c", 255)):
        save(tmp_path / "mask" / f"{name}.png", mask_of(40, 30, (4, 4, 30, 20), white))
    [told] = check(gt, str(tmp_path / "mask"), 30)[1]
    for fact in ("mask/a.png: has no level above 1 of 255", "mask_hole: zero", "1 more like it"):
        assert fact in told
    shares, told = check(gt, str(tmp_path / "mask"), 30, mask_hole="zero")
    assert told == []
    assert len(set(shares)) == 1


def test_dark_deep_pictures_are_told_and_scaled_by_a_key(tmp_path):
    x = np.mgrid[0:40, 0:40][1]
    deep = (x * 100).astype(np.uint16)
    gt = save(tmp_path / "gt" / "a.png", deep)
    save(tmp_path / "gt" / "b.png", deep // 2)
    [told] = check(str(tmp_path / "gt"), "genhalf")[1]
    assert "gt/a.png: uses 3900 of 65535" in told and "depth_max: 4095" in told
    assert check(gt, "genhalf", depth_max=4095.0)[1] == []
    bright = save(tmp_path / "bright.png", deep * 16)
    assert check(bright, "genhalf")[1] == []
    negative = save(tmp_path / "n.tif", (x / 20.0 - 1).astype(np.float32))
    [told] = check(negative, "genhalf")[1]
    assert "values of -1 to 0.95" in told and "depth_min" in told


@pytest.mark.parametrize(
    ("photo", "turned", "mask", "mask_turned", "is_told"),
    [
        ((40, 30), 2, (40, 30), 1, True),
        ((40, 30), 3, (20, 15), 1, True),
        ((32, 32), 6, (32, 32), 1, True),
        ((40, 30), 1, (40, 30), 1, False),
        ((40, 30), 3, (40, 30), 3, False),
        ((40, 30), 6, (30, 40), 1, False),  # made for the upright photo
    ],
)
def test_a_turned_photo_with_a_mask_that_is_not(
    tmp_path, photo, turned, mask, mask_turned, is_told
):
    gt = save(tmp_path / "p.jpg", picture(*photo), turned=turned, quality=98)
    path = save(tmp_path / "m.png", mask_of(*mask, (2, 2, 12, 12)), turned=mask_turned)
    told = check(gt, path, 30)[1]
    assert [f"EXIF orientation {turned}" in text for text in told] == [True] * is_told
    assert check(gt, "genhalf", 30)[1] == []


@pytest.mark.parametrize("name", ["p.gif", "p.png", "p.webp", "p.tif"])
def test_further_frames_of_pictures_and_masks_are_told(tmp_path, name):
    frames = [Image.fromarray(mask_of(30, 30, (4, 4, k, 20))) for k in (20, 22, 24)]
    path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
    still = save(tmp_path / "still.jpg", picture(30, 30))
    assert [text for text in check(path, "thick")[1] if "frames" in text] == [
        f"{path}: has 3 frames, and only the first is used"
    ]
    assert sum("has 3 frames" in text for text in check(still, path)[1]) == 1


def test_colours_that_change_are_told(tmp_path):
    cmyk = Image.fromarray(picture()).convert("CMYK")
    gt = folder_of(tmp_path / "gt", ["a.png"])
    save(tmp_path / "gt" / "b.jpg", cmyk)
    [told] = check(gt, "thick")[1]
    assert "b.jpg: is CMYK without a colour profile" in told
    assert "gt/a.png: is coloured" in " ".join(check(gt, "thick", in_channels=1)[1])
    gray = save(tmp_path / "g.png", picture()[:, :, [0, 0, 0]])
    assert check(gray, "thick", in_channels=1)[1] == []


def test_pictures_in_memory_are_checked():
    mask = Image.fromarray(mask_of(40, 30, (0, 0, 20, 30)))
    pairs = [Pair(k, Image.fromarray(picture()), mask, f"{k}.png") for k in range(2)]
    assert check_pairs(pairs, 30) == [0.5, 0.5]
    with pytest.raises(UserError, match="30 x 40"):
        check_pairs([Pair(0, Image.fromarray(picture(30, 40)), mask, "0.png")], 16)
