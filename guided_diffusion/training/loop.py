"""TRAIN: the loop that repeats the step, and what it writes at its intervals."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from guided_diffusion.config.keys import TrainConf
from guided_diffusion.dist_util import is_main, world_size
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.training.files import check_classes
from guided_diffusion.training.report import (
    Observer,
    Row,
    append_log,
    read_log,
    restart_log,
    write_loss_plot,
)
from guided_diffusion.training.timesteps import CUT, batch_indices, generator
from guided_diffusion.training.trainer import Tensor, Trainer, compiles, share

# ---- Processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, GPUs by NCCL; nothing for one alone.

    The others wait for the first while it saves and makes pictures, hence their patience.
    """
    if world_size() == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=3))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# ---- Pictures ------------------------------------------------------------------------------------


def load_images(conf: TrainConf) -> TrainingImages:
    """Read all pictures, of which as many stay in memory as ``cache_gb`` holds."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    images = TrainingImages(
        conf.data_dir,
        conf.image_size,
        class_cond=conf.class_cond,
        random_crop=conf.random_crop,
        random_flip=conf.random_flip,
        holdout=conf.holdout,
        cache_bytes=int(conf.cache_gb * 2**30 / processes),
        depth=conf.depth,
        all_formats=conf.all_formats,
        show_progress=is_main(),
    )
    check_classes(conf, images)
    return images


def batches(
    images: TrainingImages, conf: TrainConf, steps: range
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield this process's part of each step's batch, the next one being read meanwhile.

    Pictures are uint8 (n, 3, S, S), labels int64 (n,) or None.
    """
    mine = share(conf.batch_size)

    def read(step: int) -> tuple[Tensor, Tensor | None]:
        chosen = batch_indices(len(images.train), step, conf.batch_size, conf.seed)[mine]
        rng = generator(conf.seed, CUT, step)
        rng.random((mine.start, 4))  # the cuts of the processes before this one
        return images.batch(images.train[chosen], rng)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, steps.start)
        for step in steps:
            batch = ahead.result()
            if step + 1 in steps:
                ahead = reader.submit(read, step + 1)
            yield batch


# ---- The loop ------------------------------------------------------------------------------------


def describe(trainer: Trainer) -> str:
    """Return what is being trained, on what and how, in one line."""
    conf, device, images = trainer.conf, trainer.device, trainer.images
    millions = sum(p.numel() for p in trainer.parameters) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = "on" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "off"
    compiled = "compiled" if compiles(conf, device) else "not compiled"
    return (
        f"{conf.name}: {len(images.train)} pictures and {len(images.held_out)} held out, "
        f"{millions:.1f} million parameters, {world_size()} x {where}, "
        f"{'bfloat16' if trainer.bf16 else 'float32'}, TF32 {tf32}, {compiled}, "
        f"steps {trainer.step} to {conf.iterations} into {conf.out_dir}"
    )


def train(trainer: Trainer, sample_diffusion: GaussianDiffusion) -> None:
    """Train to the end, with log, checkpoints and pictures at their intervals.

    Raises TrainingStoppedError as ``Trainer.collect``, and UserError where the disk is full.
    """
    conf, images, folder = trainer.conf, trainer.images, Path(trainer.conf.out_dir)
    observer = None
    if is_main():
        print(describe(trainer), flush=True)
        observer = Observer(
            conf,
            images,
            trainer.diffusion,
            sample_diffusion,
            trainer.ema_predictor,
            trainer.device,
            trainer.part,
        )
        restart_log(folder / "log.csv", trainer.step)
        held_out = "".join(f"{images.paths[i]}\n" for i in images.held_out)
        readable = held_out.encode("utf-8", "replace").decode()  # names may be any bytes
        write_text_atomic(folder / "held_out.txt", readable)
    steps = range(trainer.step, conf.iterations)
    pause = 0.2 if sys.stderr.isatty() else 30  # a log file does not want a line each time
    with tqdm(
        total=conf.iterations, initial=trainer.step, mininterval=pause, disable=not is_main()
    ) as bar:
        trainer.restart_window()
        for batch in batches(images, conf, steps):
            trainer.train_step(*batch)
            bar.update()
            is_last = trainer.step == conf.iterations
            saves = is_last or trainer.step % conf.save_interval == 0
            shows = conf.sample_interval and (is_last or trainer.step % conf.sample_interval == 0)
            if saves or shows or trainer.step % conf.log_interval == 0:
                row = trainer.collect()
                speed = f"{row['images_per_s']:.1f}"
                bar.set_postfix({"loss": f"{row['loss']:.4f}", "images/s": speed})
                if observer:
                    _record(trainer, observer, row, saves, bool(shows))
                trainer.restart_window()


def _record(trainer: Trainer, observer: Observer, row: Row, saves: bool, shows: bool) -> None:
    """Write what is due after a step; the log comes first, for it is cut back when resumed."""
    folder, step = Path(trainer.conf.out_dir), trainer.step
    if saves or shows:
        row |= observer.held_out_losses()
    append_log(folder / "log.csv", row)
    if saves:
        trainer.save()
    if shows:
        write_loss_plot(folder / "loss.png", read_log(folder / "log.csv"))
    if shows and trainer.conf.sample_count:
        observer.write_samples(folder / f"samples_{step:06d}.png")
        observer.write_inpaintings(folder / f"inpainted_{step:06d}.png")
