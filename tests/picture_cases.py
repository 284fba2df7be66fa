"""Little pictures and masks for the tests of reading, pairing and checking."""

import numpy as np
from PIL import Image, ImageDraw


def picture(width=40, height=30, seed=0):
    """A smooth coloured picture whose four corners differ, so that turning it shows."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(seed)
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, -1).astype(np.uint8) ^ rng.integers(0, 4, 3, dtype=np.uint8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def mask_of(width, height, box, white=255, black=0):
    """A mask of ``white`` with a box of ``black``."""
    mask = np.full((height, width), white, np.uint16 if white > 255 else np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = black
    return mask


def square_mask(white=255, black=0, side=40, dtype=np.uint8):
    """A mask of ``white`` with a square of ``black`` near its middle."""
    start, stop = side // 4, side // 2
    return mask_of(side, side, (start, start, stop, stop), white, black).astype(dtype)


def photo(side=40):
    """A picture of many colours."""
    y, x = np.mgrid[0:side, 0:side]
    return np.stack([x * 6, y * 6, (x * y) % 256], -1).astype(np.uint8)


def strokes(below, colour=(255, 0, 0)):
    """An image with a stroke of a colour over it."""
    image = Image.fromarray(below).convert("RGB")
    ImageDraw.Draw(image).line([2, 20, 38, 24], fill=colour, width=5)
    return image


def save(path, image=None, *, turned=1, **options):
    """Save an image or an array, with an EXIF orientation, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(picture() if image is None else image)
    if turned > 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = turned
    image.save(path, **options)
    return str(path)


def folder_of(path, names):
    """Save one picture under several names in a folder, and return the folder."""
    for name in names:
        save(path / name)
    return str(path)
