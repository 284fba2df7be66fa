"""The pictures of a step: the same whoever reads them, and not ended by one bad file."""

import contextlib
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from train_cases import tiny_conf, write_pictures

from guided_diffusion.errors import UserError
from guided_diffusion.training import batches as reading
from guided_diffusion.training import pictures
from guided_diffusion.training.batches import batches, load_images, readers_for


def classes(tmp_path, **changes):
    folder = tmp_path / "classes"
    if not folder.exists():
        for name in ("cats", "dogs"):
            write_pictures(folder / name, 8, side=24)
    tree = {"data_dir": str(folder), "class_cond": True, "num_classes": 2, "random_crop": True}
    return tiny_conf(tmp_path, **tree, **changes)


def cut(conf, steps, readers):
    return list(batches(load_images(conf), conf, steps, readers))


def same(one, other):
    return all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair))  # noqa: B905


# ---- the same pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("cache_gb", [0, 3000 / 2**30, 4], ids=["none", "a few", "all"])
def test_any_number_of_readers_gives_the_same_pictures(tmp_path, readers, cache_gb):
    plain = cut(classes(tmp_path), range(8), 0)
    assert same(plain, cut(classes(tmp_path, cache_gb=cache_gb), range(8), readers))
    assert same(plain[5:], cut(classes(tmp_path, cache_gb=cache_gb), range(5, 8), readers))
    assert not same(plain[:4], plain[4:])


def test_processes_together_see_what_one_sees(tmp_path, monkeypatch):
    conf = classes(tmp_path)
    [whole] = cut(conf, range(1), 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        parts += cut(conf, range(1), 1)
    assert same([whole], [[torch.cat(values) for values in zip(*parts, strict=True)]])


def decoded(monkeypatch, conf):
    """Return how often a picture was decoded until the first step."""
    paths, original = [], pictures.read_rgb
    monkeypatch.setattr(pictures, "read_rgb", lambda path: (paths.append(path), original(path))[1])
    load_images(conf)
    return paths


@pytest.mark.parametrize(("kept", "expected"), [(0, 0), (3, 3), (1000, 12)])
def test_nothing_is_decoded_at_the_start_beyond_what_the_memory_holds(
    tmp_path, monkeypatch, kept, expected
):
    conf = tiny_conf(tmp_path, cache_gb=(kept * 8 * 8 * 3 + 50) / 2**30)
    assert len(decoded(monkeypatch, conf)) == expected


def test_each_process_looks_at_its_own_share_at_the_start(tmp_path, monkeypatch):
    conf = tiny_conf(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert [Path(path).stem for path in sorted(decoded(monkeypatch, conf))] == [
        f"{number:02d}" for number in range(1, 12, 2)
    ]


def test_readers_are_only_for_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(reading.sys, "platform", "linux")
    counts = [
        readers_for(load_images(tiny_conf(tmp_path, **changes)))
        for changes in ({}, {"random_crop": True}, {"cache_gb": 0})
    ]
    assert counts == [0, 4, 4]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert readers_for(load_images(tiny_conf(tmp_path, cache_gb=0))) == 1
    monkeypatch.setattr(reading.sys, "platform", "darwin")  # forking is not safe there
    assert readers_for(load_images(tiny_conf(tmp_path, cache_gb=0))) == 0


# ---- bad pictures --------------------------------------------------------------------------------


def test_several_bad_pictures_are_named_and_counted(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 20)
    for number in (2, 5):
        (folder / f"{number:02d}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 20 pictures are bad: .*02\.png: .*05\.png: "):
        load_images(tiny_conf(tmp_path))
    for number in range(6, 12):
        whole = (folder / f"{number:02d}.png").read_bytes()
        (folder / f"{number:02d}.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"8 of 20 .*08\.png: [^;]*; and 3 more$"):
        load_images(tiny_conf(tmp_path))


@pytest.mark.parametrize("readers", [0, 2])
def test_a_picture_that_turns_bad_is_skipped_with_one_warning(tmp_path, readers):
    conf = classes(tmp_path, cache_gb=0, holdout=0)
    images = load_images(conf)
    Path(images.paths[3]).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"03\.png: .*another picture takes its place") as told:
        found = list(batches(images, conf, range(12), readers))
    assert len(told) == 1
    assert len(found) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = write_pictures(tmp_path / "again", 8, side=24)
        Path(images.paths[3]).write_bytes((whole / "03.png").read_bytes())
        later = cut(conf, range(12), readers)
    changed = [(a[0] != b[0]).flatten(1).any(1) for a, b in zip(found, later, strict=True)]
    assert sum(int(batch.sum()) for batch in changed) == 3  # once an epoch of 16 in 48 pictures


@pytest.mark.parametrize("readers", [0, 2])
def test_too_many_bad_pictures_end_a_training(tmp_path, readers):
    conf = classes(tmp_path, cache_gb=0, holdout=0)
    images = load_images(conf)
    for path in images.paths[3:6]:
        Path(path).write_bytes(b"no picture")
    message = r"too many pictures .*03\.png.*nothing was saved yet; expected at most 1 of 16"
    with (
        pytest.warns(UserWarning, match="takes its place"),
        pytest.raises(UserError, match=message),
    ):
        list(batches(images, conf, range(12), readers))


# ---- readers -------------------------------------------------------------------------------------


def read(conf):
    """Return steps that one reader reads, begun, and the reader."""
    before = set(multiprocessing.active_children())
    found = batches(load_images(conf), conf, range(1000), 1)
    next(found)
    [reader] = set(multiprocessing.active_children()) - before
    return found, reader


def test_a_reader_that_is_killed_is_one_line_when_the_next_pictures_are_due(tmp_path):
    found, reader = read(classes(tmp_path, cache_gb=0))
    reader.kill()
    os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)  # here torch would raise
    with pytest.raises(UserError, match=r"cache_gb: a process that reads pictures was killed"):
        next(found)


def test_a_reader_that_is_killed_while_it_is_waited_for_is_one_line(tmp_path, monkeypatch):
    original = reading._Steps.__getitem__

    def getitem(steps, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(steps, step)

    monkeypatch.setattr(reading._Steps, "__getitem__", getitem)
    found, _ = read(classes(tmp_path, cache_gb=0))
    with pytest.raises(UserError, match=r"cache_gb: a process that reads pictures was killed"):
        list(found)


def test_what_a_reader_raises_is_not_told_as_its_death(tmp_path, monkeypatch):
    def getitem(steps, step):
        raise RuntimeError("a defect")

    monkeypatch.setattr(reading._Steps, "__getitem__", getitem)
    with pytest.raises(RuntimeError, match="a defect"):
        read(classes(tmp_path, cache_gb=0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_ends_no_reader_before_the_training(tmp_path, number):
    found, reader = read(classes(tmp_path, cache_gb=0))
    os.kill(reader.pid, number)
    for _ in range(10):
        next(found)
    assert reader.is_alive()
    found.close()
    assert not reader.is_alive()


def train_until_killed(conf, sender):
    found, reader = read(conf)
    sender.send(reader.pid)
    time.sleep(600)
    next(found)


def test_readers_end_with_a_training_that_is_killed(tmp_path):
    # More than a pipe holds: a reader waits for who takes it.
    conf = classes(tmp_path, cache_gb=0, image_size=256, attention_resolutions="")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    training = context.Process(target=train_until_killed, args=(conf, sender))
    training.start()
    sender.close()
    reader = receiver.recv()
    training.kill()
    training.join()
    try:
        assert receiver.poll(5)  # closed by the last who could write
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(reader, signal.SIGKILL)
