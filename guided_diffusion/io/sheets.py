"""Sheets of pictures: overview, film strip, GIF and grids."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.io.files import atomic_path
from guided_diffusion.io.results import as_image, read_result, result_path, write_image

OverviewRow: TypeAlias = tuple[str, Sequence[np.ndarray]]  # an image's name and its pictures
ROWS_PER_PAGE = 100
_LARGE_PAGE = 8  # with more images than this, the tiles of an overview are half as wide
_TILE = 256  # pixels of the longer side of the largest tile in an overview, and in a GIF
_STRIP_TILE = 128  # the same in a film strip
_MAX_SAMPLES = 8
_FRAMES_PER_ROW = 12
_GAP, _BORDER = 2, 10
_FONT_SIZE, _LABEL_HEIGHT = 14, 20
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
# For Chinese, Japanese and Korean names, which Pillow's font lacks: fonts of the usual systems.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc", "PingFang.ttc")


def finished_rows(
    folders: Mapping[str, str | None], results: Iterable[tuple[str, Sequence[str]]]
) -> Iterator[OverviewRow]:
    """Yield the rows of an overview from the result folders.

    ``results`` are pairs of an image's file name and those of its samples, of which the first eight
    are shown; missing files are skipped. Pictures larger than a tile are scaled down: a page of
    photos would fill the memory.
    """

    def tiles(key: str, names: Sequence[str]) -> list[np.ndarray]:
        folder = folders.get(key)
        found = (read_result(result_path(folder, name)) for name in names if folder)
        return [
            pixels if max(pixels.shape) <= _TILE else np.asarray(_fit(pixels, _TILE))
            for pixels in found
            if pixels is not None
        ]

    for name, names in results:
        masked, samples = tiles("lrs", [name]), tiles("srs", names[:_MAX_SAMPLES])
        if masked and samples:
            yield name, [*masked, *samples, *tiles("gts", [name])]


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
        write_image(target, overview(page))
        written.append(target)
    while target.is_file():
        target.unlink()
        target = next(targets)
    return written


def overview(rows: Sequence[OverviewRow]) -> Image.Image:
    """Draw a contact sheet: the pictures of each image side by side, and its name below.

    The images are laid out in columns, so that the sheet is about square. Tiles are up to 256
    pixels wide, with nine images or more up to 128.
    """
    limit = _TILE // 2 if len(rows) > _LARGE_PAGE else _TILE
    tiles = [[_fit(pixels, limit) for pixels in pictures] for _, pictures in rows]
    side = max(max(tile.size) for row in tiles for tile in row)
    width = max(map(len, tiles)) * (side + _GAP) - _GAP
    height = side + _LABEL_HEIGHT
    cells = []
    for (name, _), row in zip(rows, tiles, strict=True):
        cell = Image.new("RGB", (width, height), _PAPER)
        for column, tile in enumerate(row):
            cell.paste(tile, (column * (side + _GAP), 0))
        _write_label(cell, name, side)
        cells.append(cell)
    columns = min(len(rows), max(1, round(math.sqrt(len(rows) * height / width))))
    return grid(cells, columns, _BORDER, margin=_BORDER)


@dataclasses.dataclass(frozen=True)
class ProcessFrame:
    """A step of the reverse process: time ``t``, x_t and the predicted x_0, uint8 (H, W, C)."""

    t: int
    x: np.ndarray
    pred_xstart: np.ndarray


def write_film_strip(path: str | os.PathLike, frames: Sequence[ProcessFrame]) -> None:
    """Write the process from left to right: x_t, below it the predicted x_0, and the time.

    A row has twelve frames. Raises ``UserError`` as ``atomic_path``.
    """
    cells = [_frame_image(frame, _STRIP_TILE) for frame in frames]
    write_image(path, grid(cells, min(len(cells), _FRAMES_PER_ROW), _GAP))


def write_gif(path: str | os.PathLike, frames: Sequence[ProcessFrame]) -> None:
    """Write the process as a GIF that takes about 6 s, holds its last frame, and repeats.

    A frame shows x_t, below it the predicted x_0, and the time. Raises ``UserError`` as
    ``atomic_path``.
    """
    pages = [_frame_image(frame, _TILE).quantize(256) for frame in frames]
    duration = max(20, round(6000 / len(pages)))  # ms; viewers play shorter ones slowly
    durations = [duration] * (len(pages) - 1) + [2000]
    options = {"append_images": pages[1:], "duration": durations, "loop": 0}
    with atomic_path(path) as temporary:
        pages[0].save(temporary, format="GIF", save_all=True, **options)


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
    page = Image.new("RGB", (x.width, 2 * x.height + _GAP + _LABEL_HEIGHT), _PAPER)
    page.paste(x, (0, 0))
    page.paste(pred_xstart, (0, x.height + _GAP))
    _write_label(page, f"t={frame.t}", 2 * x.height + _GAP)
    return page


def grid(
    cells: Sequence[Image.Image], columns: int, gap: int, margin: int = 0, paper: Any = _PAPER
) -> Image.Image:
    """Lay cells of one size and mode out in rows of ``columns``; ``paper`` is a colour of it."""
    width, height = cells[0].width + gap, cells[0].height + gap
    rows = math.ceil(len(cells) / columns)
    size = (columns * width - gap + 2 * margin, rows * height - gap + 2 * margin)
    sheet = Image.new(cells[0].mode, size, paper)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        sheet.paste(cell, (margin + column * width, margin + row * height))
    return sheet


def _fit(pixels: np.ndarray, limit: int) -> Image.Image:
    """Scale to a longer side of at most ``limit`` pixels; small pictures grow by a whole factor."""
    image = as_image(pixels)
    longest = max(image.size)
    if longest <= limit:
        factor = limit // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(1, round(side * limit / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


@functools.cache
def _font(wide: bool) -> ImageFont.FreeTypeFont:
    for file_name in _WIDE_FONTS if wide else ():
        with contextlib.suppress(OSError):
            return ImageFont.truetype(file_name, _FONT_SIZE)
    return ImageFont.load_default(_FONT_SIZE)


def _write_label(cell: Image.Image, text: str, top: int) -> None:
    """Write one line of text below the tiles; a text too long loses its middle."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    font = _font(any(ord(character) > 0x2E7F for character in text))
    draw, label, kept = ImageDraw.Draw(cell), text, len(text)
    while kept > 2 and draw.textlength(label, font) > cell.width:
        kept -= 1
        label = f"{text[: (kept + 1) // 2]}..{text[len(text) - kept // 2 :]}"
    draw.text((0, top + 2), label, fill=_INK, font=font)
