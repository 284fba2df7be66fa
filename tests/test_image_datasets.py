"""Pairs of picture and mask: found, and read as the network or a whole photo takes them."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import folder_of, mask_of, picture, save
from PIL import Image
from run_cases import GOLDEN

from guided_diffusion import masks
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import Pair, ReadOptions, load_pair, load_photo, pair_images
from guided_diffusion.io.images import center_crop, to_model_range
from guided_diffusion.io.pairing import pair_up


@pytest.mark.parametrize("run", ["plain", "guided"])
def test_pairs_equal_the_published_programs(run):
    expected = np.load(GOLDEN / run / "expect.npz")
    pairs = pair_images(str(GOLDEN / run / "gt"), str(GOLDEN / run / "mask"))
    assert len(pairs) == len(expected["gt_u8"])
    for pair, gt_u8, mask_u8 in zip(pairs, expected["gt_u8"], expected["mask_u8"], strict=True):
        gt, mask = load_pair(pair, gt_u8.shape[0])
        assert np.array_equal(gt, gt_u8)
        assert np.array_equal(mask, mask_u8)


def test_pairs_by_position_with_offset_and_length(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png", "d.png"])
    mask = folder_of(tmp_path / "mask", ["1.png", "2.png", "3.png", "4.png"])
    pairs = pair_images(gt, mask, offset=1, max_len=2)
    assert [(pair.index, pair.name, Path(pair.mask_path).name) for pair in pairs] == [
        (1, "b.png", "2.png"),
        (2, "c.png", "3.png"),
    ]
    assert len(pair_images(gt, mask, max_len=100)) == 4  # at most
    with pytest.raises(UserError, match="offset: expected 0 to 3"):
        pair_images(gt, mask, offset=4)


def test_one_mask_file_serves_all(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png"])
    mask = save(tmp_path / "m.png")
    assert [pair.mask_path for pair in pair_images(gt, mask)] == [mask, mask]
    assert len(pair_images(f"{gt}/a.png", mask)) == 1
    with pytest.warns(UserWarning, match=r"gt/b.png: this mask is also one of the pictures"):
        pair_images(gt, f"{gt}/../gt/b.png")


def test_different_numbers_are_both_told(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    mask = folder_of(tmp_path / "mask", ["a.png", "b.png"])
    with pytest.raises(UserError, match=r"expected 3 masks.*found 2") as caught:
        pair_images(gt, mask)
    assert caught.value.key == "mask_path"
    # A folder with a single mask is not taken for a mask of all: that would hide a lost file.
    one = folder_of(tmp_path / "one", ["a.png"])
    with pytest.raises(UserError, match="found 1"):
        pair_images(gt, one)


def test_masks_below_the_pictures_are_no_pictures(tmp_path):
    names = ["a.png", "b.png"]
    folder_of(tmp_path / "p" / "masks", names)
    gt = folder_of(tmp_path / "p", names)
    for pair in pair_images(gt, f"{gt}/masks"):
        assert pair.gt_path == f"{gt}/{pair.name}"
        assert pair.mask_path == f"{gt}/masks/{pair.name}"
    for pair in pair_images(f"{gt}/masks", gt):
        assert pair.mask_path == f"{gt}/{pair.name}"


@pytest.mark.parametrize("names", [["a.png"], ["a.png", "a_mask001.png"]])
def test_one_folder_for_pictures_and_masks_is_refused(tmp_path, names):
    gt = folder_of(tmp_path / "p", names)
    (tmp_path / "link").symlink_to(gt)
    for mask in (gt, str(tmp_path / "link")):
        with pytest.raises(UserError, match=rf"gt_path and mask_path overlap: {len(names)} files"):
            pair_images(gt, mask)


def test_missing_mask_path_tells_the_families(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png"])
    with pytest.raises(UserError, match=r"thikc.*mask_path.*thick") as caught:
        pair_images(gt, "thikc")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "samples", "clash"),
    [
        (["a.jpg", "a.png"], 1, "a.png"),
        (["one/a.png", "two/a.png"], 1, "a.png"),
        (["a.png", "a_1.png", "a.b.png"], 2, "a_1.png"),
    ],
)
def test_colliding_results_name_both_inputs(tmp_path, names, samples, clash):
    gt = folder_of(tmp_path / "gt", names)
    mask = save(tmp_path / "m.png")
    with pytest.raises(UserError) as caught:
        pair_images(gt, mask, samples_per_image=samples)
    for part in (*names[:2], clash):
        assert part in str(caught.value)
    if samples > 1:  # names that only look alike
        assert len(pair_images(gt, mask)) == 3
        gt = folder_of(tmp_path / "long", ["x" * 251 + ".png"])
        assert len(pair_images(gt, mask)) == 1
        with pytest.raises(UserError, match="too long"):
            pair_images(gt, mask, samples_per_image=samples)


NUMBERED = ["photo1", "photo10", "photo11", "photo2"]  # all names here are sorted
NUMBERED_IMAGES = ["photo10_img", "photo11_img", "photo1_img", "photo2_img"]
ACCENTED = ["e\u0301te", "fan"]  # an accent is one character, however a system writes it


@pytest.mark.parametrize(
    ("names", "partners", "is_doubtful"),
    [
        (NUMBERED, [f"{name}_mask001" for name in NUMBERED], False),
        (["1", "10", "1a", "2"], ["mask_1_", "mask_10_", "mask_1a_", "mask_2_"], False),
        (NUMBERED_IMAGES, [name.removesuffix("_img") for name in NUMBERED_IMAGES], False),
        (["a-1", "a.b", "a"], ["a-1.jpg", "a.b.jpg", "a.jpg"], False),
        (["IMG_1", "IMG_1_2", "IMG_1_2_3"], ["IMG_1-m", "IMG_1_2-m", "IMG_1_2_3-m"], False),
        (ACCENTED, ["\u00e9te_mask", "fan_mask"], False),
        (["0", "1", "2"], ["000000", "000001", "000002"], False),
        (["img_1", "img_10", "img_2"], ["mask_1", "mask_10", "mask_2"], False),
        (["00012", "00345"], ["000000", "000001"], False),
        (["img_1", "img_5"], ["m_05x", "m_19x"], False),
        (["a", "b", "c"], ["b", "c", "d"], True),
        (["img_1", "img_10", "img_2"], ["mask_01", "mask_02", "mask_10"], True),
        (["0", "1", "10", "2"], ["000000", "000001", "000002", "000010"], True),
        (["a_image", "b_image"], ["b_mask", "c_mask"], True),
    ],
)
def test_pairs_by_name_or_by_position_with_a_warning(names, partners, is_doubtful):
    mask_files = sorted(f"{name}.png" for name in partners)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pair_up([f"{name}.png" for name in names], mask_files)
    assert found == [f"{name}.png" for name in partners]
    told = "paired by name" if found != mask_files else "although" if is_doubtful else None
    assert [told in str(each.message) for each in caught] == [True] * bool(told)


def test_a_family_draws_masks_from_seed_and_index_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    pairs = pair_images(gt, "thin")
    later = pair_images(gt, "thin", offset=1)
    state = torch.get_rng_state()
    drawn = [load_pair(pair, 32, ReadOptions(seed=3))[1] for pair in pairs]
    assert torch.equal(state, torch.get_rng_state())
    assert drawn[0].shape == (32, 32, 3)
    assert set(np.unique(drawn[0])) == {0, 255}
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], load_pair(pairs[0], 32, ReadOptions(seed=4))[1])
    assert np.array_equal(drawn[1], load_pair(later[0], 32, ReadOptions(seed=3))[1])
    expected = masks.make_mask("thin", 32, np.random.default_rng([3, 1]))
    assert np.array_equal(drawn[1][:, :, 2], expected)
    by_rule = load_pair(pairs[1], 32, ReadOptions(seed=3, mask_hole="color"))[1]
    assert np.array_equal(by_rule, drawn[1])  # which is for masks that are read
    known = load_photo(pairs[1], ReadOptions(seed=3)).known
    whole = masks.make_mask("thin", 40, np.random.default_rng([3, 1]))
    assert np.array_equal(known, whole[5:35])  # the middle, for a photo of 40 x 30


def test_flip_mirrors_both_and_inversion_only_the_mask(tmp_path):
    gt = save(tmp_path / "gt.png", picture(20, 20))
    mask = save(tmp_path / "mask.png", picture(20, 20, seed=1))
    (pair,) = pair_images(gt, mask)
    image, keep = load_pair(pair, 20)
    flipped, flipped_keep = load_pair(pair, 20, flip=True)
    assert np.array_equal(flipped, image[:, ::-1])
    assert np.array_equal(flipped_keep, keep[:, ::-1])
    to_model_range(flipped)  # torch takes no negative strides
    same, inverted = load_pair(pair, 20, ReadOptions(invert_mask=True))
    assert np.array_equal(same, image)
    assert np.array_equal(inverted, 255 - keep)


def test_hard_masks_are_hole_wherever_the_hole_reaches(tmp_path):
    gt = save(tmp_path / "p.png", picture(160, 160))
    mask = save(tmp_path / "m.png", mask_of(160, 160, (33, 80, 140, 83)))
    (pair,) = pair_images(gt, mask)
    soft = load_pair(pair, 16)[1]
    assert len(np.unique(soft)) > 2  # used as it is unless asked otherwise
    options = ReadOptions(mask_hard=True)
    hard = load_pair(pair, 16, options)[1]
    assert np.array_equal(hard, np.where(soft < 255, 0, 255))
    inverted = load_pair(pair, 16, dataclasses.replace(options, invert_mask=True))[1]
    assert (inverted == 0).mean() > 0.95  # the known line touches few pixels alone


@pytest.mark.parametrize("side", [160, 40])
def test_grow_is_in_pixels_of_the_photo(tmp_path, side):
    gt = save(tmp_path / "p.png", picture(160, 160))
    unit = side // 40
    box = (10 * unit, 10 * unit, 20 * unit, 20 * unit)
    mask = save(tmp_path / "m.png", mask_of(side, side, box))
    (pair,) = pair_images(gt, mask)
    options = ReadOptions(mask_grow=16)
    grown = load_pair(pair, 20, options)[1]
    assert (grown[3:12, 5:10] == 0).all()  # 16 pixels of 160 are 2 of 20
    assert (grown[:3] == 255).all()
    assert (grown[:, 12:] == 255).all()
    inverted = load_pair(pair, 20, dataclasses.replace(options, invert_mask=True))[1]
    assert (inverted == 255).sum() == 3
    drawn = pair_images(gt, "genhalf")[0]
    assert (load_pair(drawn, 20)[1] == 255).sum() == 3 * 10 * 20
    more = load_pair(drawn, 20, options)[1]
    assert (more == 255).sum() == 3 * 8 * 20
    # A mask of the square that the network sees grows by as much.
    wide = save(tmp_path / "wide.png", picture(300, 160))
    square = save(tmp_path / "square.png", mask_of(16, 16, (6, 6, 10, 10)))
    grown = load_pair(pair_images(wide, square)[0], 16, ReadOptions(mask_grow=20))[1]
    assert np.array_equal(grown[:, :, 0] == 0, mask_of(16, 16, (4, 4, 12, 12)) == 0)


def test_the_pictures_own_transparency_is_the_hole(tmp_path, monkeypatch):
    array = np.dstack([picture(32, 32), mask_of(32, 32, (8, 8, 24, 24))])
    array[8:24, 8:24, :3] = (255, 0, 255)  # what was erased
    gt = save(tmp_path / "gt" / "a.png", array)
    monkeypatch.chdir(tmp_path)
    (pair,) = pair_images("gt", "alpha")
    assert pair.is_alpha
    assert pair.mask_file == "gt/a.png"
    image, mask = load_pair(pair, 32)
    assert np.array_equal(mask[:, :, 0], array[:, :, 3])
    known = mask[:, :, 0] == 255
    assert np.array_equal(image[known], array[:, :, :3][known])
    # Nothing of what was erased, nor black, gets into the rim when the picture is scaled.
    small, mask = load_pair(pair, 12)
    plain = center_crop(Image.fromarray(picture(32, 32)), 12).astype(int)
    rim = mask[:, :, 0] > 60
    assert np.abs(small.astype(int) - plain)[rim].max() < 4
    (tmp_path / "alpha").mkdir()
    save(tmp_path / "alpha" / "m.png")
    assert not pair_images(gt, "alpha")[0].is_alpha


def in_memory(path):
    image = Image.open(path)
    image.load()
    return image


def test_pictures_in_memory_are_treated_as_files(tmp_path):
    stored = np.dstack([picture(40, 30), mask_of(40, 30, (3, 3, 9, 9))])
    gt = save(tmp_path / "p.png", stored, turned=6)
    mask = save(tmp_path / "m.png", mask_of(30, 40, (5, 5, 20, 20)), turned=3)
    file, memory = Pair(0, gt, mask, "p.png"), Pair(0, in_memory(gt), in_memory(mask), "p.png")
    before = memory.gt_path.tobytes()
    for options in (ReadOptions(), ReadOptions(mask_grow=3), ReadOptions(channels=1)):
        for one, other in zip(
            load_pair(file, 16, options), load_pair(memory, 16, options), strict=True
        ):
            assert np.array_equal(one, other)
    one, other = load_photo(file), load_photo(memory)
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.known, other.known)
    assert np.array_equal(one.alpha, other.alpha)
    assert memory.gt_path.tobytes() == before
    assert "origin" not in memory.gt_path.info
    alpha = dataclasses.replace(memory, mask_path="alpha", makes_mask=True)
    assert load_pair(alpha, 16)[1].min() == 0


GRAY = ReadOptions(channels=1)


def test_one_channel_gives_gray_pictures_and_masks(tmp_path):
    gray = picture()[:, :, 0]
    mask = save(tmp_path / "m.png", mask_of(40, 30, (4, 4, 20, 20)))
    pair = Pair(0, save(tmp_path / "g.png", gray), mask, "g.png")
    pixels, known = load_pair(pair, 16, GRAY)
    assert pixels.shape == known.shape == (16, 16, 1)
    assert pixels.dtype == known.dtype == np.uint8
    colour, known_colour = load_pair(pair, 16)
    assert np.array_equal(pixels, colour[:, :, :1])
    assert np.array_equal(known, known_colour[:, :, :1])
    drawn = dataclasses.replace(pair, mask_path="thick", makes_mask=True)
    assert load_pair(drawn, 16, GRAY)[1].shape == (16, 16, 1)
    assert load_pair(drawn, 16, GRAY, flip=True)[0].shape == (16, 16, 1)


def test_one_channel_keeps_16_bits(tmp_path):
    deep = (np.arange(32 * 32, dtype=np.uint16) * 61 + 7).reshape(32, 32)
    pair = Pair(0, save(tmp_path / "d.png", deep), "thin", "d.png", makes_mask=True)
    pixels, _ = load_pair(pair, 32, GRAY)
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels[:, :, 0], deep)
    small = load_pair(pair, 16, GRAY)[0][:, :, 0]
    assert np.abs(small.astype(int) - deep.reshape(16, 2, 16, 2).mean((1, 3))).max() <= 1
    photo = load_photo(pair, GRAY)
    assert photo.mode == "I;16"
    assert np.array_equal(np.asarray(photo.image_of(photo.pixels)), deep)
    assert photo.notes == []
    eight = load_photo(pair)
    assert (eight.mode, eight.pixels.dtype, eight.pixels.shape) == ("L", np.uint8, (32, 32, 3))
    assert "more than 8 bits" in " ".join(eight.notes)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_a_photo_for_one_channel_is_gray_with_its_transparency(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(mask_of(40, 30, (0, 0, 9, 9))))
    photo = load_photo(Pair(0, image, "thin", "0.png", makes_mask=True), GRAY)
    assert photo.pixels.shape == (30, 40, 1)
    assert photo.mode == ("LA" if mode.endswith("A") else "L")
    assert photo.image_of(photo.pixels).mode == photo.mode
    assert any("coloured" in note for note in photo.notes) == (mode[0] == "R")
    if mode.endswith("A"):
        assert np.array_equal(photo.alpha, mask_of(40, 30, (0, 0, 9, 9)))


def test_the_notes_of_a_photo(tmp_path):
    gt = save(tmp_path / "p.jpg", Image.fromarray(picture()).convert("CMYK"), turned=3)
    mask = save(tmp_path / "m.png", mask_of(40, 30, (3, 3, 9, 9)))
    photo = load_photo(Pair(0, gt, mask, "p.png"))
    assert "CMYK" in " ".join(photo.notes)
    assert ["EXIF orientation 3" in note for note in photo.mask_notes] == [True]
    with pytest.raises(UserError, match=r"m\.png.* 40 x 20, found 40 x 30"):
        load_photo(Pair(0, Image.fromarray(picture(40, 20)), mask, "p.png"))
