import math

import numpy as np
import pytest
import torch
from torch import nn

from guided_diffusion.nn import GroupNorm32, downsample, timestep_embedding, upsample


@pytest.mark.parametrize("dim", [2, 32, 33])
def test_timestep_embedding_by_hand(dim):
    times = [0, 1, 2.5, 7, 999]  # rescaled times are no integers
    half = dim // 2
    angles = [[t * math.exp(-math.log(10_000) * i / half) for i in range(half)] for t in times]
    expected = [
        [math.cos(a) for a in row] + [math.sin(a) for a in row] + [0.0] * (dim % 2)
        for row in angles
    ]
    got = timestep_embedding(torch.tensor(times), dim)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), np.array(expected), atol=1e-4)
    np.testing.assert_allclose(got[:3].numpy(), np.array(expected)[:3], atol=1e-6)


def test_group_norm_of_one_number_a_group():
    """The smallest feature map of one picture: nothing is left but the bias."""
    norm = GroupNorm32(32)
    nn.init.normal_(norm.bias)
    out = norm(torch.randn(1, 32, 1, 1))
    assert torch.allclose(out.flatten(), norm.bias, rtol=0, atol=1e-3)


@pytest.mark.parametrize("groups", [32, 8])
@pytest.mark.parametrize("shape", [(2, 64, 5), (2, 64, 3, 5), (3, 64)])
def test_group_norm_by_hand(shape, groups):
    generator = np.random.default_rng(0)
    x = generator.normal(2.0, 3.0, shape)
    norm = GroupNorm32(64, groups)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    grouped = x.reshape(shape[0], groups, -1)
    spread = np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    normed = ((grouped - grouped.mean(-1, keepdims=True)) / spread).reshape(shape)
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


def test_resizing_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    up = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 6, 6], [3, 3, 6, 6]]
    assert upsample(x).tolist() == [[up]]
    assert downsample(x).tolist() == [[[[3.0]]]]
    odd = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(downsample(upsample(odd)), odd)
    assert downsample(odd).shape == (2, 3, 2, 3)
