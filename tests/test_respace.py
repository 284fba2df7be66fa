from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from guided_diffusion.respace import respaced_betas, space_timesteps

GOLDEN = np.load(Path(__file__).parent / "golden" / "coefficients.npz")


@pytest.mark.parametrize("key", list(GOLDEN))
def test_tables_equal_golden(key):
    respacing, table = key.split("/")
    kept = space_timesteps(1000, respacing)
    betas = respaced_betas(get_named_beta_schedule("linear", 1000), kept)
    got = getattr(GaussianDiffusion(betas, kept), table)
    assert got.dtype == GOLDEN[key].dtype
    np.testing.assert_allclose(got, GOLDEN[key], rtol=0, atol=1e-12)


def test_sections():
    assert space_timesteps(10, "10") == space_timesteps(10, "") == list(range(10))
    assert space_timesteps(10, "2") == [0, 9]
    assert space_timesteps(10, "1,1") == [0, 5]  # a count of one keeps the first
    assert space_timesteps(9, "2,3") == [0, 4, 5, 7, 8]  # of 5 and 4 steps; 5 + round(1.5) is 7


def test_halves_are_rounded_to_even():
    # Strides of 0.5 are impossible; 1.5 and 2.5 are the first that end in a half.
    assert space_timesteps(4, "3") == [0, 2, 3]  # 1.5 → 2
    assert space_timesteps(6, "3") == [0, 2, 5]  # 2.5 → 2
    assert space_timesteps(10, "7") == [0, 2, 3, 4, 6, 8, 9]  # 1.5 → 2, 4.5 → 4, 7.5 → 8


def test_ddim_takes_the_smallest_exact_stride():
    assert space_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert space_timesteps(10, "ddim4") == [0, 3, 6, 9]
    assert space_timesteps(10, "ddim10") == list(range(10))
    assert space_timesteps(10, "ddim1") == [0]
    assert space_timesteps(10, "ddim2") == [0, 5]  # strides 5 to 9 all give two


@pytest.mark.parametrize("respacing", ["ddim6", "ddim0"])
def test_impossible_strides(respacing):
    with pytest.raises(ValueError, match=rf"no integer stride .* exactly {respacing[4:]}"):
        space_timesteps(10, respacing)


@pytest.mark.parametrize("respacing", ["ten", "5,", "-5", "2.5", "ddim", "ddim-5"])
def test_malformed(respacing):
    with pytest.raises(ValueError, match="expected '250'"):
        space_timesteps(10, respacing)


@settings(deadline=None)
@given(st.integers(1, 400), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_kept_steps_are_ascending_and_span_each_section(num_timesteps, counts):
    sizes = [len(part) for part in np.array_split(np.arange(num_timesteps), len(counts))]
    respacing = ",".join(map(str, counts))
    if any(count > size for count, size in zip(counts, sizes, strict=True)):
        with pytest.raises(ValueError, match="cannot keep"):
            space_timesteps(num_timesteps, respacing)
        return
    kept = space_timesteps(num_timesteps, respacing)
    assert len(kept) == sum(counts)
    assert sorted(set(kept)) == kept
    starts = np.cumsum([0, *sizes])
    first = np.cumsum([0, *counts])
    for i, count in enumerate(counts):
        section = kept[first[i] : first[i + 1]]
        assert section[0] == starts[i]
        assert count == 1 or section[-1] == starts[i + 1] - 1
        exact = np.linspace(0, sizes[i] - 1, count)
        assert np.abs(np.array(section) - starts[i] - exact).max() <= 0.5 + 1e-6


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 300), st.data())
def test_respaced_chain_passes_through_the_same_noise_levels(num_timesteps, data):
    betas = get_named_beta_schedule("cosine", num_timesteps)
    kept = sorted(data.draw(st.sets(st.integers(0, num_timesteps - 1), min_size=1)))
    new = respaced_betas(betas, kept)
    assert new.dtype == np.float64
    assert len(new) == len(kept)
    np.testing.assert_allclose(np.cumprod(1 - new), np.cumprod(1 - betas)[kept], rtol=1e-9)


def test_a_chain_that_ends_in_noise_alone_keeps_betas_below_1():
    betas = np.append(get_named_beta_schedule("linear", 999), 1 - 1e-15)
    for count in (10, 50, 100, 250):
        new = respaced_betas(betas, space_timesteps(1000, str(count)))
        assert (new > 0).all() and (new < 1).all()
