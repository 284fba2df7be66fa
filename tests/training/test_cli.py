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
from train_cases import tiny_conf, tiny_tree, write_pictures

import train
from guided_diffusion.cli import command_line
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import locked
from guided_diffusion.training.checkpoints import checkpoint_path, newest_step
from guided_diffusion.training.report import read_log
from guided_diffusion.training.trainer import Trainer

ROOT = Path(train.__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def write_conf(tmp_path, **changes):
    path = tmp_path / "train.yml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path, **changes)))
    return str(path)


def command(*options):
    return [sys.executable, str(ROOT / "train.py"), *options]


def run(*options):
    return subprocess.run(command(*options), capture_output=True, text=True, env=ENVIRONMENT)


def states(conf, step):
    kinds = ("model", "ema_0.9999_")
    return [torch.load(checkpoint_path(conf, kind, step)) for kind in kinds]


# ---- a whole training ----------------------------------------------------------------------------


def test_a_training_leaves_everything_and_test_py_runs_it(tmp_path, capsys):
    conf = write_conf(tmp_path, sample_interval=3)
    assert train.main(["--conf_path", conf]) == 0
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


@pytest.mark.parametrize("objective", [{}, {"predict_v": True, "learn_sigma": False}], ids=str)
def test_a_network_of_one_channel_learns_gray_pictures(tmp_path, objective):
    changes = {"in_channels": 1, "sample_interval": 6, **objective}
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
        Image.fromarray(np.roll(levels, number)).save(folder / f"{number:02d}.png")
    conf = write_conf(tmp_path, **changes)
    assert train.main(["--conf_path", conf]) == 0
    state = states(tiny_conf(tmp_path, **changes), 6)[0]
    assert state["input_blocks.0.0.weight"].shape[1] == 1
    assert state["out.2.weight"].shape[0] == (1 if objective else 2)
    assert Image.open(tmp_path / "out" / "samples_000006.png").mode == "L"
    truth = np.asarray(Image.open(tmp_path / "out" / "inpainted_000006.png"))[100:300, 600:800]
    assert (truth == truth[..., :1]).all()
    assert "in_channels: 1\n" in (tmp_path / "out" / "test.yml").read_text()


def test_a_training_goes_on_and_ends(tmp_path, capsys):
    conf = write_conf(tmp_path)
    assert train.main(["--conf_path", conf, "--set", "iterations=3"]) == 0
    assert train.main(["--conf_path", conf, "--resume"]) == 0
    assert newest_step(tiny_conf(tmp_path)) == 6
    assert train.main(["--conf_path", conf, "--resume"]) == 0
    assert "6 steps are done; to go on raise iterations" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"loss.png"}


def test_classes_are_listed_and_keep_their_order_when_a_training_goes_on(tmp_path, capsys):
    for number in (0, 2, 10):
        write_pictures(tmp_path / "pictures" / str(number), 2)
    conf = write_conf(tmp_path, class_cond=True, num_classes=3, holdout=0, save_interval=1)
    numerical = "cond_y: 0 is 0\ncond_y: 1 is 2\ncond_y: 2 is 10\n"
    as_text = "cond_y: 0 is 0\ncond_y: 1 is 10\ncond_y: 2 is 2\n"
    for step, order in enumerate((numerical, numerical, as_text, as_text), start=1):
        options = ["--conf_path", conf, "--resume", "--set", f"iterations={step}"]
        assert train.main(options) == 0
        assert order in capsys.readouterr().out
        if step == 2:
            path = checkpoint_path(tiny_conf(tmp_path), "opt", step)
            state = torch.load(path)
            del state["classes"]  # as earlier programs wrote it, which sorted classes as text
            torch.save(state, path)
    assert as_text in (tmp_path / "out" / "test.yml").read_text().replace("# cond", "cond")


def test_of_several_processes_one_exports(tmp_path, monkeypatch, capsys):
    conf = write_conf(tmp_path, iterations=3)
    train.main(["--conf_path", conf])
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, message in (("1", ""), ("0", "demo.pt, 0.4 MB\n")):
        assert not (tmp_path / "demo.pt").exists()
        monkeypatch.setenv("RANK", rank)
        assert train.main(["--conf_path", conf, "--export", str(tmp_path / "demo.pt")]) == 0
        assert capsys.readouterr().out.endswith(message)


def test_a_training_starts_from_another_ones_weights(tmp_path):
    conf = write_conf(tmp_path, iterations=3)
    train.main(["--conf_path", conf])
    source = checkpoint_path(tiny_conf(tmp_path), "ema_0.9999_", 3)
    second = ["--set", f"init_from={source}", "--set", f"out_dir={tmp_path / 'second'}"]
    still = ["--set", "iterations=1", "--set", "lr=1e-12", "--set", "image_size=16"]
    assert train.main(["--conf_path", conf, *second, *still, "--set", "warmup_steps=1"]) == 0
    first, later = torch.load(source), torch.load(tmp_path / "second" / "model000001.pt")
    assert all(torch.allclose(first[name], later[name], atol=1e-6) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu")
def test_a_gpu_trains_compiled_in_bfloat16_and_goes_on(tmp_path):
    changes = {"device": "cuda", "precision": "bfloat16", "compile": True, "sample_interval": 3}
    conf = write_conf(tmp_path, **changes)
    assert train.main(["--conf_path", conf, "--set", "iterations=3"]) == 0
    assert train.main(["--conf_path", conf, "--resume"]) == 0
    rows = read_log(tmp_path / "out" / "log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {value.dtype for value in states(tiny_conf(tmp_path), 6)[0].values()} == {torch.float32}


# ---- what is wrong is told -----------------------------------------------------------------------


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    (tmp_path / "pictures").mkdir()
    result = run("--conf_path", write_conf(tmp_path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {tmp_path}/pictures: data_dir: no pictures")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "nowhere"}, "nowhere: data_dir: no such"),
        ({"init_from": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
        ({"sample_respacing": "ddim999"}, "999"),
        ({"sample_respacing": "2000"}, "sample_respacing: "),
        ({"device": "cuda:99"}, "device"),
        ({"name": "../elsewhere"}, "name: would lead out of the folder ./runs/"),
        ({"image_size": 4, "sample_interval": 1}, "image_size and sample_interval: "),
        ({"ema_rat": "0.9"}, "nearest known key is ema_rate"),
        ({"out_dir": "{}/pictures/out"}, "pictures/out: data_dir: results would go into"),
        ({"out_dir": "{}/file"}, "file: results cannot be written there: not a folder"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_training(tmp_path, changes, message):
    (tmp_path / "file").write_text("not mine")
    if "out_dir" in changes:
        changes = {"out_dir": changes["out_dir"].format(tmp_path)}
    with pytest.raises(UserError) as caught:
        train.main(["--conf_path", write_conf(tmp_path, **changes)])
    assert message in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pictures", "train.yml"}
    assert not (tmp_path / "pictures" / "out").exists()


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the disk is too full for the next checkpoint"):
        train.main(["--conf_path", write_conf(tmp_path)])


def test_a_loss_that_is_not_finite_stops_with_status_1_and_one_line(tmp_path, capsys):
    conf = write_conf(tmp_path, lr=1e18, iterations=50, save_interval=1)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: train.main(["--conf_path", conf]))
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "is not finite in step" in lines[0]
    step = newest_step(tiny_conf(tmp_path))
    assert f"the last checkpoint is of step {step}" in lines[0]
    for state in states(tiny_conf(tmp_path), step):
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


def test_ctrl_c_saves_the_step_and_the_training_goes_on_as_if_it_had_not_been(
    tmp_path, monkeypatch, capfd
):
    conf = write_conf(tmp_path, iterations=8, save_interval=50, cache_gb=0, dropout=0.2)
    original = Trainer.train_step

    def train_step(trainer, *batch):
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: train.main(["--conf_path", conf]))
    assert end.value.code == 130
    told = capfd.readouterr().err
    assert "a second Ctrl-C ends at once" in told
    assert "interrupted: the last checkpoint is of step 5" in told
    last = read_log(tmp_path / "out" / "log.csv")[-1]
    assert (last["step"], np.isfinite(last["held_out"])) == (5, False)  # it would take its time
    monkeypatch.undo()
    assert train.main(["--conf_path", conf, "--resume"]) == 0
    other = ["--set", f"out_dir={tmp_path / 'whole'}"]
    assert train.main(["--conf_path", conf, *other]) == 0
    ends = (tiny_conf(tmp_path), tiny_conf(tmp_path, out_dir=str(tmp_path / "whole")))
    for one, two in zip(*(states(end, 8) for end in ends), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_half_file(tmp_path, monkeypatch):
    conf = write_conf(tmp_path, save_interval=2)
    original = torch.save

    def save(state, stream):
        if "step" in state:  # the last of the set
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(state, stream)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: train.main(["--conf_path", conf]))
    assert end.value.code == 130
    assert newest_step(tiny_conf(tmp_path)) is None
    assert not list((tmp_path / "out").glob(".*"))


def test_a_second_training_into_the_same_folder_is_refused(tmp_path):
    with (
        locked(tmp_path / "out"),
        pytest.raises(UserError, match=r"out: another run is at work there"),
    ):
        train.main(["--conf_path", write_conf(tmp_path)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["train_step", "__init__"])
def test_out_of_memory_is_one_line_that_names_the_way_on(tmp_path, monkeypatch, place):
    conf = write_conf(tmp_path, save_interval=2)
    train.main(["--conf_path", conf, "--set", "iterations=2"])

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Trainer, place, full)
    message = (
        r"microbatch: out of memory with 4 pictures .*use_checkpoint: true, .*--resume; "
        r"the last checkpoint is of step 2"
    )
    with pytest.raises(UserError, match=message):
        train.main(["--conf_path", conf, "--resume"])


# ---- what survives -------------------------------------------------------------------------------


def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path):
    conf = write_conf(tmp_path, iterations=40, save_interval=1)
    process = subprocess.Popen(
        command("--conf_path", conf), env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    while (newest_step(tiny_conf(tmp_path)) or 0) < 3:  # at any moment from here on
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = newest_step(tiny_conf(tmp_path))
    assert 3 <= reached < 40
    last = str(reached + 2)
    assert train.main(["--conf_path", conf, "--resume", "--set", f"iterations={last}"]) == 0

    whole = tiny_conf(tmp_path, out_dir=str(tmp_path / "whole"))
    other = ["--set", f"out_dir={whole.out_dir}", "--set", f"iterations={last}"]
    assert train.main(["--conf_path", conf, *other]) == 0
    for one, two in zip(
        states(tiny_conf(tmp_path), int(last)), states(whole, int(last)), strict=True
    ):
        assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [read_log(Path(folder, "log.csv")) for folder in (tmp_path / "out", whole.out_dir)]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert not list((tmp_path / "out").glob(".*"))


def test_two_processes_learn_as_one(tmp_path):
    changes = {"batch_size": 8, "microbatch": 2, "iterations": 8, "random_crop": True}
    # Of so few times each has its ten losses soon, and then all processes have to know them.
    changes |= {"schedule_sampler": "loss-second-moment", "diffusion_steps": 2}
    changes |= {"noise_schedule": "cosine"}
    conf = write_conf(tmp_path, **changes)
    assert train.main(["--conf_path", conf]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--conf_path", conf, "--set", f"out_dir={tmp_path / 'two'}"]
    result = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", str(ROOT / "train.py"), *options],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
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
def test_an_orphaned_process_saves_and_says_so_in_one_line(tmp_path):
    conf = write_conf(tmp_path, iterations=100_000, log_interval=1, save_interval=100_000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    errors = tmp_path / "errors"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [*torchrun, "--nproc_per_node", "2", str(ROOT / "train.py"), "--conf_path", conf],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stream,
        )  # fmt: skip
    log = tmp_path / "out" / "log.csv"
    while not log.exists() or log.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    process.stdout.read()  # until all processes have ended
    lines = [line for line in errors.read_text().splitlines() if line.startswith("error: ")]
    step = newest_step(tiny_conf(tmp_path))
    assert lines == [f"error: torchrun has ended; the last checkpoint is of step {step}"]
    assert "Traceback" not in errors.read_text()
