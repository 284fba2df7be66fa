"""The GPU's kernels compute what PyTorch does in float64, in Triton's interpreter where it is.

Everywhere a stand-in takes the place of the Triton programs, so that all around them is tried.
"""

import dataclasses
import warnings
from pathlib import Path

import network_cases
import pytest
import torch
from kernel_cases import affine_of, convolution, group_norm, pointwise, random
from network_cases import relative
from torch import nn
from triton_stand_in import StandIn

from guided_diffusion.accel import fused_unet, gpu_kernels, graphs, layout
from guided_diffusion.accel.accelerate import Checked
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.unet import attend

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
try:
    from guided_diffusion.accel import gpu_programs
except ImportError:
    gpu_programs = None


INTERPRETER = pytest.param("interpreter", marks=pytest.mark.slow)
LONG = pytest.mark.parametrize("kernels", ["stand-in", INTERPRETER], indirect=True)


@pytest.fixture(params=["stand-in", "interpreter"])
def kernels(request, monkeypatch):
    if request.param == "interpreter":
        if gpu_programs is None:
            pytest.skip("needs Triton")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles where there is a GPU")
        return gpu_kernels.GpuKernels()
    stand_in(monkeypatch)
    return gpu_kernels.GpuKernels()


def stand_in(monkeypatch):
    def init(self):
        self._programs = StandIn()

    monkeypatch.setattr(gpu_kernels.GpuKernels, "__init__", init)


def normalised(channels):
    norm = nn.GroupNorm(32, channels).requires_grad_(False)
    norm.weight.copy_(random(channels, seed=5))
    norm.bias.copy_(random(channels, seed=6))
    return norm


@LONG
@pytest.mark.parametrize("size", [(8, 8), (19, 35), (70, 66)])
@pytest.mark.parametrize("widths", [(64,), (32, 96), (256, 128)])
def test_normalisation(kernels, size, widths):
    maps, total = [random(2, *size, width, seed=width) for width in widths], sum(widths)
    norm = normalised(total)
    rows = [random(2, total, seed=i) for i in (7, 8, 9)]
    for condition in (
        {},
        {"added": rows[0][:1]},
        {"added": rows[0], "gain": rows[1], "offset": rows[2]},
        {"gain": rows[1][:1], "offset": rows[2][:1]},
    ):
        scale, shift = kernels.group_norm(maps, norm, **condition)
        output = torch.cat(maps, dim=3) * scale[:, None, None] + shift[:, None, None]
        assert relative(output, group_norm(maps, norm, **condition)) < 3e-6


def test_normalisation_in_halves_of_one_tensor(kernels):
    """As the blocks' gains and offsets come: rows that are further apart than they are long."""
    maps, norm, both = [random(3, 8, 8, 64)], normalised(64), random(3, 128, seed=1)
    gain, offset = both.chunk(2, dim=1)
    scale, shift = kernels.group_norm(maps, norm, gain=gain, offset=offset)
    output = maps[0] * scale[:, None, None] + shift[:, None, None]
    assert relative(output, group_norm(maps, norm, gain=gain, offset=offset)) < 3e-6


@LONG
@pytest.mark.parametrize("resize", [-1, 0, 1])
@pytest.mark.parametrize("has_affine", [False, True])
@pytest.mark.parametrize("widths", [(32,), (32, 96)])
def test_a_convolution(kernels, resize, has_affine, widths):
    maps = [random(2, 12, 20, width, seed=width) for width in widths]
    weight, bias = random(48, sum(widths), 3, 3, seed=1), random(48, seed=4)
    options = {"affine": affine_of(2, sum(widths)) if has_affine else None, "resize": resize}
    packed = kernels.pack_weights(weight)
    plain = convolution(maps, weight, bias, **options)
    assert relative(kernels.convolve(maps, packed, bias, **options), plain) < 3e-6
    without = kernels.convolve(maps, packed, **options)
    assert relative(without, convolution(maps, weight, torch.zeros(48), **options)) < 3e-6
    sizes = [plain.shape]
    if resize >= 0:
        sizes.append((2, plain.shape[1] // 2, plain.shape[2] // 2, 48))
    for shape in sizes:
        residual = random(*shape, seed=5)
        output = kernels.convolve(maps, packed, bias, residual=residual, **options)
        reference = convolution(maps, weight, bias, residual=residual, **options)
        assert relative(output, reference) < 3e-6
    residual = random(*plain.shape, seed=5)
    reference = convolution(maps, weight, bias, residual=residual, **options)
    output = kernels.convolve(maps, packed, bias, residual=residual, out=residual, **options)
    assert output is residual
    assert relative(output, reference) < 3e-6


@pytest.mark.parametrize("widths", [(32,), (32, 96)])
@pytest.mark.parametrize("out", [32, 80])
def test_a_pointwise_convolution(kernels, widths, out):
    maps = [random(3, 9, 5, width, seed=width) for width in widths]
    weight, bias = random(out, sum(widths), 1, 1, seed=1), random(out, seed=4)
    residual, before = random(3, 9, 5, out, seed=5), [part.clone() for part in maps]
    for options in ({}, {"affine": affine_of(3, sum(widths))}, {"residual": residual}):
        output = kernels.pointwise(maps, kernels.pack_weights(weight), bias, **options)
        assert relative(output, pointwise(maps, weight, bias, **options)) < 3e-6
    assert all(map(torch.equal, maps, before))


@pytest.mark.parametrize("new_order", [False, True])
def test_attention(kernels, new_order):
    qkv = random(2, 6, 7, 192)
    output = kernels.attend(qkv, 2, new_order)
    reference = attend(qkv.double().flatten(1, 2).transpose(1, 2), 2, new_order).transpose(1, 2)
    assert output.is_contiguous()
    assert relative(output.flatten(1, 2), reference) < 3e-6


def test_a_map_in_another_order_in_memory_is_refused(kernels):
    with pytest.raises(ValueError, match="contiguous map"):
        kernels.group_norm([random(2, 64, 8, 8).permute(0, 2, 3, 1)], nn.GroupNorm(32, 64))


def unet(dtype, **changes):
    network = network_cases.unet(num_classes=5, **changes)
    network.convert_trunk(dtype)
    return network


X, T, Y = random(3, 3, 16, 16), torch.tensor([5, 100, 900]), torch.tensor([4, 0, 2])


@LONG
@pytest.mark.parametrize(
    ("changes", "dtype", "most"),
    [
        ({}, torch.float32, 1e-5),
        ({}, torch.float16, 5e-3),
        ({}, torch.bfloat16, 5e-2),
        ({"resblock_updown": False}, torch.float16, 5e-3),
        ({"use_scale_shift_norm": False}, torch.float32, 1e-5),
        ({"norm_groups": 8}, torch.float32, 1e-5),
        ({"num_res_blocks": 0}, torch.float32, 1e-5),
    ],
)
def test_a_whole_network(kernels, changes, dtype, most):
    network = unet(dtype, **changes)
    reference = unet(torch.float32, **changes)(X, T, Y)
    with torch.inference_mode():
        network.to(memory_format=torch.channels_last)
        output = fused_unet.FusedUNet(kernels, network)(X, T, Y)
    assert output.dtype is torch.float32
    assert output.is_contiguous()
    assert relative(output, reference) < most


@pytest.mark.parametrize("fault", ["moments", "eps", "exception"])
def test_faults_of_the_programs_are_found_at_the_first_call(monkeypatch, fault):
    """The last chunk of a large map does not count, the epsilon is another, a launch fails."""
    stand_in(monkeypatch)
    network = unet(torch.float32, image_size=64, model_channels=64)
    x = random(3, 3, 64, 64)
    if fault == "moments":
        plain = StandIn._moments

        def planted(*arguments, **options):
            plain(*arguments, **options)
            arguments[6][:, -1] = 0

        monkeypatch.setattr(StandIn, "_moments", staticmethod(planted))
    elif fault == "eps":
        write = StandIn._write
        monkeypatch.setattr(StandIn, "_write", staticmethod(lambda *a: write(*a[:-2], 1e-3, a[-1])))
    else:
        monkeypatch.setattr(StandIn, "_add", staticmethod(lambda *_, **__: 1 / 0))
    fast = graphs.FixedBatch(fused_unet.FusedUNet(gpu_kernels.GpuKernels(), network))
    run = Checked(fast, network, network)
    with torch.inference_mode():
        expected = network(x, T, Y)
        with pytest.warns(UserWarning, match="division by zero|is wrong by") as caught:
            assert relative(run(x, T, Y), expected) < 1e-5
        assert len(caught) == 1
        assert torch.equal(run(x, T, Y), expected)


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu")
@pytest.mark.parametrize(
    ("precision", "most"),
    [("float32", 1e-4), ("tf32", 1e-2), ("float16", 1e-2), ("bfloat16", 5e-2)],
)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.usefixtures("switches")
def test_a_gpu_computes_the_same(precision, most, recorded):
    reference = unet(torch.float32)(X, T, Y)
    network = unet(layout.set_arithmetic(precision, False, GPU)).to(GPU)
    layout.lay_out(network, GPU)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fast = fused_unet.FusedUNet(gpu_kernels.GpuKernels(), network)
            run = Checked(graphs.FixedBatch(fast, recorded=recorded), network, network)
            inputs = [tensor.to(GPU) for tensor in (X, T, Y)]
            for count in (3, 1, 3):  # recorded, filled up, replayed
                output = run(*(tensor[:count] for tensor in inputs))
                assert relative(output.cpu(), reference[:count]) < most
        torch.cuda.set_sync_debug_mode("error")  # warns that it is a prototype
        with torch.inference_mode():
            run(*inputs)  # waits for nothing
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu")
@pytest.mark.parametrize("compile", ["auto", True, False])
def test_a_walk_waits_for_nothing_and_brings_nothing_to_the_gpu(compile):
    conf = load_conf(ROOT / "confs/demo.yml", InpaintConf)
    own = {"model_path": str(ROOT / conf.model_path), "device": "cuda", "compile": compile}
    times = get_schedule_jump(t_T=20, jump_length=5, jump_n_sample=2)
    inpainter = Inpainter(dataclasses.replace(conf, **own), times)
    gt = torch.zeros(2, 3, 64, 64, device=GPU)
    try:
        with torch.inference_mode():
            for number, _ in enumerate(inpainter.steps(gt, gt, [0, 1])):
                if number == 1:  # what is made once is made
                    torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
