"""Write the demo's masks beside its pictures: one of each kind, and a box over the eyes."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from guided_diffusion.io.results import write_image
from guided_diffusion.masks import make_mask

SIZE = 64  # px
EYES = (10, 27, 53, 40)  # left, top, right and bottom, in pixels


def over_the_eyes() -> np.ndarray:
    """Return a mask (SIZE, SIZE) whose hole is a box with round corners over both eyes."""
    mask = Image.new("L", (SIZE, SIZE), 255)
    ImageDraw.Draw(mask).rounded_rectangle(EYES, radius=5, fill=0)
    return np.asarray(mask)


def main() -> None:
    """Write six masks, each under the name of its picture."""
    kinds = ("thick", "genhalf", "ex64", "thin", "eyes", "thick")
    pictures = sorted((ROOT / "data/datasets/gts/demo").glob("*.png"))
    for number, (kind, picture) in enumerate(zip(kinds, pictures, strict=True)):
        rng = np.random.default_rng([0, number])
        mask = over_the_eyes() if kind == "eyes" else make_mask(kind, SIZE, rng)
        folder = ROOT / "data/datasets/gt_keep_masks/demo"
        write_image(folder / picture.name, Image.fromarray(mask))


if __name__ == "__main__":
    main()
