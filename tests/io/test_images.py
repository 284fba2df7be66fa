"""Reading pictures as a person sees them, and cutting them."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import picture, save
from PIL import Image, features
from run_cases import GOLDEN

from guided_diffusion.errors import UserError
from guided_diffusion.io import colours, images
from guided_diffusion.io.listing import list_images

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def pixels(path):
    return np.asarray(images.read_rgb(str(path)))


def chunk(kind, content):
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def with_chunk(path, extra):
    """Put a chunk behind the header of a PNG."""
    raw = path.read_bytes()
    path.write_bytes(raw[:33] + extra + raw[33:])
    return str(path)


LONG = zlib.compress(b'{"node": 1}, ' * 90_000, 9)
CHUNKS = {
    "compressed text": chunk(b"zTXt", b"workflow\0\0" + LONG),
    "international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "profile": chunk(b"iCCP", b"scanner\0\0" + LONG),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_text_and_profile_of_a_png_are_not_looked_at(tmp_path, name):
    save(tmp_path / "p.png", np.ascontiguousarray(np.rot90(picture())), turned=6)
    path = with_chunk(tmp_path / "p.png", CHUNKS[name])
    assert np.array_equal(np.asarray(images.read_rgb(path)), picture())


def test_damaged_pixels_beside_text_are_still_refused(tmp_path):
    save(tmp_path / "p.png", np.random.default_rng(0).integers(0, 256, (99, 99), dtype=np.uint8))
    with_chunk(tmp_path / "p.png", CHUNKS["profile"])
    (tmp_path / "p.png").write_bytes((tmp_path / "p.png").read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"p\.png: cannot be read"):
        images.read_rgb(str(tmp_path / "p.png"))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path):
    path = save(tmp_path / "p.avif", picture(), quality=95)
    assert np.abs(np.asarray(images.read_rgb(path)).astype(int) - picture()).mean() < 5


@pytest.mark.parametrize("name", ["p.heic", "p.jpg"])
def test_heic_is_refused_by_name_whatever_the_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64)
    with pytest.raises(UserError, match=rf"{name}: .*HEIC has to be converted to JPEG or PNG"):
        images.read_rgb(str(tmp_path / name))


def test_a_damaged_tiff_is_told_in_our_line_alone(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    path = Path(save(tmp_path / "p.tif", noise, compression="tiff_deflate"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 200] = b"\x55" * 200
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"p\.tif: cannot be read"):
        images.read_rgb(str(path))
    told = capfd.readouterr()
    assert told.out + told.err == ""


@pytest.mark.parametrize(("limit", "progressive"), [(9000, False), (2500, True)])
def test_a_jpeg_too_large_to_read_is_read_smaller(tmp_path, monkeypatch, limit, progressive):
    blocks = np.kron(picture(10, 10), np.ones((10, 10, 1), np.uint8))
    options = {"quality": 95, "progressive": progressive, "subsampling": 0}
    path = save(tmp_path / "p.jpg", blocks, turned=3, **options)
    whole = np.asarray(images.read_rgb(path)).astype(int)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    image = images.read_rgb(path)
    assert image.size == (50, 50)
    assert images.origin_of(image).size == (100, 100)
    small = whole.reshape(50, 2, 50, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(image) - small).mean() < 8


def test_deep_gray_is_scaled_some_rows_at_a_time(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 65536, (50, 30), dtype=np.uint16)
    path = save(tmp_path / "p.png", values)
    whole = np.asarray(images.read_rgb(path))
    monkeypatch.setattr(colours, "_BLOCK", 100)
    assert np.array_equal(np.asarray(images.read_rgb(path)), whole)


@pytest.mark.parametrize(
    ("values", "depth", "expected"),
    [
        (np.array([[0, 2048, 4095, 9000]], np.uint16), (0, 4095), [0, 128, 255, 255]),
        (np.array([[-1000, 0, 1000, 3000]], np.int32), (-1000, 3000), [0, 64, 128, 255]),
        (np.array([[-1, 0, 1, np.nan]], np.float32), (-1, 1), [0, 128, 255, 128]),
    ],
)
def test_depth_says_what_is_black_and_white(tmp_path, values, depth, expected):
    image = images.read_rgb(save(tmp_path / "p.tif", values), depth)
    assert np.asarray(image)[0, :, 0].tolist() == expected
    finite = np.nan_to_num(values)
    assert images.origin_of(image).levels == colours.Levels(
        finite.min(), finite.max(), depth[1], int(np.isnan(values).sum())
    )


def test_deep_colour_is_noted(tmp_path):
    """It is 16-bit RGB, which Pillow reads and does not write."""
    rows = 4 * (b"\0" + np.full((5, 3), 4095, ">u2").tobytes())
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path = tmp_path / "p.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks))
    assert images.origin_of(images.read_rgb(str(path))).is_deep_colour
    assert not images.origin_of(images.read_rgb(save(tmp_path / "q.png", picture()))).is_deep_colour


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # What each value says about the stored picture, by EXIF 2.3: where row 0 and column 0 lie.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = np.ascontiguousarray(undo(picture()))
    image = images.read_rgb(save(tmp_path / "p.png", stored, turned=orientation))
    assert np.array_equal(np.asarray(image), picture())
    origin = images.origin_of(image)
    assert (origin.size, origin.orientation) == ((40, 30), orientation)
    assert origin.stored == stored.shape[1::-1]
    jpeg = pixels(save(tmp_path / "p.jpg", stored, turned=orientation, quality=98)).astype(int)
    assert np.abs(jpeg - picture()).mean() < 3


def test_cmyk_is_not_inverted(tmp_path):
    image = Image.fromarray(picture()).convert("CMYK")
    path = save(tmp_path / "p.jpg", image, quality=98)
    assert b"Adobe" in Path(path).read_bytes()  # stored inverted, as Photoshop does
    assert np.abs(pixels(path).astype(int) - picture()).mean() < 3


ALPHA = np.array([[[200, 200, 200, level] for level in (0, 51, 102, 255)]], np.uint8)
PALETTE = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
PALETTE.putpalette([*RED, *GREEN, *BLUE])


@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("rgba.png", ALPHA, {}, [0, 40, 80, 200]),
        ("la.png", Image.fromarray(ALPHA).convert("LA"), {}, [0, 40, 80, 200]),
        ("l.png", np.array([[255, 90]], np.uint8), {"transparency": 90}, [255, 0]),
        ("rgb.png", np.array([[RED, BLUE]], np.uint8), {"transparency": RED}, [0, BLUE]),
        ("p.png", PALETTE, {}, [RED, GREEN, BLUE]),
        ("p.png", PALETTE, {"transparency": 1}, [RED, 0, BLUE]),
        ("p.gif", PALETTE, {"transparency": 1}, [RED, 0, BLUE]),
    ],
)
def test_palettes_are_applied_and_transparent_parts_are_black(
    tmp_path, name, image, options, expected
):
    seen = pixels(save(tmp_path / name, image, **options))[0].astype(int)
    for found, colour in zip(seen, expected, strict=True):
        assert np.abs(found - colour).max() <= 1


def test_the_first_frame_is_read_and_those_of_its_size_are_counted(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in (RED, GREEN)]
    other = Image.new("RGB", (9, 9), BLUE)
    for name, more in (("p.gif", frames[1:]), ("p.png", frames[1:]), ("p.tif", [other, *frames])):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=more)
        assert pixels(path)[2, 2].tolist() == list(RED)
        assert images.read_header(path).frames == ([0, 2, 3] if name == "p.tif" else [0, 1])


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.uint16, [0, 128, 257, 30000, 65535], [0, 0, 1, 117, 255]),
        (np.uint16, [0, 128, 200], [0, 0, 1]),  # a dark picture stays dark
        (np.int32, [0, 128, 257, 30000, 65535], [0, 0, 1, 117, 255]),
        (np.int32, [0, 2**30, 2**31 - 1], [0, 128, 255]),
        *((np.float32, [0, 0.5 * white, white, np.nan], [0, 128, 255, 0]) for white in (1, 255)),
        (np.float32, [0, 32767.5, 65535], [0, 128, 255]),
    ],
)
def test_deep_gray_is_scaled_not_clipped(tmp_path, dtype, values, expected):
    path = save(tmp_path / "p.tif", np.array([values], dtype))
    assert pixels(path)[:, :, 2].tolist() == [expected]


def make_truncated(path, **options):
    save(path, picture(200, 200), **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("half.jpg", make_truncated, "truncated"),
        ("half.png", make_truncated, "cannot be read"),
        ("half.gif", make_truncated, "cannot be read"),
        ("empty.png", lambda path: path.touch(), "is empty"),
        ("text.png", lambda path: path.write_text("hello\n"), "not a picture"),
        ("post.png", lambda path: save(path, format="EPS"), "not a picture"),
        ("folder.png", lambda path: path.mkdir(), "is a folder"),
        ("pipe.png", os.mkfifo, "is a pipe"),
        ("dangling.png", lambda path: path.symlink_to("nowhere"), "link to a file"),
        ("looped.png", lambda path: path.symlink_to(path.name), "cannot be read"),
        ("absent.png", lambda path: None, "no such file"),
    ],
)
def test_what_is_no_whole_picture_is_refused_by_name(tmp_path, name, make, problem):
    make(tmp_path / name)
    with pytest.raises(UserError, match=problem) as caught:
        images.read_rgb(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    if name != "absent.png":
        assert list_images(str(tmp_path)) == [str(tmp_path / name)]  # listed, so that it is found


@pytest.mark.parametrize("factor", [1, 3])
def test_decompression_bombs_are_an_error_not_a_warning(tmp_path, monkeypatch, factor):
    path = save(tmp_path / "bomb.png", Image.new("1", (100, factor * 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # Pillow itself warns at 900, errs at 1800
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"bomb\.png.*too many.*make the picture smaller"):
            images.read_rgb(path)
    assert Image.MAX_IMAGE_PIXELS == 900


def test_a_narrow_strip_is_refused_before_it_is_enlarged(tmp_path):
    path = save(tmp_path / "strip.png", Image.new("1", (100_000, 1)))
    with pytest.raises(UserError, match=r"strip\.png.*narrow"):
        images.load_crop(path, 256)


def test_damaged_bytes_never_escape_as_anything_but_a_user_error(tmp_path):
    rng = np.random.default_rng(0)
    refused = 0
    for name in ("p.png", "p.jpg", "p.gif", "p.webp"):
        whole = bytearray(Path(save(tmp_path / name)).read_bytes())
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(damaged), 4):
                damaged[place] = rng.integers(256)
            (tmp_path / "damaged.png").write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    crop = images.load_crop(str(tmp_path / "damaged.png"), 16)
                    assert crop.shape == (16, 16, 3)
                except UserError:
                    refused += 1
    assert refused > 20


@pytest.mark.parametrize("number", range(6))
def test_crops_equal_the_published_programs(number):
    expected = np.load(GOLDEN / "crop" / "expect.npz")[str(number)]
    crop = images.center_crop(images.read_rgb(str(GOLDEN / "crop" / f"{number}.png")), 64)
    assert crop.dtype == np.uint8
    assert np.array_equal(crop, expected)


@pytest.mark.parametrize(("width", "height"), [(7, 5), (64, 64), (65, 64), (500, 70), (31, 999)])
def test_a_crop_has_its_size_and_the_middle(width, height):
    array = np.zeros((height, width, 3), np.uint8)
    array[height // 2 - 1 : height // 2 + 2, width // 2 - 1 : width // 2 + 2] = 255
    crop = images.center_crop(Image.fromarray(array), 64)
    assert crop.shape == (64, 64, 3)
    assert crop[29:35, 29:35].max() == crop.max() > 20


def test_sides_are_rounded_not_cut():
    image = Image.fromarray(picture(100, 67))  # 100 * 64 / 67 = 95.5
    expected = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))[:, 16:80]
    assert np.array_equal(images.center_crop(image, 64), expected)


def test_tensors_are_exact():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image, mask = images.to_model_range(levels), images.mask_to_tensor(levels)
    assert image.dtype == mask.dtype == torch.float32
    assert image.shape == mask.shape == (3, 16, 16)
    expected = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(mask.permute(1, 2, 0).numpy(), levels.astype(np.float32) / 255)
    assert (mask.max(), image.min(), image.max()) == (1, -1, 1)
