"""Whatever a user can get wrong is one line naming file or key, at once, and touches nothing."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from run_cases import load_yaml, run_apart, run_here, snapshot, tiny_tree, write_run, write_tree

from guided_diffusion.run import checks

# ---- ways to spoil a run -------------------------------------------------------------------------
# Each is a function of the run's folder; what it returns, if anything, are further options.


def raw(text):
    """Put a text in the YAML's place."""
    return lambda folder: (folder / "c.yml").write_bytes(text) and None


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


def cut(name, share=0.5):
    def spoil(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

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


def saved(value, name="model.pt"):
    return lambda folder: torch.save(value, folder / name)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def wide_picture(folder):
    Image.new("RGB", (32, 16)).save(folder / "gt" / "01.png")
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 8, 8))
    mask.save(folder / "mask" / "01.png")


def finished_run(**changes):
    """Leave the record of a run with other settings."""

    def spoil(folder):
        tree = {**tiny_tree(**changes), "overview": False}
        record = {"checkpoints": {"model_path": "0"}, "device_type": "cpu"}
        (folder / "log" / "run").mkdir(parents=True)
        text = yaml.safe_dump({**tree, "record": record})
        (folder / "log" / "run" / "run.yml").write_text(text)
        return ["--resume"]

    return spoil


def other_architecture(folder):
    state = torch.load(folder / "model.pt", weights_only=True)
    state["label_emb.weight"] = torch.zeros(7, 128)
    torch.save(state, folder / "model.pt")


def edited_record(new, old="device_type: cpu"):
    """Edit the record of a finished run, as by hand."""

    def spoil(folder):
        options = finished_run()(folder)
        path = folder / "log" / "run" / "run.yml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return options

    return spoil


CASES = {
    # the YAML as a file
    "no yaml": (remove("c.yml"), "c.yml: cannot be read: No such file"),
    "python object": (raw(b"name: !!python/object/apply:os.system [touch executed]"), "c.yml: no"),
    # keys
    "unknown key": (keys(sead=1), "c.yml: sead: unknown key; the nearest known key is seed"),
    "name leads away": (keys(name="../run"), "c.yml: name: would lead out"),
    "unknown device": (keys(device="gpu"), "device: expected cpu, cuda or cuda:N, found 'gpu'"),
    # values that contradict
    "t_T too high": (
        keys(schedule_jump_params={"t_T": 5}),
        "schedule_jump_params.t_T and timestep_respacing: the walk cannot start above",
    ),
    "respacing too fine": (keys(timestep_respacing="2000"), "timestep_respacing: "),
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
    "no picture in the folder": (both(write("e/a.txt", b"a"), options("--gt", "e")), "e: gt_pa"),
    "a remote path": (options("--gt", "nowhere://x"), "nowhere://x"),
    "out is a file": (both(write("f", b""), options("--out", "f")), "f: results cannot be written"),
    "a folder in a result's place": (
        both(write("o/inpainted/01.png/x", b""), options("--out", "o")),
        "o/inpainted/01.png: a folder is in the place of a result",
    ),
    "offset too large": (data(offset=3), "offset: expected 0 to 2"),
    # pictures and masks
    "more pictures than masks": (copy("gt/00.png", "gt/09.png"), "mask: mask_path: images"),
    "samples that collide": (
        both(
            copy("gt/00.png", "gt/00_1.png"),
            copy("mask/00.png", "mask/00_1.png"),
            options("--set", "samples_per_image=2"),
        ),
        "would write its results to 00_1.png",
    ),
    "half a picture": (cut("gt/01.png"), "gt/01.png: cannot be read"),
    "a pipe as a picture": (pipe("gt/01.png"), "gt/01.png: is a pipe or device"),
    "a squeezed mask": (wide_picture, "mask/01.png: the mask has another shape than its picture"),
    "no transparency": (options("--mask", "alpha"), "gt/00.png: mask_path: has no transparency"),
    "unknown rule for masks": (keys(mask_hole="white"), "mask_hole: expected black, zero, color"),
    "black above white": (keys(depth_min=2.0, depth_max=1.0), "depth_min and depth_max: the first"),
    # checkpoints
    "no checkpoint": (remove("model.pt"), "model.pt: no such checkpoint"),
    "pickled code": (saved(Evil()), "model.pt: holds pickled code"),
    "other output": (keys(learn_sigma=False), "model.pt: does not fit the configuration; set lea"),
    "labels": (other_architecture, "model.pt: does not fit the configuration; set class_cond: t"),
    "no classifier": (
        keys(image_size=64, channel_mult=None, classifier_path="none.pt"),
        "none.pt: no such checkpoint",
    ),
    # resuming
    "resume with another seed": (finished_run(seed=6), "log/run/run.yml: "),
    "a list in the record": (
        edited_record("checkpoints: [1]", "checkpoints:\n    model_path: '0'"),
        "run.yml: is not the record of a run",
    ),
    "a number in the record": (
        edited_record("model_path: 5", "model_path: '0'"),
        "run.yml: model_path: the results there were made with other settings",
    ),
    "a pipe as the record": (
        both(write("log/run/run.yml", b""), pipe("log/run/run.yml"), options("--resume")),
        "log/run/run.yml: is not the record of a run",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(folder)
    return folder


def check(outcome, words):
    assert outcome.status == 2, outcome
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert len(line) < 600
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("name", CASES)
def test_one_line_at_once_and_nothing_touched(template, tmp_path, monkeypatch, capsys, name):
    spoil, words = CASES[name]
    folder = tmp_path / "run"
    shutil.copytree(template, folder)
    more = spoil(folder) or []
    files = snapshot(tmp_path)
    monkeypatch.chdir(folder)
    start = time.process_time()
    outcome = run_here(capsys, "--conf_path", "c.yml", *more)
    assert time.process_time() - start < 3
    check(outcome, words)
    assert snapshot(tmp_path) == files  # not even an empty folder; nothing was executed either


@pytest.mark.parametrize("name", ["unknown option", "pickled code"])
def test_a_process_of_its_own_says_the_same(template, tmp_path, name):
    spoil, words = CASES[name]
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    more = spoil(tmp_path) or []
    check(run_apart(tmp_path, "--conf_path", "c.yml", *more), words)
    assert not (tmp_path / "log").exists()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("by_option", [False, True])
def test_names_beyond_a_systems_encoding_are_told_with_the_way_out(template, tmp_path, by_option):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    (tmp_path / "gt").rename(tmp_path / "图")
    more = ["--gt", "图"]
    if not by_option:
        more = []
        data(gt_path="图")(tmp_path)
    ascii_names = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    outcome = run_apart(tmp_path, "--conf_path", "c.yml", *more, **ascii_names)
    check(outcome, "gt_path: this system's file names are ascii; start with PYTHONUTF8=1")


def test_an_option_that_is_not_utf_8_is_told(template, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(template)
    name = os.fsdecode(b"gt/caf\xe9.png")
    outcome = run_here(capsys, "--conf_path", "c.yml", "--gt", name)
    check(outcome, r"not UTF-8: rename it, or give the folder that it is in; found 'gt/caf\xe9")


def test_files_that_may_not_be_read_or_folders_written(template, tmp_path, monkeypatch, capsys):
    """Whoever tests as root may do everything, so the system's refusal is played."""
    folder = tmp_path / "run"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
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


def test_a_nearly_full_disk_is_warned_of(template, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    outcome = run_here(capsys, "--conf_path", "c.yml")
    assert outcome.status == 0
    [line] = outcome.lines
    assert line.startswith("warning: ")
    assert "0 MiB are free" in line
    assert load_yaml("log/run/run.yml")["record"]["made"] == 3
