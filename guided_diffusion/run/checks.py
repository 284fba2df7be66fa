"""What a user can get wrong about files and folders, found before a network is loaded."""

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import Pair
from guided_diffusion.io.images import name_of
from guided_diffusion.io.limits import check_memory
from guided_diffusion.io.notes import warn_of_kinds
from guided_diffusion.io.paths import check_folder, refuse_inside, refuse_overwriting
from guided_diffusion.io.results import refuse_long_jpeg
from guided_diffusion.run.picture_checks import check_pairs, warn_of_extremes
from guided_diffusion.run.record import refuse_replacing_a_configuration
from guided_diffusion.run.task import Job, Task, load_picture, read_options, tasks_of

# Bytes that a pixel takes of a photo while it is worked on, and of the cut that is worked on:
# measured with 50 megapixels.
_PHOTO_BYTES, _CUT_BYTES = 20, 17


def result_folders(conf: InpaintConf) -> dict[str, str]:
    """Return the folders of results by their YAML keys, without those that are not wanted."""
    return {key: folder for key, folder in vars(conf.data.paths).items() if folder}


def check_places(conf: InpaintConf) -> None:
    """Raise UserError where results would go into a folder of inputs."""
    for folder in (conf.log_dir, *result_folders(conf).values()):
        refuse_inside(folder, conf.data.gt_path, key="gt_path")
        refuse_inside(folder, conf.data.mask_path, key="mask_path")


def check_outputs(conf: InpaintConf, jobs: Sequence[Job]) -> None:
    """Refuse folders that cannot take the results, and results that would overwrite an input.

    Warns of a disk that is nearly full.
    """
    for folder in map(Path, {*result_folders(conf).values(), conf.log_dir}):
        existing = check_folder(folder)
        for name in {name for job in jobs for name in (job.name, job.pair.name)}:
            if (folder / name).is_dir():
                raise UserError("a folder is in the place of a result", path=folder / name)
    needed, free = len(jobs) * 4 * 3 * conf.image_size**2, shutil.disk_usage(existing).free
    if free < needed:
        text = f"{existing}: {free >> 20} MiB are free, and results may take {needed >> 20}"
        warnings.warn(text, stacklevel=3)
    refuse_replacing_a_configuration(conf)
    refuse_overwriting(_files_to_write(conf, jobs), _files_to_read(conf, jobs))


def _files_to_write(conf: InpaintConf, jobs: Sequence[Job]) -> Iterator[Path]:
    """Yield the pictures that a run writes, but for further pages of the overview."""
    log = Path(conf.log_dir)
    for job in jobs:
        for key, folder in result_folders(conf).items():
            yield Path(folder) / (job.name if key == "srs" else job.pair.name)
        if conf.save_process:
            stem = Path(job.name).stem
            yield from (log / "process" / f"{stem}{suffix}" for suffix in (".png", ".gif"))
    if conf.overview:
        yield log / "overview.png"


def _files_to_read(conf: InpaintConf, jobs: Sequence[Job]) -> Iterator[str | os.PathLike]:
    for job in jobs:
        yield job.pair.gt_path
        if job.pair.mask_file:
            yield job.pair.mask_file
    yield from filter(None, (conf.model_path, conf.classifier_path))


def check_pictures(
    conf: InpaintConf, pairs: Sequence[Pair], seeds: Sequence[int]
) -> tuple[list[float], list[tuple[Task, ...]]]:
    """Decode every picture and mask once; return each one's share of hole, and its tasks.

    ``seeds`` are those of drawn masks. Warns of what is odd about the files, and raises UserError
    naming the first bad one.
    """
    if not conf.full_size:
        options = read_options(conf, seeds[0])
        shares = check_pairs(pairs, conf.image_size, options, show_progress=conf.show_progress)
        return shares, [tasks_of(conf, None)] * len(pairs)
    shares, tasks, notes = [], [], []
    photos = tqdm(pairs, "checking photos", leave=False, delay=2, disable=not conf.show_progress)
    for pair, seed in zip(photos, seeds, strict=True):
        photo = load_picture(conf, pair, seed).photo
        if conf.output_format == "same":
            refuse_long_jpeg(pair.gt_path, photo.pixels.shape[1::-1])
        shares.append(1 - float(photo.known.mean()) / 255)
        tasks.append(tasks_of(conf, photo))
        largest = max((task.cut.side for task in tasks[-1] if task.cut), default=0)
        needed = _PHOTO_BYTES * photo.known.size + _CUT_BYTES * largest**2
        check_memory(needed, name_of(pair.gt_path), "the photo with its largest cut")
        notes += [(pair.gt_path, note) for note in photo.notes]
        notes += [(pair.mask_path, note) for note in photo.mask_notes]
    warn_of_extremes(pairs, shares)
    warn_of_kinds(notes)
    return shares, tasks
