"""train.py from outside: what it says, what it leaves, and what survives a kill."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_cases import ENVIRONMENT, ROOT
from train_cases import tiny_conf, tiny_tree, write_pictures

import train
from guided_diffusion.cli import command_line
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import locked
from guided_diffusion.training.checkpoints import checkpoint_path, newest_step
from guided_diffusion.training.report import read_log
from guided_diffusion.training.trainer import Trainer


def write_conf(tmp_path, **changes):
    path = tmp_path / "train.yml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path, **changes)))
    return str(path)


@pytest.fixture
def run(tmp_path):
    """Run train.py in this process, with a YAML of these keys."""
    return lambda *options, **keys: train.main(
        ["--conf_path", write_conf(tmp_path, **keys), *options]
    )


def states(conf, step):
    kinds = ("model", "ema_0.9999_")
    return [torch.load(checkpoint_path(conf, kind, step)) for kind in kinds]


def test_a_training_leaves_everything_and_test_py_runs_it(tmp_path, run, capsys):
    assert run(sample_interval=3) == 0
    told = capsys.readouterr()
    assert "7 pictures and 5 held out" in told.out
    assert "images/s" in told.err
    out = tmp_path / "out"
    pictures = {f"{kind}_00000{n}.png" for kind in ("samples", "inpainted") for n in (3, 6)}
    checkpoints = {f"{kind}00000{n}.pt" for kind in ("model", "ema_0.9999_", "opt") for n in (3, 6)}
    others = {"log.csv", "loss.png", "test.yml", "held_out.txt"}
    assert {path.name for path in out.iterdir()} == pictures | checkpoints | others
    rows = read_log(out / "log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [np.isfinite(row["held_out"]) for row in rows] == [False, False, True] * 2

    faster = ["--set", "timestep_respacing=3", "--set", "schedule_jump_params.t_T=3"]
    options = ["--conf_path", str(out / "test.yml"), "--out", str(tmp_path / "results")]
    test = [sys.executable, str(ROOT / "test.py"), *options, *faster]
    subprocess.run(test, check=True, env=ENVIRONMENT, cwd=tmp_path, capture_output=True)
    results = sorted((tmp_path / "results" / "inpainted").glob("*.png"))
    assert len(results) == 8
    assert Image.open(results[0]).size == (8, 8)


def test_a_network_of_one_channel_learns_gray_pictures(tmp_path, run, conf):
    folder = tmp_path / "pictures"
    for number in range(12):
        levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
        Image.fromarray(np.roll(levels, number)).save(folder / f"{number:02d}.png")
    assert run(in_channels=1, sample_interval=6) == 0
    state = states(conf, 6)[0]
    assert state["input_blocks.0.0.weight"].shape[1] == 1
    assert state["out.2.weight"].shape[0] == 2
    assert Image.open(tmp_path / "out" / "samples_000006.png").mode == "L"
    truth = np.asarray(Image.open(tmp_path / "out" / "inpainted_000006.png"))[100:300, 600:800]
    assert (truth == truth[..., :1]).all()
    assert "in_channels: 1\n" in (tmp_path / "out" / "test.yml").read_text()


def test_a_training_goes_on_and_ends(tmp_path, run, conf, capsys):
    assert run(iterations=3) == run("--resume") == 0
    assert newest_step(conf) == 6
    assert run("--resume") == 0
    assert "6 steps are done; to go on raise iterations" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"loss.png"}


def test_classes_are_listed_and_keep_their_order_when_a_training_goes_on(tmp_path, run, capsys):
    for number in (0, 2, 10):
        write_pictures(tmp_path / "pictures" / str(number), 2)
    keys = {"class_cond": True, "num_classes": 3, "holdout": 0}
    numerical = "cond_y: 0 is 0\ncond_y: 1 is 2\ncond_y: 2 is 10\n"
    as_text = "cond_y: 0 is 0\ncond_y: 1 is 10\ncond_y: 2 is 2\n"
    for step, order in enumerate((numerical, numerical, as_text), start=1):
        assert run("--resume", iterations=step, **keys) == 0
        assert order in capsys.readouterr().out
        if step == 2:
            path = checkpoint_path(tiny_conf(tmp_path), "opt", step)
            torch.save({**torch.load(path), "classes": ["0", "10", "2"]}, path)
    assert as_text in (tmp_path / "out" / "test.yml").read_text().replace("# cond", "cond")


def test_of_several_processes_one_exports(tmp_path, run, monkeypatch, capsys):
    run(iterations=3)
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, message in (("1", ""), ("0", "demo.pt, 0.4 MB\n")):
        assert not (tmp_path / "demo.pt").exists()
        monkeypatch.setenv("RANK", rank)
        assert run("--export", str(tmp_path / "demo.pt")) == 0
        assert capsys.readouterr().out.endswith(message)


def test_a_training_starts_from_another_ones_weights(tmp_path, run, conf):
    run(iterations=3)
    source = str(checkpoint_path(conf, "ema_0.9999_", 3))
    still = {"iterations": 1, "lr": 1e-12, "image_size": 16}
    assert run(init_from=source, out_dir=str(tmp_path / "second"), **still) == 0
    first, later = torch.load(source), torch.load(tmp_path / "second" / "model000001.pt")
    assert all(torch.allclose(first[name], later[name], atol=1e-6) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu")
def test_a_gpu_trains_compiled_in_bfloat16_and_goes_on(tmp_path, run):
    keys = {"device": "cuda", "precision": "bfloat16", "compile": True, "sample_interval": 3}
    assert run(iterations=3, **keys) == run("--resume", **keys) == 0
    rows = read_log(tmp_path / "out" / "log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {value.dtype for value in states(tiny_conf(tmp_path), 6)[0].values()} == {torch.float32}


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    (tmp_path / "pictures").mkdir()
    command = [sys.executable, ROOT / "train.py", "--conf_path", write_conf(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {tmp_path}/pictures: data_dir: no pictures")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "nowhere"}, "nowhere: data_dir: no such"),
        ({"init_from": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
        ({"sample_respacing": "2000"}, "sample_respacing: "),
        ({"device": "cuda:99"}, "device"),
        ({"image_size": 4, "sample_interval": 1}, "image_size and sample_interval: "),
        ({"out_dir": "{}/pictures/out"}, "pictures/out: data_dir: results would go into"),
        ({"out_dir": "{}/file"}, "file: results cannot be written there: not a folder"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_training(tmp_path, run, changes, message):
    (tmp_path / "file").write_text("not mine")
    if "out_dir" in changes:
        changes = {"out_dir": changes["out_dir"].format(tmp_path)}
    with pytest.raises(UserError) as caught:
        run(**changes)
    assert message in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pictures", "train.yml"}
    assert not (tmp_path / "pictures" / "out").exists()


def test_a_full_disk_is_told_before_training(run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the disk is too full for the next checkpoint"):
        run()


def test_a_loss_that_is_not_finite_stops_with_status_1_and_one_line(run, conf, capsys):
    with pytest.raises(SystemExit) as end:
        command_line(lambda: run(lr=1e18, iterations=50, save_interval=1))
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "is not finite in step" in lines[0]
    step = newest_step(conf)
    assert f"the last checkpoint is of step {step}" in lines[0]
    for state in states(conf, step):
        assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize(("program", "module"), [("train.py", "torch"), ("test.py", "tqdm")])
def test_ctrl_c_while_modules_are_imported_ends_with_130_and_one_line(tmp_path, program, module):
    conf = write_conf(tmp_path) if program == "train.py" else ROOT / "confs" / "demo.yml"
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n"
        "except BaseException:\n"  # as some modules do
        "    pass\n"
    )
    result = subprocess.run(
        [sys.executable, ROOT / program, "--conf_path", conf], capture_output=True, text=True,
        env=ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=ROOT,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_ctrl_c_saves_the_step(tmp_path, run, monkeypatch, capfd):
    original = Trainer.train_step

    def train_step(trainer, *batch):
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: run(iterations=8, save_interval=50))
    assert end.value.code == 130
    told = capfd.readouterr().err
    assert "a second Ctrl-C ends at once" in told
    assert "interrupted: the last checkpoint is of step 5" in told
    last = read_log(tmp_path / "out" / "log.csv")[-1]
    assert (last["step"], np.isfinite(last["held_out"])) == (5, False)  # it would take its time


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_half_file(tmp_path, run, conf, monkeypatch):
    original = torch.save

    def save(state, stream):
        if "step" in state:  # the last of the set
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(state, stream)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: run(save_interval=2))
    assert end.value.code == 130
    assert newest_step(conf) is None
    assert not list((tmp_path / "out").glob(".*"))


def test_a_second_training_into_the_same_folder_is_refused(tmp_path, run):
    message = r"out: another run is at work there"
    with locked(tmp_path / "out"), pytest.raises(UserError, match=message):
        run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["train_step", "__init__"])
def test_out_of_memory_is_one_line_that_names_the_way_on(run, monkeypatch, place):
    run(iterations=2)

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Trainer, place, full)
    message = (
        r"microbatch: out of memory with 4 pictures .*use_checkpoint: true, .*--resume; "
        r"the last checkpoint is of step 2"
    )
    with pytest.raises(UserError, match=message):
        run("--resume")


def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path, run, conf):
    written = write_conf(tmp_path, iterations=40, save_interval=1)
    command = [sys.executable, ROOT / "train.py", "--conf_path", written]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while (newest_step(conf) or 0) < 3:  # at any moment from here on
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    reached = newest_step(conf)
    assert 3 <= reached < 40
    last = reached + 2
    assert run("--resume", iterations=last) == 0
    whole = tiny_conf(tmp_path, out_dir=str(tmp_path / "whole"))
    assert run(out_dir=whole.out_dir, iterations=last) == 0
    for one, two in zip(states(conf, last), states(whole, last), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [read_log(Path(folder, "log.csv")) for folder in (tmp_path / "out", whole.out_dir)]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert not list((tmp_path / "out").glob(".*"))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_two_processes_learn_as_one(tmp_path, run):
    keys = {"batch_size": 8, "microbatch": 2, "iterations": 8, "random_crop": True}
    # Of so few times each has its ten losses soon, and then all processes have to know them.
    keys |= {"schedule_sampler": "loss-second-moment", "diffusion_steps": 2}
    keys |= {"noise_schedule": "cosine"}
    assert run(**keys) == 0
    written = write_conf(tmp_path, out_dir=str(tmp_path / "two"), **keys)
    command = [*TORCHRUN, ROOT / "train.py", "--conf_path", written]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout
    assert "warning" not in result.stderr.lower()
    one, two = (read_log(tmp_path / name / "log.csv") for name in ("out", "two"))
    assert len(one) == len(two) == 8
    for name in one[0]:
        if name != "images_per_s":
            values = [[row[name] for row in rows] for rows in (one, two)]
            np.testing.assert_allclose(*values, rtol=1e-3, err_msg=name)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in (tmp_path / "two").iterdir()}


@pytest.mark.slow
def test_an_orphaned_process_saves_and_says_so_in_one_line(tmp_path, conf):
    written = write_conf(tmp_path, iterations=100_000, log_interval=1, save_interval=100_000)
    command = [*TORCHRUN, ROOT / "train.py", "--conf_path", written]
    errors = tmp_path / "errors"
    with errors.open("w") as stream:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stream)
    log = tmp_path / "out" / "log.csv"
    while not log.exists() or log.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    process.stdout.read()  # until all processes have ended
    lines = [line for line in errors.read_text().splitlines() if line.startswith("error: ")]
    step = newest_step(conf)
    assert lines == [f"error: torchrun has ended; the last checkpoint is of step {step}"]
    assert "Traceback" not in errors.read_text()
