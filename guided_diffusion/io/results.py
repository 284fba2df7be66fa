"""Writing pictures; results and the marks by which a later run knows them."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.io.colours import is_deep, to_rgb
from guided_diffusion.io.files import atomic_path, open_regular
from guided_diffusion.io.images import masked_u8, open_image
from guided_diffusion.io.metadata import jpeg_options, png_options

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_LONGEST_JPEG = 65_500  # pixels a side that libjpeg writes
_MARK = "repaint"  # the keyword of a PNG's text with the mark; a JPEG's comment begins with it


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return an array as an image: uint8 (H, W, 3), uint8 (H, W, 1) or uint16 (H, W, 1)."""
    kinds = ((np.uint8, 3), (np.uint8, 1), (np.uint16, 1))
    if pixels.ndim != 3 or (pixels.dtype, pixels.shape[2]) not in kinds:
        raise ValueError(f"not uint8 (H, W, 3) or gray (H, W, 1): {pixels.dtype} {pixels.shape}")
    return Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]))


def refuse_long_jpeg(photo: str, size: tuple[int, int]) -> None:
    """Raise ``UserError`` for a photo, (width, height), that cannot be written as a JPEG again."""
    if Path(photo).suffix.lower() in JPEG_SUFFIXES and max(size) > _LONGEST_JPEG:
        problem = "is too long to be written as a JPEG; output_format: png has no such limit"
        expected = f"at most {_LONGEST_JPEG} pixels a side"
        raise UserError(problem, path=photo, expected=expected, got="{} x {}".format(*size))


def write_image(
    path: str | os.PathLike, picture: Image.Image | np.ndarray, *, mark: str | None = None
) -> None:
    """Write a JPEG where ``path`` ends like one, else a PNG, whole or not at all.

    ``picture`` is an upright image, whose mode and metadata (``metadata_of``, in its ``info``) are
    kept, or an array as ``as_image`` takes it. A JPEG has quality 95, full colour resolution and no
    transparency. ``mark`` is written into the file, for ``read_mark``. Raises ``UserError`` as
    ``atomic_path``.
    """
    image = picture if isinstance(picture, Image.Image) else as_image(picture)
    if Path(path).suffix.lower() in JPEG_SUFFIXES:
        if image.mode.endswith("A"):
            image = image.convert(image.mode.removesuffix("A"))
        comment = {} if mark is None else {"comment": f"{_MARK}:{mark}"}
        options = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4", **comment}
        options |= jpeg_options(image.info)
    else:
        texts = {} if mark is None else {_MARK: mark}
        options = {"format": "PNG", **png_options(image.info, texts)}
    with atomic_path(path) as temporary:
        image.save(temporary, **options)


def read_mark(path: str | os.PathLike) -> str | None:
    """Return the mark of a result, "" if it has none; None if the file cannot be read."""
    image = _read(path)
    if image is None:
        return None
    if image.format == "JPEG":
        return image.info.get("comment", b"").decode("latin-1").removeprefix(f"{_MARK}:")
    return image.info.get(_MARK, "")


def read_result(path: str | os.PathLike) -> np.ndarray | None:
    """Return a picture of a run, uint8 (H, W, 3); None if the file cannot be read."""
    image = _read(path)
    if image is None:
        return None
    return np.asarray(to_rgb(image) if is_deep(image) else image.convert("RGB"))


def _read(path: str | os.PathLike) -> Image.Image | None:
    """Return a result, which may be as large as any photo; None if the file cannot be read."""
    try:
        with open_regular(path) as stream, open_image(stream) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError):  # missing, or another file of this name
        return None


def result_path(folder: str | os.PathLike, name: str) -> Path:
    """Join folder and file name; raises ``UserError`` if the name leads out of the folder."""
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

    ``folders`` maps srs (inpainted), lrs (ground truth with its hole black), gts (ground truth, may
    be missing or None) and gt_keep_masks. Arrays are (H, W, C) as ``as_image`` takes them.
    ``sample_name`` is the file name of the inpainted picture, if not ``name``; ``mark`` is written
    into it. If ``sample`` is an image, it keeps its mode and metadata, and the ground truth gets
    its mode, transparency and profile. The inpainted picture is written last, so that a result that
    has it is complete. Raises ``UserError`` as ``atomic_path`` and ``result_path``.
    """
    inputs = _input_pictures(folders, name, gt_u8, mask_u8)
    inpainted = result_path(folders["srs"], sample_name or name)
    for path, pixels in inputs:
        write_image(path, _like(sample, pixels) if pixels is not mask_u8 else pixels)
    write_image(inpainted, sample, mark=mark)
    return [*(path for path, _ in inputs), inpainted]


def _like(sample: np.ndarray | Image.Image, pixels: np.ndarray) -> Image.Image:
    """Return pixels as an image with the mode, the transparency and the profile of ``sample``."""
    image = as_image(pixels)
    if isinstance(sample, Image.Image):
        image = image.convert(sample.mode.removesuffix("A"))
        if sample.mode.endswith("A"):
            image.putalpha(sample.getchannel("A"))
        image.info["icc_profile"] = sample.info.get("icc_profile")
    return image


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
    return read_mark(inpainted) == mark and all(_holds(path, pixels) for path, pixels in inputs)


def _holds(path: Path, pixels: np.ndarray) -> bool:
    """Whether a file holds exactly these pixels, transparency aside."""
    if pixels.shape[2] == 3:
        return np.array_equal(read_result(path), pixels)
    image = _read(path)
    if image is None:
        return False
    return np.array_equal(image.convert(image.mode.removesuffix("A")), pixels[:, :, 0])


def _input_pictures(
    folders: Mapping[str, str | None], name: str, gt_u8: np.ndarray, mask_u8: np.ndarray
) -> list[tuple[Path, np.ndarray]]:
    """Return the files beside the inpainted picture, the same for all samples of an image."""
    pictures = [
        (folders["gt_keep_masks"], mask_u8),
        (folders.get("gts"), gt_u8),
        (folders["lrs"], masked_u8(gt_u8, mask_u8)),
    ]
    return [(result_path(folder, name), pixels) for folder, pixels in pictures if folder]
