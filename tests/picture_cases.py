"""Little pictures and masks for the tests of reading, pairing and checking."""

import numpy as np
from PIL import Image


def picture(width=40, height=30, seed=0):
    """A smooth coloured picture whose four corners differ, so that turning it shows."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(seed)
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, -1).astype(np.uint8) ^ rng.integers(0, 4, 3, dtype=np.uint8)


def mask_of(width, height, box, white=255, black=0):
    """A mask of ``white`` with a box of ``black``."""
    mask = np.full((height, width), white, np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = black
    return mask


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
