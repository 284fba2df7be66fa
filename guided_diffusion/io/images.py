"""Reading pictures as a person sees them, and cutting them to a square.

A picture is RGB uint8 (H, W, 3).
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import io
import os
import stat
import struct
import threading
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from guided_diffusion.errors import UserError
from guided_diffusion.io.metadata import metadata_of

# Recognised by content, whatever the suffix says; others stay out because some of Pillow's
# readers start foreign programs (EPS) or are rarely exercised. Older Pillows read no AVIF.
_HAS_AVIF = importlib.util.find_spec("PIL.AvifImagePlugin") is not None
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", *["AVIF"] * _HAS_AVIF)
_KNOWN_FORMATS = "JPEG, PNG, GIF, WebP, BMP, TIFF" + ", AVIF" * _HAS_AVIF
# Times PIL.Image.MAX_IMAGE_PIXELS. A progressive JPEG has 3 bytes a pixel in memory at any scale.
_LARGEST_JPEG = 4
# Opening silences Pillow's warnings, and the list of warning filters belongs to the whole process:
# who warns while other threads read pictures has to hold this lock, or the warning may be lost.
WARNING_FILTERS = threading.Lock()
# The first bytes after "ftyp" of the pictures that telephones take.
_HEIC_BRANDS = (
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"),
)
_BYTES_A_PIXEL = 24  # of a photo at work: itself, its mask, what is written
_BLOCK = 1 << 20  # pixels whose float64 copies are in memory at once


@dataclasses.dataclass(frozen=True)
class Levels:
    """The values of a picture with more than 8 bits of gray, and the ``white`` that became 255."""

    lowest: float
    highest: float
    white: float


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a picture was before it was made upright, 8 bits deep and RGB.

    ``size`` is (width, height) as a person sees it, in pixels of the file; ``stored`` the same
    before the camera's rotation, of the EXIF ``orientation`` 1 to 8, was applied.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int = 1
    levels: Levels | None = None
    is_deep_colour: bool = False  # more than 8 bits a channel, of which Pillow reads the upper 8
    is_transparent: bool = False  # some of it


def _silence_libtiff() -> None:
    """Keep libtiff from writing lines of its own about a damaged file, which is told in ours."""
    with contextlib.suppress(OSError, AttributeError):  # where Pillow has it built in, it may
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


_silence_libtiff()
# In blocks above 32 MiB, which malloc returns to the system at once. Of Pillow's own 16 MiB each
# thread would keep a whole picture's worth after its first large picture.
with contextlib.suppress(AttributeError, ValueError):
    Image.core.set_block_size(64 << 20)


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


# ---- memory ------------------------------------------------------------------------------------


class Room:
    """Memory that threads share while they decode pictures: one may always, several if they fit.

    ``limit`` is in bytes. What a thread takes within ``lease`` is given back at its end.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._own = limit, 0, threading.local()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Give back at the end of the block what this thread took in it; leases do not nest."""
        self._own.taken = 0
        try:
            yield
        finally:
            with self._changed:
                self._used -= self._own.taken
                self._own.taken = None
                self._changed.notify_all()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes are free, or nobody else has any; without a lease, do not."""
        own = getattr(self._own, "taken", None)
        if own is None:
            return
        with self._changed:
            # Who has some already does not wait for more: two such threads would wait for ever.
            self._changed.wait_for(
                lambda: own or not self._used or self._used + size <= self._limit
            )
            self._used += size
            self._own.taken += size


ROOM = Room(1 << 30)


# ---- reading -----------------------------------------------------------------------------------


def read_rgb(path: str, depth: tuple[float, float] | None = None) -> Image.Image:
    """Read a picture as a person sees it, as RGB; ``origin_of`` tells what it was.

    The camera's rotation (EXIF) is applied; of an animation the first frame is taken; transparent
    parts are black; more than 8 bits of gray are scaled, not cut off, so that ``depth`` is black
    and white, if given; CMYK is converted. Colour profiles are not applied. A JPEG of up to four
    times ``PIL.Image.MAX_IMAGE_PIXELS`` is read at half its side.
    Raises ``UserError`` naming the file for anything that is not a whole picture, is no regular
    file, cannot be read, or has more pixels.
    """
    image = read_upright(path)
    with _told_of(path):
        rgb, levels = as_rgb(image, depth)
    rgb.info["origin"] = dataclasses.replace(origin_of(image), levels=levels)
    return rgb


def read_upright(path: str, *, whole: bool = False) -> Image.Image:
    """Read a picture in its own mode and depth, turned as EXIF says; raises as ``read_rgb``.

    With ``whole`` it may have as many pixels as memory holds, and is never read at half its side;
    its ``info["metadata"]`` is what the file holds besides (``metadata_of``).
    """
    path = os.fspath(path)
    with _told_of(path), open_bytes(path) as stream:
        try:
            return _decode(stream, path, whole)
        except UserError:
            raise
        except Exception:
            # Text and profile of a PNG are not looked at: neither size nor damage of theirs counts.
            bare = bare_png(stream)
            if bare is None:
                raise
            return _decode(bare, path, whole)


def origin_of(image: Image.Image) -> Origin:
    """Return what ``read_rgb`` or ``read_upright`` noted about a picture."""
    return image.info["origin"]


@contextlib.contextmanager
def _told_of(path: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file into a ``UserError`` that names it."""
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"not a picture in a known format {error}", path=path) from error
    except Image.DecompressionBombError as error:
        raise UserError("has too many pixels to read safely", path=path) from error
    except FileNotFoundError as error:
        dangling = "a link to a file that does not exist" if Path(path).is_symlink() else None
        raise UserError(dangling or "no such file", path=path) from error
    except Exception as error:  # Pillow's decoders raise anything at all over a damaged file
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot be read: {problem}", path=path) from error


def _decode(stream: io.BufferedIOBase, path: str, whole: bool) -> Image.Image:
    with open_image(stream) as image:
        stored = image.size
        if whole:
            _limit_to_memory(image, path)
        else:
            _limit_pixels(image, path)
        is_deep_colour = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(image.tile)
        ROOM.take(image.width * image.height * (20 if image.has_transparency_data else 9))
        image.load()
        metadata = metadata_of(image) if whole else {}  # turning removes some of it
        upright, orientation = _upright(image)
        size = stored[::-1] if orientation >= 5 else stored
        upright.info["origin"] = Origin(
            size, stored, orientation, None, is_deep_colour, _is_transparent(upright)
        )
        upright.info["metadata"] = metadata
        return upright


def open_bytes(path: str) -> io.BufferedIOBase:
    """Open a local or remote file; raises UserError if it is not a regular file, or empty."""
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


def open_image(stream: io.BufferedIOBase) -> Image.Image:
    """Read the header only; the size is judged by the caller instead of by a warning."""
    with WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(stream, formats=_FORMATS)
        except Image.DecompressionBombError:
            # Its format's own reader does not look at the size, which the caller judges.
            for factory, accepts in (Image.OPEN[name] for name in _FORMATS):
                stream.seek(0)
                if accepts and accepts(stream.read(16)) is True:
                    stream.seek(0)
                    return factory(stream, "")
            raise
        except Image.UnidentifiedImageError:
            stream.seek(0)
            hint = _foreign_format(stream.read(16))
            raise Image.UnidentifiedImageError(hint) from None


def _foreign_format(start: bytes) -> str:
    """Say in brackets what a file may be that no reader here knows, by its first bytes."""
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return "(HEIC has to be converted to JPEG or PNG first)"
    if start[4:11] == b"ftypavi" and not _HAS_AVIF:
        return "(AVIF has to be converted to JPEG or PNG first, or read with a newer Pillow)"
    return f"(or damaged; {_KNOWN_FORMATS} are read)"


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


def _limit_to_memory(image: Image.Image, path: str) -> None:
    """Refuse a picture that, with its copies, would fill the memory that is free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):  # another system than Linux
        free = _BYTES_A_PIXEL * _LARGEST_JPEG * (Image.MAX_IMAGE_PIXELS or 2**28)
    most = free // _BYTES_A_PIXEL
    if image.width * image.height > most:
        raise UserError(
            f"{image.width} x {image.height} pixels do not fit into the memory that is free",
            path=path,
            expected=f"at most {most} pixels now",
        )


def bare_png(stream: io.BufferedIOBase, keep: str | None = None) -> io.BytesIO | None:
    """Return a PNG without its profile and text, but for EXIF data; None where it has neither.

    ``keep`` is the keyword of a text that stays.
    """
    if stream.closed:
        return None
    stream.seek(0)
    data = stream.read()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, place, is_changed = [data[:8]], 8, False
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        chunk, place = data[place:end], end
        kind, content = chunk[4:8], chunk[8:-4]
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            is_whole = chunk[-4:] == struct.pack(">I", zlib.crc32(kind + content))
            # Pillow finds the camera's rotation in these two as well.
            wanted = ["Raw profile type exif", "XML:com.adobe.xmp", *([keep] if keep else [])]
            if not (is_whole and content.split(b"\0", 1)[0].decode("latin-1") in wanted):
                is_changed = True
                continue
        kept.append(chunk)
    return io.BytesIO(b"".join(kept)) if is_changed else None


def _upright(image: Image.Image) -> tuple[Image.Image, int]:
    """Turn a picture as its EXIF orientation says; damaged EXIF data does not spoil a picture."""
    try:
        orientation = image.getexif().get(0x0112, 1)
        turned = ImageOps.exif_transpose(image)
    except Exception:  # the pixels are decoded already, so only EXIF data can be at fault
        return image, 1
    return turned, orientation if orientation in range(1, 9) else 1


def _is_transparent(image: Image.Image) -> bool:
    """Whether some of a picture is not opaque."""
    if is_deep(image) or not image.has_transparency_data:
        return False
    alpha = image if image.mode in ("LA", "PA", "RGBA") else image.convert("RGBA")
    return alpha.getchannel("A").getextrema()[0] < 255


def as_rgb(
    image: Image.Image, depth: tuple[float, float] | None = None
) -> tuple[Image.Image, Levels | None]:
    """Return what ``read_rgb`` makes of an upright picture, and the levels of deep gray."""
    if is_deep(image):
        gray, levels = _eight_bits(np.asarray(image), image.mode, depth)
        return Image.fromarray(gray).convert("RGB"), levels
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB"), None


def is_deep(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits of gray."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(
    values: np.ndarray, mode: str, depth: tuple[float, float] | None
) -> tuple[np.ndarray, Levels]:
    """Scale deep gray so that its format's white, not the picture's brightest pixel, is 255.

    Integers count to 65,535 (a 32-bit file may go on to 2^31-1); floats to 1, 255 or 65,535,
    whichever is the first that holds them all. ``depth`` says otherwise what is black and white.
    """

    def finite(block: np.ndarray) -> np.ndarray:
        return np.nan_to_num(block.astype(np.float64)) if mode == "F" else block

    lowest = float(min(_in_blocks(lambda block: finite(block).min(), values)))
    highest = float(max(_in_blocks(lambda block: finite(block).max(), values)))
    whites = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0, 2.0**31 - 1)
    white = next((white for white in whites if highest <= white), highest)
    black, white = (0.0, white) if depth is None else depth
    scale = 255 / (white - black)

    def eight(block: np.ndarray) -> np.ndarray:
        block = finite(block).astype(np.float64)
        return np.rint((block.clip(black, white) - black) * scale).astype(np.uint8)

    return np.concatenate(_in_blocks(eight, values)), Levels(lowest, highest, white)


def _in_blocks(work: Callable, values: np.ndarray) -> list:
    """Apply ``work`` to some rows at a time: float64 copies of a whole picture take gigabytes."""
    rows = max(1, _BLOCK // values.shape[1])
    return [work(values[top : top + rows]) for top in range(0, len(values), rows)]


# ---- cutting -----------------------------------------------------------------------------------


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scale a picture's short side to ``size`` and cut out the middle: uint8 (size, size, 3).

    Halved by box means while at least twice too large, then one bicubic step; a smaller picture
    is enlarged. Raises ``ValueError`` for a strip so narrow that enlarging it would take more
    than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    pixels = np.asarray(scale_short_side(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].copy()


def scale_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale as ``center_crop`` does, without the cut; raises ``ValueError`` as it does."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"too narrow a strip ({image.width} x {image.height}) to scale to {size} pixels"
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)


def load_crop(path: str, size: int, depth: tuple[float, float] | None = None) -> np.ndarray:
    """Read and cut one picture: uint8 (size, size, 3); raises ``UserError`` naming the file.

    ``depth`` is that of ``read_rgb``.
    """
    with ROOM.lease():
        image = read_rgb(path) if depth is None else read_rgb(path, depth)
        return crop_of(path, image, size)


def crop_of(path: str, image: Image.Image, size: int) -> np.ndarray:
    """Cut as ``center_crop``, but raise ``UserError`` naming the file."""
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
    masked = np.empty_like(gt_u8)
    for rows in range(0, len(gt_u8), 256):  # a large photo's products would fill memory
        part = slice(rows, rows + 256)
        product = gt_u8[part].astype(np.uint32) * mask_u8[part]
        masked[part] = (product * 2 + 255) // 510
    return masked
