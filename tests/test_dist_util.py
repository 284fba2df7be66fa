"""Device and processes."""

import os

import pytest
import torch

from guided_diffusion import cli, dist_util
from guided_diffusion.dist_util import get_device
from guided_diffusion.errors import UserError


def test_the_default_device_is_a_gpu_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_device() == get_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "", "cuda:-1"])
def test_unknown_devices_are_refused_by_name(name):
    with pytest.raises(UserError) as caught:
        get_device(name)
    assert str(caught.value).startswith("device: ")
    assert repr(name) in str(caught.value)


def test_metal_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device: .*no Metal GPU; found mps"):
        get_device("mps")


def test_a_gpu_that_the_machine_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="device: no such GPU; found cuda:2 with 2 GPUs"):
        get_device("cuda:2")


def test_cuda_without_a_number_is_the_processs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert get_device("cuda") == torch.device("cuda", 1)
    assert get_device("cuda:0") == torch.device("cuda", 0)


def test_ranks_come_from_torchrun(monkeypatch):
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (0, 1, True)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (3, 4, False)


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
    assert place_with(monkeypatch, team()) == (None, cli.Place(1, 4, 1, 2))
    assert dist_util.local_world_size() == 2


@pytest.mark.parametrize(
    "variables",
    [
        *({"RANK": text} for text in ("1", "9", "", "abc", "-1", "\u0661", "1.0")),
        *({"WORLD_SIZE": text} for text in ("0", "2", "")),
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


def test_a_number_that_is_none_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(UserError, match=r"RANK: expected a whole number, .*found 'abc'"):
        dist_util.rank()


def test_a_process_without_its_torchrun_ends_at_once(monkeypatch):
    names = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    parents = iter(range(100))
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    with pytest.raises(UserError, match="no connection to the other processes"):
        dist_util.Team()
