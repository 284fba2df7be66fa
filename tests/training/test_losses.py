"""The losses: the published program's numbers, and closed forms."""

import math

import numpy as np
import pytest
import torch
from network_cases import GOLDEN, chain, step_inputs

from guided_diffusion.training.losses import training_losses, vb_terms_bits


@pytest.mark.parametrize("respacing", ["1000", "250"])
def test_golden_losses(respacing):
    golden = np.load(GOLDEN / "losses.npz")
    x_start, t, noise, x_t, output, mse, vb, loss = (
        torch.tensor(golden[f"{respacing}/{key}"])
        for key in ("x_start", "t", "noise", "x_t", "model_output", "mse", "vb", "loss")
    )
    assert (t == 0).any()
    assert (t > 0).any()
    diffusion = chain(respacing, rescale_learned_sigmas=True)
    torch.testing.assert_close(diffusion.q_sample(x_start, t, noise), x_t, rtol=0, atol=1e-6)
    got = training_losses(diffusion, lambda x, t: output, x_start, t, noise)
    for key, expected in (("mse", mse), ("vb", vb), ("loss", loss)):
        torch.testing.assert_close(got[key], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("learn_sigma", "predict_xstart"), [(True, False), (False, True)])
def test_variational_term_is_the_divergence(learn_sigma, predict_xstart):
    diffusion = chain(learn_sigma=learn_sigma, predict_xstart=predict_xstart)
    output, x_start, noise, _ = step_inputs(6 if learn_sigma else 3)
    x_start = x_start.clamp(-1, 1)
    t = torch.tensor([1, 8])
    x = diffusion.q_sample(x_start, t, noise)
    got = vb_terms_bits(diffusion, output, x_start, x, t).numpy()
    for i, level in enumerate(t.tolist()):
        abar, beta = diffusion.alphas_cumprod[level], diffusion.betas[level]
        before = diffusion.alphas_cumprod[level - 1]
        coef1 = math.sqrt(before) * beta / (1 - abar)
        coef2 = math.sqrt(1 - beta) * (1 - before) / (1 - abar)
        variance = beta * (1 - before) / (1 - abar)
        out, xi = output[i].double().numpy(), x[i].double().numpy()
        x0 = out[:3]  # not clipped
        if not predict_xstart:
            x0 = (xi - math.sqrt(1 - abar) * out[:3]) / math.sqrt(abar)
        var = np.full(xi.shape, beta)
        if learn_sigma:
            f = (out[3:] + 1) / 2
            var = beta**f * variance ** (1 - f)
        means = [coef1 * v + coef2 * xi for v in (x_start[i].double().numpy(), x0)]
        kl = 0.5 * (np.log(var / variance) + (variance + (means[0] - means[1]) ** 2) / var - 1)
        assert got[i] == pytest.approx(kl.mean() / math.log(2), rel=1e-4)


@pytest.mark.parametrize(("mean", "v"), [(-0.97, -1.0), (0.4, 1.0), (1.0, 6.0)])
def test_probabilities_of_all_values_sum_to_one(mean, v):
    # At level 0 the prediction's mean is its x_0, and the loss -log2 P(value).
    diffusion = chain("250", predict_xstart=True)
    x_start = (torch.arange(256.0) / 127.5 - 1).view(256, 1, 1, 1).expand(256, 3, 1, 1)
    output = torch.full((256, 6, 1, 1), mean)
    output[:, 3:] = v
    x = torch.zeros_like(x_start)
    bits = vb_terms_bits(diffusion, output, x_start, x, torch.zeros(256, dtype=torch.int64))
    assert (bits >= 0).all()
    assert (2.0 ** -bits.double()).sum().item() == pytest.approx(1, abs=1e-4)
    deviation = math.exp(0.5 * diffusion.pred_log_variance(output, 0)[0, 0, 0, 0].item())
    # And a bin well inside holds what the normal distribution says, to Page's 1e-3.
    value = x_start[100, 0, 0, 0].item()
    sides = [0.5 * math.erf((value + d / 255 - mean) / deviation / math.sqrt(2)) for d in (1, -1)]
    assert 2.0 ** -bits[100].item() == pytest.approx(sides[0] - sides[1], abs=1e-3)


def test_the_least_probability():
    diffusion = chain("250", predict_xstart=True)
    output = torch.cat([torch.full((1, 3, 1, 1), -1.0), torch.zeros(1, 3, 1, 1)], 1)
    x_start = torch.ones(1, 3, 1, 1)  # far from what is predicted
    bits = vb_terms_bits(diffusion, output, x_start, x_start, torch.tensor([0]))
    assert bits.item() == pytest.approx(-math.log2(1e-12), rel=1e-5)


def losses_of(diffusion, channels=6):
    output, x_start, noise, _ = step_inputs(channels)
    output.requires_grad_()
    t = torch.tensor([0, 5])
    losses = training_losses(diffusion, lambda x, t: output, x_start.clamp(-1, 1), t, noise)
    (gradient,) = torch.autograd.grad(losses["loss"].sum(), output)
    return losses, gradient, output, x_start.clamp(-1, 1), noise


@pytest.mark.parametrize("kind", ["eps", "xstart", "v"])
def test_hybrid_loss(kind):
    diffusion = chain(predict_xstart=kind == "xstart", predict_v=kind == "v")
    losses, gradient, output, x_start, noise = losses_of(diffusion)
    abar = torch.tensor(diffusion.alphas_cumprod[[0, 5]]).float()[:, None, None, None]
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x_start
    target = {"eps": noise, "xstart": x_start, "v": v}[kind]
    mse = ((output[:, :3] - target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses["mse"], mse)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])
    # The variational term teaches the variance alone.
    expected = 2 * (output[:, :3] - target) / (3 * 4 * 4)
    torch.testing.assert_close(gradient[:, :3], expected)
    assert (gradient[:, 3:] != 0).any()


def test_weights_of_the_variational_term():
    plain, *_ = losses_of(chain())
    rescaled, *_ = losses_of(chain(rescale_learned_sigmas=True))
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * 12 / 1000)
    torch.testing.assert_close(rescaled["loss"], plain["mse"] + plain["vb"] * 12 / 1000)
    whole, gradient, *_ = losses_of(chain(use_kl=True, rescale_learned_sigmas=True))
    assert set(whole) == {"loss", "vb"}
    torch.testing.assert_close(whole["loss"], plain["vb"] * 12)
    # Alone it teaches the prediction as well.
    assert (gradient[:, :3] != 0).any()


def test_loss_without_a_learned_variance():
    losses, _, output, _, noise = losses_of(chain(learn_sigma=False), channels=3)
    assert set(losses) == {"loss", "mse"}
    assert torch.equal(losses["loss"], losses["mse"])
    torch.testing.assert_close(losses["mse"], ((output - noise) ** 2).mean((1, 2, 3)))
    whole, *_ = losses_of(chain(learn_sigma=False, use_kl=True), channels=3)
    assert whole["loss"].shape == (2,)
    assert torch.isfinite(whole["loss"]).all()
