"""Reading pictures as a person sees them, and cutting them to a square.

A picture is uint8 (H, W, 3). For networks of one channel it is (H, W, 1), uint8 or uint16.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from guided_diffusion.errors import UserError
from guided_diffusion.io.colours import Levels, is_deep, to_rgb, to_srgb
from guided_diffusion.io.limits import check_memory, in_threads
from guided_diffusion.io.listing import open_bytes
from guided_diffusion.io.metadata import metadata_of

Source: TypeAlias = str | Image.Image  # a file's path, or a picture in memory

# Recognised by content, whatever the suffix says; others stay out because some of Pillow's
# readers start foreign programs (EPS) or are rarely exercised. Older Pillows read no AVIF.
for _name in ("Jpeg", "Png", "Gif", "WebP", "Bmp", "Tiff", "Avif"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"PIL.{_name}ImagePlugin")  # registers its format
_FORMATS = [f for f in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF") if f in Image.OPEN]
# Times PIL.Image.MAX_IMAGE_PIXELS. A progressive JPEG has 3 bytes a pixel in memory at any scale.
_LARGEST_JPEG = 4
# The first bytes after "ftyp" of the pictures that telephones take.
_HEIC_BRANDS = b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()
_BYTES_A_PIXEL = 24  # of a photo at its own size: itself, its mask, what is written
_BYTES_TO_CUT = 10  # a pixel, of a picture that is read to be cut to a square
_REMOTE_MEMORY = 160 << 20  # bytes to read a picture of a store, of 16 megapixels
_BYTES_TO_CUT_LAYERS = 20  # the same of a picture with transparency or a profile

# A PNG may hold a text or a profile of any size, up to Pillow's limit for all texts together.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# Keep libtiff from writing its own lines about a damaged file beside ours.
with contextlib.suppress(OSError, AttributeError):  # Pillow's own libtiff may not be reachable
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a picture was before it was made upright, 8 bits deep and RGB.

    ``size`` is (width, height) as a person sees it, in pixels of the file; ``stored`` the same
    before the camera's rotation, of the EXIF ``orientation`` 1 to 8, was applied.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int = 1
    mode: str = "RGB"  # Pillow's
    frames: int = 1
    has_profile: bool = False
    is_deep_colour: bool = False  # more than 8 bits a channel, of which Pillow reads the upper 8
    is_transparent: bool = False  # some of it
    is_mostly_transparent: bool = False  # more than half of its pixels
    is_coloured: bool = False  # and was made gray
    levels: Levels | None = None


@dataclasses.dataclass(frozen=True)
class Header:
    """What the start of a file says: (width, height) as stored, and the numbers of its frames.

    ``memory`` is about how many bytes it takes to read and cut the picture.
    """

    size: tuple[int, int]
    frames: list[int]
    memory: int


def name_of(source: Source) -> str:
    """Return what messages call a picture: its path, or that it is in memory."""
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "a picture in memory"
    return source


# ---- reading -----------------------------------------------------------------------------------


def read_rgb(
    source: Source, depth: tuple[float, float] | None = None, *, frame: int = 0
) -> Image.Image:
    """Read a picture as a person sees it, as RGB; ``origin_of`` returns what it was.

    The camera's rotation (EXIF) and a colour profile are applied; transparent parts are black; more
    than 8 bits of gray are scaled, not cut off, so that ``depth`` is black and white, if given. A
    JPEG of up to four times ``PIL.Image.MAX_IMAGE_PIXELS`` is read at half its side. ``frame`` is
    one of ``Header.frames``. A ``source`` in memory is treated as a file, and stays as it is.
    Raises ``UserError`` naming the file for anything that is not a whole picture, is no regular
    file, cannot be read, or has more pixels.
    """
    image = read_upright(source, frame=frame)
    with _errors_of(source):
        return to_rgb(to_srgb(image), depth)


def read_upright(source: Source, *, whole: bool = False, frame: int = 0) -> Image.Image:
    """Read a picture in its own mode and depth, turned as EXIF says; raises as ``read_rgb``.

    With ``whole`` it may have as many pixels as memory holds, and is never read at half its side;
    its ``info["metadata"]`` is what the file holds besides (``metadata_of``).
    """
    with _errors_of(source):
        if isinstance(source, Image.Image):
            return _upright(source, source.size, whole, copy=True)
        with open_bytes(source) as stream, open_image(stream) as image:
            stored = image.size
            if whole:
                check_memory(_BYTES_A_PIXEL * image.width * image.height, source)
            else:
                _limit_pixels(image, source)
            frames = len(frame_numbers(image))
            image.seek(frame)
            return _upright(image, stored, whole, frames)


def read_header(path: str) -> Header:
    """Read the start of a file; raises ``UserError`` as ``read_rgb``."""
    with _errors_of(path), open_bytes(path) as stream, open_image(stream) as image:
        is_layered = image.has_transparency_data or "icc_profile" in image.info
        each = _BYTES_TO_CUT_LAYERS if is_layered else _BYTES_TO_CUT
        memory = each * image.width * image.height
        return Header(image.size, frame_numbers(image), memory)


def memory_to_read(sources: Iterable[Source], show_progress: bool = False) -> int:
    """Return about how many bytes it takes to read and cut the largest of these pictures.

    Only headers are read; what is wrong with a file is found when it is decoded.
    """

    def memory_of(path: str) -> int:
        if "://" in path:  # reading its header would fetch all of it
            return _REMOTE_MEMORY
        try:
            return read_header(path).memory
        except UserError:
            return 0

    paths = {source for source in sources if not isinstance(source, Image.Image)}
    return max(in_threads(memory_of, paths, "looking at pictures", show_progress), default=0)


def frame_numbers(image: Image.Image) -> list[int]:
    """Return the numbers of the frames of an opened file that are as large as the first."""
    if image.format == "MPO":  # a telephone's photo, with a preview or a depth map
        return [0]
    numbers, size = [0], image.size
    with contextlib.suppress(Exception):  # a later frame that is damaged does not spoil the first
        for number in range(1, getattr(image, "n_frames", 1)):
            if image.format == "TIFF":  # whose pages may differ in size
                image.seek(number)
            numbers += [number] if image.size == size else []
    image.seek(0)
    return numbers


def origin_of(image: Image.Image) -> Origin:
    """Return what ``read_rgb`` or ``read_upright`` noted about a picture."""
    return image.info["origin"]


@contextlib.contextmanager
def _errors_of(source: Source) -> Iterator[None]:
    """Turn any exception of reading a picture into a ``UserError`` that names it."""
    path = name_of(source)
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"not a picture in a known format {error}", path=path) from error
    except FileNotFoundError as error:
        dangling = "a link to a file that does not exist" if Path(path).is_symlink() else None
        raise UserError(dangling or "no such file", path=path) from error
    except Exception as error:  # Pillow's decoders raise anything at all over a damaged file
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot be read: {problem}", path=path) from error


def open_image(stream: io.BufferedIOBase) -> Image.Image:
    """Read the header only; raises ``UnidentifiedImageError`` for another format.

    The format's reader is called directly: ``Image.open`` would warn of a large picture.
    """
    start = stream.read(16)
    for factory, accepts in (Image.OPEN[name] for name in _FORMATS):
        if accepts(start) is True:
            stream.seek(0)
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(stream, "")
    hint = f"or damaged; {', '.join(_FORMATS)} are read"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        hint = "HEIC has to be converted to JPEG or PNG first"
    raise Image.UnidentifiedImageError(f"({hint})")


def _limit_pixels(image: Image.Image, path: str) -> None:
    """Refuse a picture of too many pixels; have a JPEG decoded at a fraction of its size."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or image.width * image.height <= limit:
        return
    size, pixels = f"{image.width} x {image.height} pixels", image.width * image.height
    if image.format in ("JPEG", "MPO") and pixels <= _LARGEST_JPEG * limit:
        # Read as a whole it would be halved before anything else.
        image.draft(image.mode, (image.width // 2, image.height // 2))
    if image.width * image.height > limit:
        problem = f"{size} are too many to read safely; make the picture smaller first"
        most = f"at most {limit} pixels, or {_LARGEST_JPEG * limit} in a JPEG"
        raise UserError(problem, path=path, expected=most)


def _upright(
    image: Image.Image, stored: tuple[int, int], whole: bool, frames: int = 1, *, copy: bool = False
) -> Image.Image:
    """Decode a picture, and turn it, or a ``copy`` of it, as its EXIF orientation says."""
    is_deep_colour = ";16" in str(getattr(image, "tile", "")) and not is_deep(image)
    image.load()
    metadata = metadata_of(image) if whole else {}  # copying and turning remove some of it
    image = image.copy() if copy else image
    orientation = 1
    with contextlib.suppress(Exception):  # the pixels are there: only EXIF data can be at fault
        orientation = image.getexif().get(0x0112, 1)
        ImageOps.exif_transpose(image, in_place=True)
    orientation = orientation if orientation in range(1, 9) else 1
    hidden, pixels = _transparent_pixels(image), image.width * image.height
    image.info["metadata"] = metadata
    image.info["origin"] = Origin(
        size=stored[::-1] if orientation >= 5 else stored,
        stored=stored,
        orientation=orientation,
        mode=image.mode,
        frames=frames,
        has_profile="icc_profile" in image.info,
        is_deep_colour=is_deep_colour,
        is_transparent=hidden[0] > 0,
        is_mostly_transparent=hidden[1] > pixels / 2,
    )
    return image


def _transparent_pixels(image: Image.Image) -> tuple[int, int]:
    """Return how many pixels are not opaque, and how many are more transparent than opaque."""
    if is_deep(image) or not image.has_transparency_data:
        return 0, 0
    alpha = image if image.mode in ("LA", "PA", "RGBA") else image.convert("RGBA")
    counts = alpha.getchannel("A").histogram()
    return sum(counts[:255]), sum(counts[:128])


# ---- cutting -----------------------------------------------------------------------------------


def center_crop(image: Image.Image, size: int, source: Source = "") -> np.ndarray:
    """Scale a picture's short side to ``size`` and cut out the middle: (size, size, C).

    Halved by box means while at least twice too large, then one bicubic step; a smaller picture is
    enlarged. Raises ``UserError`` naming its ``source`` for a strip so narrow that enlarging it
    would take more than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    pixels = np.atleast_3d(scale_short_side(image, size, source))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].copy()


def scale_short_side(image: Image.Image, size: int, source: Source = "") -> Image.Image:
    """Scale as ``center_crop`` does, without the cut; raises ``UserError`` as it does."""
    is_deep_gray = image.mode == "I;16"  # Pillow scales it as floats only
    image = image.convert("I").convert("F") if is_deep_gray else image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        problem = f"too narrow a strip ({image.width} x {image.height}) to scale to {size} pixels"
        raise UserError(problem, path=name_of(source))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if is_deep_gray:
        image = Image.fromarray(np.rint(image).clip(0, 65535).astype(np.uint16))
    return image


def load_crop(source: Source, size: int) -> np.ndarray:
    """Read and cut one picture: uint8 (size, size, 3); raises ``UserError`` naming the file."""
    return center_crop(read_rgb(source), size, source)


# ---- tensors -----------------------------------------------------------------------------------


def to_model_range(pixels: np.ndarray) -> torch.Tensor:
    """Turn a picture (H, W, C), uint8 or uint16, into float32 (C, H, W) in [-1, 1]."""
    half = np.iinfo(pixels.dtype).max / 2
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(np.int32)  # not every PyTorch computes with uint16
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / half - 1


def mask_to_tensor(mask_u8: np.ndarray) -> torch.Tensor:
    """Turn a mask (H, W, C) uint8 into float32 (C, H, W) in [0, 1], 1 = known."""
    return torch.from_numpy(mask_u8).permute(2, 0, 1).float() / 255


def to_levels(x: torch.Tensor, dtype: type | np.dtype = np.uint8) -> np.ndarray:
    """Turn (N, C, H, W) in [-1, 1] into pictures (N, H, W, C), uint8 or uint16, rounded to nearest.

    Values outside are clamped. The work is done where ``x`` lies; only integers are copied.
    """
    most = np.iinfo(dtype).max
    levels = ((x.float() + 1) * (most / 2)).round().clamp(0, most)
    levels = levels.to(torch.uint8 if most == 255 else torch.int32)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy().astype(dtype, copy=False)


def masked_u8(gt: np.ndarray, mask_u8: np.ndarray) -> np.ndarray:
    """Black out what is generated: m·gt - (1-m) in [-1, 1], a mask's soft values included."""
    # In levels the formula is m·gt: exact in integers, rounded to nearest.
    masked = np.empty_like(gt)
    for rows in range(0, len(gt), 256):  # a large photo's products would fill memory
        part = slice(rows, rows + 256)
        product = gt[part].astype(np.uint32) * mask_u8[part]
        masked[part] = (product * 2 + 255) // 510
    return masked
