"""Windows: where they lie, and what their average is."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.run.windows import Windows, window_starts

T = torch.tensor([5])


@given(st.integers(2, 64), st.integers(0, 500))
def test_windows_cover_everything_with_half_of_them_shared(size, more):
    starts = window_starts(size + more, size)
    assert starts[0] == 0
    assert starts[-1] == more
    steps = [b - a for a, b in pairwise(starts)]
    assert all(0 < step <= max(1, (size + 1) // 2) for step in steps)


class Noting:
    """A network that doubles its input, and notes what it was given."""

    def __init__(self):
        self.inputs = []

    def __call__(self, x, timesteps, y=None):
        self.inputs.append((x, timesteps, y))
        return torch.cat([2 * x, -x], dim=1)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_average_of_what_is_the_same_everywhere_is_that(batch_size):
    x = torch.randn(1, 3, 20, 33, generator=torch.Generator().manual_seed(0))
    network = Noting()
    windows = Windows(network, 8, torch.zeros_like(x), batch_size)
    output = windows(x, T, torch.tensor([3]))
    torch.testing.assert_close(output, torch.cat([2 * x, -x], dim=1))
    places = 4 * 8  # along 20 pixels, and along 33
    assert len(network.inputs) == -(-places // batch_size)
    for parts, timesteps, labels in network.inputs:
        assert parts.shape[1:] == (3, 8, 8)
        assert len(parts) <= batch_size
        assert timesteps.tolist() == [5] * len(parts)
        assert labels.tolist() == [3] * len(parts)


def test_windows_without_a_hole_are_left_out():
    x, mask, network = torch.randn(1, 3, 64, 64), torch.ones(1, 3, 64, 64), Noting()
    mask[..., 63, 63] = 0.5  # half-known is not known
    output = Windows(network, 16, mask, 1)(x, T)
    [(seen, _, _)] = network.inputs
    assert torch.equal(seen, x[..., 48:, 48:])
    torch.testing.assert_close(output[..., 48:, 48:], torch.cat([2 * seen, -seen], dim=1))
    assert not output[..., :48].any()


def test_the_middle_of_a_window_counts_more_than_its_border():

    def network(x, timesteps):
        return torch.full_like(x, 1.0) * torch.arange(len(x)).view(-1, 1, 1, 1)

    x = torch.zeros(1, 3, 8, 12)
    row = Windows(network, 8, torch.zeros_like(x), 9)(x, T)[0, 0, 0]
    assert row[:4].eq(0).all()
    assert row[8:].eq(1).all()
    assert (row.diff() >= 0).all()
    assert row[4] < 0.4 < 0.6 < row[7]
