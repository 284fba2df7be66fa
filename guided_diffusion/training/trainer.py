"""TRAIN: the step, what it changes, and the loop that repeats it.

The hybrid objective is Improved DDPM's (Nichol & Dhariwal 2021, section 3; gaussian_diffusion.py
has it). resample.py says what a step sees, train_files.py what is kept, train_report.py what a
person sees of it.
"""

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from guided_diffusion.config.keys import TrainConf
from guided_diffusion.dist_util import rank, world_size
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.io.files import write_checkpoint, write_text_atomic
from guided_diffusion.training.files import (
    check_disk,
    checkpoint_path,
    last_saved,
    load_opt,
    run_settings,
    test_yaml,
)
from guided_diffusion.training.losses import training_losses
from guided_diffusion.training.report import QUARTILES, Row
from guided_diffusion.training.timesteps import (
    DROPOUT,
    NOISE,
    TIME,
    LossSecondMomentSampler,
    draw_noise,
    draw_times,
    generator,
)
from guided_diffusion.unet import UNetModel

Tensor = torch.Tensor


class TrainingStoppedError(Exception):
    """The training cannot go on, through no mistake in its inputs; told in one line."""


def gather(values: Tensor, dim: int) -> Tensor:
    """Join every process's ``values`` along ``dim``, in the order of their ranks."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim)


def share(batch_size: int) -> slice:
    """Return this process's part of a batch."""
    own = batch_size // world_size()
    return slice(rank() * own, (rank() + 1) * own)


# ---- The step ------------------------------------------------------------------------------------


def learning_rate(conf: TrainConf, step: int) -> float:
    """Return the learning rate of ``step``: warm-up, the plain rate, and a linear way down."""
    warm = (step + 1) / conf.warmup_steps if conf.warmup_steps else 1.0
    left = (conf.iterations - step) / conf.lr_anneal_steps if conf.lr_anneal_steps else 1.0
    return conf.lr * min(1.0, warm, max(0.0, left))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from torch's own generator as ``seed`` says, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def compiles(conf: TrainConf, device: torch.device) -> bool:
    """Return whether the network is compiled; ``auto`` is where it pays soon: on a GPU."""
    return device.type == "cuda" if conf.compile == "auto" else bool(conf.compile)


class Trainer:
    """Everything that a step changes, and the step itself.

    ``step`` counts the steps done. ``emas`` maps a rate to the averaged parameters, in the order
    of ``names``. ``network`` is ``model``, compiled and shared between processes as need be.
    """

    def __init__(
        self,
        conf: TrainConf,
        model: UNetModel,
        diffusion: GaussianDiffusion,
        images: TrainingImages,
        device: torch.device,
    ) -> None:
        self.conf, self.diffusion, self.images, self.device = conf, diffusion, images, device
        self.settings = run_settings(conf, images.paths)
        self.bf16 = conf.precision == "bfloat16" and device.type == "cuda"
        # Stated and not left to torch, whose own defaults differ between matrices and convolutions.
        torch.backends.cuda.matmul.allow_tf32 = conf.precision != "float32"
        torch.backends.cudnn.allow_tf32 = conf.precision != "float32"
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.network = torch.compile(self.model) if compiles(conf, device) else self.model
        if world_size() > 1:
            devices = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids=devices)
        # The network without weights of its own, to be called with averages.
        self._frame = copy.deepcopy(self.model).to("meta").eval()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = list(self.model.parameters())
        self.emas = {rate: [p.detach().clone() for p in self.parameters] for rate in conf.ema_rates}
        self.optimizer = torch.optim.AdamW(
            self.parameters, conf.lr, weight_decay=conf.weight_decay, fused=device.type == "cuda"
        )
        self.sampler = None
        if conf.schedule_sampler == "loss-second-moment":
            self.sampler = LossSecondMomentSampler(diffusion.num_timesteps)
        self.step = 0
        self.part = conf.microbatch if conf.microbatch != -1 else conf.batch_size // world_size()
        self._window: list[tuple[Tensor, Tensor]] = []  # (n, 5) losses, norm; since the last row
        self._window_start = time.perf_counter()

    def _predictor(self, network: Callable, y: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (x, timesteps) → float32 output of ``network`` in this training's arithmetic."""

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            if not self.bf16:
                return network(x, timesteps, y)
            with torch.autocast("cuda", torch.bfloat16):
                return network(x, timesteps, y).float()

        return predict

    def ema_predictor(self, y: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (x, timesteps) → output with the first rate's averages for labels ``y``."""
        weights = dict(zip(self.names, self.emas[self.conf.ema_rates[0]], strict=True))

        def network(*inputs: Tensor | None) -> Tensor:
            return torch.func.functional_call(self._frame, weights, inputs)

        return self._predictor(network, y)

    def train_step(self, images: Tensor, labels: Tensor | None) -> None:
        """Learn from this process's part of the next batch (uint8 (n, 3, S, S), labels (n,))."""
        conf, device, mine = self.conf, self.device, share(self.conf.batch_size)
        if conf.dropout:
            torch.manual_seed(
                int(generator(conf.seed, DROPOUT, self.step).integers(2**32)) + rank()
            )
        x = (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        y = None if labels is None else labels.to(device)
        steps = self.diffusion.num_timesteps
        chances = self.sampler.probabilities() if self.sampler else np.full(steps, 1 / steps)
        draws = draw_times(chances, conf.batch_size, generator(conf.seed, TIME, self.step))
        t, weights = (torch.from_numpy(values[mine]).to(device) for values in draws)
        seeds = generator(conf.seed, NOISE, self.step).integers(2**32, size=conf.batch_size)
        noise = draw_noise(seeds[mine], x.shape[1:], device)

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(conf, self.step)
        self.optimizer.zero_grad()
        losses = []
        parts = [slice(i, i + self.part) for i in range(0, len(x), self.part)]
        for part in parts:
            predict = self._predictor(self.network, None if y is None else y[part])
            with self._gradients_stay_here(part != parts[-1]):
                terms = training_losses(self.diffusion, predict, x[part], t[part], noise[part])
                (terms["loss"] * weights[part]).sum().div(len(x)).backward()
            nothing = torch.full_like(terms["loss"], math.nan)
            columns = [terms.get(name, nothing).detach() for name in ("loss", "mse", "vb")]
            losses.append(torch.stack([t[part], weights[part], *columns], dim=1).float())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, conf.grad_clip or math.inf)
        self.optimizer.step()
        self.step += 1
        self._average()
        self._window.append((torch.cat(losses), norm))
        if self.sampler:
            everyone = gather(self._window[-1][0], dim=0).cpu().numpy()
            finite = everyone[np.isfinite(everyone[:, 2])]  # collect() stops for the others
            self.sampler.update(finite[:, 0].astype(np.int64), finite[:, 2])

    def _gradients_stay_here(self, stay: bool) -> contextlib.AbstractContextManager:
        """Leave the exchange of gradients between processes to the last part of a batch."""
        shared = isinstance(self.network, DistributedDataParallel)
        return self.network.no_sync() if shared and stay else contextlib.nullcontext()

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averages towards the new weights, faster at first than at their rates."""
        for rate, averages in self.emas.items():
            reached = min(rate, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(averages, self.parameters, 1 - reached)

    def collect(self) -> Row:
        """Return the log's row over the steps since the last one; all processes call this.

        Raises TrainingStoppedError where a loss or gradient was not finite.
        """
        losses, norms = (torch.stack(values) for values in zip(*self._window, strict=True))
        table = gather(losses, dim=1).cpu().numpy().astype(np.float64)  # (steps, batch, 5)
        norms = norms.cpu().numpy()
        seconds = time.perf_counter() - self._window_start
        first = self.step - len(table) + 1
        bad = ~(np.isfinite(table[:, :, 2]).all(axis=1) & np.isfinite(norms))
        if bad.any():
            raise TrainingStoppedError(
                f"the loss or its gradient is not finite in step {first + bad.argmax()}; "
                f"{last_saved(self.conf)}; try a lower lr, or grad_clip: 1"
            )
        t, weight, loss, mse, vb = table.reshape(-1, 5).T
        row = {
            "step": self.step,
            "images": self.step * self.conf.batch_size,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": (weight * loss).mean(),
            "mse": (weight * mse).mean(),
            "vb": (weight * vb).mean(),
            "grad_norm": norms.mean(),
            "images_per_s": len(t) / seconds,
        }
        quartile = (t * QUARTILES // self.diffusion.num_timesteps).astype(int)
        for q in range(QUARTILES):
            here = quartile == q
            mean = np.average(loss[here], weights=weight[here]) if here.any() else math.nan
            row[f"loss_q{q}"] = float(mean)
        return row

    def restart_window(self) -> None:
        """Begin the next row of the log; what happened since the last step is not its time."""
        self._window, self._window_start = [], time.perf_counter()

    # --- its files -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the set of checkpoints of this step, and the YAML that tests it.

        The optimizer's file comes last: where it exists, the set is complete.
        """
        check_disk(self.conf, sum(p.numel() for p in self.parameters))
        path = functools.partial(checkpoint_path, self.conf, step=self.step)
        write_checkpoint(path("model"), self._state_dict(self.parameters))
        for rate, averages in self.emas.items():
            write_checkpoint(path(f"ema_{rate}_"), self._state_dict(averages))
        test = test_yaml(self.conf, self.diffusion, self.images, self.step)
        write_text_atomic(Path(self.conf.out_dir) / "test.yml", test)
        state = {
            "step": self.step,
            "settings": self.settings,
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict() if self.sampler else {},
        }
        write_checkpoint(path("opt"), state)

    def _state_dict(self, values: list[Tensor]) -> dict[str, Tensor]:
        """Name parameters as the network's ``state_dict`` does, in memory of their own."""
        plain = (value.detach().cpu().contiguous() for value in values)
        return dict(zip(self.names, plain, strict=True))

    def load(self, step: int) -> None:
        """Go on from the set of checkpoints of ``step``."""
        path = functools.partial(checkpoint_path, self.conf, step=step)
        state = load_opt(path("opt"), mmap=False)
        self.model.load_state_dict(load_state_dict(path("model")))
        for rate, averages in self.emas.items():
            saved = load_state_dict(path(f"ema_{rate}_"))
            for name, average in zip(self.names, averages, strict=True):
                average.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sampler:
            self.sampler.load_state_dict(state["sampler"])
        self.step = step
