"""Make data/demo.png of what ``python test.py --conf_path confs/demo.yml`` wrote to log/demo.

For each picture: its hole, two results, and the original; below, how one of them came about.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from guided_diffusion.cli import command_line
from guided_diffusion.errors import UserError
from guided_diffusion.io.results import write_image

TILE, GAP, COLUMNS = 112, 6, 2  # px, px, pictures side by side
STRIP_OF = 2  # the picture whose way from noise is shown


def main() -> None:
    """Lay the tiles out, and the strip below them."""
    log = ROOT / "log/demo"
    names = sorted(path.stem for path in (log / "gt").glob("*.png"))
    if len(names) <= STRIP_OF:
        problem = "first run: python test.py --conf_path confs/demo.yml"
        expected = f"at least {STRIP_OF + 1} pictures"
        raise UserError(problem, path=log / "gt", expected=expected, got=len(names))
    rows = -(-len(names) // COLUMNS)
    width = COLUMNS * (4 * TILE + 2 * GAP) + 2 * GAP
    sheet = Image.new("RGB", (width, rows * (TILE + GAP) + GAP), "white")
    for number, name in enumerate(names):
        files = (f"gt_masked/{name}", f"inpainted/{name}_1", f"inpainted/{name}_2", f"gt/{name}")
        left = GAP + number // rows * (4 * TILE + 3 * GAP)
        for place, file in enumerate(files):
            with Image.open(log / f"{file}.png") as image:
                tile = image.resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + place * TILE, GAP + number % rows * (TILE + GAP)))
    with Image.open(log / "process" / f"{names[STRIP_OF]}_1.png") as strip:
        height = round(strip.height * width / strip.width)
        strip = strip.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    whole = np.concatenate([np.asarray(sheet), np.asarray(strip)])
    write_image(ROOT / "data/demo.png", Image.fromarray(whole))


if __name__ == "__main__":
    command_line(main)
