"""The log, the plot and the pictures: of the right times, and always of the same things."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import sample_diffusion, tiny_conf

from guided_diffusion.errors import UserError
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training.pictures import TrainingImages
from guided_diffusion.training.report import (
    COLUMNS,
    Evaluator,
    append_log,
    read_log,
    restart_log,
    write_loss_plot,
)

GRAY = 0.25  # every picture, in [-1, 1], where the network below is perfect


def know_everything(diffusion):
    """Return a predictor of the true noise of an all-gray picture, and of a small variance."""
    signal = torch.tensor(diffusion.sqrt_alphas_cumprod, dtype=torch.float32)
    noise = torch.tensor(diffusion.sqrt_one_minus_alphas_cumprod, dtype=torch.float32)
    places = {int(time): place for place, time in enumerate(diffusion.timestep_map)}

    def predict(x, timesteps):
        t = torch.tensor([places[int(time)] for time in timesteps])[:, None, None, None]
        eps = (x - signal[t] * GRAY) / noise[t]
        return torch.cat([eps, torch.full_like(eps, -1.0)], dim=1)

    return lambda labels: predict


def know_nothing(labels):
    return lambda x, timesteps: torch.zeros(len(x), 6, *x.shape[2:])


def observe(conf, predictor, part=4):
    trainer = types.SimpleNamespace(
        conf=conf,
        diffusion=create_gaussian_diffusion(conf),
        ema_predictor=predictor,
        device=torch.device("cpu"),
        part=part,
    )
    return Evaluator(trainer, TrainingImages(conf), sample_diffusion(conf))


def gray_pictures(folder, count=12):
    folder.mkdir()
    for number in range(count):
        level = round((GRAY + 1) * 127.5)
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / f"{number:02d}.png")


def test_the_log_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "log.csv"
    assert read_log(path) == []
    restart_log(path, 0)
    append_log(path, {"step": 100, "loss": 0.125, "mse": math.nan})
    [row] = read_log(path)
    assert (row["step"], row["loss"]) == (100, 0.125)
    assert math.isnan(row["mse"])
    assert math.isnan(row["held_out"])
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert "nan" not in path.read_text()


@pytest.mark.parametrize("damage", [b"2,0.6e-", b"\xe4\xf6\xfc", b"\0" * 50, b'"2'])
def test_the_log_is_cut_back_and_damaged_lines_are_left_out(tmp_path, damage):
    path = tmp_path / "log.csv"
    restart_log(path, 0)
    for step in (1, 2, 3, 4):
        append_log(path, {"step": step, "loss": step / 3})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage + b"\n", *lines[3:]]))
    assert [row["step"] for row in read_log(path)] == [1, 3, 4]
    with path.open("a") as stream:
        stream.write("5,0.1,0.")  # the power went here
    restart_log(path, 3)
    assert path.read_bytes().splitlines(keepends=True) == [*lines[:2], lines[3]]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(UserError, match=r"log.csv: cannot be written"):
        append_log(tmp_path / "log.csv", {"step": 1})


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_plot_is_a_picture_whatever_there_is(tmp_path, count):
    rows = []
    for step in range(count):
        row = dict.fromkeys(COLUMNS, math.nan)
        rows.append(row | {"step": step, "loss_q0": 0.5, "loss_q3": math.nan, "held_out_q1": 0.2})
    write_loss_plot(tmp_path / "loss.png", rows)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        coloured = np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2) > 50
        assert coloured.any() == (count > 0)


def test_who_knows_everything_has_no_error_left_and_who_knows_nothing_has_it_all(tmp_path):
    gray_pictures(tmp_path / "pictures")
    conf = tiny_conf(tmp_path, learn_sigma=True)
    diffusion = create_gaussian_diffusion(conf)
    best = observe(conf, know_everything(diffusion)).held_out_losses()
    worst = observe(conf, know_nothing).held_out_losses()
    assert best["held_out_q3"] < 1e-3
    assert all(worst[f"held_out_q{q}"] > 0.7 for q in range(4))
    assert math.isclose(best["held_out"], np.mean([best[f"held_out_q{q}"] for q in range(4)]))


def test_each_quartile_has_its_own_times(conf):
    seen = []

    def predictor(labels):
        def predict(x, timesteps):
            seen.append(timesteps)
            return know_nothing(labels)(x, timesteps)

        return predict

    evaluator = observe(conf, predictor, part=100)
    evaluator.held_out_losses()
    assert len(seen) == 4
    for q, times in enumerate(seen):
        assert len(times) == len(evaluator.held_out)
        assert ((times >= 250 * q) & (times < 250 * (q + 1))).all()


def test_the_held_out_loss_is_the_same_however_it_is_cut_up(tmp_path):
    conf = tiny_conf(tmp_path, random_crop=True)
    losses = [observe(conf, know_nothing, part).held_out_losses() for part in (2, 100)]
    assert losses[0] == pytest.approx(losses[1])
    evaluator = observe(tiny_conf(tmp_path, holdout=0), know_nothing)
    assert evaluator.held_out_losses() == {}
    assert evaluator.shown.tolist() == [0, 11]  # neighbours are often alike


def test_samples_are_what_the_network_knows(tmp_path):
    gray_pictures(tmp_path / "pictures")
    conf = tiny_conf(tmp_path, sample_count=5, sample_respacing="20")
    evaluator = observe(conf, know_everything(sample_diffusion(conf)))
    evaluator.write_samples(tmp_path / "samples.png")
    pixels = np.asarray(Image.open(tmp_path / "samples.png"))
    assert pixels.shape == (2 * 128, 3 * 128, 3)
    assert (abs(pixels[:128].astype(int) - round((GRAY + 1) * 127.5)) <= 1).all()
    assert (pixels[128:, 256:] == 255).all()  # the sixth place is empty


def test_inpaintings_show_hole_result_and_truth(tmp_path):
    gray_pictures(tmp_path / "pictures")
    conf = tiny_conf(tmp_path, sample_count=2, sample_mask="genhalf", sample_respacing="20")
    evaluator = observe(conf, know_everything(sample_diffusion(conf)))
    evaluator.write_inpaintings(tmp_path / "inpainted.png")
    pixels = np.asarray(Image.open(tmp_path / "inpainted.png")).astype(int)
    level = round((GRAY + 1) * 127.5)
    assert (
        (abs(pixels - level) <= 1).all(axis=2)
    ).sum() > 2 * 2.4 * 256 * 256  # of three tiles each
    assert (pixels == 0).all(axis=2).sum() >= 2 * 0.5 * 256 * 256  # the left half of two holes


def test_pictures_are_the_same_every_time_however_many_are_computed_at_once(tmp_path):
    conf = tiny_conf(tmp_path, sample_respacing="5")
    for name, part in (("a", 1), ("b", 4)):
        evaluator = observe(conf, know_nothing, part)
        evaluator.write_samples(tmp_path / f"{name}.png")
        evaluator.write_inpaintings(tmp_path / f"{name}i.png")
    for kind in ("", "i"):
        first, second = (Path(tmp_path, f"{name}{kind}.png").read_bytes() for name in "ab")
        assert first == second
