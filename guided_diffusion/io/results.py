"""Result PNGs and the marks by which a later run knows them."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.io.files import JPEG_SUFFIXES, MARK, write_image, write_png
from guided_diffusion.io.images import bare_png, masked_u8, open_image


def read_mark(path: str | os.PathLike) -> str | None:
    """Return the mark of a PNG, or "" where it has none; None where there is no whole PNG."""
    try:
        with _opened(path) as image:
            image.load()
            if image.format == "JPEG":
                return image.info.get("comment", b"").decode("latin-1").removeprefix(f"{MARK}:")
            return image.info.get(MARK, "")
    except (OSError, SyntaxError, ValueError):
        return None


def read_result(path: str | os.PathLike) -> np.ndarray | None:
    """Return a picture of a run's folders, uint8 (H, W, 3), or None where there is none."""
    try:
        with _opened(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):  # absent, or somebody else's file under this name
        return None


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open a result, which may be as large as any photo, and have as large a profile."""
    data = io.BytesIO(Path(path).read_bytes())
    with open_image(bare_png(data, keep=MARK) or data) as image:
        yield image


def result_path(folder: str | os.PathLike, name: str) -> Path:
    """Join folder and file name; raises ``UserError`` if the name could lead anywhere else."""
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise UserError("a result's file name must be a plain name", path=folder, got=repr(name))
    return Path(folder) / name


def write_result(
    folders: Mapping[str, str | None],
    name: str,
    sample: np.ndarray | Image.Image,
    gt_u8: np.ndarray,
    mask_u8: np.ndarray,
    *,
    sample_name: str | None = None,
    mark: str | None = None,
) -> list[Path]:
    """Write one result into its folders and return the paths, the inpainted picture's last.

    ``folders`` maps srs (inpainted), lrs (ground truth with its hole), gts (ground truth; may be
    missing or None) and gt_keep_masks. All pictures are uint8 (S, S, 3); ground truth and mask
    are written as they are. ``sample_name`` is the inpainted picture's name where an image has
    several, ``mark`` is kept in it. A ``sample`` that is a Pillow image keeps its mode, its profile
    and its resolution. It comes last: where it exists, the others do.
    Raises ``UserError`` as ``atomic_path`` and ``result_path``.
    """
    inputs = _input_pictures(folders, name, gt_u8, mask_u8)
    inpainted = result_path(folders["srs"], sample_name or name)
    for path, pixels in inputs:
        write_png(path, pixels)
    if isinstance(sample, Image.Image):
        known = {key: sample.info[key] for key in ("icc_profile", "dpi") if sample.info.get(key)}
        write_image(inpainted, sample, mark=mark, **known)
    else:
        write_png(inpainted, sample, mark=mark)
    return [*(path for path, _ in inputs), inpainted]


def is_written(
    folders: Mapping[str, str | None],
    name: str,
    gt_u8: np.ndarray,
    mask_u8: np.ndarray,
    *,
    sample_name: str | None = None,
    mark: str,
) -> bool:
    """Return whether ``write_result`` has written all files of a result, with this mark."""
    inputs = _input_pictures(folders, name, gt_u8, mask_u8)
    inpainted = result_path(folders["srs"], sample_name or name)
    return (
        all(_has_end(path) for path in (inpainted, *(path for path, _ in inputs)))
        and read_mark(inpainted) == mark
        and all(np.array_equal(read_result(path), pixels) for path, pixels in inputs)
    )


def _has_end(path: Path) -> bool:
    """Whether a picture has its end, which Pillow does not miss."""
    end = b"\xff\xd9" if path.suffix.lower() in JPEG_SUFFIXES else b"IEND\xaeB`\x82"
    try:
        return path.read_bytes().endswith(end)
    except OSError:
        return False


def _input_pictures(
    folders: Mapping[str, str | None], name: str, gt_u8: np.ndarray, mask_u8: np.ndarray
) -> list[tuple[Path, np.ndarray]]:
    """List the files beside a result, which are the same for all samples of an image."""
    pictures = [
        (folders["gt_keep_masks"], mask_u8),
        (folders.get("gts"), gt_u8),
        (folders["lrs"], masked_u8(gt_u8, mask_u8)),
    ]
    return [(result_path(folder, name), pixels) for folder, pixels in pictures if folder]
