"""A run with a network of one channel, from files to files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_cases import write_run


@pytest.fixture
def gray_run(here, tmp_path):
    """Write photos of 8 and 16 bits and of colour, and return a function that inpaints them."""
    data = {"mask_path": "m.png", "batch_size": 3}
    options = write_run(tmp_path, 0, in_channels=1, overview=True, save_process=2, data=data)
    levels = np.random.default_rng(0).integers(0, 65536, (20, 24), dtype=np.uint16)
    Image.fromarray(levels.astype(np.uint8)).save("gt/eight.png")
    Image.fromarray(levels).save("gt/deep.png")
    colour = np.dstack([levels.astype(np.uint8)] * 2 + [levels.astype(np.uint8) // 2])
    Image.fromarray(colour).save("gt/colour.png", icc_profile=b"of colours")
    mask = np.full((20, 24), 255, np.uint8)
    mask[5:9, 5:10] = 0
    Image.fromarray(mask).save("m.png")
    return lambda *more: here(*options, *more)


@pytest.mark.parametrize("size", ["square", "full_size", "windows"])
def test_gray_pictures_keep_their_depth(gray_run, size):
    options = {
        "square": [],
        "full_size": ["--full_size"],
        "windows": ["--full_size", "--set", "windows=true"],
    }
    ended = gray_run(*options[size])
    assert ended.status == 0, ended.err
    assert [line for line in ended.lines if "coloured" in line] == [
        "warning: gt/colour.png: is coloured, and becomes gray for a network of one channel"
    ]
    modes = {"deep.png": ("I;16", "I"), "eight.png": ("L",), "colour.png": ("L",)}
    for kind in ("inpainted", "gt", "gt_masked"):
        for name, allowed in modes.items():
            with Image.open(f"log/run/{kind}/{name}") as image:
                assert image.mode in allowed, (kind, name)
                assert "icc_profile" not in image.info
    with Image.open("log/run/gt_keep_mask/deep.png") as image:
        known = np.asarray(image).reshape(image.height, image.width, -1)[:, :, 0] == 255
    for name in ("deep.png", "eight.png"):
        with Image.open(f"gt/{name}") as before, Image.open(f"log/run/inpainted/{name}") as after:
            if size != "square":
                far = known.copy()
                far[:18, :20] = False  # beyond the rim where old and new mix
                assert np.array_equal(np.asarray(before)[far], np.asarray(after)[far])
            assert len(np.unique(after)) > 20
    assert Path("log/run/overview.png").exists()
    assert list(Path("log/run/process").glob("deep*.gif"))
    assert "3 finished earlier" in gray_run(*options[size], "--resume").out
