"""DENOISE, UNDO: the diffusion mathematics and RePaint's loop over the schedule.

``p_sample_loop_progressive`` is the paper's Algorithm 1; begin reading there. What its sampler does
(CONDITION) is in samplers.py.

Everywhere here: images are float32 NCHW in [-1, 1]; a mask is 1 where the picture is known and 0
where it is generated; ``t`` indexes the respaced chain, ``timestep_map[t]`` the original one.
Tables are float64 and rounded to float32 once; the loop reads them as plain numbers, so a step
costs no copy to the device and no synchronisation.

Papers: DDPM (Ho et al. 2020), IDDPM (Nichol & Dhariwal 2021), DDIM (Song et al. 2021), ADM
(Dhariwal & Nichol 2021), RePaint (Lugmayr et al. 2022), DDNM (Wang et al. 2023).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

Tensor = torch.Tensor
Coefficient = float | Tensor  # a table at one step, or at a batch of steps as (N, 1, 1, 1)


def get_named_beta_schedule(noise_schedule: str, num_steps: int) -> np.ndarray:
    """Return ``num_steps`` float64 betas: ``linear`` (DDPM section 4) or ``cosine`` (IDDPM eq. 17).

    Linear betas are scaled so that chains of any length end at about the same noise. Raises
    ValueError for another name.
    """
    if noise_schedule == "linear":
        scale = 1000 / num_steps
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if noise_schedule == "cosine":
        u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
        alphas_cumprod = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    raise ValueError(f"expected linear or cosine, found {noise_schedule!r}")


@dataclass(frozen=True)
class Step:
    """One transition of the loop, as seen from outside."""

    t: int  # the level that ``x`` has now; -1 is finished
    x: Tensor  # (N, C, H, W)
    pred_xstart: Tensor | None  # the network's idea of the finished picture; None for an undo


class GaussianDiffusion:
    """A chain of noise levels: its tables, RePaint's loop over it, and the training losses.

    ``betas`` (float64) are those of the chain that is walked, ``timestep_map`` the original indices
    under which the network knows its levels (default: the same). Raises ValueError where the chain
    has fewer than two steps or a beta is outside (0, 1).
    """

    def __init__(
        self,
        betas: np.ndarray,
        timestep_map: list[int] | None = None,
        *,
        learn_sigma: bool = True,  # the output's second half interpolates the log variance
        fixed_small: bool = False,  # a variance that is not learned is the posterior's, not beta
        predict_xstart: bool = False,  # the output is x_0 and not the noise
        predict_v: bool = False,  # the output is v (Salimans & Ho 2022) and not the noise
        clip_denoised: bool = True,  # clip x_0 to [-clip_range, clip_range] while sampling
        clip_range: float = 1.0,
        time_scale: float = 1.0,  # the network sees timestep_map · time_scale
        rescale_learned_sigmas: bool = False,  # training: weigh vb by chain length / 1000
        use_kl: bool = False,  # training: the variational bound alone
    ) -> None:
        if len(betas) < 2:
            raise ValueError(f"expected a chain of at least 2 steps, found {len(betas)}")
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError("expected every beta between 0 and 1")
        self.learn_sigma, self.fixed_small = learn_sigma, fixed_small
        self.predict_xstart, self.predict_v = predict_xstart, predict_v
        self.clip_denoised, self.clip_range = clip_denoised, clip_range
        self.rescale_learned_sigmas, self.use_kl = rescale_learned_sigmas, use_kl
        self.num_timesteps = len(betas)
        self.timestep_map = np.asarray(
            range(len(betas)) if timestep_map is None else timestep_map, dtype=np.int64
        )

        self.betas = np.asarray(betas, dtype=np.float64)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        self.sqrt_alphas_cumprod_prev = np.sqrt(self.alphas_cumprod_prev)
        self.sqrt_one_minus_alphas_cumprod_prev = np.sqrt(1 - self.alphas_cumprod_prev)
        self.sqrt_betas, self.sqrt_alphas = np.sqrt(self.betas), np.sqrt(1 - self.betas)

        # q(x_{t-1} | x_t, x_0): DDPM eqs. 6 and 7.
        ratio = 1 / (1 - self.alphas_cumprod)
        self.posterior_mean_coef1 = self.betas * self.sqrt_alphas_cumprod_prev * ratio
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * self.sqrt_alphas * ratio
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) * ratio
        # It vanishes at 0, where its log is taken from 1; so is a variance that is not learned.
        at_1 = self.posterior_variance[1]
        self.posterior_log_variance_clipped = np.log(np.append(at_1, self.posterior_variance[1:]))
        self.fixed_large_log_variance = np.log(np.append(at_1, self.betas[1:]))
        self.log_betas = np.log(self.betas)
        self._numbers = {
            name: table.astype(np.float32).tolist()
            for name, table in vars(self).items()
            if isinstance(table, np.ndarray) and table.dtype == np.float64
        }
        times = torch.from_numpy(self.timestep_map)  # scaled in float32, as torch does it
        self._numbers["network_times"] = (times * time_scale if time_scale != 1 else times).tolist()
        self._tables: dict[tuple[torch.device, str], Tensor] = {}

    def at(self, name: str, t: int | Tensor) -> Coefficient:
        """Read the table ``name`` in float32 at one step, or at a batch of steps (N,)."""
        if isinstance(t, int):
            return self._numbers[name][t]
        return self._on(t.device, name)[t][:, None, None, None]

    def network_times(self, device: torch.device) -> Tensor:
        """Return what the network is told of each level: float32 or int64 (num_timesteps,)."""
        return self._on(device, "network_times")

    def _on(self, device: torch.device, name: str) -> Tensor:
        """Return a table in the memory of ``device``, to which it goes once."""
        if (device, name) not in self._tables:
            with torch.inference_mode(False):  # gradients may pass it later
                self._tables[device, name] = torch.tensor(self._numbers[name], device=device)
        return self._tables[device, name]

    # --- the chain -------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Return ``x_start`` at noise level ``t`` in one leap (DDPM eq. 4)."""
        signal = self.at("sqrt_alphas_cumprod", t)
        return _mix(signal, x_start, self.at("sqrt_one_minus_alphas_cumprod", t), noise)

    def undo(self, x: Tensor, t: int, noise: Tensor) -> Tensor:
        """Diffuse x_{t-1} forward to x_t again (DDPM eq. 2; RePaint, Algorithm 1 line 10)."""
        return _mix(self.at("sqrt_alphas", t), x, self.at("sqrt_betas", t), noise)

    def q_posterior_mean(self, x_start: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        coef1, coef2 = self.at("posterior_mean_coef1", t), self.at("posterior_mean_coef2", t)
        return _mix(coef1, x_start, coef2, x)

    def predict_xstart_from_eps(self, x: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """Return x_0 of which ``x`` is x_t with noise ``eps`` (DDPM eq. 4 solved for x_0)."""
        scale = self.at("sqrt_recip_alphas_cumprod", t)
        return _mix(scale, x, -self.at("sqrt_recipm1_alphas_cumprod", t), eps)

    def predict_xstart_from_v(self, x: Tensor, t: int | Tensor, v: Tensor) -> Tensor:
        """Return x_0 of which ``x`` is x_t with velocity ``v`` (Salimans & Ho 2022, appendix D)."""
        signal = self.at("sqrt_alphas_cumprod", t)
        return _mix(signal, x, -self.at("sqrt_one_minus_alphas_cumprod", t), v)

    def predict_eps_from_xstart(self, x: Tensor, t: int | Tensor, x_start: Tensor) -> Tensor:
        """Return the noise that leads from ``x_start`` to ``x`` (DDPM eq. 4 solved for eps)."""
        scaled = self.at("sqrt_recip_alphas_cumprod", t) * x
        return (scaled - x_start) / self.at("sqrt_recipm1_alphas_cumprod", t)

    # --- what the network's output means ---------------------------------------------------------

    def pred_xstart(self, output: Tensor, x: Tensor, t: int | Tensor, *, clip: bool) -> Tensor:
        """Return the x_0 (N, C, H, W) that the network's ``output`` (N, C or 2C, H, W) implies."""
        mean_part = output[:, : x.shape[1]]
        if self.predict_xstart:
            x_start = mean_part
        elif self.predict_v:
            x_start = self.predict_xstart_from_v(x, t, mean_part)
        else:
            x_start = self.predict_xstart_from_eps(x, t, mean_part)
        return x_start.clamp(-self.clip_range, self.clip_range) if clip else x_start

    def target(self, x_start: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Return what a perfect network says of ``q_sample(x_start, t, noise)``, (N, C, H, W)."""
        if self.predict_xstart:
            return x_start
        if not self.predict_v:
            return noise
        signal = self.at("sqrt_alphas_cumprod", t)  # Salimans & Ho 2022, appendix D
        return _mix(signal, noise, -self.at("sqrt_one_minus_alphas_cumprod", t), x_start)

    def pred_log_variance(self, output: Tensor, t: int | Tensor) -> Coefficient:
        """Return the log variance of p(x_{t-1} given x_t), learned (IDDPM eq. 15) or fixed."""
        if not self.learn_sigma:
            small, large = "posterior_log_variance_clipped", "fixed_large_log_variance"
            return self.at(small if self.fixed_small else large, t)
        between = output[:, output.shape[1] // 2 :]  # -1: the lower one, 1: the upper one
        upper, lower = self.at("log_betas", t), self.at("posterior_log_variance_clipped", t)
        return (upper - lower) / 2 * between + (upper + lower) / 2

    def p_mean_variance(
        self, output: Tensor, x: Tensor, t: int | Tensor, *, clip_denoised: bool
    ) -> tuple[Tensor, Coefficient, Tensor]:
        """Return mean and log variance of p(x_{t-1} given x_t), and x_0 (DDPM section 3.2)."""
        x_start = self.pred_xstart(output, x, t, clip=clip_denoised)
        return self.q_posterior_mean(x_start, x, t), self.pred_log_variance(output, t), x_start

    # --- one step down ---------------------------------------------------------------------------

    def p_sample(
        self, output: Tensor, x: Tensor, t: int, noise: Tensor, gradient: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """DENOISE: draw x_{t-1} from p(x_{t-1} given x_t) (RePaint, Algorithm 1, line 7).

        ``gradient`` is a classifier's, scaled, at ``x`` (ADM, Algorithm 1). Gives x_{t-1}, x_0.
        """
        mean, log_variance, x_start = self.p_mean_variance(
            output, x, t, clip_denoised=self.clip_denoised
        )
        if gradient is not None:
            mean = mean + _exp(log_variance) * gradient
        if t == 0:  # the last step adds no noise
            return mean, x_start
        if isinstance(log_variance, float):
            return mean.add_(noise, alpha=math.exp(0.5 * log_variance)), x_start
        return mean.addcmul_((0.5 * log_variance).exp_(), noise), x_start

    def ddim_sample(
        self,
        output: Tensor,
        x: Tensor,
        t: int,
        noise: Tensor,
        gradient: Tensor | None = None,
        *,
        eta: float = 0.0,  # how much of the noise of x_{t-1} is drawn anew, 0 to 1
        correct: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Step to x_{t-1} by way of x_0, which ``correct`` may change in between.

        x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1}) (eta z + sqrt(1 - eta^2) eps): DDIM
        (eq. 12) with an ``eta`` of 0; DDNM (Wang et al. 2023, section 3.3) where ``correct`` puts
        the known pixels into x_0. A classifier's ``gradient`` changes eps (ADM, Algorithm 2).
        Returns x_{t-1} and x_0.
        """
        x_start = self.pred_xstart(output, x, t, clip=self.clip_denoised)
        eps = self.predict_eps_from_xstart(x, t, x_start)
        if gradient is not None:
            eps = eps - self.at("sqrt_one_minus_alphas_cumprod", t) * gradient
            x_start = self.predict_xstart_from_eps(x, t, eps)
        if correct:
            x_start = correct(x_start)
        if eta:
            eps = _mix(eta, noise, math.sqrt(1 - eta**2), eps)
        direction = self.at("sqrt_one_minus_alphas_cumprod_prev", t) * eps
        return self.at("sqrt_alphas_cumprod_prev", t) * x_start + direction, x_start

    # --- the loop --------------------------------------------------------------------------------

    def p_sample_loop_progressive(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        gt: Tensor,
        gt_keep_mask: Tensor,
        times: list[int],
        draw_noise: Callable[[], Tensor],
        *,
        sampler: "Sampler",
        cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        inpa_inj_time_shift: int = 1,
    ) -> Iterator[Step]:
        """Walk ``times`` from noise to a picture whose known part is that of ``gt`` (Algorithm 1).

        The comments name the lines of the algorithm. ``gt`` and ``gt_keep_mask`` are (N, C, H, W).
        ``times`` ends at -1 and its neighbours differ by one. ``model`` gets x (N, C, H, W) and the
        network's times (N,). ``draw_noise`` gives standard normal noise of the shape of ``gt``.
        ``cond_fn`` (x, the network's times) returns scale · ∇_x log p(y | x). Noise is drawn in
        this order: x_T; what the sampler draws at the start; for each step down the step's own and
        what the sampler draws to condition x_t; one for each undo. Yields after every transition;
        the last ``x`` is the result. Raises ValueError where ``times`` leave the chain.
        """
        self.check_times(times, inpa_inj_time_shift)
        network_times = self.network_times(gt.device)[:, None].expand(-1, len(gt))
        x = draw_noise()  # line 1
        walk = Walk(self, gt, gt_keep_mask, times, draw_noise)
        sampler.start(walk)
        for number, (t, t_next) in enumerate(pairwise(times)):  # lines 2, 3 and 9
            if t_next > t:
                x = self.undo(x, t + inpa_inj_time_shift, draw_noise())  # line 10
                yield Step(t_next, x, None)
                continue
            noise = draw_noise()  # line 6
            if number > 0:  # x_T is noise everywhere: there is nothing to condition yet
                x = sampler.condition_x(walk, x, t)  # lines 4, 5 and 8
            output = model(x, network_times[t])
            gradient = cond_fn(x, network_times[t]) if cond_fn else None
            x, pred_xstart = sampler.denoise(walk, output, x, t, noise, gradient)  # line 7
            yield Step(t_next, x, pred_xstart)

    @torch.inference_mode()
    def inpaint(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        gt: Tensor,
        gt_keep_mask: Tensor,
        times: list[int],
        *,
        sampler: "Sampler",  # such as samplers.Repaint()
        generators: Sequence[torch.Generator] | None = None,  # one an image; default: torch's own
    ) -> Tensor:
        """Return ``gt`` (N, C, H, W) with its part where the mask is 0 made anew.

        ``model`` is any callable of x (N, C, H, W) and the network's times (N,); ``times`` is a
        walk such as ``get_schedule_jump`` returns; the mask is broadcast to the shape of ``gt``.
        Known pixels are not pasted back. Raises ValueError as ``p_sample_loop_progressive``.
        """
        mask, draw_noise = gt_keep_mask.to(gt).expand_as(gt), noise_source(generators, gt)
        steps = self.p_sample_loop_progressive(model, gt, mask, times, draw_noise, sampler=sampler)
        return deque(steps, maxlen=1)[0].x

    def check_times(self, times: list[int], inpa_inj_time_shift: int = 1) -> None:
        """Raise ValueError where the walk ``times`` or its undos leave the chain."""
        if max(times) >= self.num_timesteps:
            raise ValueError(f"the walk starts above a chain of {self.num_timesteps} steps")
        shifted = [t + inpa_inj_time_shift for t, t_next in pairwise(times) if t_next > t]
        if shifted and not (min(shifted) >= 0 and max(shifted) < self.num_timesteps):
            raise ValueError(f"undo would use steps {min(shifted)} to {max(shifted)} of the chain")


@dataclass
class Walk:
    """What a sampler knows of the walk it takes part in; tensors are (N, C, H, W)."""

    diffusion: GaussianDiffusion
    gt: Tensor
    gt_keep_mask: Tensor
    times: list[int]
    draw_noise: Callable[[], Tensor]
    trajectory: list[Tensor] = field(default_factory=list)  # of the known pixels, by time


class Sampler:
    """How the known pixels of a walk come in: here not at all, in samplers.py in three ways."""

    def start(self, walk: Walk) -> None:
        """Draw what the sampler needs before the first step."""

    def condition_x(self, walk: Walk, x: Tensor, t: int) -> Tensor:
        """Return x_t as the network is to see it (Algorithm 1, lines 4, 5 and 8)."""
        return x

    def denoise(
        self, walk: Walk, output: Tensor, x: Tensor, t: int, noise: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0, given the network's ``output`` at x_t (Algorithm 1, line 7)."""
        return walk.diffusion.p_sample(output, x, t, noise, gradient)


def condition(x: Tensor, known: Tensor, gt_keep_mask: Tensor) -> Tensor:
    """Take ``known`` where the mask is 1 and ``x`` where it is 0 (RePaint eq. 8c).

    RePaint takes both at the noise level of x_t. (Line 5 of the paper's Algorithm 1 prints another
    level for the known part; with that, quality is lost.) DDNM takes both without noise (its eq.
    13). A soft mask mixes.
    """
    return torch.lerp(x, known, gt_keep_mask)


def noise_source(
    generators: Sequence[torch.Generator] | None, like: Tensor
) -> Callable[[], Tensor]:
    """Return a function that draws standard normal noise, shaped as ``like`` (N, C, H, W).

    Each image has a generator of its own, so that it does not depend on the others. Without
    generators torch's global one draws. Raises ValueError unless there are N.
    """
    if generators is not None and len(generators) != len(like):
        raise ValueError(f"expected {len(like)} generators, found {len(generators)}")

    def draw_noise() -> Tensor:
        noise = torch.empty_like(like)
        for i, image in enumerate(noise):
            image.normal_(generator=generators[i] if generators else None)
        return noise

    return draw_noise


def _mix(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """Return a · x + b · y, with numbers in two passes over memory."""
    return (a * x).add_(y, alpha=b) if isinstance(b, float) else a * x + b * y


def _exp(value: Coefficient) -> Coefficient:
    return math.exp(value) if isinstance(value, float) else value.exp()
