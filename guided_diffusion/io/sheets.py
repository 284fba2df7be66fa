"""Sheets of pictures: overview, film strip, GIF and grids."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.io.files import atomic_path
from guided_diffusion.io.results import as_image, read_result, result_path, write_image

ROWS_PER_PAGE = 100
_LARGE_PAGE = 8  # with more images than this, the tiles of an overview are half as wide
_TILE = 256  # pixels of the widest tile in an overview
_MAX_SAMPLES = 8
_FRAMES_PER_ROW = 12
_GAP, _BORDER = 2, 10
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
# For Chinese, Japanese and Korean names, which Pillow's font lacks: fonts of the usual systems.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc", "PingFang.ttc")


# ---- overview ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OverviewRow:
    """One image of an overview: name, masked input, samples and, if kept, ground truth."""

    name: str
    masked: np.ndarray
    samples: Sequence[np.ndarray]
    gt: np.ndarray | None


def finished_rows(
    folders: Mapping[str, str | None], results: Iterable[tuple[str, Sequence[str]]]
) -> Iterator[OverviewRow]:
    """Yield the rows of an overview from the result folders.

    ``results`` are pairs of an image's file name and those of its samples; missing files are
    skipped. Pictures larger than a tile are scaled down: a page of photos would fill the memory.
    """

    def tile(key: str, file_name: str) -> np.ndarray | None:
        pixels = read_result(result_path(folders[key], file_name))
        if pixels is None or max(pixels.shape) <= _TILE:
            return pixels
        return np.asarray(_fit(pixels, _TILE))

    for name, names in results:
        masked = tile("lrs", name)
        samples = [tile("srs", sample) for sample in names[:_MAX_SAMPLES]]
        samples = [sample for sample in samples if sample is not None]
        gt = tile("gts", name) if folders.get("gts") else None
        if masked is not None and samples:
            yield OverviewRow(name, masked, samples, gt)


def write_overview(path: str | os.PathLike, rows: Iterable[OverviewRow]) -> list[Path]:
    """Write pages of up to ``ROWS_PER_PAGE`` images: x.png, x_2.png, x_3.png, ….

    Returns their paths. One page at a time is in memory. Further pages of an earlier overview are
    removed. Raises ``UserError`` as ``atomic_path``.
    """
    path, rows, written = Path(path), iter(rows), []
    later = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in count(2))
    targets = chain([path], later)
    for target in targets:
        page = list(islice(rows, ROWS_PER_PAGE))
        if not page:
            break
        write_image(target, np.asarray(overview(page)))
        written.append(target)
    while target.is_file():
        target.unlink()
        target = next(targets)
    return written


def overview(rows: Sequence[OverviewRow]) -> Image.Image:
    """Draw a contact sheet: for each image the masked input, its samples and the ground truth.

    The name is below. The images are laid out in columns, so that the sheet is about square. Tiles
    are up to 256 pixels wide, with nine images or more up to 128. Of an image, eight samples at
    most are shown.
    """
    if not rows:
        raise ValueError("an overview needs at least one image")
    limit = _TILE // 2 if len(rows) > _LARGE_PAGE else _TILE
    tiles = [
        [
            _fit(tile, limit)
            for tile in (row.masked, *row.samples[:_MAX_SAMPLES], row.gt)
            if tile is not None
        ]
        for row in rows
    ]
    side = max(max(tile.size) for row in tiles for tile in row)
    width = max(map(len, tiles)) * (side + _GAP) - _GAP
    height = side + _label_height(side)
    columns = min(len(rows), max(1, round(math.sqrt(len(rows) * height / width))))
    size = (
        columns * (width + _BORDER) + _BORDER,
        math.ceil(len(rows) / columns) * (height + _BORDER) + _BORDER,
    )
    sheet = Image.new("RGB", size, _PAPER)
    for index, row in enumerate(rows):
        left = _BORDER + index % columns * (width + _BORDER)
        top = _BORDER + index // columns * (height + _BORDER)
        for column, tile in enumerate(tiles[index]):
            sheet.paste(tile, (left + column * (side + _GAP), top))
        _write_label(sheet, row.name, left, top + side, width, side)
    return sheet


# ---- the process -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProcessFrame:
    """A step of the reverse process: time ``t``, x_t and the predicted x_0, uint8 (H, W, C)."""

    t: int
    x: np.ndarray
    pred_xstart: np.ndarray


def film_strip(frames: Sequence[ProcessFrame], *, tile: int = 128) -> Image.Image:
    """Draw the process from left to right: x_t, below it the predicted x_0, and the time.

    All pictures have one shape, whose longer side becomes ``tile`` pixels or slightly less. A row
    has twelve frames.
    """
    cells = [_frame_image(frame, tile) for frame in frames]
    columns = min(len(cells), _FRAMES_PER_ROW)
    rows = math.ceil(len(cells) / columns)
    width, height = cells[0].width + _GAP, cells[0].height + _GAP
    strip = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), _PAPER)
    for index, cell in enumerate(cells):
        strip.paste(cell, (index % columns * width, index // columns * height))
    return strip


def write_film_strip(
    path: str | os.PathLike, frames: Sequence[ProcessFrame], *, tile: int = 128
) -> None:
    """Write ``film_strip`` as a PNG; raises ``UserError`` as ``atomic_path``."""
    write_image(path, np.asarray(film_strip(frames, tile=tile)))


def write_gif(
    path: str | os.PathLike,
    frames: Sequence[ProcessFrame],
    *,
    seconds: float = 6.0,
    tile: int = 256,
) -> None:
    """Write the process as a GIF that takes about ``seconds``, holds its last frame, and repeats.

    A frame shows x_t, below it the predicted x_0, and the time. Raises ``UserError`` as
    ``atomic_path``.
    """
    pages = [_frame_image(frame, tile).quantize(256) for frame in frames]
    duration = max(20, round(seconds * 1000 / len(pages)))  # ms; viewers play shorter ones slowly
    durations = [duration] * (len(pages) - 1) + [2000]
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
    """Lay pictures, uint8 (N, H, W, C), out as one, in rows of ``columns`` (default: one row)."""
    count, height, width, channels = pictures.shape
    columns = columns or count
    rows = math.ceil(count / columns)
    blank = np.full((rows * columns - count, height, width, channels), 255, pictures.dtype)
    grid = np.concatenate([pictures, blank]).reshape(rows, columns, height, width, channels)
    return grid.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def _frame_image(frame: ProcessFrame, tile: int) -> Image.Image:
    x, pred_xstart = _fit(frame.x, tile), _fit(frame.pred_xstart, tile)
    page = Image.new("RGB", (x.width, 2 * x.height + _GAP + _label_height(x.width)), _PAPER)
    page.paste(x, (0, 0))
    page.paste(pred_xstart, (0, x.height + _GAP))
    _write_label(page, f"t={frame.t}", 0, 2 * x.height + _GAP, x.width, x.width)
    return page


# ---- drawing -----------------------------------------------------------------------------------


def _fit(pixels: np.ndarray, limit: int) -> Image.Image:
    """Scale to a longer side of at most ``limit`` pixels; small pictures grow by a whole factor."""
    image = as_image(pixels)
    longest = max(image.size)
    if longest <= limit:
        factor = limit // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(1, round(side * limit / longest)) for side in image.size]
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
    """Write one line of text below the tiles; a text too long loses its middle."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    font = _font(_font_size(side), any(ord(character) > 0x2E7F for character in text))
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow's bitmap font has Latin-1 only
        text = text.encode("latin-1", "replace").decode("latin-1")
    draw, label, kept = ImageDraw.Draw(sheet), text, len(text)
    while kept > 2 and draw.textlength(label, font) > width:
        kept -= 1
        label = f"{text[: (kept + 1) // 2]}..{text[len(text) - kept // 2 :]}"
    draw.text((left, top + 2), label, fill=_INK, font=font)
