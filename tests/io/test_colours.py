"""Colour profiles, and levels of more than 8 bits."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from guided_diffusion.io import colours, images

RED, BLUE = (255, 0, 0), (0, 0, 255)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# As sRGB, but for red and blue, which change places.
SWAPPED = (
    SRGB.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
)


def gray_profile(gamma):
    """A gray profile of one gamma: white point and curve behind the header."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", start, 20, b"kTRC", start + 20, 14)
    body = tags + white + curve
    head = struct.pack(
        ">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ "
    )
    return (head + SRGB[24:80] + b"\0" * 128)[:128] + body


def with_profile(image, profile):
    data = io.BytesIO()
    image.save(data, "TIFF" if image.mode == "CMYK" else "PNG", icc_profile=profile)
    return Image.open(data)


def seen(image, profile):
    return np.asarray(images.read_rgb(with_profile(image, profile)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_is_applied_once(mode):
    image = with_profile(Image.new("RGB", (4, 3), RED).convert(mode), SWAPPED)
    rgb = images.read_rgb(image)
    assert np.abs(np.asarray(rgb).astype(int) - BLUE).max() <= 2
    assert "icc_profile" not in rgb.info
    assert images.origin_of(rgb).has_profile
    upright = images.read_upright(image)
    assert upright.convert("RGB").getpixel((0, 0)) == RED  # photos of full size keep their colours


def test_transparency_stays_beside_a_profile():
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    assert np.abs(seen(image, SWAPPED)[0].astype(int) - [BLUE, (0, 0, 0)]).max() <= 2


@pytest.mark.parametrize("profile", [None, SRGB, b"no profile", SRGB[:300], gray_profile(1.0)])
def test_without_another_profile_for_rgb_pixels_stay_exactly(profile):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    assert np.array_equal(seen(Image.fromarray(pixels), profile), pixels)


def test_gray_profiles_are_applied_and_those_of_rgb_fit_gray():
    gray = Image.new("L", (2, 2), 128)
    assert seen(gray, gray_profile(1.0))[0, 0].tolist() == pytest.approx([188] * 3, abs=1)
    assert seen(gray, SRGB)[0, 0].tolist() == [128] * 3


def test_masks_are_numbers_and_keep_theirs():
    image = images.read_upright(with_profile(Image.new("RGB", (4, 3), RED), SWAPPED))
    assert np.asarray(colours.to_rgb(image))[0, 0].tolist() == list(RED)


def gray(image, depth=None):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    result = colours.to_gray(images.read_upright(image), depth)
    return np.asarray(result), images.origin_of(result)


def test_gray_keeps_every_level_of_16_bits():
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert gray(deep)[0].dtype == np.uint16
    assert np.array_equal(gray(deep)[0], deep)
    assert np.array_equal(gray(deep.astype(np.int32))[0], deep)
    scan = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    scaled = gray(scan, (0, 4095))[0]
    assert len(np.unique(scaled)) == 4096
    assert (scaled.min(), scaled.max()) == (0, 65535)


def test_gray_of_floats_is_scaled_to_16_bits():
    floats = np.array([[0, 0.5, 1, np.nan, np.inf]], np.float32)
    assert gray(floats)[0].tolist() == [[0, 32768, 65535, 0, 65535]]
    assert gray(floats * 3000 - 1000, (-1000, 2000))[0].tolist()[0][:3] == [0, 32768, 65535]


def test_gray_of_8_bits_stays_and_colour_is_noted():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for stored in (levels, np.dstack([levels] * 3)):
        pixels, origin = gray(stored)
        assert np.array_equal(pixels, levels)
        assert pixels.dtype == np.uint8
        assert not origin.is_coloured
    assert gray(Image.new("RGB", (4, 4), RED))[1].is_coloured


def test_infinite_pixels_do_not_count_for_the_range():
    floats = np.array([[0, 0.25, 1, np.inf, -np.inf, np.nan]], np.float32)
    rgb = colours.to_rgb(images.read_upright(Image.fromarray(floats)))
    assert np.asarray(rgb)[0, :, 0].tolist() == [0, 64, 255, 255, 0, 0]
    assert images.origin_of(rgb).levels == colours.Levels(0, 1, 1, 3)
    nothing = np.full((2, 2), np.nan, np.float32)
    assert not np.asarray(colours.to_rgb(images.read_upright(Image.fromarray(nothing)))).any()
