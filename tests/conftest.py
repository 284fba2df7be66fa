"""Tests run on the CPU, each on one thread: networks this small only wait for more."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # also in the programs that tests start

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, but from ``-m gpu``: what the other tests expect was computed on a CPU."""
    asked = config.getoption("markexpr").replace("not gpu", "").split()
    if "gpu" not in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also in the programs that tests start


# In the background or under nohup the tests are made to ignore these, and programs that they start
# would inherit it; a handler they do not inherit.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


@pytest.fixture
def switches():
    """Put torch's global switches back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run test.py in ``tmp_path``."""
    from run_cases import run_here

    monkeypatch.chdir(tmp_path)
    return lambda *options: run_here(capsys, *options)


@pytest.fixture
def calls(monkeypatch):
    """Seeds of every batch that the network was run for."""
    from guided_diffusion.run.inpainter import Inpainter

    seen, steps = [], Inpainter.steps

    def noting(self, gt, mask, seeds, *rest):
        seen.append(list(seeds))
        return steps(self, gt, mask, seeds, *rest)

    monkeypatch.setattr(Inpainter, "steps", noting)
    return seen


@pytest.fixture
def folders(tmp_path):
    """Where results of a run go, by their YAML keys."""
    return {key: str(tmp_path / "log" / key) for key in ("srs", "lrs", "gts", "gt_keep_masks")}
