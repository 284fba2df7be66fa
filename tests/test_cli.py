"""test.py from outside: what it writes, what it says, and the published program's own results."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from run_cases import (
    ENVIRONMENT,
    FOLDERS,
    GOLDEN,
    ROOT,
    TINY_CALLS,
    assert_same,
    command,
    load_yaml,
    pixels,
    results,
    run_apart,
    snapshot,
    write_golden,
    write_run,
)

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import describe


def assert_golden(case, folder):
    expect = np.load(GOLDEN / case / "expect.npz")
    rounded = np.rint((expect["sample"].astype(np.float64) + 1) * 127.5).clip(0, 255)
    found = results(folder)
    assert len(found) == len(rounded)
    for name, sample in zip(found, rounded.transpose(0, 2, 3, 1), strict=True):
        assert np.abs(found[name] - sample).max() <= 1
    assert_same(results(folder, "gt"), dict(zip(found, expect["gt_u8"].astype(int), strict=True)))
    masks = dict(zip(found, expect["mask_u8"].astype(int), strict=True))
    assert_same(results(folder, "gt_keep_mask"), masks)


@pytest.mark.parametrize(("case", "batch_size"), [("plain", 1), ("plain", 2), ("guided", 3)])
def test_golden_runs_for_every_batch_size(here, tmp_path, case, batch_size):
    options = write_golden(tmp_path, case, batch_size=batch_size)
    assert here(*options).status == 0
    assert_golden(case, tmp_path / "log" / case)


def test_golden_run_in_a_process_of_its_own(tmp_path):
    ended = run_apart(tmp_path, *write_golden(tmp_path, "plain", batch_size=3))
    assert (ended.status, ended.lines) == (0, [])  # nothing but bars on stderr
    assert_golden("plain", tmp_path / "log" / "plain")
    first, last = ended.out.splitlines()
    assert first == "3 images, 25.0% of the pixels to generate, seed 10"
    assert re.fullmatch(r"log/plain: 3 images, 28 network calls and [0-9.]+ s an image", last)


def test_four_files_an_image_a_record_and_an_overview(here, tmp_path):
    options, log = write_run(tmp_path, overview=True), tmp_path / "log" / "run"
    inputs = snapshot("gt") | snapshot("mask")
    here(*options)
    assert inputs == snapshot("gt") | snapshot("mask")  # they are only read
    names = {"00.png", "01.png", "02.png"}
    assert {path.name for path in log.iterdir()} == {*FOLDERS, "run.yml", "overview.png"}
    for kind in FOLDERS:
        assert {path.name for path in (log / kind).iterdir()} == names
    for name in names:
        gt, mask = pixels(log / "gt" / name), pixels(log / "gt_keep_mask" / name)
        assert (gt == pixels(tmp_path / "gt" / name)).all()
        assert (mask == pixels(tmp_path / "mask" / name)).all()
        assert (pixels(log / "gt_masked" / name) == gt * (mask == 255)).all()


def test_ground_truth_is_written_only_where_asked_for(here, tmp_path):
    paths = {"srs": "o/a", "lrs": "o/b", "gt_keep_masks": "o/c"}
    here(*write_run(tmp_path, data={"paths": paths}))
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["a", "b", "c", "run.yml"]
    assert not (tmp_path / "log").exists()


def test_several_results_an_image(here, tmp_path):
    options = write_run(tmp_path, 2, samples_per_image=3)
    ended = here(*options)
    assert f"log/run: 6 images, {TINY_CALLS} network calls" in ended.out
    found = results("log/run")
    names = [f"0{image}_{sample}.png" for image in (0, 1) for sample in (1, 2, 3)]
    assert list(found) == names
    assert set(results("log/run", "gt")) == {"00.png", "01.png"}
    assert (found["00_1.png"] != found["00_2.png"]).any()
    # Sample j of image k has the seed of a run by itself: seed + k + j · 1000003.
    record = load_yaml("log/run/run.yml")["record"]
    expected = [5, 5 + 1_000_003, 5 + 2_000_006, 6, 6 + 1_000_003, 6 + 2_000_006]
    assert record["seeds"] == dict(zip(names, expected, strict=True))
    here(*options, "--out", "alone", "--set", "samples_per_image=1", "--set", f"seed={5 + 1000003}")
    assert (results("alone")["00.png"] == found["00_2.png"]).all()


def test_offset_max_len_shuffling_and_dropping_leave_results_as_they_are(here, tmp_path):
    options = write_run(tmp_path, 5)
    here(*options)
    whole = results("log/run")

    def part(name, **data):
        changes = [arg for key, value in data.items() for arg in ("--set", f"data.{key}={value}")]
        here(*options, "--out", name, *changes)
        return results(name)

    cut = part("cut", offset=1, max_len=2)
    assert list(cut) == ["01.png", "02.png"]
    assert_same(cut, {name: whole[name] for name in cut})
    assert_same(part("shuffled", deterministic="false"), whole)
    dropped = part("dropped", drop_last="true", batch_size=2)
    assert_same(dropped, {name: whole[name] for name in list(whole)[:4]}, levels=1)


def test_random_flip_mirrors_picture_and_mask_by_the_seed_alone(here, tmp_path):
    options = write_run(tmp_path, 6, data={"random_flip": True})
    here(*options, "--out", "one")
    here(*options, "--out", "two", "--set", "data.batch_size=4")
    assert_same(results("one"), results("two"), levels=1)
    flips = []
    for name, gt in results("one", "gt").items():
        own, mask = pixels(f"gt/{name}"), pixels(f"mask/{name}")
        flips.append(not (gt == own).all())
        own, mask = (own[:, ::-1], mask[:, ::-1]) if flips[-1] else (own, mask)
        assert (gt == own).all() and (pixels(f"one/gt_keep_mask/{name}") == mask).all()
    assert 0 < sum(flips) < 6


def test_known_pixels_are_pasted_back_only_when_asked_for(here, tmp_path):
    options = write_run(tmp_path, 1)
    here(*options, "--out", "a")
    here(*options, "--out", "b", "--set", "paste_known=true")
    gt, raw, pasted = results("a", "gt"), results("a"), results("b")
    assert (pasted["00.png"][:, :4] == gt["00.png"][:, :4]).all()
    assert (pasted["00.png"][:, 4:] == raw["00.png"][:, 4:]).all()
    assert (raw["00.png"][:, :4] != gt["00.png"][:, :4]).any()


@pytest.mark.parametrize("kept", [1, 4])
def test_process_pictures_show_the_result_last(here, tmp_path, kept):
    here(*write_run(tmp_path, 1, save_process=kept))
    process = tmp_path / "log" / "run" / "process"
    assert {path.name for path in process.iterdir()} == {"00.png", "00.gif"}
    with Image.open(process / "00.gif") as film:
        assert film.n_frames == kept
    final = np.kron(results("log/run")["00.png"], np.ones((16, 16, 1)))
    assert (pixels(process / "00.png")[:128, -128:] == final).all()


def test_help_has_every_key_with_its_sentence_and_imports_no_torch(tmp_path):
    code = (
        "import runpy, sys, atexit; sys.argv = sys.argv[1:]\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'yaml' in sys.modules))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *command("--help")[1:]],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    *text, modules = ended.stdout.splitlines()
    assert modules == "False True"  # torch would take seconds
    words = " ".join(" ".join(text).split())
    for doc in describe(InpaintConf):
        assert f" {doc.key} (" in words
        assert doc.text in words


@pytest.mark.parametrize(
    "name", ["with space", "a=b", "名前", "😀", "#x", "[x]", "a: b", "it's", '"q"']
)
def test_values_of_options_are_taken_as_they_are(here, tmp_path, name):
    options = write_run(tmp_path, 1)
    for folder in ("gt", "mask"):
        (tmp_path / folder).rename(tmp_path / f"{name}-{folder}")
    picture, mask = f"{name}-gt/00.png", f"{name}-mask/00.png"
    ended = here(*options, "--gt", picture, "--mask", mask, "--out", f"{name}-out")
    assert (ended.status, ended.lines) == (0, [])
    assert list(results(f"{name}-out")) == ["00.png"]
    assert {path.name for path in (tmp_path / f"{name}-out").iterdir()} == {*FOLDERS, "run.yml"}
    assert not (tmp_path / "log").exists()


def test_one_mask_serves_all_a_family_needs_no_file_and_masks_may_be_inverted(here, tmp_path):
    options = write_run(tmp_path)
    here(*options, "--mask", "mask/01.png", "--out", "one")
    here(*options, "--mask", "genhalf", "--out", "drawn")
    assert_same(results("one"), results("drawn"))
    mask = pixels("mask/00.png").astype(np.uint8)
    Image.fromarray(255 - mask).save("inverted.png")
    here(*options, "--mask", "inverted.png", "--out", "inverted", "--invert_mask")
    for kind in ("inpainted", "gt_keep_mask"):
        assert_same(results("one", kind), results("inverted", kind))


def test_the_last_of_equal_settings_wins_and_set_comes_last(here, tmp_path):
    options = write_run(tmp_path, 1)
    changes = ["seed=1", "seed=7", "data.gt_path=gt"]
    ended = here(*options, *[f"--set={change}" for change in changes], "--gt", "no")
    assert ended.status == 0
    assert "seed 7" in ended.out


def test_a_warning_is_one_line_and_comes_once_past_the_bars(here, tmp_path):
    options = write_run(tmp_path, 2, timestep_respacing="9")
    ended = here(*options)
    assert ended.status == 0
    assert ended.lines == [
        "warning: schedule_jump_params.t_T: 4 starts the walk below the top of the 9 kept steps, "
        "where a picture is not yet pure noise; write timestep_respacing: '4' with it"
    ]
    assert "%|" in ended.err
    assert here(*options, "--set", "show_progress=false").err.count("%|") == 0


def test_home_may_be_missing_and_nobody_read_the_output(tmp_path):
    run = f"{shlex.join(command(*write_run(tmp_path, 1)))} 2>&1; echo $? > status"
    environment = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "LC_ALL": "C"}
    subprocess.run(f"({run}) | true", shell=True, cwd=tmp_path, env=ENVIRONMENT | environment)
    assert (tmp_path / "status").read_text() == "0\n"
    assert list(results(tmp_path / "log/run")) == ["00.png"]


def test_own_pictures_are_all_taken_whatever_the_yaml_chose_of_its_own(here, tmp_path):
    options = write_run(tmp_path, 4, data={"max_len": 1, "offset": 1})
    here(*options)
    assert list(results("log/run")) == ["01.png"]
    here(*options, "--gt", "gt", "--mask", "mask", "--out", "mine")
    assert len(results("mine")) == 4
    here(*options, "--gt", "gt", "--mask", "mask", "--out", "two", "--set", "data.max_len=2")
    assert len(results("two")) == 2


SPEAKING = r"""
import contextlib, os, sys
from pathlib import Path
from guided_diffusion.cli import command_line
from guided_diffusion.errors import UserError
def main():
    print("\u56fe\u2028\udce9")
    with Path(sys.argv[1]).open("w") as result:
        for number in (1, 2):  # as libraries write
            with contextlib.suppress(OSError):
                os.write(number, b"a library: ")
        result.write("whole")
    if "fail" in sys.argv:
        raise UserError("is wrong", path="\u56fe\udce9")
command_line(main)
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
@pytest.mark.parametrize(("option", "status"), [("pass", 0), ("fail", 2)])
def test_streams_that_are_closed_or_full_cost_nothing(tmp_path, closed, option, status):
    line = shlex.join([sys.executable, "-c", SPEAKING, str(tmp_path / "result"), option])
    ended = subprocess.run(
        ["sh", "-c", f"{line} {closed}"], cwd=ROOT, env=ENVIRONMENT, capture_output=True
    )
    assert ended.returncode == status, ended.stderr
    assert (tmp_path / "result").read_text() == "whole"
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("encoding", ["utf-8:strict", "latin-1:strict", "ascii"])
def test_what_a_stream_cannot_encode_is_escaped(tmp_path, encoding):
    ended = subprocess.run(
        [sys.executable, "-c", SPEAKING, tmp_path / "result", "fail"],
        cwd=ROOT, env=ENVIRONMENT | {"PYTHONIOENCODING": encoding}, capture_output=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert b"Traceback" not in ended.stderr
    assert ended.stdout.splitlines()[0].endswith(b"\\udce9")
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(b"a library: error: ") and last.endswith(b"\\udce9: is wrong")
