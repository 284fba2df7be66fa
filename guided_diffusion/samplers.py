"""CONDITION: how the known pixels come in. Each sampler is one class.

To add one, derive it from ``Sampler`` (gaussian_diffusion.py) or from one of these, override the
methods that differ, and give it a name for the YAML in ``SAMPLERS`` of script_util.py.
"""

from dataclasses import dataclass

from guided_diffusion.gaussian_diffusion import Sampler, Tensor, Walk, condition


@dataclass(frozen=True)
class Repaint(Sampler):
    """RePaint: put the known pixels, noised to its level, into every x_t (its eq. 8)."""

    inject: bool = True  # put the known pixels in at all; without them the picture is a new one
    cumulative_noise: bool = False  # noise them along one walk, not independently in every step

    def start(self, walk: Walk) -> None:
        """Draw one forward walk from the known picture, where its noise is cumulative."""
        if not (self.inject and self.cumulative_noise):
            return
        z = walk.gt
        for t in range(walk.diffusion.num_timesteps):  # Upstream: the whole chain's noise is drawn
            noise = walk.draw_noise()
            if t <= max(walk.times):
                z = walk.diffusion.undo(z, t, noise)
                walk.trajectory.append(z)

    def condition_x(self, walk: Walk, x: Tensor, t: int) -> Tensor:
        """Return x_t with the known pixels at its noise level."""
        if not self.inject:
            return x
        if walk.trajectory:
            known = walk.trajectory[t]
        else:
            known = walk.diffusion.q_sample(walk.gt, t, walk.draw_noise())
        return condition(x, known, walk.gt_keep_mask)


@dataclass(frozen=True)
class Ddim(Repaint):
    """RePaint's conditioning with DDIM's steps, which add no noise (Song et al. 2021, eq. 12)."""

    def denoise(
        self, walk: Walk, output: Tensor, x: Tensor, t: int, noise: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0, given the network's ``output`` at x_t."""
        return walk.diffusion.ddim_sample(output, x, t, noise, gradient)


@dataclass(frozen=True)
class Ddnm(Sampler):
    """DDNM: put the known pixels into every predicted x_0 (Wang et al. 2023, section 3.3).

    An ``overshoot`` moves them 1 + overshoot (1 - alphabar_t) times the way from their prediction
    to their values, so that in few steps what is beside them follows.
    """

    eta: float = 0.85  # share of fresh noise in a step, 0 to 1
    overshoot: float = 0.0
    inject: bool = True

    def denoise(
        self, walk: Walk, output: Tensor, x: Tensor, t: int, noise: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0 with the known pixels, given the network's ``output`` at x_t."""
        diffusion = walk.diffusion
        way = 1 + self.overshoot * float(1 - diffusion.alphas_cumprod[t])

        def correct(x_start: Tensor) -> Tensor:
            if not self.inject:
                return x_start
            return x_start.lerp(condition(x_start, walk.gt, walk.gt_keep_mask), way)

        return diffusion.ddim_sample(output, x, t, noise, gradient, eta=self.eta, correct=correct)
