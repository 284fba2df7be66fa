"""What a user can get wrong about folders, pictures and masks, found before a network is loaded."""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import (
    Pair,
    ReadOptions,
    crop_mask,
    crop_photo,
    is_of_the_square,
    load_photo,
    read_mask,
    read_photo,
)
from guided_diffusion.io.holes import BLACK, WHITE, same_shape
from guided_diffusion.io.images import Origin, name_of, origin_of
from guided_diffusion.io.limits import check_memory, in_threads
from guided_diffusion.io.notes import (
    note_on_turning,
    notes_on_mask,
    notes_on_picture,
    warn_of_kinds,
)
from guided_diffusion.io.paths import check_folder, refuse_inside, refuse_overwriting
from guided_diffusion.io.results import refuse_long_jpeg
from guided_diffusion.run.record import refuse_replacing_a_configuration
from guided_diffusion.run.task import Job, Task, bytes_to_load, read_options, tasks_of

# Bytes that a pixel takes of a photo while it is worked on, and of the cut that is worked on:
# measured with 50 megapixels.
_PHOTO_BYTES, _CUT_BYTES = 20, 17
# Share of a hole's pixels that may be half-known without a warning: thin strokes have up to 0.22.
_SOFT_RIM = 0.23


# ---- Folders -------------------------------------------------------------------------------------


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
    inputs = {path for job in jobs for path in (job.pair.gt_path, job.pair.mask_file) if path}
    inputs |= {path for path in (conf.model_path, conf.classifier_path) if path}
    refuse_overwriting(_files_to_write(conf, jobs), inputs)


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


# ---- Pictures and masks --------------------------------------------------------------------------


@dataclass
class _Checked:
    """What decoding a picture and its mask showed; the share is that of the pixels in the hole."""

    share: float
    notes: list[str]
    mask_notes: list[str]
    tasks: tuple[Task, ...]


def check_pictures(
    conf: InpaintConf, pairs: Sequence[Pair], seeds: Sequence[int]
) -> tuple[list[float], list[tuple[Task, ...]]]:
    """Decode every picture and mask once; return each one's share of hole, and its tasks.

    ``seeds`` are those of drawn masks. Threads decode, as many as memory allows; a mask that serves
    all is decoded once. Warns, once a kind, of what is odd: masks that leave nothing to generate,
    or nothing known, or are not black and white, and pictures that use little of their range.
    Raises UserError naming the first bad file, or the first mask that has another aspect ratio than
    its picture.
    """
    check = _check_photos if conf.full_size else _check_squares
    checked = check(conf, pairs, [read_options(conf, seed) for seed in seeds])
    shares = [each.share for each in checked]
    _warn_of_extremes(pairs, shares)
    found = list(zip(pairs, checked, strict=True))
    warn_of_kinds((pair.gt_path, note) for pair, each in found for note in each.notes)
    warn_of_kinds((pair.mask_path, note) for pair, each in found for note in each.mask_notes)
    return shares, [each.tasks for each in checked]


def _check_photos(
    conf: InpaintConf, pairs: Sequence[Pair], options: Sequence[ReadOptions]
) -> list[_Checked]:
    def check(work: tuple[Pair, ReadOptions]) -> _Checked:
        pair, photo = work[0], load_photo(*work)
        if conf.output_format == "same":
            refuse_long_jpeg(pair.gt_path, photo.pixels.shape[1::-1])
        tasks = tasks_of(conf, photo, 0)
        largest = max((task.cut.side for task in tasks), default=0)
        needed = _PHOTO_BYTES * photo.known.size + _CUT_BYTES * largest**2
        check_memory(needed, name_of(pair.gt_path), "the photo with its largest cut")
        return _Checked(_share_of_hole(photo.known), photo.notes, photo.mask_notes, tasks)

    work, memory = zip(pairs, options, strict=True), bytes_to_load(conf, pairs)
    return in_threads(check, work, "checking photos", conf.show_progress, memory=memory)


@dataclass
class _Mask:
    """What decoding one mask showed; the share is that of the square that the network sees."""

    share: float
    origin: Origin | None = None  # of its file; None where its shape does not matter
    notes: list[str] = field(default_factory=list)
    softness: str = ""  # how much of its hole is half-known, where that is much


def _check_squares(
    conf: InpaintConf, pairs: Sequence[Pair], options: Sequence[ReadOptions]
) -> list[_Checked]:
    size, first = conf.image_size, pairs[0]
    is_shared = not first.makes_mask and all(p.mask_path is first.mask_path for p in pairs)

    def check(work: tuple[Pair, ReadOptions]) -> tuple[Origin, list[str], _Mask | None]:
        (pair, options), mask = work, None
        image = read_photo(pair, options)
        origin = origin_of(image)
        if pair.is_alpha:
            mask = _Mask(_share_of_hole(crop_mask(pair, image, size, options, origin.size)))
        crop_photo(pair, image, size, options)
        notes = notes_on_picture(image, options.depth)
        del image  # before the mask is decoded
        if not (is_shared or pair.is_alpha):
            mask = _look_at_mask(pair, size, options, origin.size)
        return origin, notes, mask

    work, memory = zip(pairs, options, strict=True), bytes_to_load(conf, pairs)
    found = in_threads(check, work, "checking pictures", conf.show_progress, memory=memory)
    shared = _look_at_mask(first, size, options[0], found[0][0].size) if is_shared else None
    checked = []
    for pair, (origin, notes, own_mask) in zip(pairs, found, strict=True):
        mask = own_mask or shared
        mask_notes = _notes_on_both(pair, origin, mask, size)
        checked.append(_Checked(mask.share, notes, mask_notes, tasks_of(conf, None, 0)))
    return checked


def _look_at_mask(pair: Pair, size: int, options: ReadOptions, photo: tuple[int, int]) -> _Mask:
    """Read or draw a mask, and judge it."""
    image, notes, darkest = read_mask(pair, options, size), [], 0
    if options.mask_hole is None and not pair.makes_mask:
        notes, darkest = notes_on_mask(image, invert=options.invert_mask)
    mask = crop_mask(pair, image, size, options, photo)
    if pair.makes_mask or mask.min() == mask.max():  # no hole whose place could be wrong
        return _Mask(_share_of_hole(mask), notes=notes)
    hole, touched = (mask <= BLACK).sum(), (mask < WHITE).sum()
    half_known, softness = 1 - hole / max(1, touched), ""
    if half_known > _SOFT_RIM:
        softness = f"{half_known:.0%} of its hole's pixels are half-known at {size} x {size}"
        if darkest > BLACK and not options.invert_mask:
            softness = "its hole is gray, which is half-known, and not black"
        elif not hole:
            softness = f"its hole is thinner than a pixel at {size} x {size}, so half-known"
    return _Mask(_share_of_hole(mask), origin_of(image), notes, softness)


def _notes_on_both(pair: Pair, photo: Origin, mask: _Mask, size: int) -> list[str]:
    """Return what is odd about a mask beside its picture.

    Raises ``UserError`` for a mask of another aspect ratio, whose hole would be elsewhere.
    """
    if mask.origin is None:
        return mask.notes
    shape = mask.origin.size
    if not same_shape(shape, photo.size) and not is_of_the_square(shape, photo.size, size):
        turned = " (stored {} x {} and turned by its EXIF orientation {})".format(
            *photo.stored, photo.orientation
        )
        raise UserError(
            f"the mask has another shape than its picture {name_of(pair.gt_path)}"
            f"{turned if photo.orientation > 1 else ''}; make it for the upright picture, or of"
            f" {size} x {size} pixels for the square that is cut from it",
            path=name_of(pair.mask_path),
            expected="the shape of {} x {}".format(*photo.size),
            got="{} x {}".format(*shape),
        )
    if turning := note_on_turning(photo, mask.origin):
        return [*mask.notes, turning]
    if mask.notes or not mask.softness:
        return mask.notes
    return [
        f"{mask.softness}: part of what should go stays; mask_hard: true makes these pixels hole,"
        " mask_grow: N enlarges the hole"
    ]


def _share_of_hole(mask: np.ndarray) -> float:
    return 1 - float(mask.mean()) / 255


def _warn_of_extremes(pairs: Sequence[Pair], shares: Sequence[float]) -> None:
    """Warn of masks whose share of hole is 0 or 1."""
    for extreme, problem in ((0.0, "nothing to generate"), (1.0, "nothing known to start from")):
        hits = [pair for pair, share in zip(pairs, shares, strict=True) if share == extreme]
        if hits:
            first = name_of(hits[0].mask_file or hits[0].mask_path)
            text = f"{first}: this mask leaves {problem} ({len(hits)} of {len(pairs)} images)"
            warnings.warn(f"{text}; in a mask, white is known and black is generated", stacklevel=3)
