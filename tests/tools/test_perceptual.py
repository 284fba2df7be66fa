"""LPIPS against its definition in numpy, and what is read as AlexNet's weights."""

import numpy as np
import pytest
import torch
from lpips_cases import alexnet_state, reference

from guided_diffusion.errors import UserError
from guided_diffusion.tools import perceptual
from guided_diffusion.tools.perceptual import load_lpips


@pytest.fixture(scope="module")
def state():
    return alexnet_state()


@pytest.fixture(scope="module")
def lpips(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return load_lpips(path)


def pictures(height, width):
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (3, height, width))
    y = np.clip(x + rng.normal(0, 0.4, x.shape), -1, 1)
    hole = np.zeros((height, width), bool)
    hole[height // 3 :, : width // 2] = True
    return x, y, hole


@pytest.mark.parametrize(("height", "width"), [(31, 31), (40, 67)])
def test_it_is_the_papers_formula_for_each_picture_of_a_batch(lpips, state, height, width):
    x, y, hole = pictures(height, width)
    holes = np.stack([hole, hole, np.zeros_like(hole)])
    batch = (np.stack([x, y, x]), np.stack([y, y, y]), holes)
    whole, inside = lpips(*(torch.from_numpy(each).float() for each in batch))
    expected = reference(state, x, y, hole)
    assert whole.tolist() == pytest.approx([expected[0], 0, expected[0]], rel=2e-5)
    assert inside[:2].tolist() == pytest.approx([expected[1], 0], rel=2e-5)
    assert inside[2].isnan()
    assert abs(expected[0] - expected[1]) > 1e-2 * expected[0]  # the hole is not the whole


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (torch.zeros(64), r"\(192,\).*found \(64,\)"),
        (torch.ones(192, dtype=torch.int64), r"floating-point.*found torch\.int64"),
        (None, r"\(192,\).*found no such"),
    ],
)
def test_wrong_files_are_named(state, tmp_path, changed, found):
    changes = {**state, "features.3.bias": changed}
    path = tmp_path / "alexnet.pth"
    torch.save({name: value for name, value in changes.items() if value is not None}, path)
    with pytest.raises(UserError, match=rf"alexnet\.pth: .*features\.3\.bias .*{found}"):
        load_lpips(path)


def test_without_a_network_one_line_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"cannot be fetched \(Name or service.*--alexnet FILE"):
        load_lpips()


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchmetrics.* requirements-metrics\.txt"):
        load_lpips()
