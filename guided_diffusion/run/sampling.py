"""From jobs to their pictures: batches, smaller ones where memory is out, and float32 again."""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.dist_util import is_out_of_memory
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import condition
from guided_diffusion.io.images import mask_to_tensor, to_levels, to_model_range
from guided_diffusion.io.sheets import ProcessFrame
from guided_diffusion.run.full_size import paste
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.run.task import Job, Picture, Task, batches, load_picture, tasks_of
from guided_diffusion.scheduler import count_steps

# Sees each network call: its number in the walk, from 1, x and what the network predicts, each
# (N, C, S, S) in [-1, 1]. Where it returns True the walk ends, and the prediction is the result.
# What it raises ends the run.
Observer = Callable[[int, torch.Tensor, torch.Tensor], object]
_LOOK_INTERVAL = 64  # network calls between looks at whether all images are lost


@dataclass
class Sample:
    """What the loop made of one task."""

    task: Task
    pixels: np.ndarray  # (side, side, C)
    nonfinite_at: int  # the network call, from 1, after which it was not finite; 0: it is finite
    frames: list[ProcessFrame]


@dataclass
class Made:
    """What came of one job. ``problem`` says why there is no result, if there is none."""

    job: Job
    parts: list[Sample] = field(default_factory=list)
    picture: Picture | None = None  # None: read again, so that a batch holds no photos
    problem: str = ""

    def result(self, conf: InpaintConf) -> tuple[np.ndarray | Image.Image, Picture]:
        """Return the inpainted square, or photo in its own mode, and what it was made from."""
        picture = self.picture or load_picture(conf, self.job.pair, self.job.mask_seed)
        if picture.photo is None:
            return self.parts[0].pixels, picture
        pixels = picture.pixels.copy()
        for part in self.parts:
            paste(pixels, picture.photo.known, part.task.cut, part.pixels, conf.feather)
        return picture.photo.image_of(pixels), picture


@dataclass
class Sampling:
    """Makes the results of jobs with the networks of ``inpainter``.

    ``check`` is called between two steps, and what it raises ends the run. ``warn`` takes a line of
    text. ``in_float32`` collects the names of results that reduced precision lost.
    """

    inpainter: Inpainter
    batch_size: int
    observe: Observer | None = None
    check: Callable[[], None] = lambda: None
    warn: Callable[[str], None] = warnings.warn
    show_progress: bool = False
    in_float32: list[str] = field(default_factory=list)
    _exact: Inpainter | None = None  # the same in float32, once that is needed

    @property
    def conf(self) -> InpaintConf:
        """The configuration of the run."""
        return self.inpainter.conf

    def make(self, jobs: Sequence[Job]) -> Iterator[list[Made]]:
        """Yield what came of the jobs, a batch at a time.

        A batch that does not fit into memory is halved. Raises UserError where one image alone does
        not fit.
        """
        too_large = 0
        while jobs:
            self.check()
            batch, made = jobs[: self.batch_size], None
            try:
                made = self._make_batch(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if made is None:  # outside the handler: the exception held the tensors
                tried = self.batch_size if self.conf.full_size else len(batch)
                too_large = too_large or tried
                self.batch_size = halve(self.inpainter.device, tried)
                continue
            if too_large:
                self.warn(
                    f"batch_size: {too_large} images at once do not fit into memory, "
                    f"{self.batch_size} do"
                )
            too_large, jobs = 0, jobs[len(batch) :]
            yield made

    def _make_batch(self, jobs: Sequence[Job]) -> list[Made]:
        """Sample some jobs, ``batch_size`` pictures at once; a bad picture costs no other."""
        made, work = [Made(job) for job in jobs], {}
        for each in made:
            try:
                picture = load_picture(self.conf, each.job.pair, each.job.mask_seed)
            except UserError as error:
                each.problem = str(error)
                continue
            each.picture = None if picture.photo else picture
            for task in tasks_of(self.conf, picture.photo, each.job.seed):
                work[task] = each, task.inputs(picture)
        for batch in batches(list(work), self.batch_size):
            owners, pictures = zip(*(work[task] for task in batch), strict=True)
            samples = self._sample_again(batch, pictures, [each.job.name for each in owners])
            for each, sample in zip(owners, samples, strict=True):
                each.parts.append(sample)
                if (call := sample.nonfinite_at) and not each.problem:
                    t = [t for t, after in pairwise(self.inpainter.times) if after < t][call - 1]
                    each.problem = f"no finite number after network call {call}, at time t = {t}"
        return made

    def _sample_again(
        self, tasks: Sequence[Task], pictures: Sequence[tuple], names: Sequence[str]
    ) -> list[Sample]:
        """Sample a batch; what reduced precision loses is sampled again in float32."""
        samples = self._sample(self.inpainter, tasks, pictures)
        lost = [i for i, sample in enumerate(samples) if sample.nonfinite_at]
        if lost and self.inpainter.is_reduced:
            affected = [names[i] for i in lost]
            self.warn(f"no finite number in reduced precision, in float32: {', '.join(affected)}")
            self._exact = self._exact or self.inpainter.in_float32()
            again = self._sample(self._exact, [tasks[i] for i in lost], [pictures[i] for i in lost])
            self.in_float32 += affected
            for i, sample in zip(lost, again, strict=True):
                samples[i] = sample
        return samples

    @torch.inference_mode()
    def _sample(
        self, inpainter: Inpainter, tasks: Sequence[Task], pictures: Sequence[tuple]
    ) -> list[Sample]:
        """Walk the schedule with a batch."""
        device, times = inpainter.device, inpainter.times
        gt = torch.stack([to_model_range(pixels) for pixels, _ in pictures]).to(device)
        mask = torch.stack([mask_to_tensor(mask) for _, mask in pictures]).to(device)
        kept = np.linspace(len(times) - 2, 0, self.conf.save_process)  # ends with the result
        wanted = set(kept.round().astype(int).tolist())
        x, pred_xstart, frames, calls = gt, gt, [], 0
        nonfinite_at = torch.zeros(len(tasks), dtype=torch.int64, device=device)
        steps = inpainter.steps(gt, mask, [task.seed for task in tasks], self.batch_size)
        with (
            inpainter.arithmetic(),
            self.progress("network", count_steps(times)[0], "call", leave=False) as bar,
        ):
            for number, step in enumerate(steps):
                self.check()
                x = step.x
                if step.pred_xstart is not None:
                    pred_xstart, calls = step.pred_xstart, calls + 1
                    is_lost = x.isfinite().flatten(1).all(dim=1).logical_not_()
                    # Without waiting for the device.
                    nonfinite_at.add_(is_lost & (nonfinite_at == 0), alpha=calls)
                    bar.update()
                    if self.observe and self.observe(calls, x, pred_xstart) is True:
                        x = pred_xstart
                        break
                    if calls % _LOOK_INTERVAL == 0 and nonfinite_at.all():
                        break
                if number in wanted:
                    frames.append((step.t, to_levels(x), to_levels(pred_xstart)))
        if self.conf.paste_known:
            x = condition(x, gt, mask)
        samples = x.nan_to_num()
        return [
            Sample(
                task,
                to_levels(samples[i : i + 1], pictures[i][0].dtype)[0],
                lost,
                [ProcessFrame(t, now[i], x0[i]) for t, now, x0 in frames],
            )
            for i, (task, lost) in enumerate(zip(tasks, nonfinite_at.tolist(), strict=True))
        ]

    def progress(self, title: str, total: int, unit: str, *, leave: bool) -> tqdm:
        """Return a progress bar, shown where ``show_progress`` says so."""
        interval = 0.1 if sys.stderr.isatty() else 30  # a night's bars should not fill a log file
        return tqdm(
            total=total, desc=title, unit=unit, leave=leave, mininterval=interval,
            maxinterval=max(10, interval), disable=not self.show_progress,
        )  # fmt: skip


def halve(device: torch.device, batch_size: int) -> int:
    """Return the next smaller batch size after memory ran out; UserError where there is none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if batch_size == 1:
        raise UserError("one image alone does not fit into memory", key="batch_size")
    return batch_size // 2
