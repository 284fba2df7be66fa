"""One run a folder: the lock that a crash releases."""

import contextlib
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guided_diffusion.errors import UserError
from guided_diffusion.io import files

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


def test_the_second_is_refused_by_the_name_of_the_first(tmp_path):
    process, _ = hold(tmp_path / "out")
    try:
        expected = rf"out: process {process.pid} on {platform.node()} is at work there"
        with pytest.raises(UserError, match=expected), files.locked(tmp_path / "out"):
            pytest.fail("the folder was given twice")
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_crash_releases_the_lock_even_where_a_forked_process_lives_on(tmp_path):
    process, first = hold(tmp_path / "out", "fork")
    [child] = {first, int(process.stdout.readline())} - {process.pid}
    process.kill()
    process.wait()
    with files.locked(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    os.kill(child, signal.SIGKILL)


def test_one_process_does_not_lock_twice_and_folders_do_not_disturb_each_other(tmp_path):
    with files.locked(tmp_path / "a"), files.locked(tmp_path / "b"):
        with pytest.raises(UserError, match="at work there"), files.locked(tmp_path / "a"):
            pass
        with pytest.raises(UserError, match="at work there"), files.locked(tmp_path / "a"):
            pass  # the one that was refused has not taken the lock away
    with files.locked(tmp_path / "a"):
        pass


def test_nothing_is_left_of_it(tmp_path):
    with files.locked(tmp_path / "new" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
    with files.locked(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "result").touch()
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["result"]


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


def test_without_locks_there_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.warns(UserWarning, match="this system has no locks"), files.locked(tmp_path):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: .*not a folder"), files.locked(tmp_path / "file/a"):
        pass


def test_a_folder_that_always_vanishes_is_one_line(tmp_path, monkeypatch):
    def mkdir(self, **_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    told = r"out: results cannot be written there: No such file"
    with pytest.raises(UserError, match=told), files.locked(tmp_path / "out"):
        pass
