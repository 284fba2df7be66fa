"""TRAIN: the losses of IDDPM (Nichol & Dhariwal 2021, section 3)."""

import math
from collections.abc import Callable

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion

Tensor = torch.Tensor


def training_losses(
    diffusion: GaussianDiffusion,
    model: Callable[[Tensor, Tensor], Tensor],
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
) -> dict[str, Tensor]:
    """Return ``loss`` and its parts ``mse`` and ``vb``, each (N,), of x_0 at levels ``t`` (N,).

    The hybrid loss of IDDPM (eq. 16): the squared error of the prediction plus the variational
    term with the prediction detached, so that it teaches the variance alone. ``use_kl`` leaves
    only the variational term, an unlearned variance only the squared error.
    """
    x = diffusion.q_sample(x_start, t, noise)
    output = model(x, diffusion.network_times(x.device)[t])
    if diffusion.use_kl:
        vb = vb_terms_bits(diffusion, output, x_start, x, t) * diffusion.num_timesteps
        return {"loss": vb, "vb": vb}
    channels = x.shape[1]
    target = diffusion.target(x_start, t, noise)
    mse = _mean_flat((target - output[:, :channels]) ** 2)
    if not diffusion.learn_sigma:
        return {"loss": mse, "mse": mse}
    frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)
    vb = vb_terms_bits(diffusion, frozen, x_start, x, t)
    if diffusion.rescale_learned_sigmas:
        vb = vb * (diffusion.num_timesteps / 1000)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def vb_terms_bits(
    diffusion: GaussianDiffusion, output: Tensor, x_start: Tensor, x: Tensor, t: Tensor
) -> Tensor:
    """Return L_{t-1}, or L_0 where t is 0, in bits a dimension (N,) (IDDPM eqs. 4 to 6)."""
    mean, log_variance, _ = diffusion.p_mean_variance(output, x, t, clip_denoised=False)
    true_mean = diffusion.q_posterior_mean(x_start, x, t)
    true_log_variance = diffusion.at("posterior_log_variance_clipped", t)
    # KL(true step ‖ predicted step), both normal, in nats.
    spread = log_variance - true_log_variance + torch.exp(true_log_variance - log_variance)
    kl = 0.5 * (spread - 1 + (true_mean - mean) ** 2 * torch.exp(-log_variance))
    nll = -_discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
    return torch.where(t == 0, _mean_flat(nll), _mean_flat(kl)) / math.log(2)


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _standard_normal_cdf(x: Tensor) -> Tensor:
    """Approximate the cumulative distribution by a tanh (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of 8-bit values ``x`` in [-1, 1], in nats, elementwise (DDPM eq. 13).

    A value's bin is ±1/255 wide, open at both ends of the range; no probability is below 1e-12.
    """
    inv_scale = torch.exp(-log_scale)
    below_upper = _standard_normal_cdf((x - mean + 1 / 255) * inv_scale)
    below_lower = _standard_normal_cdf((x - mean - 1 / 255) * inv_scale)
    probability = torch.where(
        x < -0.999,
        below_upper,
        torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower),
    )
    return probability.clamp(min=1e-12).log()
