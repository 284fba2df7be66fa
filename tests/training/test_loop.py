"""What the processes of a training tell each other, and of each other."""

import threading

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
    monkeypatch.setattr(loop, "_watch_parent", threading.Event)


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
    message = "no connection to the other processes; .*--resume goes on; nothing was saved yet"
    with pytest.raises(UserError, match=message), loop.process_group(tiny_conf(tmp_path), CPU):
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
    with pytest.raises(type(error)) as caught, loop.process_group(tiny_conf(tmp_path), CPU):
        raise error
    assert caught.value is error
