"""TRAIN: the step, and what it changes.

losses.py has the objective, timesteps.py which times and noise a step sees, checkpoints.py what is
saved, report.py the log and pictures; loop.py repeats the step.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.dist_util import rank, world_size
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.training.losses import training_losses
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


def gather(values: Tensor, dim: int) -> Tensor:
    """Join every process's ``values`` along ``dim``, in the order of their ranks."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim)


def share(batch_size: int) -> slice:
    """Return this process's part of a batch."""
    count = batch_size // world_size()
    return slice(rank() * count, (rank() + 1) * count)


def pictures_at_once(conf: TrainConf) -> int:
    """Return how many pictures a process sends through the network at once."""
    count = conf.batch_size // world_size()
    return count if conf.microbatch == -1 else min(count, conf.microbatch)


def parts_of(count: int, size: int) -> list[slice]:
    """Divide ``count`` pictures into parts of up to ``size``."""
    return [slice(i, i + size) for i in range(0, count, size)]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU within the block, and restore it at its end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def uses_bfloat16(conf: TrainConf, device: torch.device) -> bool:
    """Return whether to multiply in bfloat16; warn of a CPU that would have to emulate it."""
    wanted = conf.precision == "bfloat16"
    if wanted and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        problem = "bfloat16 is slow on this CPU, which has no AVX-512; it trains in float32"
        warnings.warn(problem, stacklevel=3)
        return False
    return wanted


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to the device, without waiting for a GPU's queue."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def learning_rate(conf: TrainConf, step: int) -> float:
    """Return the learning rate of ``step``: linear warm-up, ``lr``, and linear decay to 0."""
    warmup = (step + 1) / conf.warmup_steps if conf.warmup_steps else 1.0
    decay = (conf.iterations - step) / conf.lr_anneal_steps if conf.lr_anneal_steps else 1.0
    return conf.lr * min(1.0, warmup, max(0.0, decay))


class Trainer:
    """The state of a training, and the step that changes it.

    ``step`` counts the steps done. ``emas`` maps a rate to the network with averaged parameters.
    ``shared`` is ``model``, wrapped where several processes exchange gradients, and ``network`` is
    ``shared``, compiled where the configuration says so; the three have the same parameters.
    ``part`` pictures are computed at once.
    """

    def __init__(
        self, conf: TrainConf, model: UNetModel, diffusion: GaussianDiffusion, device: torch.device
    ) -> None:
        self.conf, self.diffusion, self.device = conf, diffusion, device
        self.bf16 = uses_bfloat16(conf, device)
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            backend.allow_tf32 = conf.precision != "float32"  # torch's defaults for them differ
        compiles = conf.compile is True  # auto waits for a measurement of the gain
        # A CPU has kernels for channels_last in bfloat16, but normalises it slowly in float32. A
        # GPU copies it to normalise it, unless the network is compiled.
        is_fast = self.bf16 if device.type == "cpu" else compiles
        self.memory_format = torch.channels_last if is_fast else torch.contiguous_format
        self.model = model.to(device, memory_format=self.memory_format).train()
        self.shared: torch.nn.Module = self.model
        if world_size() > 1:
            ids = [device] if device.type == "cuda" else None
            self.shared = DistributedDataParallel(self.model, device_ids=ids)
        # Compiled last: the compiler then overlaps the exchange of gradients with computation.
        self.network = torch.compile(self.shared) if compiles else self.shared
        self.parameters = list(self.model.parameters())
        self.emas = {
            rate: copy.deepcopy(self.model).eval().requires_grad_(False) for rate in conf.ema_rates
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters, conf.lr, weight_decay=conf.weight_decay, fused=device.type == "cuda"
        )
        self.sampler = None  # draw times uniformly
        if conf.schedule_sampler == "loss-second-moment":
            self.sampler = LossSecondMomentSampler(diffusion.num_timesteps)
        self.step = 0
        self.part = pictures_at_once(conf)

    def _predictor(self, network: Callable, y: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (x, timesteps) → float32 output of ``network``, computed in ``precision``."""

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            if not self.bf16:
                return network(x, timesteps, y)
            with torch.autocast(self.device.type, torch.bfloat16):
                return network(x, timesteps, y).float()

        return predict

    def ema_predictor(self, y: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (x, timesteps) → output with the averages of the first rate, for labels ``y``."""
        return self._predictor(self.emas[self.conf.ema_rates[0]], y)

    def train_step(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Learn from this process's part of a batch, as ``batches`` yields it.

        Returns float32 (n, 5) with each picture's time, weight, loss, mse and vb (NaN where the
        objective lacks it), and the norm of the gradient. Does not wait for a GPU.
        """
        conf, device = self.conf, self.device
        if conf.dropout:
            seed = int(generator(conf.seed, DROPOUT, self.step).integers(2**32))
            torch.manual_seed(seed + rank())
        x = (moved(images, device).float() / 127.5 - 1).contiguous(memory_format=self.memory_format)
        y = None if labels is None else moved(labels, device)
        t, weights, noise = self._draw(x.shape[1:])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(conf, self.step)
        self.optimizer.zero_grad()
        losses = []
        parts = parts_of(len(x), self.part)
        for part in parts:
            predict = self._predictor(self.network, None if y is None else y[part])
            keeps = part != parts[-1] and self.shared is not self.model
            with self.shared.no_sync() if keeps else contextlib.nullcontext():
                terms = training_losses(self.diffusion, predict, x[part], t[part], noise[part])
                (terms["loss"] * weights[part]).sum().div(len(x)).backward()
            nothing = torch.full_like(terms["loss"], math.nan)
            columns = [terms.get(name, nothing).detach() for name in ("loss", "mse", "vb")]
            losses.append(torch.stack([t[part], weights[part], *columns], dim=1).float())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, conf.grad_clip or math.inf)
        self.optimizer.step()
        self.step += 1
        self._average()
        if self.sampler:
            rows = gather(torch.cat(losses), dim=0).cpu().numpy()
            self.sampler.update(t=rows[:, 0], losses=rows[:, 2])
        return torch.cat(losses), norm

    @torch.no_grad()
    def _average(self) -> None:
        """Update the exponential averages; their rates are lower in the first steps."""
        for rate, network in self.emas.items():
            decay = min(rate, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_([*network.parameters()], self.parameters, 1 - decay)

    def _draw(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the times (n,), weights (n,) and noise (n, *shape) of this process's next step."""
        conf, mine, steps = self.conf, share(self.conf.batch_size), self.diffusion.num_timesteps
        chances = self.sampler.probabilities() if self.sampler else np.full(steps, 1 / steps)
        draws = draw_times(chances, conf.batch_size, generator(conf.seed, TIME, self.step))
        t, weights = (moved(torch.from_numpy(values[mine]), self.device) for values in draws)
        seeds = generator(conf.seed, NOISE, self.step).integers(2**32, size=conf.batch_size)
        return t, weights, draw_noise(seeds[mine], shape, self.device)
