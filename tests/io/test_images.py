"""Reading pictures: what files hold besides pixels, and what memory they take meanwhile."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from guided_diffusion.errors import UserError
from guided_diffusion.io import colours, images


def photo(width=40, height=30):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 6, y * 8, (x + y) * 3], -1).astype(np.uint8)


def saved(path, array, **options):
    path.parent.mkdir(exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return str(path)


def chunk(kind, content):
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def with_chunk(path, extra):
    """Put a chunk behind the header of a PNG."""
    raw = path.read_bytes()
    path.write_bytes(raw[:33] + extra + raw[33:])
    return str(path)


# ---- PNG -----------------------------------------------------------------------------------------

LONG = zlib.compress(b'{"node": 1}, ' * 90_000, 9)
CHUNKS = {
    "compressed text": chunk(b"zTXt", b"workflow\0\0" + LONG),
    "international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "profile": chunk(b"iCCP", b"scanner\0\0" + LONG),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_text_and_profile_of_a_png_are_not_looked_at(tmp_path, name):
    saved(tmp_path / "p.png", photo())
    path = with_chunk(tmp_path / "p.png", CHUNKS[name])
    assert np.array_equal(np.asarray(images.read_rgb(path)), photo())


def test_the_cameras_rotation_is_applied_beside_long_text(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path / "p.png", np.ascontiguousarray(np.rot90(photo())), exif=exif)
    path = with_chunk(tmp_path / "p.png", CHUNKS["compressed text"])
    image = images.read_rgb(path)
    assert np.array_equal(np.asarray(image), photo())
    origin = images.origin_of(image)
    assert (origin.size, origin.stored, origin.orientation) == ((40, 30), (30, 40), 6)


def test_damaged_pixels_beside_text_are_still_refused(tmp_path):
    saved(tmp_path / "p.png", np.random.default_rng(0).integers(0, 256, (99, 99), dtype=np.uint8))
    with_chunk(tmp_path / "p.png", CHUNKS["profile"])
    (tmp_path / "p.png").write_bytes((tmp_path / "p.png").read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"p\.png: cannot be read"):
        images.read_rgb(str(tmp_path / "p.png"))


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path):
    path = saved(tmp_path / "p.avif", photo(), quality=95)
    assert np.abs(np.asarray(images.read_rgb(path)).astype(int) - photo()).mean() < 5


@pytest.mark.parametrize("name", ["p.heic", "p.jpg"])
def test_heic_is_refused_by_name_whatever_the_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64)
    with pytest.raises(UserError, match=rf"{name}: .*HEIC has to be converted to JPEG or PNG"):
        images.read_rgb(str(tmp_path / name))


def test_a_damaged_tiff_is_told_in_our_line_alone(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    path = Path(saved(tmp_path / "p.tif", noise, compression="tiff_deflate"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 200] = b"\x55" * 200
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"p\.tif: cannot be read"):
        images.read_rgb(str(path))
    told = capfd.readouterr()
    assert told.out + told.err == ""


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("limit", [9000, 2500])
def test_a_jpeg_too_large_to_read_is_read_smaller(tmp_path, monkeypatch, limit, progressive):
    blocks = np.kron(photo(10, 10)[:, :, :3] * 4, np.ones((10, 10, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    path = saved(
        tmp_path / "p.jpg", blocks, quality=95, exif=exif, progressive=progressive, subsampling=0
    )
    whole = np.asarray(images.read_rgb(path)).astype(int)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    image = images.read_rgb(path)
    assert image.size == (50, 50)
    assert images.origin_of(image).size == (100, 100)
    small = whole.reshape(50, 2, 50, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(image) - small).mean() < 8


def test_far_too_large_a_jpeg_says_what_to_do(tmp_path, monkeypatch):
    path = saved(tmp_path / "p.jpg", photo(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match=r"100 x 100 pixels are too many.*picture smaller"):
        images.read_rgb(path)


def test_deep_gray_is_scaled_some_rows_at_a_time(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 65536, (50, 30), dtype=np.uint16)
    path = saved(tmp_path / "p.png", values)
    whole = np.asarray(images.read_rgb(path))
    monkeypatch.setattr(colours, "_BLOCK", 100)
    assert np.array_equal(np.asarray(images.read_rgb(path)), whole)


# ---- depth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "depth", "expected"),
    [
        (np.array([[0, 2048, 4095, 9000]], np.uint16), (0, 4095), [0, 128, 255, 255]),
        (np.array([[-1000, 0, 1000, 3000]], np.int32), (-1000, 3000), [0, 64, 128, 255]),
        (np.array([[-1, 0, 1, np.nan]], np.float32), (-1, 1), [0, 128, 255, 128]),
    ],
)
def test_depth_says_what_is_black_and_white(tmp_path, values, depth, expected):
    image = images.read_rgb(saved(tmp_path / "p.tif", values), depth)
    assert np.asarray(image)[0, :, 0].tolist() == expected
    finite = np.nan_to_num(values)
    assert images.origin_of(image).levels == colours.Levels(
        finite.min(), finite.max(), depth[1], int(np.isnan(values).sum())
    )


def test_eight_bits_have_no_depth(tmp_path):
    path = saved(tmp_path / "p.png", photo())
    assert np.array_equal(np.asarray(images.read_rgb(path, (0, 9))), photo())
    assert images.origin_of(images.read_rgb(path)).levels is None


def write_deep_colour(path, values):
    """Write 16-bit RGB, which Pillow reads and does not write: uint16 (H, W, 3)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks))
    return str(path)


def test_deep_colour_is_noted(tmp_path):
    values = np.full((4, 5, 3), 4095, np.uint16)
    origin = images.origin_of(images.read_rgb(write_deep_colour(tmp_path / "p.png", values)))
    assert origin.is_deep_colour
    assert not images.origin_of(images.read_rgb(saved(tmp_path / "q.png", photo()))).is_deep_colour
