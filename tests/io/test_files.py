"""Locks that a crash releases, and whole files or none."""

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion.errors import UserError
from guided_diffusion.io import files
from guided_diffusion.io.results import write_image

PIXELS = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)

HOLD = r"""
import os, sys, time
from guided_diffusion.io.files import locked
with locked(sys.argv[1]):
    forked = os.fork() if "fork" in sys.argv else 1
    print(f"{os.getpid()}\n", end="", flush=True)
    time.sleep(60)
"""


def hold(folder, *options):
    """Start a process that keeps ``folder``, and wait until it does."""
    root = Path(files.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, *options],
        cwd=root, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, int(process.stdout.readline())


def test_a_folder_that_another_process_has_is_refused(tmp_path):
    process, _ = hold(tmp_path / "out")
    try:
        refused = pytest.raises(UserError, match="out: another run is at work there")
        with refused, files.locked(tmp_path / "other", tmp_path / "out"):
            pytest.fail("the folder was given twice")
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_crash_releases_the_lock_even_where_a_forked_process_lives_on(tmp_path):
    process, first = hold(tmp_path / "out", "fork")
    [child] = {first, int(process.stdout.readline())} - {process.pid}
    process.kill()
    process.wait()
    with files.locked(tmp_path / "out"):
        pass
    os.kill(child, signal.SIGKILL)


def test_one_process_does_not_lock_twice_and_folders_do_not_disturb_each_other(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    with files.locked(tmp_path / "a", tmp_path / "link"), files.locked(tmp_path / "b"):
        for _ in range(2):  # the one that was refused has not taken the lock away
            with pytest.raises(UserError, match="at work there"), files.locked(tmp_path / "link"):
                pass
    with files.locked(tmp_path / "a"):
        pass


def test_nothing_is_left_of_it(tmp_path):
    with files.locked(tmp_path / "out", tmp_path / "out" / "inner"):
        pass
    assert list(tmp_path.iterdir()) == []
    with files.locked(tmp_path / "out"):
        (tmp_path / "out" / "result").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result"]


def _in_turn(folder, ended):
    while not ended.is_set():
        with contextlib.suppress(UserError), files.locked(folder):
            Path(folder, "mine").touch(exist_ok=False)  # raises where two are in at once
            time.sleep(0.001)
            Path(folder, "mine").unlink()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_many_processes_are_never_in_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    workers = [context.Process(target=_in_turn, args=(tmp_path / "out", ended)) for _ in range(3)]
    for worker in workers:
        worker.start()
    time.sleep(1)
    ended.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_there_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch, code):
    def refuse(self):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="has no locks"), files.locked(tmp_path):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_lock_is_not_followed_to_another_file_and_a_pipe_does_not_hang(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(UserError, match=r"\.lock: cannot be locked"), files.locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with contextlib.suppress(UserError), files.locked(tmp_path):
        pass


def test_a_file_appears_whole_and_alone(tmp_path):
    target = tmp_path / "new" / "folder" / "名.yml"
    with files.atomic_path(target) as temporary:
        temporary.touch()
        assert not target.exists()
        assert temporary.parent == target.parent
    files.write_text_atomic(target, "größe: 1\n")
    assert target.read_bytes() == "größe: 1\n".encode()
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "usual").touch()
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_leftovers_of_killed_processes_go(tmp_path):
    with files.atomic_path(tmp_path / "x") as leftover:
        leftover.touch()
    leftover.touch()
    (tmp_path / ".something.tmp").touch()
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".something.tmp"}


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path, exception):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(exception), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise exception
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), real_sync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append("name"), real_replace(self, to))[1]
    )
    files.write_text_atomic(tmp_path / "x.txt", "text")
    assert events == ["sync", "name", "sync"]


WRITERS = {
    "x.png": lambda path: write_image(path, PIXELS),
    "x.txt": lambda path: files.write_text_atomic(path, "x" * 30_000),
    "x.pt": lambda path: files.write_checkpoint(path, {"a": torch.zeros(30_000)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, name):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # refuses to write on
    try:
        with pytest.raises(UserError) as caught:
            WRITERS[name](tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"{tmp_path / name}: cannot be written: {os.strerror(errno.EFBIG)}"
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "log").touch()
    with pytest.raises(UserError, match=r"log/x\.png: cannot be written"):
        write_image(tmp_path / "log" / "x.png", PIXELS)
    (tmp_path / "y.png").mkdir()
    with pytest.raises(UserError, match=r"y\.png: cannot be written"):
        write_image(tmp_path / "y.png", PIXELS)
    vanished = tmp_path / "vanished" / "x.png"
    with pytest.raises(UserError, match=r"x\.png"), files.atomic_path(vanished):
        vanished.parent.rmdir()


def test_checkpoints_come_back_and_failures_of_ones_own_stay_tracebacks(tmp_path):
    state = {"weights": torch.arange(5.0), "step": 7, "rng": {"state": 2**100}}
    files.write_checkpoint(tmp_path / "x.pt", state)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert torch.equal(loaded["weights"], state["weights"])
    assert loaded["rng"] == state["rng"]
    with pytest.raises((AttributeError, TypeError)):  # a lambda cannot be stored
        files.write_checkpoint(tmp_path / "y.pt", {"no": lambda: None})
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
