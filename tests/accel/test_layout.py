"""Weights in the order that convolutions read, folded convolutions, twins: all compute the same."""

from functools import partial

import network_cases
import pytest
import torch
from network_cases import relative
from torch import nn
from torch.nn import functional as F

from guided_diffusion.accel import layout
from guided_diffusion.nn import upsample

CPU = torch.device("cpu")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([10, 700])
Y = torch.tensor([1, 3])


unet = partial(network_cases.unet, num_classes=5)


@pytest.mark.parametrize(
    ("resblock_updown", "dtype", "least", "most"),
    [(True, None, 0, 1e-5), (False, None, 0, 1e-5), (True, torch.bfloat16, 1e-6, 0.05)],
)
def test_a_network_laid_out_computes_the_same(resblock_updown, dtype, least, most):
    network = unet(resblock_updown=resblock_updown)
    reference = network(X, T, Y)
    if dtype:
        network.convert_trunk(dtype)
    layout.lay_out(network, CPU)
    assert network.memory_format == torch.channels_last
    assert any(isinstance(module, layout.FoldedConv2d) for module in network.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert least <= relative(network(X, T, Y), reference) < most


def test_a_gradient_passes_through_a_network_laid_out_in_inference_mode():
    network = unet()
    expected = torch.autograd.grad(network(x := X.clone().requires_grad_(), T, Y).sum(), x)[0]
    with torch.inference_mode():
        layout.lay_out(network, CPU)
    assert relative(torch.autograd.grad(network(x, T, Y).sum(), x)[0], expected) < 1e-4


def test_precision_sets_how_float32_is_multiplied_in_its_block(switches):
    def seen():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    torch.backends.cudnn.allow_tf32 = True
    before = seen()
    for precision, inside in (("float32", (False, False)), ("tf32", (True, True)), (None, before)):
        with layout.arithmetic(precision):
            assert seen() == inside
        assert seen() == before


def test_the_type_of_the_trunk():
    assert layout.trunk_dtype(None, False, CPU) == torch.float32
    assert layout.trunk_dtype("tf32", False, CPU) == torch.float32
    assert layout.trunk_dtype("bfloat16", False, CPU) == torch.bfloat16
    gpu = torch.device("cuda", 0)
    assert layout.trunk_dtype(None, True, gpu) == torch.float16
    assert layout.trunk_dtype("float16", False, gpu) == torch.float16


@pytest.mark.parametrize("keys", [("float16", False), (None, True)])
def test_half_precision_on_a_cpu_is_float32_with_a_warning(keys):
    with pytest.warns(UserWarning, match="half precision is for GPUs"):
        assert layout.trunk_dtype(*keys, CPU) == torch.float32


@pytest.mark.parametrize(
    ("size", "channels"), [((1, 1), (3, 5)), ((4, 6), (8, 8)), ((7, 3), (3, 5))]
)
def test_folding_a_convolution_after_a_doubling(size, channels):
    conv = nn.Conv2d(*channels, 3, padding=1)
    x = torch.randn(2, channels[0], *size).to(memory_format=torch.channels_last)
    expected = F.conv2d(upsample(x).double(), conv.weight.double(), conv.bias.double(), padding=1)
    other = layout.FoldedConv2d(conv)
    assert set(other.state_dict()) == {"weight", "bias"}  # as before
    conv.weight.data.zero_()  # no longer used
    folded = other(x)
    torch.testing.assert_close(folded.double(), expected, rtol=0, atol=2e-6)
    assert folded.is_contiguous(memory_format=torch.channels_last)


def test_a_twin_shares_all_numbers_and_no_module():
    network = unet()
    layout.lay_out(network, CPU)
    twin = layout.twin(network)
    own, other = ([*net.parameters(), *net.buffers()] for net in (network, twin))
    assert list(map(id, own)) == list(map(id, other))
    assert not {id(m) for m in network.modules()} & {id(m) for m in twin.modules()}
    before = network(X, T, Y)
    assert torch.equal(twin(X, T, Y), before)
    layout.swap_modules(twin, nn.Conv2d, lambda _: nn.Identity())
    assert not any(isinstance(module, nn.Conv2d) for module in twin.modules())
    assert torch.equal(network(X, T, Y), before)
