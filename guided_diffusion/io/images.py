"""Reading pictures as a person sees them, and cutting them to a square.

A picture is RGB uint8 (H, W, 3).
"""

import io
import os
import stat
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from guided_diffusion.errors import UserError

# Recognised by content, whatever the suffix says; others stay out because some of Pillow's
# readers start foreign programs (EPS) or are rarely exercised.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
# Opening silences Pillow's warnings, and the list of warning filters belongs to the whole process.
_OPENING = threading.Lock()


def _blobfile(path: str) -> types.ModuleType:
    """Import blobfile, only when a path asks for it; a store that is out of reach is an error."""
    try:
        import blobfile

        blobfile.configure(retry_limit=6, log_callback=lambda _: None)
    except ImportError as error:
        raise UserError(
            "paths with :// are read with blobfile, which is not installed (pip install blobfile)",
            path=path,
        ) from error
    return blobfile


# ---- reading -----------------------------------------------------------------------------------


def read_rgb(path: str) -> Image.Image:
    """Read a picture as a person sees it, as RGB.

    The camera's rotation (EXIF) is applied; of an animation the first frame is taken; transparent
    parts are black; more than 8 bits of gray are scaled, not cut off; CMYK is converted. Colour
    profiles are not applied. Raises ``UserError`` naming the file for anything that is not a
    whole picture, is no regular file, cannot be read, or has more pixels than
    ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    path = os.fspath(path)
    try:
        with _open_bytes(path) as stream, _open_image(stream) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise UserError(
                    f"{image.width} x {image.height} pixels are too many to read safely",
                    path=path,
                    expected=f"at most {limit} pixels",
                )
            image.load()
            return _as_rgb(_upright(image))
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError("not a picture in a known format (or damaged)", path=path) from error
    except Image.DecompressionBombError as error:
        raise UserError("has too many pixels to read safely", path=path) from error
    except FileNotFoundError as error:
        dangling = "a link to a file that does not exist" if Path(path).is_symlink() else None
        raise UserError(dangling or "no such file", path=path) from error
    except Exception as error:  # Pillow's decoders raise anything at all over a damaged file
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot be read: {problem}", path=path) from error


def _open_bytes(path: str) -> io.BufferedIOBase:
    if "://" in path:
        with _blobfile(path).BlobFile(path, "rb") as remote:
            data = remote.read()
        stream: io.BufferedIOBase = io.BytesIO(data)
        size = len(data)
    else:
        status = Path(path).stat()  # before opening: opening a pipe waits for its other end
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise UserError(f"is {what}, not a picture", path=path)
        stream, size = Path(path).open("rb"), status.st_size  # noqa: SIM115 - the caller closes
    if size == 0:
        stream.close()
        raise UserError("is empty", path=path)
    return stream


def _open_image(stream: io.BufferedIOBase) -> Image.Image:
    """Read the header only; the size is judged by the caller instead of by a warning."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(stream, formats=_FORMATS)


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF orientation says; damaged EXIF data does not spoil a picture."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are decoded already, so only EXIF data can be at fault
        return image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale deep gray so that its format's white, not the picture's brightest pixel, is 255.

    Integers count to 65,535 (a 32-bit file may go on to 2^31-1); floats to 1, 255 or 65,535,
    whichever is the first that holds them all.
    """
    values = np.nan_to_num(values.astype(np.float64))
    whites = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0, 2.0**31 - 1)
    white = next((white for white in whites if values.max() <= white), values.max())
    return np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)


# ---- cutting -----------------------------------------------------------------------------------


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scale a picture's short side to ``size`` and cut out the middle: uint8 (size, size, 3).

    Halved by box means while at least twice too large, then one bicubic step; a smaller picture
    is enlarged. Raises ``ValueError`` for a strip so narrow that enlarging it would take more
    than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    pixels = np.asarray(_scale_short_side(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].copy()


def _scale_short_side(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"too narrow a strip ({image.width} x {image.height}) to scale to {size} pixels"
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)


def load_crop(path: str, size: int) -> np.ndarray:
    """Read and cut one picture: uint8 (size, size, 3); raises ``UserError`` naming the file."""
    image = read_rgb(path)
    try:
        return center_crop(image, size)
    except ValueError as error:
        raise UserError(str(error), path=path) from error


def to_model_range(gt_u8: np.ndarray) -> torch.Tensor:
    """Turn a picture (H, W, 3) uint8 into the network's float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(gt_u8).permute(2, 0, 1).float() / 127.5 - 1


def mask_to_tensor(mask_u8: np.ndarray) -> torch.Tensor:
    """Turn a mask (H, W, 3) uint8 into float32 (3, H, W) in [0, 1], 1 = known."""
    return torch.from_numpy(mask_u8).permute(2, 0, 1).float() / 255


# ---- results -----------------------------------------------------------------------------------


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Turn (N, 3, H, W) in [-1, 1] into pictures, uint8 (N, H, W, 3), by rounding to nearest.

    Values outside are clamped. The work is done where ``x`` lies; only bytes are copied.
    """
    levels = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def masked_u8(gt_u8: np.ndarray, mask_u8: np.ndarray) -> np.ndarray:
    """Black out what is generated: m·gt - (1-m) in [-1, 1], a mask's soft values included."""
    # In levels of 0 to 255 the formula is m·gt: exact in integers, rounded to nearest.
    product = gt_u8.astype(np.uint32) * mask_u8
    return ((product * 2 + 255) // 510).astype(np.uint8)
