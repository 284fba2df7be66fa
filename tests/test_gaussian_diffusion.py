import itertools
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from network_cases import GOLDEN, chain, golden_networks, step_inputs

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    condition,
    get_named_beta_schedule,
)
from guided_diffusion.respace import respaced_betas, space_timesteps
from guided_diffusion.run.inpainter import classifier_gradient
from guided_diffusion.samplers import Ddim, Ddnm, Repaint
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.script_util import create_sampler
from guided_diffusion.training.losses import training_losses


def repaint(diffusion, model, gt, mask, times, draw, **flags):
    """Walk with the sampler that these keys of a YAML choose."""
    loop = ("cond_fn", "inpa_inj_time_shift")
    keys = {
        "sampler": "repaint",
        "use_ddim": False,
        "ddnm_eta": 0.85,
        "ddnm_overshoot": 0.0,
        "inpa_inj_sched_prev": True,
        "inpa_inj_sched_prev_cumnoise": False,
    }
    keys |= {name: value for name, value in flags.items() if name not in loop}
    sampler = create_sampler(SimpleNamespace(**keys))
    rest = {name: value for name, value in flags.items() if name in loop}
    return diffusion.p_sample_loop_progressive(
        model, gt, mask, times, draw, sampler=sampler, **rest
    )


def noise_source(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def last(steps):
    with torch.inference_mode():
        *_, step = steps
    assert step.t == -1
    return step.x


# --- betas and tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [25, 1000, 4000])
def test_linear_betas(steps):
    betas, scale = get_named_beta_schedule("linear", steps), 1000 / steps
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, scale * np.linspace(1e-4, 0.02, steps), rtol=1e-12)


def test_cosine_betas():
    golden = np.load(GOLDEN / "losses.npz")["cosine_betas_1000"]
    np.testing.assert_allclose(get_named_beta_schedule("cosine", 1000), golden, rtol=0, atol=1e-12)
    assert get_named_beta_schedule("cosine", 7)[-1] == 0.999


def test_unknown_schedule():
    with pytest.raises(ValueError, match="linear or cosine, found 'sqrt'"):
        get_named_beta_schedule("sqrt", 10)


@pytest.mark.parametrize("betas", [[0.1], [0.1, 0.0], [0.1, 1.0], [0.1, np.nan]])
def test_impossible_chains(betas):
    with pytest.raises(ValueError, match=r"at least 2 steps|between 0 and 1"):
        GaussianDiffusion(np.array(betas))


@pytest.mark.parametrize("time_scale", [1.0, 0.25])
def test_the_network_is_told_original_and_scaled_times(time_scale):
    diffusion = chain("3", time_scale=time_scale)
    assert diffusion.timestep_map.tolist() == [0, 500, 999]
    seen = []

    def model(x, t):
        seen.append(t.clone())
        return torch.zeros(2, 6, 4, 4)

    gt = torch.zeros(2, 3, 4, 4)
    last(repaint(diffusion, model, gt, gt, [2, 1, 0, -1], noise_source(gt.shape)))
    training_losses(diffusion, model, gt, torch.tensor([2, 1]), gt)
    expected = [[999.0, 999.0], [500.0, 500.0], [0.0, 0.0], [999.0, 500.0]]
    assert [(t / time_scale).tolist() for t in seen] == expected


# --- golden samples and losses -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "batch_size"), [("plain", 1), ("plain", 3), ("guided", 2)])
def test_golden_samples_for_every_batch_size(name, batch_size):
    conf, expect, model, classifier = golden_networks(name)
    gt = expect["gt_u8"].permute(0, 3, 1, 2).float() / 127.5 - 1
    mask = expect["mask_u8"].permute(0, 3, 1, 2).float() / 255
    diffusion = chain(conf["timestep_respacing"])
    times = get_schedule_jump(**conf["schedule_jump_params"])
    for begin in range(0, len(gt), batch_size):
        batch = range(begin, min(begin + batch_size, len(gt)))
        generators = [torch.Generator().manual_seed(conf["seed"] + k) for k in batch]
        y = torch.cat([torch.randint(0, 1000, (1,), generator=g) for g in generators])
        assert y.tolist() == expect["y"][batch].tolist()
        cond_fn = classifier and (
            lambda x, t, y=y: classifier_gradient(classifier, x, t, y, conf["classifier_scale"])
        )
        sample = last(
            repaint(
                diffusion,
                lambda x, t, y=y: model(x, t, y),
                gt[batch],
                mask[batch],
                times,
                lambda gs=generators: torch.cat(
                    [torch.randn((1, *gt.shape[1:]), generator=g) for g in gs]
                ),
                cond_fn=cond_fn,
            )
        )
        torch.testing.assert_close(sample, expect["sample"][batch], rtol=0, atol=1e-4)


# --- the loop against a second, naive one --------------------------------------------------------


def naive_repaint(network, gradient, gt, mask, times, draw, betas, kept, flags):
    """The loop in words turned into float64 numpy, apart from the code that is tested."""
    original = np.cumprod(1 - betas)
    abar = original[kept]
    beta = np.array([1 - abar[i] / (abar[i - 1] if i else 1) for i in range(len(kept))])
    abar_before = [1.0, *abar[:-1]]
    variance = [beta[i] * (1 - abar_before[i]) / (1 - abar[i]) for i in range(len(kept))]

    def predicted(x, t):
        out = network(x, kept[t] * flags["time_scale"])
        if flags["predict_xstart"]:
            x0 = out[:, :3]
        else:
            x0 = x / np.sqrt(abar[t]) - np.sqrt(1 / abar[t] - 1) * out[:, :3]
        if flags["clip_denoised"]:
            x0 = np.clip(x0, -1, 1)
        if flags["learn_sigma"]:
            f = (out[:, 3:] + 1) / 2
            log_var = f * np.log(beta[t]) + (1 - f) * np.log(variance[max(t, 1)])
        else:
            log_var = np.full_like(x, np.log(beta[t] if t else variance[1]))
        return x0, log_var

    x = draw()
    trajectory = []
    if flags["cumnoise"] and flags["sched_prev"]:
        z = gt
        for i in range(len(kept)):
            z = np.sqrt(1 - beta[i]) * z + np.sqrt(beta[i]) * draw()
            trajectory.append(z)
    reverse_steps = 0
    for t, t_next in pairwise(times):
        if t_next > t:
            k = t + flags["time_shift"]
            x = np.sqrt(1 - beta[k]) * x + np.sqrt(beta[k]) * draw()
            continue
        eps1 = draw()
        reverse_steps += 1
        if flags["sched_prev"] and reverse_steps > 1:
            if flags["cumnoise"]:
                known = trajectory[t]
            else:
                known = np.sqrt(abar[t]) * gt + np.sqrt(1 - abar[t]) * draw()
            x = mask * known + (1 - mask) * x
        x0, log_var = predicted(x, t)
        guide = gradient(x, kept[t] * flags["time_scale"]) if flags["guided"] else None
        if flags["use_ddim"]:
            if flags["guided"]:
                eps = (x / np.sqrt(abar[t]) - x0) / np.sqrt(1 / abar[t] - 1)
                eps = eps - np.sqrt(1 - abar[t]) * guide
                x0 = x / np.sqrt(abar[t]) - np.sqrt(1 / abar[t] - 1) * eps
            eps = (x / np.sqrt(abar[t]) - x0) / np.sqrt(1 / abar[t] - 1)
            x = np.sqrt(abar_before[t]) * x0 + np.sqrt(1 - abar_before[t]) * eps
        else:
            coef1 = beta[t] * np.sqrt(abar_before[t]) / (1 - abar[t])
            coef2 = (1 - abar_before[t]) * np.sqrt(1 - beta[t]) / (1 - abar[t])
            mean = coef1 * x0 + coef2 * x
            if flags["guided"]:
                mean = mean + np.exp(log_var) * guide
            x = mean + (t != 0) * np.exp(0.5 * log_var) * eps1
    return x, x0


def toy_network(module, flags):
    """Smooth, dependent on neighbours and on time; the same in numpy and in torch."""

    def network(x, t):
        if module is torch:
            t = t.to(x.dtype)[:, None, None, None]
        beside = module.roll(x, 1, -1) if module is np else torch.roll(x, 1, -1)
        first = 0.7 * module.sin(x) + 0.2 * module.cos(2 * beside + t / 300)
        second = module.sin(3 * x + t / 200)  # within [-1, 1], as what is learned mostly is
        parts = [first, second] if flags["learn_sigma"] else [first]
        return np.concatenate(parts, 1) if module is np else torch.cat(parts, 1)

    return network


def toy_gradient(module):
    def gradient(x, t):
        if module is torch:
            t = t.to(x.dtype)[:, None, None, None]
        return 0.5 * module.cos(x + t / 100)

    return gradient


SWITCHES = (
    "learn_sigma", "predict_xstart", "clip_denoised", "use_ddim", "sched_prev", "cumnoise",
    "guided",
)  # fmt: skip


@pytest.mark.parametrize(
    "values",
    list(itertools.product([True, False], repeat=len(SWITCHES))),
    ids=lambda v: "".join("01"[x] for x in v),
)
def test_all_combinations_against_a_naive_loop(values):
    time_shift = sum(values) % 3
    flags = dict(zip(SWITCHES, values, strict=True))
    flags |= {"time_shift": time_shift, "time_scale": 0.5 if time_shift == 2 else 1.0}
    steps, respacing = (1000, "9") if time_shift else (400, "5,4")
    betas = get_named_beta_schedule("linear" if time_shift else "cosine", steps)
    kept = space_timesteps(steps, respacing)
    times = [7, 6, 7, *get_schedule_jump(7, 1, 2, 2)]  # back to the top once
    generator = np.random.default_rng(sum(values))
    shape = (2, 3, 4, 4)
    noises = generator.normal(size=(60, *shape)).astype(np.float32)
    gt = generator.uniform(-1, 1, shape).astype(np.float32)
    mask = generator.choice([0.0, 0.3, 1.0], shape).astype(np.float32)

    drawn, drawn_by_torch = iter(noises.astype(np.float64)), iter(torch.tensor(noises))
    network, gradient = toy_network(np, flags), toy_gradient(np)
    exact = gt.astype(np.float64), mask.astype(np.float64), times, drawn.__next__
    expected = naive_repaint(network, gradient, *exact, betas, kept, flags)
    keys = ("learn_sigma", "predict_xstart", "clip_denoised", "time_scale")
    chosen = {key: flags[key] for key in keys}
    with torch.inference_mode():
        *_, step = repaint(
            GaussianDiffusion(respaced_betas(betas, kept), kept, **chosen),
            toy_network(torch, flags),
            torch.tensor(gt),
            torch.tensor(mask),
            times,
            drawn_by_torch.__next__,
            cond_fn=toy_gradient(torch) if flags["guided"] else None,
            use_ddim=flags["use_ddim"],
            inpa_inj_sched_prev=flags["sched_prev"],
            inpa_inj_sched_prev_cumnoise=flags["cumnoise"],
            inpa_inj_time_shift=time_shift,
        )
    assert len(list(drawn_by_torch)) == len(list(drawn)) > 0
    for got, wanted in zip((step.x, step.pred_xstart), expected, strict=True):
        assert np.abs(got.numpy() - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())


# --- what a step is ------------------------------------------------------------------------------


WALK = [2, 1, 2, 1, 0, -1]  # down, up, down, down, down


def bounded_network(x, t):
    return torch.cat([torch.sin(x), torch.cos(3 * x + t[:, None, None, None] / 200)], dim=1)


def test_steps_tell_where_they_are():
    gt = torch.zeros(1, 3, 2, 2)
    steps = list(repaint(chain("5"), bounded_network, gt, gt, WALK, noise_source(gt.shape)))
    assert [step.t for step in steps] == WALK[1:]
    assert [step.pred_xstart is None for step in steps] == [False, True, False, False, False]


# --- identities of conditioning ------------------------------------------------------------------


def test_where_nothing_is_known_the_picture_has_no_effect():
    gt, times = torch.rand(2, 3, 4, 4) * 2 - 1, get_schedule_jump(9, 1, 3, 2)
    first, second = (
        last(repaint(chain(), bounded_network, own, 0 * gt, times, noise_source(gt.shape)))
        for own in (gt, -gt)
    )
    assert torch.equal(first, second)


def test_all_known_returns_the_picture_up_to_the_last_noise():
    diffusion, gt = chain(), torch.rand(2, 3, 4, 4) * 1.6 - 0.8
    times, mask, drawn = get_schedule_jump(12, 1, 3, 2), torch.ones(2, 3, 4, 4), []
    source = noise_source(gt.shape)

    def draw():
        drawn.append(source())
        return drawn[-1]

    def run(eps_of):
        def model(x, t):
            return torch.cat([eps_of(x, t), torch.zeros_like(x)], 1)

        return last(repaint(diffusion, model, gt, mask, times, draw))

    # A network that knows the noise gives back the picture, whatever happened before.
    def true_noise(x, t):
        level = diffusion.timestep_map.tolist().index(int(t[0]))
        return diffusion.predict_eps_from_xstart(x, level, gt)

    torch.testing.assert_close(run(true_noise), gt, rtol=0, atol=1e-5)
    # One that sees none leaves exactly the noise with which level 0 was conditioned.
    left = math.sqrt(1 / diffusion.alphas_cumprod[0] - 1)
    result = run(lambda x, t: torch.zeros_like(x))
    torch.testing.assert_close(result, (gt + left * drawn[-1]).clamp(-1, 1))


# --- closed forms: where the exact answer is known -----------------------------------------------


def gaussian_denoiser(diffusion, mu, s):
    """The exact eps and variance of a picture whose pixels are independent N(mu, s²)."""

    def model(x, t):
        level = diffusion.timestep_map.tolist().index(int(t[0]))
        abar, beta = diffusion.alphas_cumprod[level], diffusion.betas[level]
        marginal = abar * s**2 + 1 - abar
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * mu) / marginal
        # Var(x_{t-1} given x_t) = the posterior's + coef1² · Var(x_0 given x_t), as a fraction f of
        # the way between the two learnable bounds.
        exact = diffusion.posterior_variance[level] + (
            diffusion.posterior_mean_coef1[level] ** 2 * s**2 * (1 - abar) / marginal
        )
        lower = diffusion.posterior_log_variance_clipped[level]
        f = (math.log(exact) - lower) / (math.log(beta) - lower)
        return torch.cat([eps, torch.full_like(x, 2 * f - 1)], 1)

    return model


@pytest.mark.parametrize(
    ("mu", "s", "use_ddim", "steps", "times"),
    [
        (0.3, 0.5, False, 1000, list(range(999, -2, -1))),
        (-0.6, 0.1, True, 1000, list(range(999, -2, -1))),
        (0.3, 0.5, False, 250, get_schedule_jump(250, 1, 50, 3)),  # jumps change no distribution
    ],
    ids=["ddpm", "ddim", "jumps"],
)
def test_sampling_reproduces_a_gaussian(mu, s, use_ddim, steps, times):
    diffusion = chain(str(steps), clip_denoised=False)
    gt, model = torch.zeros(4, 3, 40, 40), gaussian_denoiser(diffusion, mu, s)
    draw, flags = noise_source(gt.shape), {"use_ddim": use_ddim, "inpa_inj_sched_prev": False}
    sample = last(repaint(diffusion, model, gt, gt, times, draw, **flags))
    n, more = sample.numel(), 1000 / steps  # 19,200 independent samples; few steps are less exact
    assert sample.mean().item() == pytest.approx(mu, abs=4 * s / math.sqrt(n) + 0.005)
    assert sample.std().item() == pytest.approx(s, rel=4 / math.sqrt(2 * n) + 0.005 * more)
    z = (sample - mu) / s
    assert (z**3).mean().item() == pytest.approx(0, abs=0.1)
    assert (z**4).mean().item() == pytest.approx(3, abs=0.2)


RHO, SPREAD = 0.8, 0.5


def pair_denoiser(diffusion):
    """The exact eps of pixels that come in pairs (left, right), N(0, SPREAD²), correlated RHO."""

    def model(x, t):
        level = diffusion.timestep_map.tolist().index(int(t[0]))
        abar = diffusion.alphas_cumprod[level]
        own, shared = abar * SPREAD**2 + 1 - abar, abar * SPREAD**2 * RHO
        scale = math.sqrt(1 - abar) / (own**2 - shared**2)
        eps = scale * (own * x - shared * x.flip(-1))
        return torch.cat([eps, torch.zeros_like(x)], 1)

    return model


def posterior_of_pairs(jump_n_sample):
    """Slope of the generated right pixel over the known left, and the deviation around it."""
    diffusion = chain("250", clip_denoised=False)
    shape = (4, 3, 400, 2)
    gt = SPREAD * noise_source(shape, seed=100)()
    mask = torch.zeros(shape)
    mask[..., 0] = 1
    model, times = pair_denoiser(diffusion), get_schedule_jump(250, 1, 10, jump_n_sample)
    sample = last(repaint(diffusion, model, gt, mask, times, noise_source(shape)))
    known, generated = gt[..., 0], sample[..., 1]
    slope = (known * generated).sum() / known.square().sum()
    return slope.item(), (generated - slope * known).std().item()


def test_resampling_brings_the_posterior_nearer():
    exact_slope, exact_deviation = RHO, SPREAD * math.sqrt(1 - RHO**2)
    (slope_1, deviation_1), (slope_10, deviation_10) = map(posterior_of_pairs, (1, 10))
    # Without resampling the generated pixel follows the known one too little, but follows it.
    assert 0.2 * exact_slope < slope_1 < 0.75 * exact_slope
    assert abs(slope_10 - exact_slope) < 0.3 * abs(slope_1 - exact_slope)
    assert abs(deviation_10 - exact_deviation) < 0.3 * abs(deviation_1 - exact_deviation)


# --- one step ------------------------------------------------------------------------------------


def test_the_smaller_variance_that_is_not_learned():
    diffusion = chain(learn_sigma=False, fixed_small=True)
    output, *_ = step_inputs(channels=3)
    variances = [math.exp(diffusion.pred_log_variance(output, t)) for t in range(12)]
    expected = [diffusion.posterior_variance[1], *diffusion.posterior_variance[1:]]
    np.testing.assert_allclose(variances, expected, rtol=1e-6)


@pytest.mark.parametrize("t", [0, 5, 11])
def test_a_velocity_means_the_picture_that_it_was_made_of(t):
    _, x_start, eps, _ = step_inputs()
    diffusion = chain(predict_v=True, learn_sigma=False)
    x = diffusion.q_sample(x_start, t, eps)
    signal, noise = diffusion.sqrt_alphas_cumprod[t], diffusion.sqrt_one_minus_alphas_cumprod[t]
    v = signal * eps - noise * x_start
    found = diffusion.pred_xstart(v.float(), x, t, clip=False)
    torch.testing.assert_close(found, x_start, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(diffusion.target(x_start, t, eps), v.float())


@pytest.mark.parametrize("kind", [{}, {"predict_xstart": True}, {"predict_v": True}], ids=str)
def test_the_target_means_the_picture_that_noise_was_added_to(kind):
    _, x_start, eps, _ = step_inputs()
    diffusion, t = chain(**kind), torch.tensor([2, 9])
    x, target = diffusion.q_sample(x_start, t, eps), diffusion.target(x_start, t, eps)
    found = diffusion.pred_xstart(target, x, t, clip=False)
    torch.testing.assert_close(found, x_start, rtol=1e-4, atol=1e-4)


def test_pictures_are_clipped_to_the_range_that_is_stated():
    output, x, *_ = step_inputs(channels=3)
    diffusion = chain(predict_xstart=True, learn_sigma=False, clip_range=2.5)
    found = diffusion.pred_xstart(10 * output, x, 3, clip=True)
    assert torch.equal(found, (10 * output).clamp(-2.5, 2.5))


def test_tables_take_one_step_or_a_batch_of_them():
    diffusion = chain()
    _, x, noise, _ = step_inputs()
    both = diffusion.q_sample(x, torch.tensor([3, 9]), noise)
    for i, t in enumerate((3, 9)):
        abar = diffusion.alphas_cumprod[t]
        expected = math.sqrt(abar) * x[i] + math.sqrt(1 - abar) * noise[i]
        torch.testing.assert_close(both[i], expected)
        torch.testing.assert_close(diffusion.q_sample(x, t, noise)[i], expected)


@pytest.mark.parametrize("inference", [False, True])
def test_classifier_gradient(inference):
    weight = torch.randn(5, 3 * 4 * 4, generator=torch.Generator().manual_seed(2))

    def classifier(x, t):
        return torch.tanh(x.flatten(1)) @ weight.T + t[:, None].float() / 500

    x, t, y = step_inputs()[1], torch.tensor([10, 700]), torch.tensor([4, 1])
    # By hand: d/dx_j log softmax(z)_y = (W_yj - Σ_c p_c W_cj) · (1 - tanh²(x_j)).
    p = torch.softmax(classifier(x, t), dim=-1)
    expected = (weight[y] - p @ weight) * (1 - torch.tanh(x.flatten(1)) ** 2)
    with torch.inference_mode(inference):
        # As in the loop, all tensors come from the same mode.
        got = classifier_gradient(classifier, x.clone(), t.clone(), y, 2.5)
    torch.testing.assert_close(got, 2.5 * expected.view_as(x), rtol=1e-4, atol=1e-5)
    assert not got.requires_grad


# --- walks that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "shift", "problem"),
    [
        ([5, 4, 3, 2, 1, 0, -1], 1, "starts above a chain of 5 steps"),
        ([4, 3, 4, 3, 2, 1, 0, -1], 2, "undo would use steps 5 to 5"),
        ([4, 3, 4, 3, 2, 1, 2, 1, 0, -1], 2, "undo would use steps 3 to 5"),
        ([2, 1, 0, 1, 0, -1], -1, "undo would use steps -1 to -1"),
    ],
)
def test_walks_that_leave_the_chain(times, shift, problem):
    diffusion, gt = chain("5"), torch.zeros(1, 3, 2, 2)
    # Found before the network is called or noise is drawn: here there are none.
    with pytest.raises(ValueError, match=problem):
        last(repaint(diffusion, None, gt, gt, times, None, inpa_inj_time_shift=shift))


def test_walks_that_fit():
    chain("5").check_times([4, 3, 4, 3, 2, 1, 0, -1], 1)
    chain("5").check_times([4, 3, 4, 3, 2, 1, 0, -1], -3)
    chain("5").check_times([4, 3, 2, 1, 0, -1], 100)  # without undos a shift has no effect


# --- ddnm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 6])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("overshoot", [0.0, 1.5])
def test_a_step_of_ddnm_by_hand(t, eta, overshoot):
    diffusion = chain(clip_denoised=False)
    output, x, noise, known = step_inputs()
    mask = torch.linspace(0, 1, known.numel()).view_as(known)  # soft ones, too
    draws = iter([x, noise])
    flags = {"sampler": "ddnm", "ddnm_eta": eta, "ddnm_overshoot": overshoot}
    walk = [t, t - 1]
    step = next(repaint(diffusion, lambda *_: output, known, mask, walk, draws.__next__, **flags))
    abar, before = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t - 1] if t else 1.0
    eps = output[:, :3]
    x_start = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    x_hat = x_start + mask * (1 + overshoot * (1 - abar)) * (known - x_start)
    mixed = eta * noise + math.sqrt(1 - eta**2) * eps
    expected = math.sqrt(before) * x_hat + math.sqrt(1 - before) * mixed
    torch.testing.assert_close(step.x, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.pred_xstart, x_hat, rtol=1e-4, atol=1e-4)


# --- the door for other networks and other data --------------------------------------------------


def two_channel_network(x, t):
    return torch.sin(x + t[:, None, None, None] / 1000)


@pytest.mark.parametrize("sampler", [Repaint(), Repaint(cumulative_noise=True), Ddim(), Ddnm(0.5)])
def test_inpaint_takes_any_shape_and_keeps_what_is_known(sampler):
    diffusion = chain("5", learn_sigma=False)
    gt = torch.linspace(-1, 1, 2 * 2 * 3 * 5).reshape(2, 2, 3, 5)
    mask = torch.ones(1, 1, 3, 5)
    mask[..., 2:] = 0
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    made = diffusion.inpaint(
        two_channel_network, gt, mask, WALK, sampler=sampler, generators=generators
    )
    assert made.shape == gt.shape
    seed_2 = [torch.Generator().manual_seed(2)]
    alone = diffusion.inpaint(
        two_channel_network, gt[1:], mask, WALK, sampler=sampler, generators=seed_2
    )
    torch.testing.assert_close(made[1:], alone)
    if isinstance(sampler, Ddnm):  # its last step ends at x_0 itself
        torch.testing.assert_close(made[..., :2], gt[..., :2])
    assert (made[..., 2:] - gt[..., 2:]).abs().mean() > 0.05


def test_inpaint_wants_a_generator_for_each_image():
    gt = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="expected 2 generators, found 1"):
        chain("5").inpaint(
            two_channel_network, gt, gt, WALK, sampler=Repaint(), generators=[torch.Generator()]
        )


def test_a_sampler_of_ones_own_is_one_class():
    class KeepFirst(Repaint):
        def condition_x(self, walk, x, t):
            return condition(x, walk.gt, walk.gt_keep_mask)

    gt = torch.full((1, 1, 2, 2), 0.5)
    seen = []

    def network(x, t):
        seen.append(x.clone())
        return torch.zeros_like(x)

    chain("5", learn_sigma=False).inpaint(
        network, gt, torch.ones_like(gt), WALK, sampler=KeepFirst()
    )
    assert all(torch.equal(x, gt) for x in seen[1:])
