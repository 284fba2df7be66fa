"""Device and processes."""

import pytest
import torch

from guided_diffusion import dist_util
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
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert get_device("cuda") == torch.device("cuda", 1)
    assert get_device("cuda:0") == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 1), torch.device("cuda", 0)]


def test_ranks_come_from_torchrun(monkeypatch):
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (0, 1, True)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (3, 4, False)
