"""What a person sees of a training: a log, a plot of the loss, and pictures at intervals."""

import collections
import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io.files import atomic_path, write_text_atomic
from guided_diffusion.io.images import (
    load_crop,
    mask_to_tensor,
    masked_u8,
    to_model_range,
    to_uint8,
)
from guided_diffusion.io.results import write_image
from guided_diffusion.io.sheets import OverviewRow, montage, write_overview
from guided_diffusion.masks import make_mask
from guided_diffusion.samplers import Repaint
from guided_diffusion.scheduler import get_schedule_jump
from guided_diffusion.training.checkpoints import last_saved
from guided_diffusion.training.losses import training_losses
from guided_diffusion.training.pictures import TrainingImages
from guided_diffusion.training.timesteps import HELD_OUT, SHOW, draw_noise, generator
from guided_diffusion.training.trainer import TrainingStoppedError, gather

Tensor = torch.Tensor
Row = dict[str, float]  # one line of the log; NaN or absent where there is nothing to say
QUARTILES = 4
HELD_OUT_PICTURES = 128  # so many at most tell the held-out loss: enough, and quick
COLUMNS = (
    *("step", "images", "lr", "loss", "mse", "vb", "grad_norm", "images_per_s"),
    *(f"loss_q{q}" for q in range(QUARTILES)),
    *("held_out", *(f"held_out_q{q}" for q in range(QUARTILES))),
)


# ---- The log -------------------------------------------------------------------------------------


def read_log(path: Path) -> list[Row]:
    """Return the log's rows; lines that are damaged or cut off are left out."""
    return [row for row in _read_lines(path) if row is not None]


def _read_lines(path: Path) -> list[Row | None]:
    """Return the row of each line but the first, which has the names; None for a damaged one."""
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
    return [_read_line(line) for line in lines[1:]]


def _read_line(line: str) -> Row | None:
    values = line.split(",")
    if len(values) != len(COLUMNS) or not line.endswith("\n"):
        return None
    try:
        return {name: float(v.strip() or "nan") for name, v in zip(COLUMNS, values, strict=True)}
    except ValueError:
        return None


def _csv_line(row: Row) -> str:
    values = (row.get(name, math.nan) for name in COLUMNS)
    return ",".join("" if math.isnan(value) else f"{value:.7g}" for value in values) + "\n"


def restart_log(path: Path, step: int) -> None:
    """Write the log anew with its rows up to ``step``: later ones will be trained again.

    Damaged lines are left out, and what is no file gets another name, each with a warning.
    """
    if path.exists() and not path.is_file():
        aside = next(p for n in range(1, 10**6) if not (p := Path(f"{path}.{n}")).exists())
        with contextlib.suppress(OSError):  # then writing says what is wrong
            path.rename(aside)
            warnings.warn(f"{path}: is not a file; it is {aside} now", stacklevel=2)
    rows = _read_lines(path)
    spoilt = sum(row is None for row in rows[:-1])  # a kill may well cut the last one
    if spoilt:
        warnings.warn(f"{path}: {spoilt} damaged lines of the log are left out", stacklevel=2)
    kept = [row for row in rows if row is not None and row["step"] <= step]
    write_text_atomic(path, ",".join(COLUMNS) + "\n" + "".join(map(_csv_line, kept)))


def append_log(path: Path, row: Row) -> None:
    """Add one row in a single write; raises UserError where the system refuses."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(_csv_line(row))
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


class LossWindow:
    """The losses of the steps since the last row of the log, left on the device until then."""

    def __init__(self, conf: TrainConf, num_timesteps: int) -> None:
        self.conf, self.num_timesteps = conf, num_timesteps
        self.restart()

    def restart(self) -> None:
        """Begin the next row; what happened since the last step is not its time."""
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._start = time.perf_counter()

    def add(self, losses: Tensor, norm: Tensor) -> None:
        """Note what ``Trainer.train_step`` returned."""
        self._steps.append((losses, norm))

    def row(self, step: int, lr: float) -> Row:
        """Return the log's row after ``step`` steps, over all processes; all of them call this.

        Raises TrainingStoppedError where a loss or gradient was not finite.
        """
        losses, norms = (torch.stack(values) for values in zip(*self._steps, strict=True))
        table = gather(losses, dim=1).cpu().numpy().astype(np.float64)  # (steps, batch, 5)
        norms = norms.cpu().numpy()
        seconds = time.perf_counter() - self._start
        bad = ~(np.isfinite(table[:, :, 2]).all(axis=1) & np.isfinite(norms))
        if bad.any():
            raise TrainingStoppedError(
                f"the loss or its gradient is not finite in step "
                f"{step - len(table) + 1 + bad.argmax()}; "
                f"{last_saved(self.conf)}; try a lower lr, or grad_clip: 1"
            )
        t, weight, loss, mse, vb = table.reshape(-1, 5).T
        row = {
            "step": step,
            "images": step * self.conf.batch_size,
            "lr": lr,
            "loss": (weight * loss).mean(),
            "mse": (weight * mse).mean(),
            "vb": (weight * vb).mean(),
            "grad_norm": norms.mean(),
            "images_per_s": len(t) / seconds,
        }
        quartile = (t * QUARTILES // self.num_timesteps).astype(int)
        for q in range(QUARTILES):
            here = quartile == q
            mean = np.average(loss[here], weights=weight[here]) if here.any() else math.nan
            row[f"loss_q{q}"] = float(mean)
        return row


# ---- What it has learnt --------------------------------------------------------------------------


class Evaluator:
    """Looks at what a network has learnt, always at the same pictures, times and noise.

    ``predictor`` gives, for labels (n,) or None, the function (x, timesteps) → output to look at.
    Pictures are cut in the middle, whatever training does; ``part`` of them are worked on at once.
    Without held-out pictures there is no held-out loss, and training pictures are inpainted.
    """

    def __init__(
        self,
        conf: TrainConf,
        images: TrainingImages,
        diffusion: GaussianDiffusion,  # of the training
        sample_diffusion: GaussianDiffusion,  # of the process pictures
        predictor: Callable[[Tensor | None], Callable[[Tensor, Tensor], Tensor]],
        device: torch.device,
        part: int,
    ) -> None:
        self.conf, self.images, self.device, self.part = conf, images, device, part
        self.diffusion, self.sample_diffusion = diffusion, sample_diffusion
        self.predictor = predictor
        self.held_out = _spread(images.held_out, HELD_OUT_PICTURES)
        inpainted = images.held_out if len(images.held_out) else images.train
        self.shown = _spread(inpainted, conf.sample_count)
        chosen = {*self.held_out, *self.shown}
        self.crops = {i: load_crop(images.paths[i], conf.image_size, conf.depth) for i in chosen}

    def _clean(self, indices: np.ndarray) -> Tensor:
        return torch.stack([to_model_range(self.crops[i]) for i in indices]).to(self.device)

    def _labels(self, indices: np.ndarray) -> Tensor | None:
        labels = self.images.labels
        return None if labels is None else torch.from_numpy(labels[indices]).to(self.device)

    @torch.no_grad()
    def held_out_losses(self) -> Row:
        """Return the mean held-out loss, in all and by quartile of the times."""
        if not len(self.held_out):
            return {}
        count, means = len(self.held_out), {}
        for q in range(QUARTILES):
            rng = generator(self.conf.seed, HELD_OUT, q)
            places = (q + rng.random(count)) / QUARTILES * self.diffusion.num_timesteps
            t = torch.from_numpy(places.astype(np.int64)).to(self.device)
            seeds = rng.integers(2**32, size=count)
            losses = []
            for part in _parts(count, self.part):
                x = self._clean(self.held_out[part])
                predict = self.predictor(self._labels(self.held_out[part]))
                noise = draw_noise(seeds[part], x.shape[1:], self.device)
                losses.append(training_losses(self.diffusion, predict, x, t[part], noise)["loss"])
            means[f"held_out_q{q}"] = torch.cat(losses).mean().item()
        return {"held_out": sum(means.values()) / QUARTILES, **means}

    def write_samples(self, path: Path) -> None:
        """Write a grid of whole pictures made from fixed noise."""
        conf, count = self.conf, self.conf.sample_count
        gt = torch.zeros(count, 3, conf.image_size, conf.image_size, device=self.device)
        labels = torch.arange(count, device=self.device) % conf.num_classes
        labels = labels if conf.class_cond else None
        samples = self._repaint(gt, torch.zeros_like(gt), labels, jump_n_sample=1)
        grid = montage(samples, columns=math.ceil(math.sqrt(count)))
        times = max(1, 128 // conf.image_size)  # so that small pictures can be seen
        write_image(path, grid.repeat(times, 0).repeat(times, 1))

    def write_inpaintings(self, path: Path) -> None:
        """Write a grid of fixed pictures and masks: masked, inpainted, truth."""
        conf, masks = self.conf, []
        for number in range(len(self.shown)):
            rng = generator(conf.seed, SHOW, number)
            mask = make_mask(conf.sample_mask, conf.image_size, rng)
            masks.append(np.repeat(mask[:, :, None], 3, axis=2))
        keep = torch.stack([mask_to_tensor(mask) for mask in masks]).to(self.device)
        gt, labels = self._clean(self.shown), self._labels(self.shown)
        results = self._repaint(gt, keep, labels, jump_n_sample=5)
        rows = []
        for i, mask, result in zip(self.shown, masks, results, strict=True):
            name, crop = Path(self.images.paths[i]).stem, self.crops[i]
            rows.append(OverviewRow(name, masked_u8(crop, mask), [result], crop))
        write_overview(path, rows)

    @torch.no_grad()
    def _repaint(
        self, gt: Tensor, keep: Tensor, labels: Tensor | None, jump_n_sample: int
    ) -> np.ndarray:
        """Run RePaint over (N, 3, S, S), five stretches of jumps; return uint8 (N, S, S, 3)."""
        steps, results = self.sample_diffusion.num_timesteps, []
        times = get_schedule_jump(
            steps, jump_length=max(1, steps // 5), jump_n_sample=jump_n_sample
        )
        for part in _parts(len(gt), self.part):
            source = torch.Generator(self.device).manual_seed(self.conf.seed + part.start)
            draw = functools.partial(
                torch.randn, gt[part].shape, generator=source, device=self.device
            )
            predict = self.predictor(None if labels is None else labels[part])
            walk = self.sample_diffusion.p_sample_loop_progressive(
                predict, gt[part], keep[part], times, draw, sampler=Repaint()
            )
            [last] = collections.deque(walk, maxlen=1)
            results.append(to_uint8(last.x))
        return np.concatenate(results)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """Choose up to ``count`` of ``indices``, evenly over all: neighbours are often alike."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices)))
    return indices[places.round().astype(int)]
