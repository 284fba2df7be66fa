"""Reading checkpoints: whatever the file is, one line says what is wrong, and nothing is run."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from guided_diffusion import dist_util
from guided_diffusion.dist_util import get_device
from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import fingerprint, load_state_dict, state_dict_shapes

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(STATE, path)
    return path


def refusal(path, read=load_state_dict):
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


def test_a_state_dict_is_read_as_it_was_saved(saved):
    state = load_state_dict(saved)
    assert list(state) == list(STATE)
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert state_dict_shapes(saved) == {"a.weight": (2, 3), "a.bias": (2,)}


def test_weights_are_mapped_from_the_file_and_not_copied(saved):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    state = load_state_dict(saved)
    mapped = [line.split()[0] for line in maps.read_text().splitlines() if str(saved) in line]
    ranges = [tuple(int(end, 16) for end in part.split("-")) for part in mapped]
    pointer = state["a.weight"].data_ptr()
    assert any(low <= pointer < high for low, high in ranges)


def test_the_old_format_without_zip_is_read(tmp_path):
    path = tmp_path / "old.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    state = load_state_dict(path)
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert state_dict_shapes(path)["a.bias"] == (2,)


def test_a_missing_file_and_a_folder(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "absent.pt")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>quota exceeded</html>", "is a web page"),
        (b'{"error": {"code": 404}}', "is JSON"),
        (b"some text", "is not a checkpoint saved by torch"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is not a checkpoint saved by torch"),
        (b"PK\x03\x04" + bytes(500), "damaged or incomplete"),
    ],
)
@pytest.mark.parametrize("read", [load_state_dict, state_dict_shapes])
def test_what_people_save_in_a_checkpoints_place(tmp_path, content, expected, read):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert expected in refusal(path, read)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_truncated_file_never_loads(tmp_path, new_format):
    path = tmp_path / "model.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for length in {*range(1, 80), *range(80, len(whole), 23), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refusal(path)


def test_a_zip_archive_that_is_no_checkpoint(tmp_path):
    import zipfile

    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    assert "damaged or incomplete" in refusal(path)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, new_format):
    path, canary = tmp_path / "model.pt", tmp_path / "canary"
    content = {**STATE, "code": Canary(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert "never run" in refusal(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # the canary is alive: loaded carelessly, it sings


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    path, canary = tmp_path / "model.pt", tmp_path / "canary"
    path.write_bytes(pickle.dumps(Canary(canary)))
    refusal(path)
    assert not canary.exists()


def test_a_whole_module_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "save model.state_dict()" in refusal(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(2)], "list"),
        ({"model": STATE, "epoch": 3}, "a dictionary of model, epoch"),
        ({**STATE, "step": 7}, "a dictionary of a.weight, a.bias, step"),
        ({}, "a dictionary of nothing"),
        ({0: torch.ones(2)}, "a dictionary of 0"),
        (torch.ones(3), "Tensor"),
        (None, "NoneType"),
    ],
)
def test_something_else_than_one_state_dict(tmp_path, content, found):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    line = refusal(path)
    assert "expected a state_dict of named tensors" in line
    assert f"found {found}" in line


def test_fingerprints_follow_the_content(tmp_path):
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    torch.save(STATE, paths[0])
    torch.save({**STATE, "a.bias": torch.tensor([1.0, 1.0001])}, paths[1])
    os.link(paths[0], paths[2])
    first, changed, same = map(fingerprint, paths)
    assert first == same != changed


def test_fingerprints_of_the_old_format_follow_the_size(tmp_path):
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    for path, size in zip(paths, (2, 3), strict=True):
        torch.save({"a": torch.ones(size)}, path, _use_new_zipfile_serialization=False)
    assert fingerprint(paths[0]) != fingerprint(paths[1])


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
