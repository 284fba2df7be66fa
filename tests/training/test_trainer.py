"""The step, and what is left of it after an interruption: everything."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from train_cases import make_trainer, sample_diffusion, tiny_conf, write_pictures

from guided_diffusion.errors import StoppedError
from guided_diffusion.io.images import load_crop
from guided_diffusion.training import trainer
from guided_diffusion.training.checkpoints import checkpoint_path, load, newest_step
from guided_diffusion.training.loop import train
from guided_diffusion.training.losses import training_losses
from guided_diffusion.training.pictures import TrainingImages, batches
from guided_diffusion.training.report import Evaluator, log_row, read_log
from guided_diffusion.training.timesteps import draw_noise
from guided_diffusion.training.trainer import learning_rate


def run(conf, start=None):
    trainer = make_trainer(conf)
    if start:
        load(trainer, start)
    train(trainer, TrainingImages(conf), sample_diffusion(conf))
    return trainer


def steps(trainer, count):
    images = TrainingImages(trainer.conf)
    for batch in batches(images, range(trainer.step, trainer.step + count)):
        trainer.train_step(*batch)
    return trainer


def weights(network):
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def shaken(trainer):
    """Move all weights: layers that start at zero hide those below them."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.parameters:
            p += 0.1 * torch.randn(p.shape, generator=source)
    return trainer


def gradients(tmp_path, **changes):
    """Return the gradients of a first step."""
    trainer = steps(shaken(make_trainer(tiny_conf(tmp_path, **changes))), 1)
    return torch.cat([p.grad.flatten() for p in trainer.parameters])


def test_the_learning_rate_rises_stays_and_falls(tmp_path):
    conf = tiny_conf(tmp_path, lr=1.0, warmup_steps=4, lr_anneal_steps=5, iterations=20)
    rates = [learning_rate(conf, step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:16] == [1.0] * 12
    assert np.allclose(rates[16:], [0.8, 0.6, 0.4, 0.2])
    assert {learning_rate(tiny_conf(tmp_path, lr=0.5), step) for step in (0, 5, 1000)} == {0.5}


def test_averages_follow_the_weights_at_their_rates_and_faster_at_first(tmp_path):
    trainer = make_trainer(tiny_conf(tmp_path, ema_rate="0.15,0.9"))
    averages = {rate: weights(trainer.model) for rate in (0.15, 0.9)}
    for step in range(1, 4):
        steps(trainer, 1)
        for rate in averages:
            reached = min(rate, (1 + step) / (10 + step))
            averages[rate] = reached * averages[rate] + (1 - reached) * weights(trainer.model)
    for rate, average in averages.items():
        assert torch.allclose(weights(trainer.emas[rate]), average, atol=1e-6)
        assert not torch.allclose(average, weights(trainer.model), atol=1e-6)
    x, t = torch.ones(1, 3, 8, 8), torch.ones(1)
    shown = [trainer.ema_predictor(None)(x, t), trainer.emas[0.15](x, t), trainer.emas[0.9](x, t)]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])


@pytest.mark.parametrize(
    "changes", [{"microbatch": 1}, {"microbatch": 2, "use_checkpoint": True}, {"microbatch": 99}]
)
def test_what_saves_memory_does_not_change_what_is_learnt(tmp_path, changes):
    plain, thrifty = gradients(tmp_path), gradients(tmp_path, **changes)
    assert (plain != 0).float().mean() > 0.9
    assert torch.allclose(plain, thrifty, rtol=1e-3, atol=1e-5)


def test_bfloat16_learns_nearly_the_same_on_a_cpu_that_has_it(tmp_path, monkeypatch):
    plain = gradients(tmp_path)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    rounded = gradients(tmp_path, precision="bfloat16")
    assert rounded.dtype == torch.float32
    assert 1e-4 < ((rounded - plain).norm() / plain.norm()).item() < 5e-2
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    with pytest.warns(UserWarning, match="no AVX-512; it trains in float32"):
        assert torch.equal(gradients(tmp_path, precision="bfloat16"), plain)


def test_gradients_are_cut_to_their_largest_norm(tmp_path):
    norm, conf = gradients(tmp_path).norm().item(), tiny_conf(tmp_path, grad_clip=0.01)
    trainer = shaken(make_trainer(conf))
    [batch] = batches(TrainingImages(conf), range(1))
    assert norm > 0.1
    assert math.isclose(trainer.train_step(*batch)[1], norm, rel_tol=1e-5)
    cut = torch.cat([p.grad.flatten() for p in trainer.parameters])
    assert math.isclose(cut.norm().item(), 0.01, rel_tol=1e-3)


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_dropout_is_drawn_anew_in_every_step(tmp_path, monkeypatch, dropout):
    trainer = shaken(make_trainer(tiny_conf(tmp_path, dropout=dropout, lr=1e-12)))
    drawn = trainer._draw((3, 8, 8))
    monkeypatch.setattr(trainer, "_draw", lambda _: drawn)
    [batch] = batches(TrainingImages(trainer.conf), range(1))
    first, second = (trainer.train_step(*batch)[0] for _ in range(2))
    assert torch.allclose(first, second, rtol=1e-4, equal_nan=True) == (dropout == 0)


def test_the_loss_falls(tmp_path):
    trainer = make_trainer(tiny_conf(tmp_path, batch_size=8, lr=3e-3))
    images = TrainingImages(trainer.conf)
    x = images.batch(images.train, np.random.default_rng(0))[0].float() / 127.5 - 1
    x = x.repeat(10, 1, 1, 1)
    t = torch.linspace(0, 999, len(x)).long()
    noise = draw_noise(np.arange(len(x)), x.shape[1:])

    def loss():
        with torch.no_grad():
            return training_losses(trainer.diffusion, trainer.model, x, t, noise)["loss"].mean()

    before = loss()
    steps(trainer, 50)
    assert loss() < 0.9 * before


def test_the_row_weighs_losses_and_sorts_them_by_time(conf):
    trainer = make_trainer(conf)
    trainer.step = 7
    rows = torch.tensor([[0.0, 2.0, 1.0, 0.5, 0.5], [249, 1, 4, 4, 0], [999, 1, 3, 3, 0]])
    row = log_row(trainer, [(rows, torch.tensor(1.0))], 0)
    assert (row["step"], row["images"], row["lr"]) == (7, 28, 1e-3)
    assert math.isclose(row["loss"], (2 + 4 + 3) / 3)
    assert math.isclose(row["loss_q0"], (2 * 1 + 4) / 3)
    assert math.isnan(row["loss_q1"])
    assert row["loss_q3"] == 3
    norms = [torch.tensor(norm) for norm in (1.0, 1.0, math.nan, 1.0)]
    with pytest.raises(StoppedError, match="not finite in step 6"):
        log_row(trainer, [(rows, norm) for norm in norms], 0)


def test_the_sampler_of_times_learns_the_losses(tmp_path):
    trainer = make_trainer(tiny_conf(tmp_path, schedule_sampler="loss-second-moment"))
    [batch] = batches(TrainingImages(trainer.conf), range(1))
    rows = trainer.train_step(*batch)[0].numpy()
    for t, loss in rows[:, [0, 2]]:
        assert trainer.sampler.losses[int(t), 0] == loss


def test_labels_reach_the_network(tmp_path):
    for name in ("cats", "dogs"):
        write_pictures(tmp_path / "classes" / name, 4)
    changes = {"data_dir": str(tmp_path / "classes"), "num_classes": 2, "holdout": 0}
    trainer = steps(shaken(make_trainer(tiny_conf(tmp_path, class_cond=True, **changes))), 1)
    assert (trainer.model.label_emb.weight.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2, "random_crop": True, "ema_rate": "0.9,0.99", "microbatch": 2},
        {"schedule_sampler": "loss-second-moment", "diffusion_steps": 2,
         "noise_schedule": "cosine"},
    ],
    ids=["all kinds of chance", "sampler with a memory"],
)  # fmt: skip
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(tmp_path, changes):
    changes = {**changes, "iterations": 9, "log_interval": 2}
    whole = tiny_conf(tmp_path, out_dir=str(tmp_path / "whole"), **changes)
    run(whole)
    cut = tiny_conf(tmp_path, out_dir=str(tmp_path / "cut"), **changes)
    interrupted = make_trainer(cut)
    original = interrupted.train_step

    def train_step(*batch):
        if interrupted.step == 8:  # after the set of 6 and a log line that will be written again
            raise KeyboardInterrupt
        return original(*batch)

    interrupted.train_step = train_step
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, TrainingImages(cut), sample_diffusion(cut))
    assert newest_step(cut) == 6
    run(cut, start=6)

    for kind in ("model", *(f"ema_{rate}_" for rate in whole.ema_rates)):
        states = [torch.load(checkpoint_path(conf, kind, 9)) for conf in (whole, cut)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    logs = [read_log(Path(conf.out_dir) / "log.csv") for conf in (whole, cut)]
    for row in (*logs[0], *logs[1]):
        del row["images_per_s"]
    assert str(logs[0]) == str(logs[1])
    assert [row["step"] for row in logs[0]] == [2, 3, 4, 6, 8, 9]


def test_what_is_compiled_on_request_includes_the_exchange_of_gradients(tmp_path, monkeypatch):
    class Shared(torch.nn.Module):
        def __init__(self, module, device_ids=None):
            super().__init__()
            self.module, self.device_ids = module, device_ids

    monkeypatch.setattr(trainer, "DistributedDataParallel", Shared)
    monkeypatch.setattr(torch, "compile", lambda module: ("compiled", module))
    monkeypatch.setenv("WORLD_SIZE", "2")
    plain = make_trainer(tiny_conf(tmp_path, compile="auto"))
    compiled = make_trainer(tiny_conf(tmp_path, compile=True))
    assert plain.network is plain.shared
    assert compiled.network == ("compiled", compiled.shared)
    assert compiled.shared.module is compiled.model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu")
@pytest.mark.usefixtures("switches")
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path):
    conf = tiny_conf(tmp_path, device="cuda", precision="bfloat16", compile=False)
    own = make_trainer(conf, torch.device("cuda", 0))
    (first, _), (second, _) = batches(TrainingImages(conf), range(2))
    own.train_step(first, None)  # what is made once is made
    try:
        torch.cuda.set_sync_debug_mode("error")
        own.train_step(second, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_sixteen_pictures_are_learnt_by_heart(tmp_path):
    write_pictures(tmp_path / "pictures", 16, side=8)
    changes = {"channel_mult": "1,1", "random_flip": False, "holdout": 0, "batch_size": 48}
    changes |= {"lr": 3e-3, "warmup_steps": 20, "lr_anneal_steps": 500, "grad_clip": 1}
    changes |= {"iterations": 1000, "log_interval": 100, "save_interval": 1000}
    conf = tiny_conf(tmp_path, ema_rate="0.99", sample_respacing="50", **changes)
    trainer = run(conf)
    rows = read_log(tmp_path / "out" / "log.csv")
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]

    images = TrainingImages(conf)
    evaluator = Evaluator(trainer, images, sample_diffusion(conf))
    nothing = torch.zeros(32, 3, 8, 8)
    samples = evaluator._repaint(nothing, nothing, None, jump_n_sample=1) / 255.0
    pictures = np.stack([load_crop(path, 8) for path in images.paths]) / 255.0
    distances = ((samples[:, None] - pictures[None]) ** 2).mean(axis=(2, 3, 4))
    apart = ((pictures[:, None] - pictures[None]) ** 2).mean(axis=(2, 3, 4))
    assert np.median(distances.min(axis=1)) < 0.1 * np.median(apart)
    assert len(set(distances.argmin(axis=1))) >= 6  # and not one of them alone
