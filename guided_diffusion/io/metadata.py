"""What a photo's file holds besides its pixels: EXIF, XMP, texts, profile and resolution."""

import contextlib
import re

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 0xA002, 0xA003
_EXIF, _GPS, _INTEROP = 0x8769, 0x8825, 0xA005  # the directories inside of EXIF data
# Tags of a TIFF that describe how its pixels are stored, or hold what is kept elsewhere.
_STORAGE_TAGS = {
    *(*range(254, 267), 273, *range(277, 282), 284, *range(288, 294), 297, *range(317, 326)),
    *(330, *range(332, 348), *range(512, 522), 529, 532, 700, 33723, 34377, 34675, 37724),
}
_XMP_START = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_KEYWORD = "XML:com.adobe.xmp"
_OTHER_KEYWORDS = {_XMP_KEYWORD, "Raw profile type exif", "Raw profile type APP1"}
_LARGEST_DPI = 65_535  # a JPEG has 16 bits for it
_LARGEST_SEGMENT = 65_533  # bytes of a JPEG's segment


def metadata_of(image: Image.Image) -> dict[str, object]:
    """Return what an opened file holds besides its pixels; call it before it is turned upright.

    ``exif`` and ``xmp`` are bytes, ``texts`` are a PNG's by keyword; ``icc_profile`` and ``dpi``
    are Pillow's. The orientation becomes 1, and the thumbnail, which shows the photo as it was, is
    left out. So is what is damaged.
    """
    found = {}
    parts = {"exif": _exif_of, "xmp": _xmp_of, "texts": _texts_of, "dpi": _dpi_of}
    if image.mode not in ("CMYK", "LAB", "YCbCr"):  # a profile describes the channels of its mode
        parts["icc_profile"] = lambda image: image.info.get("icc_profile")
    for name, part in parts.items():
        with contextlib.suppress(Exception):  # Pillow raises anything at all over damaged data
            found[name] = part(image)
    return {name: value for name, value in found.items() if value}


def _exif_of(image: Image.Image) -> bytes:
    found, exif = image.getexif(), Image.Exif()
    directories = {tag: dict(found.get_ifd(tag)) for tag in (_EXIF, _GPS)}
    details = directories[_EXIF]
    if _INTEROP in details:
        details[_INTEROP] = dict(found.get_ifd(_INTEROP))
    if {_WIDTH, _HEIGHT} <= details.keys():
        is_turned = found.get(_ORIENTATION, 1) >= 5
        details[_WIDTH], details[_HEIGHT] = image.size[::-1] if is_turned else image.size
    exif.update(_writable(found))
    exif.update({directory: _writable(tags) for directory, tags in directories.items() if tags})
    if not exif:
        return b""
    exif[_ORIENTATION] = 1
    return exif.tobytes()


def _writable(tags: dict[int, object]) -> dict[int, object]:
    """Return the tags of a directory without those that Pillow reads but cannot write."""
    kept = {}
    for tag, value in tags.items():
        if tag not in _STORAGE_TAGS and tag not in (_EXIF, _GPS):
            with contextlib.suppress(Exception):
                single = Image.Exif()
                single[tag] = value
                single.tobytes()
                kept[tag] = value
    return kept


def _xmp_of(image: Image.Image) -> bytes:
    xmp = image.info.get("xmp") or image.info.get(_XMP_KEYWORD) or b""
    for name, segment in getattr(image, "applist", ()):  # older Pillows have a JPEG's XMP here only
        if name == "APP1" and segment.startswith(_XMP_START):
            xmp = segment.removeprefix(_XMP_START)
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    return re.sub(rb'(tiff:Orientation(?:="|>))[0-9]', rb"\g<1>1", xmp)


def _texts_of(image: Image.Image) -> dict[str, str]:
    texts = image.text if image.format == "PNG" else {}
    return {keyword: text for keyword, text in texts.items() if keyword not in _OTHER_KEYWORDS}


def _dpi_of(image: Image.Image) -> tuple[float, float] | None:
    dpi = image.info.get("dpi", ())
    is_usual = len(dpi) == 2 and all(0 < value <= _LARGEST_DPI for value in dpi)  # may be 0/0
    return (float(dpi[0]), float(dpi[1])) if is_usual else None


def jpeg_options(metadata: dict[str, object]) -> dict[str, object]:
    """Return the options of Pillow's JPEG writer that keep ``metadata``."""
    options, xmp = _common(metadata), _XMP_START + metadata.get("xmp", b"")
    if len(options.get("exif", b"")) > _LARGEST_SEGMENT:
        del options["exif"]
    if "xmp" in metadata and len(xmp) <= _LARGEST_SEGMENT:
        options["extra"] = b"\xff\xe1" + (2 + len(xmp)).to_bytes(2, "big") + xmp
    return options


def png_options(metadata: dict[str, object], texts: dict[str, str]) -> dict[str, object]:
    """Return the options of Pillow's PNG writer that keep ``metadata`` and further ``texts``."""
    chunks = PngInfo()
    for keyword, text in {**metadata.get("texts", {}), **texts}.items():
        chunks.add_text(keyword, text, zip=len(text) > 1000)
    if "xmp" in metadata:
        chunks.add_itxt(_XMP_KEYWORD, metadata["xmp"].decode("utf-8", "replace"))
    return {"pnginfo": chunks, **_common(metadata)}


def _common(metadata: dict[str, object]) -> dict[str, object]:
    return {key: metadata[key] for key in ("exif", "icc_profile", "dpi") if metadata.get(key)}
