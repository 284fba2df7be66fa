"""TRAIN: the loop over the steps, its files, and the processes that share the steps."""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from guided_diffusion.cli import Interrupts
from guided_diffusion.config.schema import shown
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.dist_util import Team, is_main, is_out_of_memory, rank, world_size
from guided_diffusion.errors import UserError, printable
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.training import checkpoints
from guided_diffusion.training.pictures import TrainingImages, batches
from guided_diffusion.training.report import (
    Evaluator,
    Row,
    append_log,
    log_row,
    read_log,
    restart_log,
    write_loss_plot,
)
from guided_diffusion.training.trainer import Trainer, gather, pictures_at_once, seeded

# ---- Processes -----------------------------------------------------------------------------------


# Words of gloo's RuntimeError when a process is gone; NCCL and the store raise a DistError.
_LOST = ("gloo/transport", "gloo connectfullmesh")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, GPUs by NCCL; a single process needs nothing.

    The timeout is long because the others wait while the main process saves and samples. Raises
    UserError where torchrun or another process has ended.
    """
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torchrun, timeout = os.getppid(), datetime.timedelta(hours=3)
    try:
        torch.distributed.init_process_group(
            backend,
            timeout=timeout,
            store=Team().store(timeout),  # soon raises where torchrun has ended before
            rank=rank(),
            world_size=world_size(),
        )
        yield
    except KeyboardInterrupt:
        if os.getppid() != torchrun and is_main():
            raise UserError("torchrun has ended") from None
        raise
    except RuntimeError as error:
        is_lost = isinstance(error, torch.distributed.DistError)
        is_lost = is_lost or any(word in str(error).lower() for word in _LOST)
        if is_out_of_memory(error) or not is_lost:
            raise
        problem = "no connection to the other processes; the same command with --resume goes on"
        raise UserError(problem) from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# Settings that may change on resuming, but not from process to process: when they communicate.
_INTERVALS = ("iterations", "log_interval", "save_interval", "sample_interval")


def refuse_differences(conf: TrainConf, names: Sequence[str], start: int) -> None:
    """Raise UserError where a process has other settings, pictures or a start than the first.

    All processes have to call this, with their pictures' ``names`` and their first step ``start``.
    """
    if world_size() == 1:
        return
    settings = checkpoints.run_settings(conf, names)
    settings |= {name: getattr(conf, name) for name in _INTERVALS} | {"out_dir": f"step {start}"}
    gathered = [settings] * world_size()
    torch.distributed.all_gather_object(gathered, settings)
    first = gathered[0]
    for number, other in enumerate(gathered):
        differing = [name for name in settings if other.get(name) != first.get(name)]
        if differing:
            raise UserError(
                "this process has other settings, pictures or checkpoints than the first; all need "
                "the same YAML and pictures, and an out_dir that they share",
                key=f"process {number}: {' and '.join(differing)}",
                expected=", ".join(shown(first.get(name)) for name in differing),
                got=", ".join(shown(other.get(name)) for name in differing),
            )


# ---- The loop ------------------------------------------------------------------------------------


def describe(trainer: Trainer, images: TrainingImages) -> str:
    """Return what is being trained, on what and how, in one line."""
    conf, device = trainer.conf, trainer.device
    millions = sum(p.numel() for p in trainer.parameters) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = "on" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "off"
    is_compiled = trainer.network is not trainer.shared
    compiled = "compiled in the first step" if is_compiled else "not compiled"
    return (
        f"{conf.name}: {len(images.train)} pictures and {len(images.held_out)} held out, "
        f"{millions:.1f} million parameters, {world_size()} x {where}, "
        f"{'bfloat16' if trainer.bf16 else 'float32'}, TF32 {tf32}, {compiled}, "
        f"steps {trainer.step} to {conf.iterations} into {conf.out_dir}"
    )


def build_and_train(conf: TrainConf, device: torch.device, start: int) -> None:
    """Build the network, read the pictures, and train from step ``start``.

    Raises as ``train``, and UserError where files do not fit the network, a picture is bad, or
    memory is too small.
    """
    diffusion = create_gaussian_diffusion(conf)
    sample_diffusion = create_gaussian_diffusion(conf, "sample_respacing")
    try:
        with seeded(conf.seed):
            model = create_model(conf)
        if conf.init_from and not start:
            checkpoints.load_into(model, conf.init_from, key="init_from")
        checkpoints.check_disk(conf, sum(p.numel() for p in model.parameters()))
        classes = checkpoints.load_opt(conf, start)["classes"] if start else ()
        images = TrainingImages(conf, classes)
        with _messages_name_checkpoint(conf), process_group(device):
            refuse_differences(conf, images.names, start)
            trainer = Trainer(conf, model, diffusion, device)
            if start:
                checkpoints.load(trainer, start)
            train(trainer, images, sample_diffusion)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with {pictures_at_once(conf)} pictures at once; lower it, or write "
            f"use_checkpoint: true, and go on with --resume; {checkpoints.last_saved(conf)}",
            key="microbatch",
        ) from error


@contextlib.contextmanager
def _messages_name_checkpoint(conf: TrainConf) -> Iterator[None]:
    """Add to errors and interrupts which checkpoint --resume goes on from."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}; {checkpoints.last_saved(conf)}") from error
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(checkpoints.last_saved(conf) if is_main() else "") from interrupt


def train(trainer: Trainer, images: TrainingImages, sample_diffusion: GaussianDiffusion) -> None:
    """Train to the end, with log, checkpoints and pictures at their intervals.

    After Ctrl-C, or the end of torchrun, the step is finished and saved, and KeyboardInterrupt
    raised. Raises StoppedError as ``log_row``, and UserError where the disk is full.
    """
    conf, evaluator = trainer.conf, None
    if is_main():
        notes = [describe(trainer, images), *checkpoints.class_notes(images)]
        print(*map(printable, notes), sep="\n", flush=True)
        evaluator = Evaluator(trainer, images, sample_diffusion)
        _begin_files(trainer, images)
    steps, parent = range(trainer.step, conf.iterations), os.getppid()
    done, since = [], time.perf_counter()
    pause = 0.2 if sys.stderr.isatty() else 30  # a log file does not want a line each time
    notice = "interrupted: this step will be saved; a second Ctrl-C ends at once"
    with (
        Interrupts(notice if is_main() else "") as interrupts,
        tqdm(
            total=conf.iterations, initial=trainer.step, mininterval=pause, disable=not is_main()
        ) as bar,
    ):
        for batch in batches(images, steps):
            done.append(trainer.train_step(*batch))
            bar.update()
            # Without torchrun nothing ends the other processes when one of them fails.
            is_orphan = world_size() > 1 and os.getppid() != parent
            # Exchanged by the CPUs, so that no process waits for its GPU.
            ends = torch.tensor([interrupts.has_arrived or is_orphan], dtype=torch.uint8)
            stops = bool(gather(ends, dim=0).any())
            is_last = trainer.step == conf.iterations
            saves = stops or is_last or trainer.step % conf.save_interval == 0
            samples = conf.sample_interval and (is_last or trainer.step % conf.sample_interval == 0)
            evaluates = bool(saves or samples) and not stops  # an interrupt must not take long
            if saves or samples or trainer.step % conf.log_interval == 0:
                row = log_row(trainer, done, since)
                speed = f"{row['images_per_s']:.1f}"
                bar.set_postfix({"loss": f"{row['loss']:.4f}", "images/s": speed})
                if evaluator:
                    row |= evaluator.held_out_losses() if evaluates else {}
                    _record(evaluator, row, saves, evaluates, evaluates and bool(samples))
                done, since = [], time.perf_counter()
            if stops:
                raise KeyboardInterrupt


def _begin_files(trainer: Trainer, images: TrainingImages) -> None:
    """Cut the log back to the step that a training goes on from, and list held-out pictures."""
    folder = Path(trainer.conf.out_dir)
    restart_log(folder / "log.csv", trainer.step)
    files = dict.fromkeys(images.paths[i] for i in images.held_out)  # once for all of its frames
    held_out = "".join(f"{path}\n" for path in files)
    readable = held_out.encode("utf-8", "replace").decode()  # names may be any bytes
    write_text_atomic(folder / "held_out.txt", readable)


def _record(evaluator: Evaluator, row: Row, saves: bool, plots: bool, samples: bool) -> None:
    """Write what is due after a step; the log comes first, because resuming cuts it back."""
    trainer = evaluator.trainer
    folder, step = Path(trainer.conf.out_dir), trainer.step
    append_log(folder / "log.csv", row)
    if saves:
        checkpoints.save(trainer, evaluator.images)
    if plots:
        write_loss_plot(folder / "loss.png", read_log(folder / "log.csv"))
    if samples and trainer.conf.sample_count:
        evaluator.write_samples(folder / f"samples_{step:06d}.png")
        evaluator.write_inpaintings(folder / f"inpainted_{step:06d}.png")
