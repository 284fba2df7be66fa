"""The pictures of a training: found, split, classed, cut, kept in memory."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.io.images import load_crop
from guided_diffusion.training import pictures
from guided_diffusion.training.pictures import TrainingImages, split_by_name


def picture(width=40, height=30, seed=0):
    """A smooth coloured picture whose four corners differ, so that turning it shows."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(seed)
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, -1).astype(np.uint8) ^ rng.integers(0, 4, 3, dtype=np.uint8)


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture() if array is None else array).save(path)


@pytest.fixture
def photos(tmp_path):
    for number in range(6):
        kind = "cat" if number % 2 else "ant"
        save(tmp_path / "photos" / kind / f"{number}.png", picture(40 + number, 30, seed=number))
    return str(tmp_path / "photos")


def test_training_pictures_and_classes(photos):
    images = TrainingImages(photos, 16, class_cond=True, random_flip=False)
    assert len(images) == 6
    assert images.class_names == ["ant", "cat"]
    batch, labels = images.batch([5, 0, 5], np.random.default_rng(0))
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, 3, 16, 16)
    assert labels.tolist() == [1, 0, 1]
    assert np.array_equal(batch[1].permute(1, 2, 0).numpy(), load_crop(images.paths[0], 16))
    assert torch.equal(batch[0], batch[2])
    assert TrainingImages(photos, 16).batch([0], np.random.default_rng(0))[1] is None


def test_a_picture_outside_the_classes_is_named(photos):
    save(Path(photos) / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png.*subfolder"):
        TrainingImages(photos, 16, class_cond=True)


@pytest.mark.parametrize("random_crop", [False, True])
def test_batches_depend_on_the_generator_alone(photos, random_crop):
    cached = TrainingImages(photos, 16, random_crop=random_crop)
    uncached = TrainingImages(photos, 16, random_crop=random_crop, cache_bytes=0)
    partly = TrainingImages(photos, 16, random_crop=random_crop, cache_bytes=3000)
    batches = [
        images.batch(np.array([3, 1, 4, 1]), np.random.default_rng([7, 2]))[0]
        for images in (cached, cached, uncached, partly)
    ]
    assert all(torch.equal(batches[0], other) for other in batches[1:])
    other = cached.batch([3] * 20, np.random.default_rng([7, 3]))[0]
    again = cached.batch([3] * 20, np.random.default_rng([7, 4]))[0]
    assert not torch.equal(other, again)


def test_the_cache_keeps_to_its_budget(photos, monkeypatch):
    one = 16 * 16 * 3
    images = TrainingImages(photos, 16, cache_bytes=2 * one + one // 2)
    paths, read = [], pictures.read_rgb
    monkeypatch.setattr(pictures, "read_rgb", lambda path: (paths.append(path), read(path))[1])
    images.batch(range(6), np.random.default_rng(0))
    assert sorted(paths) == images.paths[2:]


def test_flips_are_half_of_all(photos):
    images = TrainingImages(photos, 16)
    batch, _ = images.batch([0] * 400, np.random.default_rng(0))
    plain = torch.from_numpy(load_crop(images.paths[0], 16)).permute(2, 0, 1)
    same = sum(torch.equal(one, plain) for one in batch)
    mirrored = sum(torch.equal(one, plain.flip(2)) for one in batch)
    assert same + mirrored == 400
    assert 150 < same < 250


def test_random_crops_show_between_four_fifths_and_all(tmp_path):
    # Red grows evenly to the right, green downwards, so a crop tells its place and its share.
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    planes = np.stack([*np.meshgrid(ramp, ramp), np.zeros((320, 320), np.uint8)], -1)
    save(tmp_path / "r" / "ramp.png", planes)
    images = TrainingImages(str(tmp_path / "r"), 64, random_crop=True, random_flip=False)
    batch, _ = images.batch([0] * 200, np.random.default_rng(0))
    rows = batch[:, 0, 32].float()
    spans = (rows[:, -1] - rows[:, 0]) / 255
    assert 0.77 < spans.min() < 0.82
    assert 0.95 < spans.max() <= 1
    across, down = rows[:, 0], batch[:, 1, 0, 32].float()
    assert across.max() > 30  # the window moves
    assert down.max() > 30
    assert not torch.allclose(across, down, atol=5)  # both ways on its own


def test_unreadable_training_pictures_are_named_at_once(photos):
    (Path(photos) / "cat" / "bad.png").write_text("no")
    with pytest.raises(UserError, match=r"cat/bad\.png"):
        TrainingImages(photos, 16, cache_bytes=0)


def test_small_training_pictures_are_counted_in_one_warning(photos):
    save(Path(photos) / "tiny.png", picture(9, 7))
    save(Path(photos) / "tiny2.png", picture(50, 7))
    for random_crop in (False, True):
        with pytest.warns(UserWarning, match="2 of 8 pictures are smaller") as caught:
            images = TrainingImages(photos, 16, random_crop=random_crop)
        assert len(caught) == 1
        everything = images.batch(range(8), np.random.default_rng(0))[0]
        assert everything.shape == (8, 3, 16, 16)


def test_training_tells_of_dark_deep_pictures_and_scales_them(tmp_path):
    deep = (np.mgrid[0:40, 0:40][1] * 100).astype(np.uint16)
    for name in ("a.png", "b.png"):
        save(tmp_path / "p" / name, deep)
    with pytest.warns(UserWarning, match=r"a\.png: uses 3900 of 65535.*and 1 more") as caught:
        dark = TrainingImages(str(tmp_path / "p"), 16)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        light = TrainingImages(str(tmp_path / "p"), 16, depth=(0.0, 4095.0), cache_bytes=0)
    draw = [
        images.batch([0], np.random.default_rng(0))[0].float().mean() for images in (dark, light)
    ]
    assert draw[1] > 10 * draw[0]


def test_hidden_folders_are_no_classes(photos):
    save(Path(photos) / ".ipynb_checkpoints" / "0-checkpoint.png")
    save(Path(photos) / "cat" / "__MACOSX" / "0.png")
    images = TrainingImages(photos, 16, class_cond=True)
    assert images.class_names == ["ant", "cat"]
    assert len(images) == 6


def test_the_split_hangs_on_names_and_survives_additions():
    names = [f"pictures/{number}.png" for number in range(2000)]
    kept, out = split_by_name(names, 0.1)
    assert sorted([*kept, *out]) == list(range(2000))
    assert 150 < len(out) < 250
    again = split_by_name(["new/a.png", *names], 0.1)[1]
    assert {0, *out + 1} >= set(again) >= set(out + 1)


@pytest.mark.parametrize(
    ("count", "share", "sizes"),
    [(5, 0.0, (5, 0)), (1, 0.5, (1, 0)), (2, 0.01, (1, 1)), (2, 1.0, (1, 1))],
)
def test_each_side_of_the_split_gets_something(count, share, sizes):
    kept, out = split_by_name([f"{number}.png" for number in range(count)], share)
    assert (len(kept), len(out)) == sizes


def test_training_hides_what_is_held_out(photos):
    images = TrainingImages(photos, 16, holdout=0.3)
    names = [str(Path(path).relative_to(photos)) for path in images.paths]
    expected = split_by_name(names, 0.3)
    assert np.array_equal(images.train, expected[0])
    assert np.array_equal(images.held_out, expected[1])
    assert len(images.held_out) >= 1
