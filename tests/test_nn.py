import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from guided_diffusion.nn import (
    GroupNorm32,
    UpConv2d,
    _chunks,
    downsample,
    timestep_embedding,
    upsample,
    zero_module,
)


@pytest.mark.parametrize("dim", [2, 32, 33])
def test_timestep_embedding_by_hand(dim):
    times = [0, 1, 7, 999]
    half = dim // 2
    angles = [[t * math.exp(-math.log(10_000) * i / half) for i in range(half)] for t in times]
    expected = [
        [math.cos(a) for a in row] + [math.sin(a) for a in row] + [0.0] * (dim % 2)
        for row in angles
    ]
    got = timestep_embedding(torch.tensor(times), dim)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), np.array(expected), atol=1e-4)
    np.testing.assert_allclose(got[:2].numpy(), np.array(expected)[:2], atol=1e-6)


def test_timestep_embedding_takes_fractions():
    # Rescaled times are no integers, and 2.5 is not 2.
    got = timestep_embedding(torch.tensor([2.5, 2.0]), 8)
    assert got[0, 0].item() == pytest.approx(math.cos(2.5))
    assert got[0, 4].item() == pytest.approx(math.sin(2.5))
    assert got[1, 0].item() == pytest.approx(math.cos(2.0))


def test_group_norm_of_one_number_a_group():
    """The smallest feature map of one picture: nothing is left but the bias."""
    norm = GroupNorm32(32)
    nn.init.normal_(norm.bias)
    out = norm(torch.randn(1, 32, 1, 1))
    assert torch.allclose(out.flatten(), norm.bias, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 64, 5), (2, 64, 3, 5), (3, 64)])
def test_group_norm_by_hand(shape):
    generator = np.random.default_rng(0)
    x = generator.normal(2.0, 3.0, shape)
    norm = GroupNorm32(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    groups = x.reshape(shape[0], 32, -1)
    spread = np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    normed = ((groups - groups.mean(-1, keepdims=True)) / spread).reshape(shape)
    per_channel = (1, 64) + (1,) * (len(shape) - 2)
    weight, bias = (p.detach().numpy().reshape(per_channel) for p in (norm.weight, norm.bias))
    got = norm(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(got, normed * weight + bias, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_computes_in_float32(dtype):
    # In half precision the mean of squares of such values would overflow or lose all digits.
    x = (torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0)) + 300).to(dtype)
    norm = GroupNorm32(32)
    got = norm(x)
    assert got.dtype == dtype
    assert norm.weight.dtype == torch.float32
    torch.testing.assert_close(got, norm(x.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("chunks", [2, 8])
def test_normalising_in_chunks(chunks, offset):
    norm = GroupNorm32(64).requires_grad_(requires_grad=False)
    norm.weight.normal_()
    norm.bias.normal_()
    x = (torch.randn(2, 64, 8, 4) + offset).to(memory_format=torch.channels_last)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double())
    plain, other = ((y.double() - exact).abs().max() for y in (norm(x), norm.in_chunks(x, chunks)))
    assert other <= max(3 * plain, 2e-6)
    assert norm.in_chunks(x.bfloat16(), chunks).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((1, 256, 256, 256), 256), ((8, 256, 256, 256), 32), ((1, 1024, 8, 8), 1), ((1, 32, 9, 9), 1)],
)
def test_chunks_divide_the_pixels(shape, chunks):
    x = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    assert _chunks(x) == chunks
    assert shape[2] * shape[3] % _chunks(x) == 0
    assert _chunks(torch.empty(shape, device="meta")) == 1  # another layout
    assert _chunks(torch.empty(shape[:3], device="meta")) == 1


def test_zero_module():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4))
    assert zero_module(module) is module
    assert all((parameter == 0).all() for parameter in module.parameters())


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 3)])
@pytest.mark.parametrize("channels", [(3, 5), (8, 8)])
def test_folding_a_convolution_after_a_doubling(size, channels):
    conv = UpConv2d(*channels)
    x = torch.randn(2, channels[0], *size).to(memory_format=torch.channels_last)
    expected = F.conv2d(upsample(x).double(), conv.weight.double(), conv.bias.double(), padding=1)
    torch.testing.assert_close(conv(x).double(), expected, rtol=0, atol=2e-6)
    conv.fold()
    conv.weight.data.zero_()  # no longer used
    folded = conv(x)
    torch.testing.assert_close(folded.double(), expected, rtol=0, atol=2e-6)
    assert folded.is_contiguous(memory_format=torch.channels_last)


def test_folding_does_not_show_in_a_checkpoint():
    conv = UpConv2d(4, 4)
    before = set(conv.state_dict())
    conv.fold()
    assert set(conv.state_dict()) == before == {"weight", "bias"}


def test_resizing_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    up = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 6, 6], [3, 3, 6, 6]]
    assert upsample(x).tolist() == [[up]]
    assert downsample(x).tolist() == [[[[3.0]]]]
    odd = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(downsample(upsample(odd)), odd)
    assert downsample(odd).shape == (2, 3, 2, 3)
