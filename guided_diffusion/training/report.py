"""TRAIN: how well it goes: a log, a plot of the losses, and process pictures."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from guided_diffusion.errors import StoppedError, UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io.files import atomic_path, write_text_atomic
from guided_diffusion.io.images import mask_to_tensor, masked_u8, to_levels, to_model_range
from guided_diffusion.io.results import write_image
from guided_diffusion.io.sheets import montage, write_overview
from guided_diffusion.masks import make_mask
from guided_diffusion.samplers import Repaint
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.training.losses import training_losses
from guided_diffusion.training.pictures import TrainingImages
from guided_diffusion.training.timesteps import HELD_OUT, SHOW, draw_noise, generator
from guided_diffusion.training.trainer import Trainer, gather, learning_rate, parts_of

Tensor = torch.Tensor
Row = dict[str, float]  # a line of the log; NaN or absent where a column is empty
QUARTILES = 4
HELD_OUT_PICTURES = 128  # at most, for the held-out loss
COLUMNS = (
    *("step", "images", "lr", "loss", "mse", "vb", "grad_norm", "images_per_s"),
    *(f"loss_q{q}" for q in range(QUARTILES)),
    *("held_out", *(f"held_out_q{q}" for q in range(QUARTILES))),
)


# ---- The log -------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the lines of a log and their numbers, without what a power cut has damaged."""
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    for line in text.split("\n")[1:-1]:
        with contextlib.suppress(ValueError):
            numbers = [float(value or "nan") for value in line.split(",")]
            yield line, dict(zip(COLUMNS, numbers, strict=True))


def read_log(path: Path) -> list[Row]:
    """Return the rows of a log; none where there is no file."""
    return [row for _, row in _read(path)]


def restart_log(path: Path, step: int) -> None:
    """Write the log anew with its lines up to ``step``: later steps will be trained again."""
    kept = [line for line, row in _read(path) if row["step"] <= step]
    write_text_atomic(path, "\n".join([",".join(COLUMNS), *kept, ""]))


def append_log(path: Path, row: Row) -> None:
    """Add one row in a single write; raises UserError where the system refuses."""
    values = (row.get(name, math.nan) for name in COLUMNS)
    line = ",".join("" if math.isnan(value) else f"{value:.7g}" for value in values)
    try:
        with path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(f"{line}\n")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", path=path) from error


def write_loss_plot(path: Path, rows: list[Row]) -> None:
    """Plot the loss of each quartile of the times, in training and, dashed, held out."""
    from matplotlib.figure import Figure  # slow to import, and used rarely

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for q in range(QUARTILES):
        for prefix, style in (("loss", "-"), ("held_out", "--")):
            name = f"{prefix}_q{q}"
            points = [(row["step"], row[name]) for row in rows if math.isfinite(row[name])]
            if points:
                label = f"{prefix.replace('_', ' ')}, times {25 * q} to {25 * (q + 1)} %"
                marker = "." if len(points) < 3 or prefix == "held_out" else None
                axes.plot(
                    *zip(*points, strict=True), style, color=f"C{q}", marker=marker, label=label
                )
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    if axes.lines:
        axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


# ---- The losses of some steps --------------------------------------------------------------------


def log_row(trainer: Trainer, done: Sequence[tuple[Tensor, Tensor]], since: float) -> Row:
    """Return the log's row after the steps ``done``, over all processes; all of them call this.

    ``done`` is what ``Trainer.train_step`` returned for each, still on the device, and ``since``
    when the first began, by ``time.perf_counter``. Raises StoppedError where a loss or gradient was
    not finite.
    """
    losses, norms = (torch.stack(values) for values in zip(*done, strict=True))
    table = gather(losses, dim=1).cpu().numpy().astype(np.float64)  # (steps, batch, 5)
    norms = norms.cpu().numpy()
    seconds = time.perf_counter() - since
    bad = ~(np.isfinite(table[:, :, 2]).all(axis=1) & np.isfinite(norms))
    if bad.any():
        raise StoppedError(
            "the loss or its gradient is not finite in step "
            f"{trainer.step - len(table) + 1 + bad.argmax()}; try a lower lr, or grad_clip: 1"
        )
    t, weight, loss, mse, vb = table.reshape(-1, 5).T
    row = {
        "step": trainer.step,
        "images": trainer.step * trainer.conf.batch_size,
        "lr": learning_rate(trainer.conf, trainer.step - 1),
        "loss": (weight * loss).mean(),
        "mse": (weight * mse).mean(),
        "vb": (weight * vb).mean(),
        "grad_norm": norms.mean(),
        "images_per_s": len(t) / seconds,
    }
    quartile = (t * QUARTILES // trainer.diffusion.num_timesteps).astype(int)
    for q in range(QUARTILES):
        here = quartile == q
        mean = np.average(loss[here], weights=weight[here]) if here.any() else math.nan
        row[f"loss_q{q}"] = float(mean)
    return row


# ---- Evaluation ----------------------------------------------------------------------------------


class Evaluator:
    """Evaluates a trainer's averaged network, always on the same pictures, times and noise.

    Pictures are cut in the middle, whatever the training does. Without held-out pictures there is
    no held-out loss, and pictures of the training are inpainted.
    """

    def __init__(
        self, trainer: Trainer, images: TrainingImages, sample_diffusion: GaussianDiffusion
    ) -> None:
        self.trainer, self.images, self.sample_diffusion = trainer, images, sample_diffusion
        self.conf, self.device = trainer.conf, trainer.device
        self.held_out = _spread(images.held_out, HELD_OUT_PICTURES)
        inpainted = images.held_out if len(images.held_out) else images.train
        self.shown = _spread(inpainted, self.conf.sample_count)
        self.crops = {i: images.middle(i) for i in {*self.held_out, *self.shown}}

    @torch.no_grad()
    def held_out_losses(self) -> Row:
        """Return the mean loss on held-out pictures, over all times and by their quartile."""
        if not len(self.held_out):
            return {}
        diffusion, count, means = self.trainer.diffusion, len(self.held_out), {}
        for q in range(QUARTILES):
            rng = generator(self.conf.seed, HELD_OUT, q)
            places = (q + rng.random(count)) / QUARTILES * diffusion.num_timesteps
            t = torch.from_numpy(places.astype(np.int64)).to(self.device)
            seeds, losses = rng.integers(2**32, size=count), []
            for part in parts_of(count, self.trainer.part):
                x, labels = self._inputs(self.held_out[part])
                predict = self.trainer.ema_predictor(labels)
                noise = draw_noise(seeds[part], x.shape[1:], self.device)
                losses.append(training_losses(diffusion, predict, x, t[part], noise)["loss"])
            means[f"held_out_q{q}"] = torch.cat(losses).mean().item()
        return {"held_out": sum(means.values()) / QUARTILES, **means}

    def write_samples(self, path: Path) -> None:
        """Write a grid of pictures drawn from fixed noise."""
        conf, count = self.conf, self.conf.sample_count
        shape = (count, conf.in_channels, conf.image_size, conf.image_size)
        gt = torch.zeros(shape, device=self.device)
        labels = torch.arange(count, device=self.device) % conf.num_classes
        labels = labels if conf.class_cond else None
        samples = self._repaint(gt, torch.zeros_like(gt), labels, jump_n_sample=1)
        grid = montage(samples, columns=math.ceil(math.sqrt(count)))
        times = max(1, 128 // conf.image_size)  # enlarges small pictures
        write_image(path, grid.repeat(times, 0).repeat(times, 1))

    def write_inpaintings(self, path: Path) -> None:
        """Write an overview of fixed pictures and masks: masked, inpainted, truth."""
        conf, masks = self.conf, []
        for number in range(len(self.shown)):
            rng = generator(conf.seed, SHOW, number)
            mask = make_mask(conf.sample_mask, conf.image_size, rng)
            masks.append(np.repeat(mask[:, :, None], conf.in_channels, axis=2))
        keep = torch.stack([mask_to_tensor(mask) for mask in masks]).to(self.device)
        gt, labels = self._inputs(self.shown)
        results = self._repaint(gt, keep, labels, jump_n_sample=5)
        rows = []
        for i, mask, result, truth in zip(self.shown, masks, results, to_levels(gt), strict=True):
            name = Path(self.images.paths[i]).stem
            rows.append((name, [masked_u8(truth, mask), result, truth]))
        write_overview(path, rows)

    def _inputs(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return pictures (N, C, S, S) in [-1, 1] with their labels (N,), if they have any."""
        x, labels = torch.stack([to_model_range(self.crops[i]) for i in indices]), None
        if self.images.labels is not None:
            labels = torch.from_numpy(self.images.labels[indices]).to(self.device)
        return x.to(self.device), labels

    @torch.no_grad()
    def _repaint(
        self, gt: Tensor, keep: Tensor, labels: Tensor | None, jump_n_sample: int
    ) -> np.ndarray:
        """Run RePaint on (N, C, S, S), with jumps of a fifth of the steps; uint8 (N, S, S, C)."""
        steps, seed, results = self.sample_diffusion.num_timesteps, self.conf.seed, []
        jump = max(1, steps // 5)
        times = get_schedule_jump(steps, jump_length=jump, jump_n_sample=jump_n_sample)
        sources = [torch.Generator(self.device).manual_seed(seed + i) for i in range(len(gt))]
        for part in parts_of(len(gt), self.trainer.part):
            predict = self.trainer.ema_predictor(None if labels is None else labels[part])
            x = self.sample_diffusion.inpaint(
                predict, gt[part], keep[part], times, sampler=Repaint(), generators=sources[part]
            )
            results.append(to_levels(x))
        return np.concatenate(results)


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """Choose up to ``count`` of ``indices``, evenly over all: neighbours are often alike."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices)))
    return indices[places.round().astype(int)]
