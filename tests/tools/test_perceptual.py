"""LPIPS against its definition in numpy, and what is read as AlexNet's weights."""

import numpy as np
import pytest
import torch
from lpips_cases import alexnet_state, reference

from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.tools import perceptual
from guided_diffusion.tools.perceptual import LPIPS, heads_file, load_lpips, read_alexnet


@pytest.fixture(scope="module")
def state():
    return alexnet_state()


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


def test_a_file_of_torchvision_is_read(state, tmp_path):
    more = {**state, "classifier.1.weight": torch.zeros(2, 2)}
    torch.save(more, tmp_path / "alexnet.pth")
    found = read_alexnet(tmp_path / "alexnet.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert load_lpips(tmp_path / "alexnet.pth").conv1.weight.shape == (192, 64, 5, 5)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (torch.zeros(64), r"found \(64,\)"),
        (torch.ones(192, dtype=torch.int64), r"found torch\.int64"),
        (None, "found none"),
    ],
)
def test_wrong_files_are_named(state, tmp_path, changed, found):
    changes = {**state, "features.3.bias": changed}
    path = tmp_path / "alexnet.pth"
    torch.save({name: value for name, value in changes.items() if value is not None}, path)
    with pytest.raises(UserError, match=rf"alexnet\.pth: features\.3\.bias: .*\(192,\).*{found}"):
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
