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


class TrainingStoppedError(Exception):
    """The training cannot go on, through no mistake in its inputs; told in one line."""


# ---- Processes that share a batch ----------------------------------------------------------------


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


def pictures_at_once(conf: TrainConf) -> int:
    """Return how many pictures a process works on at once."""
    own = conf.batch_size // world_size()
    return own if conf.microbatch == -1 else min(own, conf.microbatch)


# ---- The network ---------------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from torch's own generator as ``seed`` says, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def compiles(conf: TrainConf) -> bool:
    """Return whether the network is compiled; ``auto`` waits for a measurement of the gain."""
    return conf.compile is True


def allow_tf32(allowed: bool) -> None:
    """Say whether products may be TF32: torch's own defaults for them and convolutions differ."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def uses_bfloat16(conf: TrainConf, device: torch.device) -> bool:
    """Return whether to multiply in bfloat16; warn where a CPU would have to imitate it."""
    wanted = conf.precision == "bfloat16"
    if wanted and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        problem = "bfloat16 is slow on this CPU, which has no AVX-512; it trains in float32"
        warnings.warn(problem, stacklevel=3)
        return False
    return wanted


def memory_format(device: torch.device, *, bf16: bool, compiled: bool) -> torch.memory_format:
    """Return how feature maps lie in memory in a training.

    A CPU has kernels for channels_last in bfloat16; in float32 it normalises them slowly. A GPU's
    normalisation rearranges them, unless it is compiled.
    """
    is_fast = bf16 if device.type == "cpu" else compiled
    return torch.channels_last if is_fast else torch.contiguous_format


def shared_between_processes(model: UNetModel, device: torch.device) -> torch.nn.Module:
    """Return ``model``, with its gradients averaged over all processes where there are several."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


# ---- The step ------------------------------------------------------------------------------------


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on the device, without waiting for what a GPU is doing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def learning_rate(conf: TrainConf, step: int) -> float:
    """Return the learning rate of ``step``: warm-up, the plain rate, and a linear way down."""
    warm = (step + 1) / conf.warmup_steps if conf.warmup_steps else 1.0
    left = (conf.iterations - step) / conf.lr_anneal_steps if conf.lr_anneal_steps else 1.0
    return conf.lr * min(1.0, warm, max(0.0, left))


def without_exchange(shared: torch.nn.Module, stay: bool) -> contextlib.AbstractContextManager:
    """Keep gradients in this process while ``stay``: the last part of a batch exchanges them."""
    exchanges = isinstance(shared, DistributedDataParallel)
    return shared.no_sync() if exchanges and stay else contextlib.nullcontext()


@torch.no_grad()
def move_averages(emas: dict[float, list[Tensor]], parameters: list[Tensor], step: int) -> None:
    """Move the averages towards the weights after ``step`` steps, faster at first than at rate."""
    for rate, averages in emas.items():
        reached = min(rate, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, parameters, 1 - reached)


class Trainer:
    """Everything that a step changes, and the step itself.

    ``step`` counts the steps done. ``emas`` maps a rate to the averaged parameters, in the order
    of ``names``. ``shared`` is ``model`` between processes, and ``network`` the same, compiled
    where that is wanted; both have the parameters of ``model``.
    """

    def __init__(
        self,
        conf: TrainConf,
        model: UNetModel,
        diffusion: GaussianDiffusion,
        device: torch.device,
    ) -> None:
        self.conf, self.diffusion, self.device = conf, diffusion, device
        self.bf16 = uses_bfloat16(conf, device)
        allow_tf32(conf.precision != "float32")
        compiled = compiles(conf)
        self.memory_format = memory_format(device, bf16=self.bf16, compiled=compiled)
        self.model = model.to(device, memory_format=self.memory_format).train()
        self.shared = shared_between_processes(self.model, device)
        # Compiled last: so the compiler sees where gradients are exchanged and lets the exchange
        # of some overlap with the computation of others.
        self.network = torch.compile(self.shared) if compiled else self.shared
        # The network without weights of its own, to be called with averages.
        self._frame = copy.deepcopy(self.model).to("meta").eval()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = list(self.model.parameters())
        self.emas = {rate: [p.detach().clone() for p in self.parameters] for rate in conf.ema_rates}
        self.optimizer = torch.optim.AdamW(
            self.parameters, conf.lr, weight_decay=conf.weight_decay, fused=device.type == "cuda"
        )
        has_memory = conf.schedule_sampler == "loss-second-moment"
        self.sampler = LossSecondMomentSampler(diffusion.num_timesteps) if has_memory else None
        self.step = 0
        self.part = pictures_at_once(conf)

    def _predictor(self, network: Callable, y: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (x, timesteps) → float32 output of ``network`` in this training's arithmetic."""

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            if not self.bf16:
                return network(x, timesteps, y)
            with torch.autocast(self.device.type, torch.bfloat16):
                return network(x, timesteps, y).float()

        return predict

    def ema_predictor(self, y: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (x, timesteps) → output with the first rate's averages for labels ``y``."""
        weights = dict(zip(self.names, self.emas[self.conf.ema_rates[0]], strict=True))

        def network(*inputs: Tensor | None) -> Tensor:
            return torch.func.functional_call(self._frame, weights, inputs)

        return self._predictor(network, y)

    def train_step(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Learn from this process's part of the next batch (uint8 (n, 3, S, S), labels (n,)).

        Return float32 (n, 5) with each picture's time, weight, loss, mse and vb (NaN where the
        objective lacks it), and the norm of the gradient. Neither is waited for on a GPU.
        """
        conf, device = self.conf, self.device
        if conf.dropout:
            torch.manual_seed(
                int(generator(conf.seed, DROPOUT, self.step).integers(2**32)) + rank()
            )
        x = (moved(images, device).float() / 127.5 - 1).contiguous(memory_format=self.memory_format)
        y = None if labels is None else moved(labels, device)
        t, weights, noise = self._draw(x.shape[1:])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(conf, self.step)
        self.optimizer.zero_grad()
        losses = []
        parts = [slice(i, i + self.part) for i in range(0, len(x), self.part)]
        for part in parts:
            predict = self._predictor(self.network, None if y is None else y[part])
            with without_exchange(self.shared, part != parts[-1]):
                terms = training_losses(self.diffusion, predict, x[part], t[part], noise[part])
                (terms["loss"] * weights[part]).sum().div(len(x)).backward()
            nothing = torch.full_like(terms["loss"], math.nan)
            columns = [terms.get(name, nothing).detach() for name in ("loss", "mse", "vb")]
            losses.append(torch.stack([t[part], weights[part], *columns], dim=1).float())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, conf.grad_clip or math.inf)
        self.optimizer.step()
        self.step += 1
        move_averages(self.emas, self.parameters, self.step)
        if self.sampler:
            self.sampler.watch(gather(torch.cat(losses), dim=0).cpu().numpy())
        return torch.cat(losses), norm

    def _draw(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw this process's times (n,), weights (n,) and noise (n, *shape) of the next step."""
        conf, mine, steps = self.conf, share(self.conf.batch_size), self.diffusion.num_timesteps
        chances = self.sampler.probabilities() if self.sampler else np.full(steps, 1 / steps)
        draws = draw_times(chances, conf.batch_size, generator(conf.seed, TIME, self.step))
        t, weights = (moved(torch.from_numpy(values[mine]), self.device) for values in draws)
        seeds = generator(conf.seed, NOISE, self.step).integers(2**32, size=conf.batch_size)
        return t, weights, draw_noise(seeds[mine], shape, self.device)
