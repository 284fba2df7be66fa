"""Write a folder of masks: ``python guided_diffusion/masks.py``."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

if __name__ == "__main__":  # as a script its own folder comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import open_regular
from guided_diffusion.io.images import open_image
from guided_diffusion.io.listing import IMAGE_SUFFIXES
from guided_diffusion.io.paths import check_folder
from guided_diffusion.io.results import read_mark, write_image
from guided_diffusion.io.sheets import grid
from guided_diffusion.masks import FAMILIES, MAX_SIZE, MIN_SIZE, generated_share, make_mask

MAX_COUNT = 1_000_000  # file names have six digits
_PREVIEW_MARK = "preview of masks"  # by which a later run knows its own contact sheet
PREVIEW_TILES, PREVIEW_COLUMNS, PREVIEW_SIDE, PREVIEW_GAP = 64, 8, 128, 4


def _contact_sheet(masks: Sequence[np.ndarray]) -> Image.Image:
    """Return the masks side by side on gray, eight a row, reduced to 128 px where larger."""
    side = min(PREVIEW_SIDE, masks[0].shape[0])
    tiles = [Image.fromarray(mask).resize((side, side), Image.Resampling.BOX) for mask in masks]
    columns = min(PREVIEW_COLUMNS, len(tiles))
    return grid(tiles, columns, PREVIEW_GAP, margin=PREVIEW_GAP, paper=128)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(
        description="Write a folder of inpainting masks of one of the paper's six families.",
        epilog="Polarity: in a mask white (255) is known and kept, black (0) is generated. "
        "A run that finds its masks the wrong way round can turn them with invert_mask: true.",
    )
    parser.add_argument(
        "--kind",
        required=True,
        choices=FAMILIES,
        metavar="FAMILY",
        help="thin or thick: random strokes; ev2li: every other line known; nn2: one pixel in "
        "four known; ex64: only the centre known; genhalf: only the left half known",
    )
    parser.add_argument("--count", type=int, default=1, help="how many masks (default: 1)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="0 or above (default: 0)")
    out_help = "folder for 000000.png, 000001.png, ..."
    parser.add_argument("--out", required=True, metavar="DIR", help=out_help)
    preview_help = "also write a contact sheet of the first 64, DIR_preview.png, beside the folder"
    parser.add_argument("--preview", action="store_true", help=preview_help)
    options = parser.parse_args(argv)
    if not options.out:
        raise UserError("the path is empty", key="--out")
    limits = {"count": (1, MAX_COUNT), "size": (MIN_SIZE, MAX_SIZE), "seed": (0, 2**63 - 1)}
    for key, (low, high) in limits.items():
        got = getattr(options, key)
        if not low <= got <= high:
            raise UserError(key=f"--{key}", expected=f"a whole number in {low}..{high}", got=got)
    return options


def _is_mask(path: Path) -> bool:
    """Return whether a file may be an earlier mask: a square PNG of black and white alone."""
    try:
        with open_regular(path) as stream, open_image(stream) as image:
            is_alike = image.format == "PNG" and image.mode in ("L", "RGB")
            is_square = image.width == image.height
            return is_alike and is_square and bool(np.isin(np.asarray(image), (0, 255)).all())
    except Exception:  # Pillow's decoders raise anything at all over a damaged file
        return False


def _check_folder_of_masks(folder: Path, written: set[str]) -> None:
    """Raise UserError where masks cannot go there, or a file that is no mask would be lost.

    Warns of other pictures in it, which a run over the folder takes for masks.
    """
    check_folder(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(written & present):
        if not _is_mask(folder / name):
            problem = "is no mask and would be overwritten: take another folder, or remove it"
            raise UserError(problem, path=folder / name, key="--out")
    others = {name for name in present - written if name.lower().endswith(IMAGE_SUFFIXES)}
    if others := sorted(others):
        text = f"{folder}: holds {len(others)} other pictures, such as {others[0]}"
        warnings.warn(f"{text}, which a run takes for masks", stacklevel=2)


def _preview_path(folder: Path) -> Path:
    """Return the contact sheet's path; raises UserError where another picture has it."""
    # Beside the folder: a later run would take a sheet inside of it for a mask.
    path = folder.resolve().with_name(f"{folder.resolve().name}_preview.png")
    if os.path.lexists(path) and read_mark(path) != _PREVIEW_MARK:
        problem = "is no contact sheet and would be overwritten: move or remove it"
        raise UserError(problem, path=path, key="--preview")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Write the masks that the command line asks for; mask i depends on the seed and i alone.

    Raises:
        UserError: an option is out of range, or the folder cannot be written to.
    """
    options = _parse(argv)
    folder = Path(options.out)
    shares, tiles = [], []
    sheet = _preview_path(folder) if options.preview else None
    _check_folder_of_masks(folder, {f"{index:06d}.png" for index in range(options.count)})
    for index in range(options.count):
        rng = np.random.default_rng([options.seed, index])
        mask = make_mask(options.kind, options.size, rng)
        write_image(folder / f"{index:06d}.png", Image.fromarray(mask))
        shares.append(100 * generated_share(mask))
        if sheet and index < PREVIEW_TILES:
            tiles.append(mask)
    if sheet:
        write_image(sheet, _contact_sheet(tiles), mark=_PREVIEW_MARK)
    print(
        f"{options.count} {options.kind} masks of {options.size}x{options.size} in {folder}, "
        f"generated pixels: mean {np.mean(shares):.1f} %, min {min(shares):.1f} %, "
        f"max {max(shares):.1f} %"
    )
    if sheet:
        print(f"contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    command_line(main)
