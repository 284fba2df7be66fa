"""LPIPS against its definition in numpy, and what is read as AlexNet's weights."""

import os
import pickle

import numpy as np
import pytest
import torch
from lpips_cases import LAYERS, alexnet_state, reference

from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.tools import perceptual
from guided_diffusion.tools.perceptual import LPIPS, heads_file, load_lpips, read_alexnet


@pytest.fixture(scope="module")
def state():
    return alexnet_state()


def flax_tree(state):
    convolutions = {
        f"Conv_{number}": {
            "kernel": state[f"features.{layer[0]}.weight"].permute(2, 3, 1, 0).numpy().copy(),
            "bias": state[f"features.{layer[0]}.bias"].numpy(),
        }
        for number, layer in enumerate(LAYERS)
    }
    return {"AlexNet_0": convolutions, "NetLinLayer_0": {}}


def pictures(height, width):
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (3, height, width))
    y = np.clip(x + rng.normal(0, 0.4, x.shape), -1, 1)
    hole = np.zeros((height, width), bool)
    hole[height // 3 :, : width // 2] = True
    return x, y, hole


def as_batch(array):
    return (
        torch.from_numpy(array)[None].float() if array.dtype != bool else torch.tensor(array)[None]
    )


@pytest.mark.parametrize(("height", "width"), [(31, 31), (40, 67)])
def test_it_is_the_papers_formula(state, height, width):
    inputs = pictures(height, width)
    lpips = LPIPS(state, load_state_dict(heads_file()))
    found = [value.item() for value in lpips(*map(as_batch, inputs))]
    assert found == pytest.approx(reference(state, *inputs), rel=2e-5)
    assert abs(found[0] - found[1]) > 1e-2 * found[0]  # the hole is not the whole


def test_a_batch_is_its_pictures(state):
    lpips = LPIPS(state, load_state_dict(heads_file()))
    x, y, hole = map(as_batch, pictures(33, 33))
    empty = torch.zeros_like(hole)
    whole, inside = lpips(
        torch.cat([x, y, x]), torch.cat([y, y, y]), torch.cat([hole, hole, empty])
    )
    alone = lpips(x, y, hole)
    assert torch.allclose(whole, torch.stack([alone[0][0], torch.tensor(0.0), alone[0][0]]))
    assert torch.allclose(inside[:2], torch.stack([alone[1][0], torch.tensor(0.0)]))
    assert inside[2].isnan()


@pytest.mark.parametrize("written", ["zip", "older", "flax"])
def test_each_format_gives_the_same_weights(state, written, tmp_path):
    path = tmp_path / "alexnet"
    if written == "flax":
        path.write_bytes(pickle.dumps(flax_tree(state), protocol=4))
    else:
        more = {**state, "classifier.1.weight": torch.zeros(2, 2)}
        torch.save(more, path, _use_new_zipfile_serialization=written == "zip")
    found = read_alexnet(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert load_lpips(path).conv1.weight.shape == (192, 64, 5, 5)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_executed(tmp_path):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": Touch(tmp_path / "made")}, protocol=4))
    with pytest.raises(
        UserError, match=r"alexnet\.ckpt: asks for posix\.mkdir, which is never run"
    ):
        read_alexnet(path)
    assert not (tmp_path / "made").exists()


def test_wrong_files_are_named(state, tmp_path):
    path = tmp_path / "alexnet.ckpt"
    tree = flax_tree(state)
    path.write_bytes(pickle.dumps(tree, protocol=4)[:-1000])
    with pytest.raises(UserError, match=r"alexnet\.ckpt: is damaged"):
        read_alexnet(path)
    del tree["AlexNet_0"]["Conv_3"]
    path.write_bytes(pickle.dumps(tree, protocol=4))
    with pytest.raises(UserError, match=r"alexnet\.ckpt: expected AlexNet_0 with Conv_0 to Conv_4"):
        read_alexnet(path)
    torch.save({**state, "features.3.bias": torch.zeros(64)}, path)
    with pytest.raises(
        UserError, match=r"features\.3\.bias: expected AlexNet's \(192,\), found \(64,"
    ):
        read_alexnet(path)
    with pytest.raises(UserError, match=r"absent\.pth: no such checkpoint"):
        read_alexnet(tmp_path / "absent.pth")


def test_without_a_network_one_line_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"cannot be fetched \(Name or service.*--alexnet FILE"):
        load_lpips()


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchmetrics .* requirements-metrics\.txt"):
        heads_file()
