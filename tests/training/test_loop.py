"""What the processes of a training tell each other, and of each other."""

import dataclasses
import types

import pytest
import torch
from train_cases import tiny_conf

from guided_diffusion.errors import UserError
from guided_diffusion.training import loop

CPU = torch.device("cpu")


@pytest.fixture
def team(monkeypatch):
    """Be the first of two processes, without the other."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(loop, "Team", lambda: types.SimpleNamespace(store=lambda _: None))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        torch.distributed.DistNetworkError("Failed to recv, got 0 bytes"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        torch.distributed.DistStoreError("wait timeout after 1000ms, keys: /x"),
    ],
    ids=str,
)
def test_a_process_that_is_gone_is_one_line(tmp_path, team, error):
    message = "no connection to the other processes; .*--resume goes on"
    with pytest.raises(UserError, match=message), loop.process_group(CPU):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("at 12:4: tl.store(out + i, x): the connection of types is unknown"),
        RuntimeError("the compiler timed out"),
        ValueError("a broken pipe of operations"),
        torch.distributed.DistBackendError("NCCL error: CUDA failure 2 'out of memory'"),
        UserError("too many pictures"),
    ],
    ids=str,
)
def test_another_failure_is_not_told_as_a_lost_process(tmp_path, team, error):
    with pytest.raises(type(error)) as caught, loop.process_group(CPU):
        raise error
    assert caught.value is error


def test_the_end_of_torchrun_is_told_whoever_noticed_it(tmp_path, team, monkeypatch):
    """The others stop the first before it has looked for itself."""
    with pytest.raises(KeyboardInterrupt), loop.process_group(CPU):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="torchrun has ended"), loop.process_group(CPU):
        monkeypatch.setattr("os.getppid", lambda: -1)
        raise KeyboardInterrupt


def meet(monkeypatch, *processes):
    """Let processes compare (conf, names, start), one after the other; raises as the last does."""
    met = []

    def gather(views, own):
        met.append(own)
        views[:] = met

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for process in processes:
        loop.refuse_differences(*process)


def test_processes_that_agree_go_on_whatever_their_folders_are_called(conf, team, monkeypatch):
    other = dataclasses.replace(conf, data_dir="elsewhere", out_dir="there", cache_gb=1)
    meet(monkeypatch, (conf, ["a.png"], 3), (other, ["a.png"], 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 0}, r"process 1: out_dir: .* expected 'step 3', found 'step 0'"),
        ({"names": ["b.png"]}, r"process 1: data_dir: .*pictures .*expected '1 pictures \(list"),
        ({"lr": 0.5}, r"process 1: lr: .*expected 0\.001, found 0\.5"),
        ({"log_interval": 7, "seed": 9}, r"process 1: seed and log_interval: "),
    ],
    ids=str,
)
def test_a_process_that_would_train_otherwise_is_named(
    tmp_path, team, monkeypatch, changes, message
):
    conf, changes = tiny_conf(tmp_path), dict(changes)
    start, names = changes.pop("start", 3), changes.pop("names", ["a.png"])
    other = dataclasses.replace(conf, **changes)
    with pytest.raises(UserError, match=message):
        meet(monkeypatch, (conf, ["a.png"], 3), (other, names, start))
