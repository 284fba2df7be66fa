"""Results on disk: written whole or not at all, and in the form in which people look at them.

Every file is written under a temporary name beside its place and then renamed, so that whoever
finds a file finds all of it. Pictures are uint8 (H, W, 3).
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import platform
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from guided_diffusion import UserError

ROWS_PER_PAGE = 100
_MARK = "repaint"  # the PNG comment that says with which settings a result was made
_LARGE_PAGE = 8  # from so many images on, the tiles of an overview are small
_MOST_SAMPLES = 8
_FRAMES_PER_LINE = 12
_GAP, _BORDER = 2, 10
_PAPER, _INK = (255, 255, 255), (40, 40, 40)

# Pillow's own font has no Chinese, Japanese or Korean; these come with the usual systems.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc", "PingFang.ttc")


# ---- whole files -------------------------------------------------------------------------------


def check_folder(folder: str | os.PathLike) -> Path:
    """Return the part of ``folder`` that exists; UserError where results could not go there."""
    parts = (Path(folder), *Path(folder).absolute().parents)
    there = next(part for part in parts if os.path.lexists(part))
    if max(len(os.fsencode(part.name)) for part in parts) > 255:
        raise UserError("results cannot be written there: the name is too long", path=folder)
    if not there.is_dir():
        raise UserError("results cannot be written there: not a folder", path=there)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError("results cannot be written there: no permission", path=there)
    return there


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends well.

    The folder is made if need be. The block must create the file, and must say its format where
    a writer would guess it from the suffix. After an exception, Ctrl-C included, the temporary
    file is removed and what stood at ``path`` is untouched. Raises ``UserError`` naming ``path``
    when the system refuses (disk full, no permission, read-only).
    """
    path = Path(path)
    temporary = path.with_name(_temporary_name())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot be written: {reason}", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary_name() -> str:
    """Name a file by 16 hexadecimal digits: machine, process, and chance."""
    return f".{_machine()}{os.getpid() & 0xFFFFFF:06x}{secrets.token_hex(3)}.tmp"


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all; raises ``UserError`` as ``atomic_path``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_png(path: str | os.PathLike, array_u8: np.ndarray, *, mark: str | None = None) -> None:
    """Write a picture, uint8 (H, W, 3), whole or not at all; raises as ``atomic_path``.

    ``mark`` is kept in the file as a comment that ``read_mark`` gives back.
    """
    image, notes = _as_image(array_u8), PngInfo()
    if mark is not None:
        notes.add_text(_MARK, mark)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=notes)


def read_mark(path: str | os.PathLike) -> str | None:
    """Return the mark of a PNG, or "" where it has none; None where there is no whole PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return image.info.get(_MARK, "")
    except (OSError, SyntaxError, ValueError):
        return None


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files that killed processes left in ``folder``.

    Those of a process that lives, or of another machine within a day, belong to a run beside this
    one.
    """
    for leftover in Path(folder).glob(f".{'[0-9a-f]' * 16}.tmp"):
        machine, process = leftover.name[1:5], int(leftover.name[5:11], 16)
        with contextlib.suppress(OSError):
            is_old = time.time() - leftover.stat().st_mtime > 24 * 3600
            if is_old or (machine == _machine() and not _is_other_alive(process)):
                leftover.unlink()


def _is_other_alive(process: int) -> bool:
    """Whether another process of this number runs: this one has no files underway yet."""
    if process == os.getpid() & 0xFFFFFF:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_checkpoint(path: str | os.PathLike, state: object) -> None:
    """Write what ``torch.save`` can, whole or not at all; raises as ``atomic_path``."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        refusals: list[OSError] = []
        try:
            torch.save(state, _Noting(stream, refusals))
        except RuntimeError:  # torch's writer hides the system's refusal behind its own exception
            if refusals:
                raise refusals[0] from None
            raise


class _Noting(io.RawIOBase):
    """A file that notes the exceptions of its writes before passing them on."""

    def __init__(self, stream: io.BufferedWriter, refusals: list[OSError]) -> None:
        self._stream, self._refusals = stream, refusals

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self._refusals.append(error)
            raise


def _as_image(array_u8: np.ndarray) -> Image.Image:
    if array_u8.dtype != np.uint8 or array_u8.ndim != 3 or array_u8.shape[2] != 3:
        raise ValueError(f"not uint8 (H, W, 3): {array_u8.dtype} {array_u8.shape}")
    return Image.fromarray(np.ascontiguousarray(array_u8))


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


def result_path(folder: str | os.PathLike, name: str) -> Path:
    """Join folder and file name; raises ``UserError`` if the name could lead anywhere else."""
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise UserError("a result's file name must be a plain name", path=folder, got=repr(name))
    return Path(folder) / name


def write_result(
    folders: Mapping[str, str | None],
    name: str,
    sample: np.ndarray,
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
    several, ``mark`` is kept in it. It comes last: where it exists, the others do.
    Raises ``UserError`` as ``atomic_path`` and ``result_path``.
    """
    inputs = _input_pictures(folders, name, gt_u8, mask_u8)
    inpainted = result_path(folders["srs"], sample_name or name)
    for path, pixels in inputs:
        write_png(path, pixels)
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
        and all(np.array_equal(_read_back(path), pixels) for path, pixels in inputs)
    )


def _has_end(path: Path) -> bool:
    """Whether a PNG has its last chunk, which Pillow does not miss."""
    try:
        return path.read_bytes().endswith(b"IEND\xaeB`\x82")
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


# ---- overview ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OverviewRow:
    """One image of an overview: its name, the masked input, its samples and, if kept, the truth."""

    name: str
    masked: np.ndarray
    samples: Sequence[np.ndarray]
    gt: np.ndarray | None


def finished_rows(
    folders: Mapping[str, str | None], results: Iterable[tuple[str, Sequence[str]]]
) -> Iterator[OverviewRow]:
    """Read rows back from the result folders, those of earlier runs included.

    ``results`` gives (name, names of its samples); what is not there (yet) is passed over.
    """
    for name, names in results:
        masked = _read_back(result_path(folders["lrs"], name))
        samples = [
            _read_back(result_path(folders["srs"], sample)) for sample in names[:_MOST_SAMPLES]
        ]
        samples = [sample for sample in samples if sample is not None]
        truth = folders.get("gts")
        gt = _read_back(result_path(truth, name)) if truth else None
        if masked is not None and samples:
            yield OverviewRow(name, masked, samples, gt)


def _read_back(path: Path) -> np.ndarray | None:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):  # absent, or somebody else's file under this name
        return None


def write_overview(path: str | os.PathLike, rows: Iterable[OverviewRow]) -> list[Path]:
    """Write ``overview`` pages of up to ``ROWS_PER_PAGE`` images: x.png, x_2.png, x_3.png, ….

    Rows may come from a generator: one page is held in memory. Returns the paths.
    """
    path, rows, written = Path(path), iter(rows), []
    while page := list(islice(rows, ROWS_PER_PAGE)):
        number = len(written) + 1
        target = path if number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")
        write_png(target, np.asarray(overview(page)))
        written.append(target)
    return written


def overview(rows: Sequence[OverviewRow]) -> Image.Image:
    """Draw a contact sheet: for each image the masked input, its samples and the ground truth.

    The name stands below. Rows stand in as many columns as make the sheet about square. Tiles
    are up to 256 pixels wide, 128 from nine images on; at most eight samples of an image are shown.
    """
    if not rows:
        raise ValueError("an overview needs at least one image")
    most = 128 if len(rows) > _LARGE_PAGE else 256
    tiles = [
        [
            _fit(tile, most)
            for tile in (row.masked, *row.samples[:_MOST_SAMPLES], row.gt)
            if tile is not None
        ]
        for row in rows
    ]
    side = max(max(tile.size) for row in tiles for tile in row)
    width = max(map(len, tiles)) * (side + _GAP) - _GAP
    height = side + _label_height(side)
    columns = min(len(rows), max(1, round(math.sqrt(len(rows) * height / width))))
    lines = math.ceil(len(rows) / columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + _BORDER) + _BORDER, lines * (height + _BORDER) + _BORDER),
        _PAPER,
    )
    for index, row in enumerate(rows):
        left = _BORDER + index % columns * (width + _BORDER)
        top = _BORDER + index // columns * (height + _BORDER)
        for place, tile in enumerate(tiles[index]):
            sheet.paste(tile, (left + place * (side + _GAP), top))
        _write_label(sheet, row.name, left, top + side, width, side)
    return sheet


# ---- the process -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProcessFrame:
    """One moment of the reverse process: time ``t``, the noisy picture and the predicted x_0."""

    t: int
    x: np.ndarray
    pred_xstart: np.ndarray


def film_strip(frames: Sequence[ProcessFrame], *, tile: int = 128) -> Image.Image:
    """Draw the process from left to right: x_t above, predicted x_0 below, and the time.

    All pictures have one shape; the longer side becomes ``tile`` pixels or somewhat less. Twelve
    frames stand in a line.
    """
    cells = [_frame_image(frame, tile) for frame in frames]
    columns = min(len(cells), _FRAMES_PER_LINE)
    lines = math.ceil(len(cells) / columns)
    width, height = cells[0].width + _GAP, cells[0].height + _GAP
    strip = Image.new("RGB", (columns * width - _GAP, lines * height - _GAP), _PAPER)
    for index, cell in enumerate(cells):
        strip.paste(cell, (index % columns * width, index // columns * height))
    return strip


def write_film_strip(
    path: str | os.PathLike, frames: Sequence[ProcessFrame], *, tile: int = 128
) -> None:
    """Write ``film_strip`` as a PNG; raises ``UserError`` as ``atomic_path``."""
    write_png(path, np.asarray(film_strip(frames, tile=tile)))


def write_gif(
    path: str | os.PathLike,
    frames: Sequence[ProcessFrame],
    *,
    seconds: float = 6.0,
    tile: int = 256,
) -> None:
    """Write the process as a GIF of about ``seconds``, repeated for ever; the last frame stays.

    x_t above, predicted x_0 below, and the time. Raises ``UserError`` as ``atomic_path``.
    """
    pages = [_frame_image(frame, tile).quantize(256) for frame in frames]
    each = max(20, round(seconds * 1000 / len(pages)))  # viewers slow down what is below 20 ms
    durations = [each] * (len(pages) - 1) + [2000]
    with atomic_path(path) as temporary:
        pages[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pages[1:],
            duration=durations,
            loop=0,
        )


def montage(pictures: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lay (N, H, W, 3) pictures out as one, in rows of ``columns`` (default: one row)."""
    count, height, width, channels = pictures.shape
    columns = columns or count
    lines = math.ceil(count / columns)
    blank = np.full((lines * columns - count, height, width, channels), 255, pictures.dtype)
    grid = np.concatenate([pictures, blank]).reshape(lines, columns, height, width, channels)
    return grid.swapaxes(1, 2).reshape(lines * height, columns * width, channels)


def _frame_image(frame: ProcessFrame, tile: int) -> Image.Image:
    x, pred_xstart = _fit(frame.x, tile), _fit(frame.pred_xstart, tile)
    page = Image.new("RGB", (x.width, 2 * x.height + _GAP + _label_height(x.width)), _PAPER)
    page.paste(x, (0, 0))
    page.paste(pred_xstart, (0, x.height + _GAP))
    _write_label(page, f"t={frame.t}", 0, 2 * x.height + _GAP, x.width, x.width)
    return page


# ---- drawing -----------------------------------------------------------------------------------


def _fit(pixels: np.ndarray, most: int) -> Image.Image:
    """Scale to a longer side of at most ``most`` pixels; small pictures grow in whole pixels."""
    image = _as_image(pixels)
    longest = max(image.size)
    if longest <= most:
        times = most // longest
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    size = [max(1, round(side * most / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


def _font_size(side: int) -> int:
    return max(10, min(14, side // 8))


def _label_height(side: int) -> int:
    return _font_size(side) + 6


@functools.lru_cache(maxsize=8)
def _font(size: int, wide: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for file_name in _WIDE_FONTS if wide else ():
        with contextlib.suppress(OSError):
            return ImageFont.truetype(file_name, size)
    return ImageFont.load_default(size)


def _write_label(sheet: Image.Image, text: str, left: int, top: int, width: int, side: int) -> None:
    """Write one line in the band below the tiles, its middle left out where it is too long."""
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    font = _font(_font_size(side), any(ord(sign) > 0x2E7F for sign in text))
    if not isinstance(font, ImageFont.FreeTypeFont):  # without FreeType: Latin-1 only
        text = text.encode("latin-1", "replace").decode("latin-1")
    draw, shown, keep = ImageDraw.Draw(sheet), text, len(text)
    while keep > 2 and draw.textlength(shown, font) > width:
        keep -= 1
        shown = f"{text[: (keep + 1) // 2]}..{text[len(text) - keep // 2 :]}"
    draw.text((left, top + 2), shown, fill=_INK, font=font)
