"""What nights bring: kills, signals, lost processes, full disks; nothing finished is ever lost."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_cases import (
    ENVIRONMENT,
    FOLDERS,
    ROOT,
    assert_same,
    command,
    load_yaml,
    results,
    run_apart,
    write_run,
)

from guided_diffusion.io import files
from guided_diffusion.io import results as io_results
from guided_diffusion.run import inpainter

LONG = {"t_T": 4, "n_sample": 30}  # some tenths of a second an image
LOG = "log/run"


def start(folder, *options, processes=1):
    return subprocess.Popen(
        command(*options, processes=processes),
        cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds=60):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.01)


def finished(folder):
    """Return the finished results, by name, with the time at which they were written."""
    there = (folder / LOG / "inpainted").glob("*.png")
    return {path.name: path.stat().st_mtime_ns for path in there}


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("kills", "images"), [(2, 12), pytest.param(30, 90, marks=pytest.mark.slow)]
)
def test_kills_at_random_moments_lose_nothing(tmp_path, kills, images):
    options = write_run(tmp_path, images, schedule_jump_params=LONG, seed=None)
    whole = run_apart(tmp_path, *options, "--out", "whole")
    image_seconds = float(re.search(r"([\d.]+) s an image", whole.out)[1])
    seed = load_yaml(tmp_path / "whole" / "run.yml")["seed"]
    record = tmp_path / LOG / "run.yml"
    moments, known, start_seconds, more = random.Random(0), {}, 0, ["--set", f"seed={seed}"]
    for kill in range(kills):
        before = record.stat().st_mtime_ns if record.exists() else 0
        began = time.perf_counter()
        process = start(tmp_path, *options, "--resume", *more)
        if kill % 5 == 4:  # some while the program starts, most while results are made
            time.sleep(moments.uniform(0, start_seconds))
        else:
            wait_for(lambda b=before: record.exists() and record.stat().st_mtime_ns != b)
            start_seconds = time.perf_counter() - began
            time.sleep(moments.uniform(0, 3 * image_seconds))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "there were too few images for the kills"
        now, more = finished(tmp_path), []  # the seed is in the record
        assert known.items() <= now.items()  # nothing finished was touched again
        known = now
        for kind in FOLDERS:
            for path in (tmp_path / LOG / kind).glob("*.png"):
                with Image.open(path) as image:
                    image.load()
    assert 0 < len(known) < images
    ended = run_apart(tmp_path, *options, "--resume")
    assert f"seed {seed}\n" in ended.out
    assert f"{images - len(known)} images, {len(known)} finished earlier" in ended.out
    assert known.items() <= finished(tmp_path).items()
    for kind in FOLDERS:
        assert_same(results(tmp_path / LOG, kind), results(tmp_path / "whole", kind))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_within_a_call_and_says_how_to_go_on(tmp_path, number):
    options = write_run(tmp_path, 6, schedule_jump_params=LONG)
    process = start(tmp_path, *options)
    wait_for(lambda: len(finished(tmp_path)) >= 1)
    process.send_signal(number)
    before = len(finished(tmp_path))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    done = len(finished(tmp_path))
    assert 1 <= done <= min(before + 1, 5)
    line = err.splitlines()[-1]
    told = rf"interrupted: {done} of 6 results are in log/run; go on with: (.*)"
    found = re.fullmatch(told, line)
    assert "Traceback" not in err
    assert leftovers(tmp_path) == []
    ended = subprocess.run(
        found[1], shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert f"{done} finished earlier" in ended.stdout
    assert len(finished(tmp_path)) == 6


def test_ctrl_c_before_anything_is_made(here, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inpainter, "load_model", interrupted)
    ended = here(*write_run(tmp_path, 1))
    assert (ended.status, ended.err) == (130, "interrupted\n")
    assert not (tmp_path / "log").exists()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Results of one process, to compare with."""
    folder = tmp_path_factory.mktemp("single")
    assert run_apart(folder, *write_run(folder, 5, samples_per_image=2)).status == 0
    return results(folder / LOG)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_same_results_and_one_summary(tmp_path, single, processes):
    options = write_run(tmp_path, 5, samples_per_image=2, timestep_respacing="4")
    ended = run_apart(tmp_path, *options, "--set", "data.batch_size=2", processes=processes)
    assert ended.status == 0, ended.err
    assert_same(results(tmp_path / LOG), single, levels=1)
    first, *memory, last = ended.out.splitlines()
    assert first == "5 images, 50.0% of the pixels to generate, seed 5"
    assert [line[:10] for line in memory] in ([], ["batch_size"])  # not every system tells
    assert re.match(r"log/run: 10 images, 6 network calls and [0-9.]+ s an image", last)
    assert len(re.findall(r"images: 100%", ended.err)) == 1
    record = load_yaml(tmp_path / LOG / "run.yml")["record"]
    assert record["processes"] == processes
    assert record["made"] == 10
    assert leftovers(tmp_path) == []


def children(process):
    """Return the processes that run test.py below torchrun, by rank."""
    listed = ["ps", "--ppid", str(process.pid), "-o", "pid="]
    found = subprocess.run(listed, capture_output=True, text=True).stdout.split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in found}
    ranks = {pid: re.search(rb"\0RANK=(\d+)", text) for pid, text in environments.items()}
    return {int(rank[1]): pid for pid, rank in ranks.items() if rank}


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_costs_only_what_it_was_at(here, tmp_path, rank):
    options = write_run(tmp_path, 8, schedule_jump_params={"t_T": 4, "n_sample": 80})
    process = start(tmp_path, *options, processes=2)
    wait_for(lambda: len(finished(tmp_path)) >= 2)
    time.sleep(0.1)  # a result is there before its process has counted it
    os.kill(children(process)[rank], signal.SIGKILL)
    died = time.perf_counter()
    out, err = process.communicate(timeout=60)
    assert time.perf_counter() - died < 25  # nobody waits for the dead
    assert process.returncode != 0
    known = finished(tmp_path)
    assert 2 <= len(known) < 8
    assert len(leftovers(tmp_path)) <= 1  # what the killed one was writing; nobody else leaves any
    assert "finished earlier" not in out
    if rank == 1:  # the main process was asked to end, and says so
        assert f"interrupted: {len(known)} of 8 results are in log/run; go on with: the sa" in err
    ended = here(*options, "--resume")
    assert ended.status == 0
    assert f"{8 - len(known)} images, {len(known)} finished earlier" in ended.out
    assert known.items() <= finished(tmp_path).items()
    assert leftovers(tmp_path) == []


def test_a_mistake_is_told_once_by_several_processes(tmp_path):
    options = write_run(tmp_path, 2)
    began = time.perf_counter()
    ended = run_apart(tmp_path, *options, "--set", "sead=1", processes=2)
    assert time.perf_counter() - began < 40
    assert ended.status != 0
    assert ended.err.count("error: --set sead=1: sead: unknown key") == 1
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_a_fault_of_another_process_than_the_first_is_told_and_ends_all(tmp_path):
    """The second process cannot write; the first is ended by torchrun and not left waiting."""
    options = write_run(tmp_path, 6, schedule_jump_params=LONG)
    script = tmp_path / "second.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.path[0] = {str(ROOT)!r}\n"
        "from guided_diffusion.io import files\n"
        "def full(*_): raise OSError(28, 'No space left on device')\n"
        "if os.environ['RANK'] == '1': files._sync = full\n"
        f"runpy.run_path({str(ROOT / 'test.py')!r}, run_name='__main__')\n"
    )
    argv = command(*options, processes=2)
    argv[argv.index(str(ROOT / "test.py"))] = str(script)
    ended = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode != 0
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "cannot be written: No space left on device" in told[0]
    assert "go on with: the same torchrun command with --resume" in told[0]
    assert leftovers(tmp_path) == []
    assert run_apart(tmp_path, *options, "--resume").status == 0


def test_a_full_disk_ends_the_run_in_one_line_and_the_rest_is_resumed(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 4)
    sync, synced = files._sync, []

    def full(path, flags):
        if path.suffix == ".tmp":
            synced.append(path)
            if len(synced) > 1 + 4 + 2:  # the record, one image, half of another
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path, flags)

    monkeypatch.setattr(files, "_sync", full)
    ended = here(*options)
    assert ended.status == 2
    [line] = ended.lines
    assert line.startswith("error: log/run/gt_masked/01.png: cannot be written: No space left on")
    assert "; 1 of 4 results are in log/run; go on with: " in line
    known = finished(tmp_path)
    assert (leftovers(tmp_path), list(known)) == ([], ["00.png"])
    monkeypatch.setattr(files, "_sync", sync)
    assert "3 images, 1 finished earlier" in here(*options, "--resume").out
    assert known.items() <= finished(tmp_path).items()


def test_a_disk_that_fails_under_the_run(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 3)
    replace = Path.replace

    def failing(self, target):
        if Path(target).name == "01.png":
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    ended = here(*options, "--set", "data.batch_size=3")
    assert ended.status == 2
    [line] = ended.lines
    assert line.startswith("error: log/run/gt_keep_mask/01.png: cannot be written: Read-only")
    assert leftovers(tmp_path) == []
    # What was computed with it in a batch is not thrown away.
    assert sorted(finished(tmp_path)) == ["00.png", "02.png"]


def test_a_checkpoint_that_changes_under_the_run_ends_it(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 3)
    before, write = Path("model.pt").read_bytes(), io_results.write_image
    torch.save({name: t + 1 for name, t in torch.load("model.pt").items()}, "other.pt")

    def changing(path, *rest, **names):
        write(path, *rest, **names)
        if Path(path) == Path(LOG, "inpainted", "00.png"):
            Path("model.pt").rename("away.pt")  # does no harm: the weights are in memory
        if Path(path) == Path(LOG, "inpainted", "01.png"):
            shutil.copyfile("other.pt", "away.pt")  # in place: the same inode
            Path("away.pt").rename("model.pt")

    monkeypatch.setattr(io_results, "write_image", changing)
    ended = here(*options)
    assert ended.status == 1
    [line] = ended.lines
    assert line.startswith("error: model.pt: has changed since this run began to read it; 2 of 3 ")
    assert sorted(finished(tmp_path)) == ["00.png", "01.png"]
    Path("model.pt").write_bytes(before)
    monkeypatch.setattr(io_results, "write_image", write)
    assert "1 image, 2 finished earlier" in here(*options, "--resume").out


def test_inputs_that_vanish_under_the_run_cost_only_themselves(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 4, overview=True)
    assert here(*options).status == 0
    before, height = finished(tmp_path), Image.open(Path(LOG, "overview.png")).height
    write = io_results.write_image

    def vanishing(path, *rest, **names):
        write(path, *rest, **names)
        if Path(path) == Path(LOG, "inpainted", "00.png"):
            Path("gt/01.png").unlink()
            Path("mask/02.png").write_bytes(b"")

    monkeypatch.setattr(io_results, "write_image", vanishing)
    ended = here(*options)
    assert ended.status == 1
    assert ended.lines == [
        "failed: 01.png: gt/01.png: no such file",
        "failed: 02.png: mask/02.png: is empty",
    ]
    assert "log/run: 2 images, 2 failed (01.png, 02.png), which --resume tries again" in ended.out
    assert {name for name, _ in before.items() & finished(tmp_path).items()} == {"01.png", "02.png"}
    assert Image.open(Path(LOG, "overview.png")).height < height  # without what an earlier run made


STRANGE = [
    "-rf.png",
    "a\nb.png",
    "~.png",
    "%2e%2e%2f.png",
    "a\\..\\b.png",
    "$(x).png",
    "\udcff.png",
]


@pytest.mark.parametrize("name", STRANGE)
def test_no_name_leads_out_of_the_folder(here, tmp_path, name):
    options = write_run(tmp_path / "in", 1)
    os.chdir(tmp_path / "in")
    for folder in ("gt", "mask"):
        Path(folder, "00.png").rename(Path(folder, name))
    ended = here(*options)
    assert ended.status == 0, ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in Path().iterdir()} == {"c.yml", "gt", "log", "mask", "model.pt"}
    for kind in FOLDERS:
        [path] = Path(LOG, kind).iterdir()
        assert path.name.endswith(".png")
    assert len(load_yaml(f"{LOG}/run.yml")["record"]["seeds"]) == 1
    assert "1 finished earlier" in here(*options, "--resume").out


def test_a_link_in_a_results_place_is_replaced_and_not_followed(here, tmp_path):
    options = write_run(tmp_path, 1)
    other = tmp_path / "precious.png"
    other.write_bytes(b"precious")
    (tmp_path / LOG / "inpainted").mkdir(parents=True)
    (tmp_path / LOG / "inpainted" / "00.png").symlink_to(other)
    (tmp_path / LOG / "run.yml").symlink_to(other)
    assert here(*options).status == 0
    assert other.read_bytes() == b"precious"
    assert not (tmp_path / LOG / "inpainted" / "00.png").is_symlink()
