"""Whatever a user can get wrong is one line naming file or key, at once, and touches nothing."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from run_cases import load_yaml, run_apart, run_here, snapshot, tiny_tree, write_run, write_tree

from guided_diffusion.run import checks

# Each way to spoil a run is a function of its folder; what it returns, if anything, are options.


def keys(**changes):
    """Change keys of the YAML."""
    return lambda folder: write_tree(folder, tiny_tree(**changes))


def data(**changes):
    """Change keys of the data set."""

    def spoil(folder):
        tree = tiny_tree()
        tree["data"]["eval"]["tiny"].update(changes)
        write_tree(folder, tree)

    return spoil


def options(*more):
    return lambda folder: list(more)


def write(name, content):
    """Put other bytes into a file."""

    def spoil(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return spoil


def remove(name):
    def spoil(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def copy(source, target):
    def spoil(folder):
        (folder / target).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(folder / source, folder / target)

    return spoil


def both(*spoils):
    def spoil(folder):
        found = [one(folder) for one in spoils]
        return [option for some in found if some for option in some]

    return spoil


def pipe(name):
    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


CASES = {
    # the YAML as a file
    "no yaml": (remove("c.yml"), "c.yml: cannot be read: No such file"),
    # keys
    "name leads away": (keys(name="../run"), "c.yml: name: would lead out"),
    "unknown device": (keys(device="gpu"), "device: expected cpu, cuda or cuda:N, found 'gpu'"),
    # values that contradict
    "t_T too high": (
        keys(schedule_jump_params={"t_T": 5}),
        "schedule_jump_params.t_T and timestep_respacing: the walk cannot start above",
    ),
    "no full batch": (data(drop_last=True, batch_size=9), "drop_last and data.eval.tiny.batch"),
    "results among inputs": (options("--out", "gt/res"), "gt/res: gt_path: results would go into"),
    "results among masks": (data(paths={"lrs": "mask/x/y"}), "mask/x/y: mask_path: results would"),
    "a result over the input": (
        both(copy("gt/00.png", "inpainted/a.png"), options("--gt", "inpainted/a.png", "--mask",
             "thick", "--out", ".")),
        "inpainted/a.png: a result would overwrite the input inpainted/a.png",
    ),
    "a mask over the mask": (
        both(copy("mask/00.png", "gt_keep_mask/00.png"), options("--gt", "gt/00.png", "--mask",
             "gt_keep_mask/00.png", "--out", ".", "--set", "data.paths.gts=x")),
        "gt_keep_mask/00.png: a result would overwrite the input gt_keep_mask/00.png",
    ),
    "the overview over the input": (
        both(copy("gt/00.png", "overview.png"), options("--gt", "overview.png", "--mask",
             "mask/00.png", "--out", ".", "--set", "overview=true", "--set", "data.paths.gts=x")),
        "overview.png: a result would overwrite the input overview.png",
    ),
    # options
    "unknown option": (options("--rezume"), "unrecognized arguments: --rezume"),
    "empty out": (options("--out", ""), "--out: the path is empty"),
    # paths
    "no pictures' folder": (options("--gt", "none"), "none: gt_path: no such file or folder"),
    "pictures of another folder": (
        options("--gt", "data/datasets/gts/demo"),
        "data/datasets/gts/demo: gt_path: no such file or folder (looked for in ",
    ),
    "a remote path": (options("--gt", "nowhere://x"), "nowhere://x"),
    "out is a file": (both(write("f", b""), options("--out", "f")), "f: results cannot be written"),
    "a folder in a result's place": (
        both(write("o/inpainted/01.png/x", b""), options("--out", "o")),
        "o/inpainted/01.png: a folder is in the place of a result",
    ),
    # pictures and masks
    "more pictures than masks": (copy("gt/00.png", "gt/09.png"), "mask: mask_path: images"),
    "samples that collide": (
        both(copy("gt/00.png", "gt/00_1.png"), copy("mask/00.png", "mask/00_1.png"),
             options("--set", "samples_per_image=2")),
        "would write its results to 00_1.png",
    ),
    "a pipe as a picture": (pipe("gt/01.png"), "gt/01.png: is a pipe or device"),
    "unknown rule for masks": (keys(mask_hole="white"), "mask_hole: expected black, zero, color"),
    # checkpoints
    "no checkpoint": (remove("model.pt"), "model.pt: no such checkpoint"),
    "pickled code": (
        lambda folder: torch.save(Evil(), folder / "model.pt"), "model.pt: holds pickled code",
    ),
    "other output": (keys(learn_sigma=False), "model.pt: does not fit the configuration; set lea"),
    "no classifier": (
        keys(image_size=64, channel_mult=None, classifier_path="none.pt"),
        "none.pt: no such checkpoint",
    ),
    "a pipe as the record": (
        both(write("log/run/run.yml", b""), pipe("log/run/run.yml"), options("--resume")),
        "log/run/run.yml: is not the record of a run",
    ),
}  # fmt: skip


def check(outcome, words):
    assert outcome.status == 2, outcome
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert len(line) < 600
    assert "Traceback" not in outcome.err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write a run, and go there."""
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", CASES)
def test_one_line_at_once_and_nothing_touched(folder, tmp_path, capsys, name):
    spoil, words = CASES[name]
    more = spoil(folder) or []
    files = snapshot(tmp_path)
    start = time.process_time()
    outcome = run_here(capsys, "--conf_path", "c.yml", *more)
    assert time.process_time() - start < 3
    check(outcome, words)
    assert snapshot(tmp_path) == files  # not even an empty folder; nothing was executed either


@pytest.mark.parametrize("name", ["unknown option", "pickled code"])
def test_a_process_of_its_own_says_the_same(folder, name):
    spoil, words = CASES[name]
    more = spoil(folder) or []
    check(run_apart(folder, "--conf_path", "c.yml", *more), words)
    assert not (folder / "log").exists()
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("by_option", [False, True])
def test_names_beyond_a_systems_encoding_are_told_with_the_way_out(folder, by_option):
    (folder / "gt").rename(folder / "图")
    more = ["--gt", "图"] if by_option else data(gt_path="图")(folder) or []
    ascii_names = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    outcome = run_apart(folder, "--conf_path", "c.yml", *more, **ascii_names)
    check(outcome, "gt_path: this system's file names are ascii; start with PYTHONUTF8=1")


def test_an_option_that_is_not_utf_8_is_told(folder, capsys):
    name = os.fsdecode(b"gt/caf\xe9.png")
    outcome = run_here(capsys, "--conf_path", "c.yml", "--gt", name)
    check(outcome, r"not UTF-8: rename it, or give the folder that it is in; found 'gt/caf\xe9")


def test_files_that_may_not_be_read_or_folders_written(folder, monkeypatch, capsys):
    """Whoever tests as root may do everything, so the system's refusal is played."""
    opened, closed = Path.open, set()

    def refusing(self, *args, **names):
        if self.name in closed:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **names)

    monkeypatch.setattr(Path, "open", refusing)
    for name, words in (
        ("c.yml", "c.yml: cannot be read: Permission denied"),
        ("01.png", "gt/01.png: cannot be read: Permission denied"),
        ("model.pt", "model.pt: cannot be read: Permission denied"),
    ):
        closed.add(name)
        check(run_here(capsys, "--conf_path", "c.yml"), words)
        closed.clear()
    monkeypatch.setattr(os, "access", lambda *_: False)
    check(
        run_here(capsys, "--conf_path", "c.yml"), "results cannot be written there: no permission"
    )
    assert not (folder / "log").exists()


def test_a_nearly_full_disk_is_warned_of(folder, monkeypatch, capsys):
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    outcome = run_here(capsys, "--conf_path", "c.yml")
    assert outcome.status == 0
    [line] = outcome.lines
    assert line.startswith("warning: ")
    assert "0 MiB are free" in line
    assert load_yaml("log/run/run.yml")["record"]["made"] == 3
