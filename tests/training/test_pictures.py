"""The pictures of a training: found, split, labelled, cut, kept in memory, replaced if bad."""

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import noise, save
from PIL import Image
from train_cases import tiny_conf, write_pictures

from guided_diffusion.errors import UserError
from guided_diffusion.io.images import load_crop
from guided_diffusion.training import pictures
from guided_diffusion.training.pictures import TrainingImages, batches, split_by_name


def training(tmp_path, **changes):
    return TrainingImages(tiny_conf(tmp_path, **changes))


def classes(tmp_path, **changes):
    """Two classes of eight pictures, cut at random."""
    folder = tmp_path / "classes"
    if not folder.exists():
        for name in ("cats", "dogs"):
            write_pictures(folder / name, 8, side=24)
    tree = {"data_dir": str(folder), "class_cond": True, "num_classes": 2, "random_crop": True}
    return training(tmp_path, **{**tree, **changes})


def decoded(monkeypatch):
    """Return the list of what is decoded from here on."""
    paths, read = [], pictures.read_rgb
    monkeypatch.setattr(
        pictures, "read_rgb", lambda path, *_, **__: (paths.append(path), read(path))[1]
    )
    return paths


def rng(seed=0):
    return np.random.default_rng(seed)


def test_labels_are_the_first_level_subfolders(tmp_path):
    images = classes(tmp_path, random_crop=False, random_flip=False)
    batch, labels = images.batch([15, 0, 15], rng())
    assert (batch.dtype, batch.shape) == (torch.uint8, (3, 3, 8, 8))
    assert labels.tolist() == [1, 0, 1]
    crop = load_crop(images.paths[0], 8)
    assert np.array_equal(batch[1].permute(1, 2, 0).numpy(), crop)
    assert images.class_names == ["cats", "dogs"]
    assert training(tmp_path).batch([0], rng())[1] is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["0", "10", "2"], ["0", "2", "10"]), (["class10", "class2"], ["class10", "class2"])],
)
def test_numbers_are_classes_in_numerical_order_and_a_record_decides(tmp_path, names, expected):
    for name in names:
        write_pictures(tmp_path / "classes" / name, 1)
    changes = {"data_dir": str(tmp_path / "classes"), "num_classes": len(names), "holdout": 0}
    images = classes(tmp_path, **changes)
    assert images.class_names == expected
    assert images.labels.tolist() == [expected.index(name) for name in sorted(names)]
    images = TrainingImages(images.conf, names)
    assert images.class_names == names
    assert images.labels.tolist() == list(range(len(names)))


def test_classes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"num_classes: .*expected 2, found 3"):
        classes(tmp_path, num_classes=3)
    save(tmp_path / "classes" / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png.*subfolder"):
        classes(tmp_path)


def test_the_split_depends_on_names_and_survives_additions():
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


def test_held_out_pictures_are_never_learnt(tmp_path):
    images = training(tmp_path, random_flip=False)
    assert len(images.held_out) >= 1
    seen = {
        picture.numpy().tobytes() for batch, _ in batches(images, range(20)) for picture in batch
    }
    crops = [load_crop(path, 8).transpose(2, 0, 1).tobytes() for path in images.paths]
    assert seen == {crops[i] for i in images.train}


def test_flips_are_half_of_all(tmp_path):
    images = training(tmp_path)
    batch, _ = images.batch([0] * 400, rng())
    plain = torch.from_numpy(load_crop(images.paths[0], 8)).permute(2, 0, 1)
    same = sum(torch.equal(picture, plain) for picture in batch)
    mirrored = sum(torch.equal(picture, plain.flip(2)) for picture in batch)
    assert same + mirrored == 400
    assert 150 < same < 250


def test_random_crops_show_between_four_fifths_and_all(tmp_path):
    # Red grows evenly to the right, green downwards, so a crop shows its place and its size.
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    planes = np.stack([*np.meshgrid(ramp, ramp), np.zeros((320, 320), np.uint8)], -1)
    save(tmp_path / "pictures" / "ramp.png", planes)
    images = training(
        tmp_path, image_size=64, attention_resolutions="", random_crop=True, random_flip=False
    )
    batch, _ = images.batch([0] * 200, rng())
    rows = batch[:, 0, 32].float()
    spans = (rows[:, -1] - rows[:, 0]) / 255
    assert 0.77 < spans.min() < 0.82
    assert 0.95 < spans.max() <= 1
    across, down = rows[:, 0], batch[:, 1, 0, 32].float()
    assert across.max() > 30  # the window moves
    assert down.max() > 30
    assert not torch.allclose(across, down, atol=5)  # in both directions independently


def same(some, others):
    return all(torch.equal(a, b) for pair in zip(some, others, strict=True) for a, b in zip(*pair))  # noqa: B905


@pytest.mark.parametrize(
    ("threads", "cache_gb"), [(1, 0), (3, 3000 / 2**30), (3, 4)], ids=["none", "a few", "all"]
)
def test_threads_and_memory_do_not_change_what_a_step_sees(tmp_path, threads, cache_gb):
    plain = list(batches(classes(tmp_path), range(8), threads=1))
    images = classes(tmp_path, cache_gb=cache_gb)
    assert same(plain, batches(images, range(8), threads))
    assert same(plain[5:], batches(images, range(5, 8), threads))
    assert not same(plain[:4], plain[4:])


def test_processes_together_see_what_one_sees(tmp_path, monkeypatch):
    [whole] = batches(classes(tmp_path), range(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        parts += batches(classes(tmp_path), range(1))
    assert same([whole], [[torch.cat(values) for values in zip(*parts, strict=True)]])


def save_frames(path, count=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.new("RGB", (16, 16), (40 * number, 99, 9)) for number in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_of_several_frames_the_first_is_taken_with_a_warning(tmp_path):
    for name in ("a.gif", "b.png"):
        save_frames(tmp_path / "pictures" / name)
    with pytest.warns(UserWarning, match=r"a\.gif: has 6 frames.*all_frames.*and 1 more") as caught:
        images = training(tmp_path, cache_gb=0)
    assert len(caught) == 1
    assert len(images) == 2


@pytest.mark.parametrize(("suffix", "cache_gb"), [("gif", 1), ("png", 0), ("tif", 1)])
def test_all_frames_are_pictures_on_one_side_of_the_split(tmp_path, suffix, cache_gb):
    for name in ("a", "b", "c"):
        save_frames(tmp_path / "pictures" / name / f"x.{suffix}")
    changes = {"class_cond": True, "num_classes": 3, "all_frames": True, "all_formats": True}
    changes["holdout"] = 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = training(tmp_path, cache_gb=cache_gb, **changes)
    assert (len(images.names), len(images)) == (3, 18)
    assert len(images.held_out) == 6
    assert len({images.paths[index] for index in images.held_out}) == 1
    levels, labels = images.batch(range(18), rng())
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    expected = torch.arange(0, 240, 40).repeat(3)
    assert (levels[:, 0, 4, 4].int() - expected).abs().max() <= 2
    assert abs(int(images.middle(9)[4, 4, 0]) - 120) <= 2


@pytest.mark.parametrize(("random_crop", "cache_gb"), [(False, 1), (True, 0)])
def test_gray_pictures_keep_16_bits_for_a_network_of_one_channel(tmp_path, random_crop, cache_gb):
    ramp = (1000 + np.mgrid[0:12, 0:12].sum(0)).astype(np.uint16)  # 23 of 65,536 levels
    save(tmp_path / "pictures" / "deep.png", ramp)
    save(tmp_path / "pictures" / "eight.png", (ramp // 8).astype(np.uint8))
    changes = {"in_channels": 1, "random_crop": random_crop, "cache_gb": cache_gb, "holdout": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ramp is dark
        images = training(tmp_path, image_size=12, attention_resolutions="", **changes)
    levels, _ = images.batch([0, 1], rng())
    assert (levels.shape, levels.dtype) == ((2, 1, 12, 12), torch.float32)
    deep = levels[0, 0] * 257
    assert len(deep.unique()) > 15
    assert 1000 <= deep.min() < deep.max() <= 1022
    assert torch.equal(levels[1], levels[1].round())
    assert images.batch([1], rng())[0].dtype == torch.uint8
    assert (images.middle(0).dtype, images.middle(0).shape) == (np.uint16, (12, 12, 1))


@pytest.mark.parametrize(
    ("random_crop", "kept", "cached"), [(False, 0, 0), (True, 3, 3), (False, 1000, 12)]
)
def test_no_more_is_kept_than_memory_holds(tmp_path, monkeypatch, kept, cached, random_crop):
    side = 10 if random_crop else 8
    cache_gb = (kept * side * side * 3 + 50) / 2**30 if kept else 0
    paths = decoded(monkeypatch)
    images = training(tmp_path, cache_gb=cache_gb, random_crop=random_crop)
    at_start = len(paths)
    assert cached <= at_start <= (12 if kept else 0)
    images.batch(range(12), rng())
    images.batch(range(12), rng())
    assert len(paths) - at_start == 2 * (12 - cached)  # each of the others every time


def test_each_process_looks_at_its_share_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    paths = decoded(monkeypatch)
    training(tmp_path)
    assert sorted(Path(path).name for path in paths) == [f"{n:02d}.png" for n in range(1, 12, 2)]


@pytest.mark.parametrize("random_crop", [False, True])
def test_small_pictures_are_enlarged_with_one_warning(tmp_path, random_crop):
    write_pictures(tmp_path / "pictures", 6)
    for name, shape in (("tiny.png", (7, 5)), ("flat.png", (7, 50))):
        save(tmp_path / "pictures" / name, noise(*shape, 3))
    with pytest.warns(UserWarning, match="2 of 8 pictures are smaller") as caught:
        images = training(tmp_path, random_crop=random_crop)
    assert len(caught) == 1
    assert images.batch(range(8), rng())[0].shape == (8, 3, 8, 8)


def test_dark_deep_pictures_are_told_once_and_scaled_by_a_key(tmp_path):
    deep = (np.mgrid[0:40, 0:40][1] * 100).astype(np.uint16)
    for name in ("a.png", "b.png"):
        save(tmp_path / "pictures" / name, deep)
    with pytest.warns(UserWarning, match=r"a\.png: uses 3900 of 65535.*and 1 more") as caught:
        dark = training(tmp_path)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        light = training(tmp_path, depth_max=4095.0, cache_gb=0)
    means = [images.batch([0], rng())[0].float().mean() for images in (dark, light)]
    assert means[1] > 10 * means[0]


def test_bad_pictures_are_named_and_counted_at_the_start(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 20)
    (folder / "02.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^.*02\.png: not a picture"):
        training(tmp_path, cache_gb=0)
    for number in range(5, 12):
        whole = (folder / f"{number:02d}.png").read_bytes()
        (folder / f"{number:02d}.png").write_bytes(whole[: len(whole) // 2])
    message = r"8 of 20 pictures are bad: .*02\.png: .*08\.png: [^;]*; and 3 more$"
    with pytest.raises(UserError, match=message):
        training(tmp_path)


def test_a_picture_that_becomes_bad_is_replaced_with_one_warning_and_too_many_are_not(tmp_path):
    images = classes(tmp_path, cache_gb=0, holdout=0)
    before = list(batches(images, range(12)))
    Path(images.paths[3]).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"03\.png: .*another takes its place") as caught:
        after = list(batches(images, range(12)))
    assert len(caught) == 1
    changed = [(a[0] != b[0]).flatten(1).any(1) for a, b in zip(after, before, strict=True)]
    assert sum(int(batch.sum()) for batch in changed) == 3  # once an epoch of 16, in 48 pictures
    Path(images.paths[4]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"03\.png.*04\.png.*expected at most 1 of 16, found 2"):
        list(batches(images, range(12), threads=1))


def test_threads_end_with_the_training(tmp_path):
    def pool():
        return {thread for thread in threading.enumerate() if "ThreadPool" in thread.name} - others

    others = set(threading.enumerate())  # of whatever else runs in this process
    steps = batches(classes(tmp_path, cache_gb=0), range(1000))
    next(steps)
    assert pool()
    steps.close()
    assert not pool()
