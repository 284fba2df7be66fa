"""The door: what is fast is compared with PyTorch's own operations before it is trusted."""

import contextlib
import copy
import dataclasses
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from network_cases import randomised, relative

from guided_diffusion.accel import accelerate as door
from guided_diffusion.accel import build, cpu_kernels
from guided_diffusion.accel.accelerate import accelerate, accelerate_gradient
from guided_diffusion.run.inpainter import classifier_gradient
from guided_diffusion.unet import EncoderUNetModel, TrunkConfig, UNetModel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = TrunkConfig(32, 32, (1, 2), 1, (16,), num_heads=4, num_head_channels=32)
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([500]).expand(3), torch.tensor([1, 3, 0])


def unet():
    return randomised(UNetModel(SMALL, 6, num_classes=5))


def classifier():
    return randomised(EncoderUNetModel(SMALL, 7, "attention"))


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def kernels():
    try:
        return cpu_kernels.load()
    except build.KernelError as error:
        pytest.skip(str(error))


# ---- Faults in the kernels -----------------------------------------------------------------------


def one_scale(kernels, monkeypatch):
    """Every image is normalised as the first one."""
    group_norm = kernels.group_norm

    def planted(maps, norm, **conditions):
        return tuple(part[:1].repeat(len(part), 1) for part in group_norm(maps, norm, **conditions))

    monkeypatch.setattr(kernels, "group_norm", planted)


def lost_moments(kernels, monkeypatch):
    """The last rows of a map do not count in its moments."""
    group_norm = kernels.group_norm

    def planted(maps, norm, **conditions):
        return group_norm([part[:, :-1].contiguous() for part in maps], norm, **conditions)

    monkeypatch.setattr(kernels, "group_norm", planted)


def wrong_eps(kernels, monkeypatch):
    group_norm = kernels.group_norm

    def planted(maps, norm, **conditions):
        norm = copy.copy(norm)
        norm.eps = 1e-3
        return group_norm(maps, norm, **conditions)

    monkeypatch.setattr(kernels, "group_norm", planted)


def bfloat16_maps(kernels, monkeypatch):
    """What is called float32 is rounded to bfloat16 between the layers."""
    convolve = kernels.convolve

    def planted(*arguments, **options):
        return convolve(*arguments, **options).bfloat16().float()

    monkeypatch.setattr(kernels, "convolve", planted)


def not_a_number(kernels, monkeypatch):
    convolve = kernels.convolve

    def planted(*arguments, **options):
        output = convolve(*arguments, **options)
        output[-1, -1, -1, -1] = torch.nan
        return output

    monkeypatch.setattr(kernels, "convolve", planted)


def exception(kernels, monkeypatch):
    def planted(*_, **__):
        raise ValueError("not at this shape\nand a long story")

    monkeypatch.setattr(kernels, "convolve", planted)


FAULTS = [one_scale, lost_moments, wrong_eps, bfloat16_maps, not_a_number, exception]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_one_warning_and_the_output_is_the_plain_networks(
    fault, kernels, monkeypatch
):
    model = unet()
    expected = model(X, T, Y)
    fault(kernels, monkeypatch)
    network = accelerate(model, CPU, "auto")
    words = "not at this shape;" if fault is exception else "is wrong by .* at batch size 3;"
    with torch.inference_mode():
        with pytest.warns(UserWarning, match=f"compile: the fast network .*{words}") as caught:
            first = network(X, T, Y)
        assert len(caught) == 1
        monkeypatch.undo()  # too late: it is not trusted any more
        with silence():
            second = network(X, T, Y)
    for output in (first, second):
        assert relative(output, expected) < 1e-6  # and not the kernels', which round otherwise
    assert torch.equal(second, expected)


@pytest.mark.parametrize("fault", [bfloat16_maps, exception])
def test_a_fault_in_a_gradient(fault, kernels, monkeypatch):
    gradient = partial(classifier_gradient, scale=2.0)
    network = classifier()
    expected = gradient(network, X, T, Y)
    fault(kernels, monkeypatch)
    run = accelerate_gradient(gradient, network, CPU, "auto")
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="compile: the fast network") as caught:
            outputs = [run(X, T, Y), run(X, T, Y)]
        assert len(caught) == 1
    assert relative(outputs[0], expected) < 1e-4  # image by image, which rounds otherwise
    assert torch.equal(outputs[1], expected)


def test_without_a_fault_the_kernels_output_is_used(kernels):
    for plain, run, inputs in (
        (model := unet(), accelerate(model, CPU, "auto"), (X, T, Y)),
        (
            partial(classifier_gradient, own := classifier(), scale=2.0),
            accelerate_gradient(partial(classifier_gradient, scale=2.0), own, CPU, "auto"),
            (X, T, Y),
        ),
    ):
        with torch.inference_mode(), silence():
            outputs = [run(*inputs) for _ in range(2)]
            expected = plain(*inputs)
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], expected)
        assert relative(outputs[0], expected) < 1e-4


# ---- Memory ------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_the_check_leaves_no_second_copy_of_the_weights_in_memory(kernels, tmp_path):
    model = randomised(UNetModel(dataclasses.replace(SMALL, model_channels=128), 6))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", mmap=True, weights_only=True)
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    network = accelerate(model, CPU, "auto")

    def resident():
        text, total = Path("/proc/self/smaps").read_text(), 0
        for entry in text.split("VmFlags")[:-1]:
            if "model.pt" in entry:
                total += int(entry.split("Rss:")[1].split()[0]) * 1024
        return total

    before = sum(parameter.nbytes for parameter in model.parameters())
    with torch.inference_mode(), silence():
        network(X, T)
    assert before > 20e6
    assert resident() < 0.3 * before  # all but the smallest ones
    assert sum(p.sum() for p in model.parameters()).isfinite()  # reads the file again
    assert resident() > 0.5 * before


# ---- Which way is taken --------------------------------------------------------------------------


@pytest.mark.parametrize("compile", ["auto", False])
def test_a_gpu_uses_pytorchs_own_operations_unless_it_is_to_compile(compile, monkeypatch):
    monkeypatch.setattr(door, "lay_out", lambda *_, **__: None)
    model, encoder = unet(), classifier()
    with silence():
        assert accelerate(model, GPU, compile) is model
        run = accelerate_gradient(classifier_gradient, encoder, GPU, compile)
    assert run.func is classifier_gradient
    assert run.args == (encoder,)


def test_a_gpu_compiles_the_whole_network_into_cuda_graphs(monkeypatch):
    monkeypatch.setattr(door, "lay_out", lambda *_, **__: None)
    options = {}
    monkeypatch.setattr(torch, "compile", lambda model, **own: options.update(own, model=model))
    accelerate(model := unet(), GPU, True)
    assert options == {"model": model, "dynamic": False, "mode": "reduce-overhead"}
