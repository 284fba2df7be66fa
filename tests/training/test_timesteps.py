"""What a step sees depends on the seed and the step alone."""

import numpy as np
import pytest
import torch

from guided_diffusion.training.timesteps import (
    LossSecondMomentSampler,
    batch_indices,
    draw_noise,
    draw_times,
    generator,
)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 25])
def test_every_picture_comes_once_an_epoch_in_an_order_that_ignores_the_batch_size(batch_size):
    count, total = 10, 50
    stream = [batch_indices(count, step, batch_size, seed=5) for step in range(total)]
    stream = np.concatenate(stream)[:total].reshape(-1, count)
    one_by_one = np.concatenate([batch_indices(count, step, 1, seed=5) for step in range(total)])
    assert (np.sort(stream, axis=1) == np.arange(count)).all()
    assert (stream.ravel() == one_by_one).all()


def test_epochs_seeds_and_purposes_have_numbers_of_their_own():
    orders = [batch_indices(50, epoch, 50, seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    draws = {generator(1, purpose, number).random() for purpose in (0, 1) for number in (0, 1)}
    assert len(draws) == 4


def test_a_pictures_noise_depends_on_its_seed_alone():
    seeds = np.array([7, 2**32 - 1, 9, 7])
    noise = draw_noise(seeds, (3, 8, 8))
    assert torch.equal(noise[1:3], draw_noise(seeds[1:3], (3, 8, 8)))
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[2])
    many = draw_noise(np.arange(100), (3, 16, 16))
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_weights_undo_the_preference_for_some_times():
    probabilities = np.array([0.7, 0.2, 0.1])
    t, weights = draw_times(probabilities, 20_000, np.random.default_rng(0))
    assert np.allclose(np.bincount(t) / len(t), probabilities, atol=0.02)
    assert np.allclose(probabilities[t] * weights, 1 / 3)
    assert weights.dtype == np.float32  # a float64 weight would make the whole loss float64


def test_the_sampler_is_even_until_every_time_has_ten_losses():
    sampler = LossSecondMomentSampler(2)
    sampler.update(np.repeat([0, 1], [10, 9]), np.repeat([3.0, 1.0], [10, 9]))
    assert (sampler.probabilities() == 0.5).all()
    sampler.update(np.array([1]), np.array([1.0]))
    assert np.allclose(sampler.probabilities(), [0.999 * 0.75 + 0.0005, 0.999 * 0.25 + 0.0005])


def test_the_sampler_takes_the_root_mean_square_of_the_last_ten():
    sampler = LossSecondMomentSampler(2)
    losses = np.array([100.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])  # the first is the eleventh last
    sampler.update(np.zeros(11, dtype=int), losses)
    sampler.update(np.ones(10, dtype=int), np.ones(10))
    root = np.sqrt((np.arange(1, 11) ** 2).mean())
    expected = 0.999 * root / (root + 1) + 0.0005
    assert np.isclose(sampler.probabilities()[0], expected)
    sampler.update(np.array([0.0, 1.0]), np.array([np.nan, np.inf]))  # the training stops for these
    assert np.isclose(sampler.probabilities()[0], expected)
