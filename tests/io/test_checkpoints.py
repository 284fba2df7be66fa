"""Reading checkpoints: whatever the file is, one line says what is wrong, and nothing is run."""

import argparse
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion.errors import UserError
from guided_diffusion.io import checkpoints
from guided_diffusion.io.checkpoints import (
    check_checkpoint,
    fingerprint,
    load_state_dict,
    state_dict_shapes,
    write_weights,
)
from guided_diffusion.io.weights import check_fits

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.fixture
def saved(path):
    torch.save(STATE, path)
    return path


def refusal(path, read=load_state_dict):
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_state_dict_is_read_as_it_was_saved(saved, is_zip):
    torch.save(STATE, saved, _use_new_zipfile_serialization=is_zip)
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


def test_a_missing_file_a_folder_and_a_pipe_that_is_not_waited_for(tmp_path, path):
    assert "no such checkpoint" in refusal(path)
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(path)
    assert "is a pipe or device" in refusal(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>quota exceeded</html>", "is a web page"),
        (b'{"error": {"code": 404}}', "is JSON"),
        (b"some text", "is not a checkpoint saved by torch"),
        (b"PK\x03\x04" + bytes(500), "damaged or incomplete"),
    ],
)
def test_what_people_save_in_a_checkpoints_place(path, content, expected):
    path.write_bytes(content)
    assert expected in refusal(path)
    assert expected in refusal(path, state_dict_shapes)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_truncated_file_never_loads(path, new_format):
    torch.save(STATE, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for length in {*range(1, 80), *range(80, len(whole), 23), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refusal(path)


def test_a_zip_archive_that_is_no_checkpoint(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    assert "is not a checkpoint saved by torch" in refusal(path)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old format", "plain pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path, path, form):
    canary = tmp_path / "canary"
    content = {**STATE, "code": Canary(canary)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content["code"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    expected = "damaged" if form == "plain pickle" else "save model.state_dict()"
    assert expected in refusal(path)
    assert not canary.exists()
    if form != "plain pickle":
        torch.load(path, weights_only=False)
        assert canary.exists()  # the canary is alive: loaded carelessly, it sings


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(2)], "list"),
        ({**STATE, "step": 7}, "a dictionary of a.weight, a.bias, step"),
        ({}, "a dictionary of nothing"),
        ({0: torch.ones(2)}, "a dictionary of 0"),
        (None, "NoneType"),
    ],
)
def test_something_else_than_one_state_dict(path, content, found):
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
    for path, size in zip(paths, (2, 3), strict=False):
        torch.save({"a": torch.ones(size)}, path, _use_new_zipfile_serialization=False)
    assert fingerprint(paths[0]) != fingerprint(paths[1])


# ---- Damage --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Give each test a cache folder of its own, and no memory of earlier tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setattr(checkpoints, "_found_whole", set())
    return folder


LARGE = {"a.weight": torch.linspace(1, 2, 50_000)}


def test_damage_inside_a_file_is_found_by_its_checksums(path):
    torch.save(LARGE, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    assert "damaged or incomplete" in refusal(path)
    assert "data/0" in refusal(path)


def test_a_file_is_looked_at_once_until_it_changes(path, cache, monkeypatch):
    looks = []
    torch.save(LARGE, path)
    finite = checkpoints._check_finite
    monkeypatch.setattr(checkpoints, "_check_finite", lambda p: looks.append(p) or finite(p))
    for _ in range(3):
        load_state_dict(path)
        checkpoints._found_whole.clear()  # as in another process
    assert len(looks) == 1
    torch.save({"a.weight": LARGE["a.weight"] + 1}, path)
    load_state_dict(path)
    assert len(looks) == 2
    cache.chmod(0o777)  # others may write there: nothing in it counts
    checkpoints._found_whole.clear()
    load_state_dict(path)
    assert len(looks) == 3


@pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"),
    reason="this PyTorch always writes checksums",
)
def test_an_archive_without_checksums_is_read(path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(LARGE, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_state_dict(path)["a.weight"], LARGE["a.weight"])


def test_an_archive_that_was_packed_anew_is_read_unless_it_is_compressed(tmp_path):
    torch.save(LARGE, tmp_path / "old.pt")
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{compression}.pt"
        with (
            zipfile.ZipFile(tmp_path / "old.pt") as old,
            zipfile.ZipFile(path, "w", compression) as new,
        ):
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
    assert torch.equal(load_state_dict(tmp_path / "0.pt")["a.weight"], LARGE["a.weight"])
    assert "save it by torch.save" in refusal(path)  # mapped, it would be other numbers


def test_no_byte_of_the_table_traces_back(saved):
    whole = saved.read_bytes()
    table = struct.unpack("<I", whole[-6:-2])[0]
    for place in range(table, len(whole), 3):
        for value in (0, 255, whole[place] ^ 1):
            saved.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            fingerprint(saved)
            try:
                load_state_dict(saved)
            except UserError as error:
                assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"a.weight": torch.tensor([0.0, float("nan")])}, "NaN or infinite"),
        ({"a.weight": torch.tensor([0.0, float("-inf")]).half()}, "NaN or infinite"),
        ({"a.weight": torch.empty(3, device="meta")}, "a meta tensor"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(path, state, found):
    torch.save({"model": NET, "ema": {**EMA, **state}}, path)
    for _ in range(2):  # what is damaged is not remembered
        line = refusal(path)
        assert found in line
        assert "a.weight" in line


# ---- Weights in other things ---------------------------------------------------------------------

NET = {
    "time_embed.0.weight": torch.ones(4, 2),
    "input_blocks.0.0.weight": torch.ones(2, 3, 3, 3),
    "out.2.bias": torch.ones(6),
}
EMA = {name: 2 * value for name, value in NET.items()}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPPED = {
    "model and ema": {"model": NET, "ema": EMA, "optimizer": {"state": {0: {"exp_avg": NET}}}},
    "ema in its own dictionary": {"model": NET, "ema": {"state_dict": EMA, "decay": 0.999}},
    "lightning": {
        "pytorch-lightning_version": "2.1",
        "hyper_parameters": argparse.Namespace(lr=1e-4),
        "callbacks": {"ModelCheckpoint": {"best": np.float64(0.5), "score": torch.tensor(0.1)}},
        "state_dict": under("model.", EMA),
    },
    "compiled": under("_orig_mod.module.", EMA),
    "ema_model": {**under("model.", NET), **under("ema_model.", EMA), "ema.num_updates": 7},
    "lucidrains": {
        "step": 1,
        "model": under("model.", NET),
        "ema": {
            **under("online_model.model.", NET),
            **under("ema_model.model.", EMA),
            "initted": torch.tensor(True),
        },
    },
    "averages of torch": {"n_averaged": torch.tensor(5), **under("module.", EMA)},
    "tables between": {**under("model.", EMA), "betas": torch.ones(10), "alphas_cumprod": EMA},
    "values between": {**EMA, "step": 7, "config": {"a": [1]}, "when": np.int64(3)},
    "params_ema": {"params": NET, "params_ema": EMA},
    "a list": [NET, {"state": {}}, 3, {"ema": EMA}],
    "other letters": {"Model_State_Dict": NET, "EMA_state_dict": EMA},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_zip"), [*((name, True) for name in WRAPPED), ("lightning", False)]
)
def test_weights_are_found_wherever_they_are(path, recwarn, name, is_zip):
    torch.save(WRAPPED[name], path, _use_new_zipfile_serialization=is_zip)
    state = load_state_dict(path)
    assert state.keys() == EMA.keys()
    assert all(torch.equal(state[key], EMA[key]) for key in EMA)
    lines = [str(each.message) for each in recwarn]
    assert len(lines) == (name != "values between")
    assert all(line.startswith(str(path)) and len(line) < 600 for line in lines)
    assert state_dict_shapes(path) == {key: tuple(value.shape) for key, value in EMA.items()}


def test_averages_are_preferred_and_said_to_be(path):
    torch.save(WRAPPED["model and ema"], path)
    with pytest.warns(UserWarning, match="takes ema, averaged weights, and not model"):
        load_state_dict(path)


def test_several_networks_are_not_guessed_from(path):
    torch.save({"alpha": NET, "beta": EMA}, path)
    assert "alpha and beta" in refusal(path)
    many = {f"n{i}.{name}": torch.ones(1) for i in range(1000) for name in NET}
    torch.save(many, path)
    assert "holds several networks" in refusal(path)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("module.temb.dense.0.weight", "DDPM's PyTorch port"),
        ("down_blocks.0.resnets.0.conv1.weight", "config.json"),
        ("first_stage_model.encoder.conv_in.weight", "latent diffusion"),
        ("downs.0.0.block1.proj.weight", "denoising-diffusion-pytorch"),
        ("module.all_modules.0.W", "score_sde"),
        ("model.enc.64x64_conv.weight", "EDM"),
        ("blocks.0.adaLN_modulation.1.weight", "transformer"),
    ],
)
def test_other_programs_networks_are_named(path, name, form):
    state = {name: torch.ones(2)}
    for tree in ({"model": state, "step": 2}, [state, {}, 3]):  # DDIM saves a list
        torch.save(tree, path)
        assert form in refusal(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused_and_not_run(path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))
    assert "is a TorchScript program" in refusal(path)


def test_names_are_cut_and_their_escape_sequences_do_not_reach_the_terminal(path):
    prefix = "\x1b[31m\u202e\x07."
    torch.save({**under(prefix, NET), f"{prefix}{'z' * 10_000}": torch.tensor(7)}, path)
    with pytest.warns(UserWarning, match=r"takes \\x1b\[31m\\u202e\\x07; skips z") as told:
        load_state_dict(path)
    torch.save({"\x1b]0;title\x07" + "x" * 10_000: {"y" * 10_000: torch.ones(1)}}, path)
    line = refusal(path)
    assert "\\x1b]0;title" in line
    for text in (line, str(told[0].message)):
        assert len(text) < 600
        assert text.isprintable()


def test_a_file_for_another_network_names_the_first_difference(path):
    expected = {name: tuple(value.shape) for name, value in NET.items()}
    check_fits(path, NET, expected)
    for name, shape, found in [("out.2.bias", (3,), "found (6,)"), ("new", (1,), "found no such")]:
        with pytest.raises(UserError, match=name) as caught:
            check_fits(path, NET, {**expected, name: shape}, key="init_from")
        assert "init_from" in str(caught.value)
        assert found in str(caught.value)


# ---- safetensors ---------------------------------------------------------------------------------


def test_safetensors_are_written_and_read(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    write_weights(path, under("module.", NET))
    with pytest.warns(UserWarning, match=r"takes module"):
        state = load_state_dict(path)
    assert all(torch.equal(state[name], NET[name]) for name in NET)
    check_checkpoint(path)
    assert len(fingerprint(path)) == 16
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.rename(tmp_path / "model.pt")  # the content counts
    with pytest.warns(UserWarning, match=r"takes module"):
        assert load_state_dict(tmp_path / "model.pt").keys() == NET.keys()
    torch.save(STATE, path)
    assert "damaged" in refusal(path)


def test_safetensors_that_are_cut_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    write_weights(path, NET)
    whole = path.read_bytes()
    for length in (*range(1, 60, 7), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert len(refusal(path)) < 600


def test_without_safetensors_one_line_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    write_weights(tmp_path / "x.safetensors", STATE)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert "pip install -r requirements-diffusers.txt" in refusal(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"requirements-diffusers.txt"):
        write_weights(tmp_path / "y.safetensors", STATE)
