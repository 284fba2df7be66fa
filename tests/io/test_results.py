"""Pictures written, results, and their marks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import noise
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.io import images, results


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)])
def test_pictures_of_another_kind_are_a_defect(tmp_path, array):
    with pytest.raises(ValueError, match="not uint8") as caught:
        results.write_image(tmp_path / "x.png", array)
    assert not isinstance(caught.value, UserError)


def test_every_level_survives_the_way_through_the_model_range():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    x = torch.from_numpy(levels).float() / 127.5 - 1
    # A third of a level either way rounds back, where truncation would lose the lower ones.
    for shift in (-0.33, 0, 0.33):
        moved = images.to_levels(x + shift / 127.5)
        assert np.array_equal(moved, levels.transpose(0, 2, 3, 1))
    outside = torch.tensor([-9.0, -1.001, 1.001, 9.0]).reshape(1, 1, 2, 2)
    assert images.to_levels(outside).flatten().tolist() == [0, 0, 255, 255]
    half = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8).bfloat16()  # rounded once
    assert np.array_equal(images.to_levels(half), images.to_levels(half.float()))


def test_masked_picture_is_the_formula_for_every_pair_of_levels():
    gt, mask = np.meshgrid(np.arange(256), np.arange(256))
    m, x0 = mask / 255, gt / 127.5 - 1
    expected = np.rint((m * x0 - (1 - m) + 1) * 127.5)
    assert np.array_equal(images.masked_u8(gt.astype(np.uint8), mask.astype(np.uint8)), expected)


def test_four_folders_hold_exactly_the_pixels(folders):
    gt, mask, sample = (noise(8, 8, 3, seed=seed) for seed in range(3))
    paths = results.write_result(folders, "two.dots.png", sample, gt, mask)
    assert {str(path) for path in paths} == {f"{f}/two.dots.png" for f in folders.values()}
    assert paths[-1].parent.name == "srs"
    assert np.array_equal(read(f"{folders['srs']}/two.dots.png"), sample)
    assert np.array_equal(read(f"{folders['gts']}/two.dots.png"), gt)
    assert np.array_equal(read(f"{folders['gt_keep_masks']}/two.dots.png"), mask)
    masked = read(f"{folders['lrs']}/two.dots.png")
    assert np.array_equal(masked, images.masked_u8(gt, mask))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_pictures_are_gray_files_of_their_depth(folders, dtype):
    gt, mask = noise(8, 8, 1).astype(dtype) * (257 if dtype == np.uint16 else 1), noise(8, 8, 1)
    results.write_result(folders, "a.png", gt, gt, mask, mark="m")
    for key, pixels in (("srs", gt), ("gts", gt), ("gt_keep_masks", mask)):
        found = read(f"{folders[key]}/a.png")
        assert found.dtype == pixels.dtype
        assert np.array_equal(found, pixels[..., 0])
    shown = results.read_result(f"{folders['srs']}/a.png")
    assert np.array_equal(shown, (gt // (257 if dtype == np.uint16 else 1)).repeat(3, 2))
    assert results.is_written(folders, "a.png", gt, mask, mark="m")
    gt[0, 0] += 1
    assert not results.is_written(folders, "a.png", gt, mask, mark="m")


def test_samples_have_names_of_their_own_and_ground_truth_is_optional(folders, tmp_path):
    picture = noise(8, 8, 3)
    for number in (1, 2):
        wanted = folders | {"gts": None}
        names = {"name": "a.png", "sample_name": f"a_{number}.png"}
        paths = results.write_result(
            wanted, sample=picture, gt_u8=picture, mask_u8=picture, **names
        )
        assert len(paths) == 3
    assert {path.name for path in Path(folders["srs"]).iterdir()} == {"a_1.png", "a_2.png"}
    assert [path.name for path in Path(folders["lrs"]).iterdir()] == ["a.png"]
    assert not (tmp_path / "log" / "gts").exists()


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/b.png", "..", ".", "", "x\0.png"])
def test_a_name_that_leaves_its_folder_is_refused_before_anything_is_written(
    folders, tmp_path, name
):
    picture = noise(8, 8, 3)
    for names in ((name, None), ("a.png", name)) if name else ((name, None),):
        with pytest.raises(UserError, match="plain name"):
            results.write_result(folders, names[0], picture, picture, picture, sample_name=names[1])
    assert list(tmp_path.iterdir()) == []


def test_results_are_read_back_whatever_their_size_and_profile(folders, monkeypatch, recwarn):
    gt, mask = noise(8, 8, 3), noise(8, 8, 3, seed=1)
    photo = Image.fromarray(gt)
    photo.info["icc_profile"] = noise(3 << 20).tobytes()
    results.write_result(folders, "a.png", photo, gt, mask, mark="m")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert results.read_mark(Path(folders["srs"], "a.png")) == "m"
    assert np.array_equal(results.read_result(Path(folders["srs"], "a.png")), gt)
    assert results.is_written(folders, "a.png", gt, mask, mark="m")
    assert not recwarn.list


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_pipe_or_a_device_in_place_of_a_result_is_none(folders):
    gt, mask = noise(8, 8, 3), noise(8, 8, 3, seed=1)
    *_, written = results.write_result(folders, "x.png", gt, gt, mask, mark="m")
    assert results.is_written(folders, "x.png", gt, mask, mark="m")
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        written.unlink()
        make(written)
        assert not results.is_written(folders, "x.png", gt, mask, mark="m")
        assert results.read_result(written) is results.read_mark(written) is None
