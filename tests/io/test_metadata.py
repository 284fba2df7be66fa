"""What a photo's file holds besides its pixels comes back in the result's file."""

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from PIL.PngImagePlugin import PngInfo

from guided_diffusion.io.images import read_upright
from guided_diffusion.io.results import write_image

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6" dc:title="caf\xc3\xa9"/>'
APP1 = b"http://ns.adobe.com/xap/1.0/\0" + XMP
APP1 = b"\xff\xe1" + (2 + len(APP1)).to_bytes(2, "big") + APP1
NOTE = bytes(range(1, 200))


def exif():
    data = Image.Exif()
    data[0x010F], data[0x0112], data[0x0132] = "Maker", 6, "2024:01:02 03:04:05"
    details = {0x9003: "2024:01:02 03:04:05", 0xA002: 40, 0xA003: 30, 0x927C: NOTE}
    data.get_ifd(0x8769).update(details)
    data.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 15.5)})
    return data


def save(path):
    """Write a photo of 40 x 30 pixels that the camera held upright, with all that it can have."""
    photo = Image.fromarray(np.full((30, 40, 3), 90, np.uint8))
    options = {"exif": exif(), "icc_profile": b"a profile", "dpi": (300, 300)}
    if path.suffix == ".jpg":
        options["extra"] = APP1
    if path.suffix == ".png":
        texts = PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        texts.add_text("Creation Time", "2024")
        options["pnginfo"] = texts
    if path.suffix == ".webp":
        options["xmp"] = XMP
    if path.suffix == ".tif":
        options["exif"] = Image.Exif()
        options["exif"].load(exif().tobytes())
        options["exif"][700] = XMP
    photo.save(path, **options)


def copy(source, target):
    """Read and write a photo as a run of full size does, and return the file, opened."""
    photo = read_upright(str(source), whole=True)
    result = Image.fromarray(np.asarray(photo))
    result.info.update(photo.info["metadata"])
    write_image(target, result, mark="m")
    with Image.open(target) as image:
        image.load()
    return image


@pytest.mark.parametrize("target", ["a.png", "a.jpg"])
@pytest.mark.parametrize("source", ["p.jpg", "p.png", "p.webp", "p.tif"])
def test_all_comes_back_upright(tmp_path, source, target):
    save(tmp_path / source)
    image = copy(tmp_path / source, tmp_path / target)
    assert image.size == (30, 40)
    found = image.getexif()
    assert (found[0x010F], found[0x0112], found[0x0132]) == ("Maker", 1, "2024:01:02 03:04:05")
    assert found.get_ifd(0x8825) == {1: "N", 2: (48.0, 8.0, 15.5)}
    details = found.get_ifd(0x8769)
    assert (details[0x9003], details[0x927C]) == ("2024:01:02 03:04:05", NOTE)
    assert (details[0xA002], details[0xA003]) == (30, 40)
    assert not {*found} & {256, 257, 259, 273, 279}  # how a TIFF's pixels are stored
    assert image.info["icc_profile"] == b"a profile"
    assert b'dc:title="caf\xc3\xa9"' in image.info["xmp"]
    assert b'Orientation="6"' not in image.info["xmp"]
    if source != "p.webp":
        assert round(image.info["dpi"][0]) == 300
    if target == "a.jpg":
        assert JpegImagePlugin.get_sampling(image) == 0  # colour at full resolution
    if source == "p.png" and target == "a.png":
        assert image.text["Creation Time"] == "2024"


def test_the_thumbnail_of_the_photo_as_it_was_is_left_out(tmp_path):
    """Its directory follows the first one: offset 26, one entry each."""
    thumbnail = b"\xff\xd8what is to be removed\xff\xd9"
    first = b"\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a\0\0\0"
    entries = [(0x0201, 56), (0x0202, len(thumbnail))]
    second = b"\x02\0" + b"".join(
        tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0" + value.to_bytes(4, "little")
        for tag, value in entries
    )
    data = b"II*\0\x08\0\0\0" + first + second + b"\0\0\0\0" + thumbnail
    Image.new("RGB", (8, 8)).save(tmp_path / "p.jpg", exif=b"Exif\0\0" + data)
    assert b"to be removed" in (tmp_path / "p.jpg").read_bytes()
    image = copy(tmp_path / "p.jpg", tmp_path / "a.jpg")
    assert image.getexif()[0x0112] == 1
    assert b"to be removed" not in (tmp_path / "a.jpg").read_bytes()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"]
)
def test_damaged_exif_data_cost_nothing_else(tmp_path, exif):
    photo = Image.new("RGB", (8, 8))
    photo.save(tmp_path / "p.jpg", exif=exif, icc_profile=b"a profile")
    assert copy(tmp_path / "p.jpg", tmp_path / "a.png").info["icc_profile"] == b"a profile"


def test_what_is_too_long_for_a_jpeg_is_left_out(tmp_path):
    data = exif()
    data.get_ifd(0x8769).update({0x927C: bytes(70_000)})
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode() + " " * 70_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png", exif=data, pnginfo=texts)
    image = copy(tmp_path / "p.png", tmp_path / "a.jpg")
    assert not image.getexif()
    assert "xmp" not in image.info
    assert copy(tmp_path / "p.png", tmp_path / "a.png").getexif()[0x010F] == "Maker"
