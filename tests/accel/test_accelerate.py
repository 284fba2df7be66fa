"""The door: what is fast is compared with PyTorch's own operations before it is trusted."""

import copy
from functools import partial

import pytest
import torch
from network_cases import randomised, relative

from guided_diffusion.accel import accelerate as door
from guided_diffusion.accel.accelerate import accelerate
from guided_diffusion.run.inpainter import classifier_gradient
from guided_diffusion.unet import EncoderUNetModel, TrunkConfig, UNetModel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = TrunkConfig(32, 32, (1, 2), 1, (16,), num_heads=4, num_head_channels=32)
INPUTS = (
    torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    torch.tensor([500]).expand(3),
    torch.tensor([1, 3, 0]),
)
GRADIENT = partial(classifier_gradient, scale=2.0)
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=["network", "gradient"])
def way(request):
    """A network, the gradient to take of it if any, and the plain callable."""
    if request.param == "network":
        model = randomised(UNetModel(SMALL, 6, num_classes=5))
        return model, None, model
    classifier = randomised(EncoderUNetModel(SMALL, 7, "attention"))
    return classifier, GRADIENT, partial(GRADIENT, classifier)


def one_scale(compute, *arguments, **options):
    """Every image is normalised as the first one."""
    return tuple(part[:1].repeat(len(part), 1) for part in compute(*arguments, **options))


def wrong_eps(compute, maps, norm, **options):
    norm = copy.copy(norm)
    norm.eps = 1e-3
    return compute(maps, norm, **options)


def bfloat16_maps(compute, *arguments, **options):
    """What is called float32 is rounded to bfloat16 between the layers."""
    return compute(*arguments, **options).bfloat16().float()


def not_a_number(compute, *arguments, **options):
    output = compute(*arguments, **options)
    output[-1, -1, -1, -1] = torch.nan
    return output


def exception(compute, *arguments, **options):
    raise ValueError("not at this shape\nand a long story")


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        (one_scale, "network"),
        (wrong_eps, "network"),
        (bfloat16_maps, "network"),
        (bfloat16_maps, "gradient"),
        (not_a_number, "network"),
        (exception, "network"),
        (exception, "gradient"),
    ],
    indirect=["way"],
)
def test_a_fault_costs_one_warning_and_the_output_is_the_plain_ones(
    fault, way, kernels, monkeypatch
):
    network, gradient, plain = way
    expected = plain(*INPUTS)
    name = "group_norm" if fault in (one_scale, wrong_eps) else "convolve"
    monkeypatch.setattr(kernels, name, partial(fault, getattr(kernels, name)))
    run = accelerate(network, CPU, "auto", gradient=gradient)
    words = "not at this shape;" if fault is exception else "is wrong by .* at batch size 3;"
    with torch.inference_mode():
        with pytest.warns(UserWarning, match=f"compile: the fast network .*{words}") as caught:
            first = run(*INPUTS)
        assert len(caught) == 1
        monkeypatch.undo()  # too late: it is not trusted any more
        second = run(*INPUTS)
    # Image by image, which rounds otherwise, but not as the kernels do.
    assert relative(first, expected) < (1e-4 if gradient else 1e-6)
    assert torch.equal(second, expected)


def test_without_a_fault_the_kernels_output_is_used(way, kernels):
    network, gradient, plain = way
    run = accelerate(network, CPU, "auto", gradient=gradient)
    with torch.inference_mode():
        outputs = [run(*INPUTS) for _ in range(2)]
        expected = plain(*INPUTS)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], expected)
    assert relative(outputs[0], expected) < 1e-4


@pytest.mark.parametrize("compile", ["auto", False])
def test_a_gpu_uses_pytorchs_own_operations_unless_it_is_to_compile(compile, way, monkeypatch):
    monkeypatch.setattr(door, "lay_out", lambda *_: None)
    network, gradient, plain = way
    run = accelerate(network, GPU, compile, gradient=gradient)
    assert getattr(run, "func", run) is getattr(plain, "func", plain)
    assert getattr(run, "args", None) == getattr(plain, "args", None)


@pytest.mark.parametrize("way", ["network"], indirect=True)
def test_a_gpu_compiles_the_whole_network_into_cuda_graphs(way, monkeypatch):
    monkeypatch.setattr(door, "lay_out", lambda *_: None)
    options = {}
    monkeypatch.setattr(torch, "compile", lambda model, **own: options.update(own, model=model))
    accelerate(way[0], GPU, True)
    assert options == {"model": way[0], "dynamic": False, "mode": "reduce-overhead"}
