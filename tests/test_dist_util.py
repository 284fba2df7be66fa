"""Device and processes."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from guided_diffusion import cli, dist_util
from guided_diffusion.dist_util import get_device
from guided_diffusion.errors import UserError


def test_the_default_device_is_a_gpu_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_device() == get_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, f"found {name!r}") for name in ("gpu", "cuda:x", "meta", "", "cuda:-1")),
        ("mps", "no Metal GPU; found mps"),
        ("cuda:2", "no such GPU; found cuda:2 with 2 GPUs"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch, name, problem):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as caught:
        get_device(name)
    assert str(caught.value).startswith("device: ")
    assert problem in str(caught.value)


def test_cuda_without_a_number_is_the_processs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert get_device("cuda") == torch.device("cuda", 1)
    assert get_device("cuda:0") == torch.device("cuda", 0)


def team(**changes):
    whole = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    return whole | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} | changes


NAMES = tuple(team())


def place_with(monkeypatch, variables):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return cli.leave_stray_team(), cli.place()


def test_the_whole_set_is_a_team(monkeypatch):
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (0, 1, True)
    assert place_with(monkeypatch, team()) == (None, cli.Place(1, 4, 1, 2))
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (1, 4, False)


@pytest.mark.parametrize(
    "variables",
    [
        *({"RANK": text} for text in ("1", "", "abc", "-1", "1.0")),
        *({"WORLD_SIZE": text} for text in ("0", "2")),
        *({"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}),
        *(team(RANK="4"), team(WORLD_SIZE="1"), team(LOCAL_RANK="2"), team(LOCAL_WORLD_SIZE="9")),
        *(team(MASTER_ADDR=""), team(MASTER_PORT=""), team(RANK="one")),
    ],
    ids=str,
)
def test_anything_else_is_one_process_with_a_warning(monkeypatch, variables):
    warning, place = place_with(monkeypatch, variables)
    assert place == cli.Place()
    name, value = next(
        (n, v) for n, v in variables.items() if n not in ("MASTER_ADDR", "MASTER_PORT")
    )
    assert f"{name}={value!r}" in warning
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} & os.environ.keys()


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_that_says_so_is_no_news(monkeypatch, variables):
    assert place_with(monkeypatch, variables) == (None, cli.Place())


def test_a_process_without_its_torchrun_ends_at_once(monkeypatch):
    names = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    parents = iter(range(100))
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    with pytest.raises(UserError, match="no connection to the other processes"):
        dist_util.Team()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, expected):
    assert dist_util.is_out_of_memory(error) is expected


def test_interrupts_are_put_off_once_and_ignored_ones_stay_ignored():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            interrupts.check()
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]  # a second one acts
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {n: signal.getsignal(n) for n in before} == before


def test_interrupts_do_nothing_outside_the_main_thread():
    def work():
        with cli.Interrupts() as interrupts:
            interrupts.check()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
