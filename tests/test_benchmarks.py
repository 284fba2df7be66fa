"""The benchmarks run, and their plain port computes what the networks do; nothing asserts time."""

import json
import os
import subprocess
import sys
from functools import partial

import end_to_end
import numpy as np
import plain
import pytest
import sampler
import torch
from network_cases import unet
from run_cases import ROOT, tiny_tree, write_tree
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.config.keys import FAST, InpaintConf
from guided_diffusion.config.reading import as_overrides, load_conf
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.samplers import Ddim, Ddnm, Repaint
from guided_diffusion.scheduler import count_steps, get_schedule_jump
from guided_diffusion.script_util import create_gaussian_diffusion, create_schedule

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLASSIFIER = """
name: benchmark
model_path: absent.pt
image_size: 64
timestep_respacing: '4'
schedule_jump_params: {t_T: 4}
classifier_width: 64
classifier_depth: 1
classifier_attention_resolutions: '8'
data: {eval: {set: {gt_path: gt, mask_path: mask}}}
"""


def benchmark(folder, *arguments):
    """Return the rows of ``sampler.py``, after a look at what it printed."""
    figures, tables = folder / "figures.json", folder / "tables.md"
    command = [sys.executable, sampler.__file__, "--rounds", "1", "--calls", "1"]
    files = ["--json", figures, "--markdown", tables]
    ended = subprocess.run([*command, *arguments, *files], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert tables.read_text(encoding="utf-8") == ended.stdout
    rows = [row for row in json.loads(figures.read_text())["results"] if "mode" in row]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [r["mode"] for r in rows]
    return rows


@pytest.mark.parametrize("what", ["network", "classifier"])
def test_the_sampler_is_timed_and_exact(what, tmp_path):
    if what == "network":
        rows = benchmark(tmp_path, "--network", "demo", "--batch_sizes", "1")
    else:
        conf = tmp_path / "conf.yml"
        conf.write_text(CLASSIFIER)
        options = ["--conf_path", conf, "--classifier", "--batch_sizes", "2"]
        rows = benchmark(tmp_path, *options)
    assert [row["mode"] for row in rows] == ["plain", "ours-eager", "ours"]
    for row in rows:
        assert 0 < row["forward_error"] < 1e-4
        assert row["ms_a_call_and_image"] > 0


@pytest.mark.parametrize("name", ["sampler", "end_to_end", "quality"])
def test_torch_finds_how_its_threads_are_to_wait(tmp_path, name):
    stand_in = "import os; print(os.environ.get('GOMP_SPINCOUNT'), flush=True); os._exit(0)"
    (tmp_path / "torch.py").write_text(stand_in)
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "benchmarks" / f"{name}.py")],
        capture_output=True, text=True, env=environment | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ended.stdout == "2000\n", ended.stderr


def test_a_picture_is_timed_from_noise_to_result():
    command = [sys.executable, end_to_end.__file__, "--network", "demo", "--at_most", "0.01"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines() if "|" in line]
    ways = {name: calls for name, calls, *_ in rows[2:]}
    conf = load_conf(ROOT / "confs" / "demo.yml", InpaintConf, as_overrides(FAST))
    fast = create_schedule(conf, create_gaussian_diffusion(conf))
    assert ways["published schedule"] == ways["plain port, published schedule"] == "2,410"
    assert ways["`--fast`"] == f"{count_steps(fast)[0]}"
    for _, _, measured, seconds, _ in rows[2:]:
        assert measured == "1"
        assert float(seconds.replace(",", "")) > 0


def test_a_conditional_network_is_timed_too(tmp_path, capsys):
    changes = {"class_cond": True, "num_classes": 3, "compile": False}
    write_tree(tmp_path, tiny_tree(model_path="absent.pt", diffusion_steps=250, **changes))
    conf = str(tmp_path / "c.yml")
    end_to_end.main(["--conf_path", conf, "--at_most", "0", "--device", "cpu"])
    assert "| plain port, published schedule | 2,410 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--modes", "plain,fast"],
        ["--modes", "plain-compiled"],
        ["--modes", "ours-compiled-float16"],
        ["--batch_sizes", "1,,2"],
    ],
)
def test_options_are_checked_before_anything_runs(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        sampler.parse_args(arguments)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_modes_are_understood(device):
    names = sampler.default_modes(torch.device(device))
    assert sampler.parse_args(["--modes", ",".join(names)]).modes == names


class Operations(TorchDispatchMode):
    """Notes every operation that goes to a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


# Reading a value back, and bringing one to the device.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}
COPYING = {"lift_fresh", "lift_fresh_copy", "_to_copy", "copy_", "scalar_tensor", "tensor"}


def cond_fn(x, timesteps):
    return x.clone()


@pytest.mark.parametrize(
    ("sampler", "cond_fn"),
    [(Repaint(), cond_fn), (Repaint(cumulative_noise=True), None), (Ddim(), None), (Ddnm(), None)],
    ids=["guided", "cumulative", "ddim", "ddnm"],
)
def test_the_loop_never_waits_for_the_device_nor_copies_to_it(sampler, cond_fn):
    """On ``meta`` tensors reading a value back is impossible, and copies are seen by name."""
    diffusion = GaussianDiffusion(np.linspace(1e-3, 0.3, 20))
    times = get_schedule_jump(20, 1, 4, 3)
    gt = torch.empty(2, 3, 16, 16, device="meta")
    steps = diffusion.p_sample_loop_progressive(
        lambda x, timesteps: x.new_empty(2, 6, 16, 16),
        gt,
        gt,
        times,
        lambda: torch.empty_like(gt),
        sampler=sampler,
        cond_fn=cond_fn,
    )
    with torch.inference_mode(), Operations() as operations:
        next(steps)  # before the first step, tables may go to the device
        operations.names.clear()
        count = sum(1 for _ in steps)
    assert count == len(times) - 2
    assert "mul" in operations.names
    assert not set(operations.names) & (WAITING | COPYING)


@pytest.mark.parametrize("predict_v", [False, True])
def test_the_plain_loop_samples_the_same_but_waits_and_copies(predict_v):
    """The test above can fail: its means see what the plain loop does."""
    gt, mask = X.clamp(-1, 1), (X > 0).float()
    diffusion = GaussianDiffusion(np.linspace(1e-3, 0.3, 20), predict_v=predict_v)
    network = partial(unet(num_classes=5), y=torch.tensor([1, 3]))

    def inputs():
        generator = torch.Generator().manual_seed(7)
        times = get_schedule_jump(20, 1, 4, 3)
        return network, gt, mask, times, lambda: torch.randn(gt.shape, generator=generator)

    with torch.inference_mode():
        *_, ours = diffusion.p_sample_loop_progressive(*inputs(), sampler=Repaint())
        with Operations() as operations:
            *_, theirs = plain.repaint(diffusion, *inputs())
    assert (ours.x - theirs).abs().max() < 1e-4
    assert set(operations.names) & WAITING
    assert set(operations.names) & COPYING
