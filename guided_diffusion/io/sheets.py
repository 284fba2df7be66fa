"""Pictures of pictures: overview, film strip, GIF, grids."""

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
_LARGE_PAGE = 8  # from so many images on, the tiles of an overview are small
_TILE = 256  # pixels of an overview's widest tiles
_MOST_SAMPLES = 8
_FRAMES_PER_LINE = 12
_GAP, _BORDER = 2, 10
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
# Pillow's own font has no Chinese, Japanese or Korean; these come with the usual systems.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc", "PingFang.ttc")


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

    ``results`` gives (name, names of its samples); what is not there (yet) is passed over. Pictures
    that are larger than a tile are scaled down to one: a page of whole photos would fill memory.
    """

    def tile(key: str, file_name: str) -> np.ndarray | None:
        pixels = read_result(result_path(folders[key], file_name))
        if pixels is None or max(pixels.shape) <= _TILE:
            return pixels
        return np.asarray(_fit(pixels, _TILE))

    for name, names in results:
        masked = tile("lrs", name)
        samples = [tile("srs", sample) for sample in names[:_MOST_SAMPLES]]
        samples = [sample for sample in samples if sample is not None]
        gt = tile("gts", name) if folders.get("gts") else None
        if masked is not None and samples:
            yield OverviewRow(name, masked, samples, gt)


def write_overview(path: str | os.PathLike, rows: Iterable[OverviewRow]) -> list[Path]:
    """Write ``overview`` pages of up to ``ROWS_PER_PAGE`` images: x.png, x_2.png, x_3.png, ….

    Rows may come from a generator: one page is held in memory. Pages that an earlier overview has
    beyond these are removed. Returns the paths.
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

    The name stands below. Rows stand in as many columns as make the sheet about square. Tiles
    are up to 256 pixels wide, 128 from nine images on; at most eight samples of an image are shown.
    """
    if not rows:
        raise ValueError("an overview needs at least one image")
    most = _TILE // 2 if len(rows) > _LARGE_PAGE else _TILE
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
    write_image(path, np.asarray(film_strip(frames, tile=tile)))


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
    image = as_image(pixels)
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
