import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from guided_diffusion import masks
from guided_diffusion.errors import UserError
from guided_diffusion.tools import make_masks

SCRIPT = Path(masks.__file__)
DEMO = SCRIPT.parents[1] / "data/datasets/gt_keep_masks/demo"
RANDOM = ("thin", "thick")
FIXED = tuple(kind for kind in masks.FAMILIES if kind not in RANDOM)


def draw(kind, size, seed=0):
    return masks.make_mask(kind, size, np.random.default_rng(seed))


def run(*words, cwd=None):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("kind", masks.FAMILIES)
def test_form_values_and_seed(kind):
    for size in (8, 17, 256):
        mask = draw(kind, size)
        assert mask.dtype == np.uint8
        assert mask.shape == (size, size)
        assert set(np.unique(mask)) == {0, 255}
    assert np.array_equal(draw(kind, 64, 3), draw(kind, 64, 3))
    assert np.array_equal(draw(kind, 64, 3), draw(kind, 64, 4)) == (kind in FIXED)
    rng = np.random.default_rng(5)
    before = rng.bit_generator.state
    masks.make_mask(kind, 32, rng)
    assert (rng.bit_generator.state == before) == (kind in FIXED)


@pytest.mark.parametrize("size", [8, 9, 64, 255])
def test_exact_patterns(size):
    row, column = np.indices((size, size))
    assert np.array_equal(draw("ev2li", size) == 255, row % 2 == 0)
    assert np.array_equal(draw("nn2", size) == 255, (row % 2 == 0) & (column % 2 == 0))
    assert np.array_equal(draw("genhalf", size) == 255, column < size // 2)


@pytest.mark.parametrize(
    ("size", "start", "stop"), [(256, 96, 160), (8, 3, 5), (9, 3, 5), (10, 3, 6), (255, 95, 159)]
)
def test_exact_centre(size, start, stop):
    expected = np.zeros((size, size), np.uint8)
    expected[start:stop, start:stop] = 255
    assert np.array_equal(draw("ex64", size), expected)


@pytest.mark.parametrize("kind", RANDOM)
def test_share_is_above_nothing_and_at_most_half(kind):
    found = [masks.generated_share(draw(kind, 128, seed)) for seed in range(300)]
    assert min(found) > 0
    # The limit redraws and does not shape what it lets through: shares come near it.
    assert 0.4 < max(found) <= 0.5
    assert 0.15 < np.mean(found) < 0.35
    smallest = [masks.generated_share(draw(kind, masks.MIN_SIZE, seed)) for seed in range(100)]
    assert max(smallest) <= 0.5


@pytest.mark.parametrize(("number", "kind"), [(0, "thick"), (3, "thin"), (5, "thick")])
def test_the_masks_that_ship_are_drawn_again(number, kind):
    shipped = np.array(Image.open(DEMO / f"100000{number}.png").convert("L"))
    drawn = masks.make_mask(kind, 64, np.random.default_rng([0, number]))
    assert np.mean(drawn == shipped) > 0.99  # other Pillows may round a rim differently


def test_three_thick_masks_in_ten_are_boxes_of_the_published_sides(monkeypatch):
    boxes, rectangle, rng = [], ImageDraw.ImageDraw.rectangle, np.random.default_rng(1)

    def noting(self, box, **options):
        boxes.append(box)
        rectangle(self, box, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", noting)
    counts = []
    for _ in range(400):
        before = len(boxes)
        masks.make_mask("thick", 256, rng)
        counts.append(len(boxes) - before)
    assert 0.25 < np.mean(np.array(counts) > 0) < 0.42  # some are too large and drawn again
    boxes = np.array(boxes)
    sides = 1 + boxes[:, 2:] - boxes[:, :2]
    assert (sides.min(), sides.max()) == (30, 150)
    assert (boxes.min(), boxes.max()) == (10, 245)


@pytest.mark.parametrize("kind", RANDOM)
def test_the_drawing_grows_with_the_size(kind):
    agreements = []
    for seed in range(10):
        small, large = draw(kind, 256, seed), draw(kind, 512, seed)
        agreements.append(np.mean(small == large[::2, ::2]))
        assert abs(masks.generated_share(small) - masks.generated_share(large)) < 0.05
    assert min(agreements) > 0.93


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("thick", 7, "size must be in 8..16384, found 7"),
        ("thick", masks.MAX_SIZE + 1, "size must be in 8..16384, found 16385"),
        ("thck", 64, "'thck' is unknown, expected one of thin, thick, ev2li"),
    ],
)
def test_bad_arguments(kind, size, message):
    with pytest.raises(ValueError, match=message):
        draw(kind, size)


def test_command_writes_what_it_reports(tmp_path, capsys):
    out = tmp_path / "some where" / "thick"
    arguments = ["--kind", "thick", "--count", "5", "--size", "64", "--seed", "7"]
    assert make_masks.main([*arguments, "--out", str(out), "--preview"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{index:06d}.png" for index in range(5)]
    written = [np.array(Image.open(out / name)) for name in names]
    for index, mask in enumerate(written):
        rng = np.random.default_rng([7, index])
        assert np.array_equal(mask, masks.make_mask("thick", 64, rng))
    found = [100 * masks.generated_share(mask) for mask in written]
    report = capsys.readouterr().out
    assert f"mean {np.mean(found):.1f} %, min {min(found):.1f} %, max {max(found):.1f} %" in report
    # The contact sheet lies beside the folder, where a run over the folder does not find it.
    with Image.open(out.parent / "thick_preview.png") as sheet:
        assert sheet.size == (5 * 68 + 4, 68 + 4)


@pytest.mark.parametrize(
    "make",
    [
        Image.new("RGB", (32, 32), (0, 255, 254)).save,
        Image.new("L", (32, 16), 255).save,
        Image.new("RGBA", (32, 32)).save,
        lambda path: path.write_bytes(b"\x89PNG half"),
        os.mkfifo,
    ],
    ids=["photo", "not square", "transparent", "damaged", "pipe"],
)
def test_a_file_that_is_no_mask_is_not_overwritten(tmp_path, make):
    path = tmp_path / "000002.png"
    make(path)
    before = path.stat().st_ino, path.stat().st_mtime_ns  # reading it may change its atime
    with pytest.raises(UserError, match=r"000002\.png: --out: is no mask and would be overwritten"):
        make_masks.main(["--kind", "thick", "--size", "32", "--count", "3", "--out", str(tmp_path)])
    assert [each.name for each in tmp_path.iterdir()] == ["000002.png"]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before


def test_a_folder_that_the_system_refuses_to_make(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"m/000000\.png: cannot be written: No space left"):
        make_masks.main(["--kind", "nn2", "--size", "8", "--out", str(tmp_path / "m")])


def test_a_preview_replaces_a_preview_and_nothing_else(tmp_path):
    options = ["--kind", "nn2", "--size", "8", "--out", str(tmp_path / "m"), "--preview"]
    photo = tmp_path / "m_preview.png"
    Image.new("RGB", (64, 64), "red").save(photo)
    before = photo.read_bytes()
    with pytest.raises(UserError, match=r"m_preview\.png: --preview: .* would be overwritten"):
        make_masks.main(options)
    assert photo.read_bytes() == before
    assert not (tmp_path / "m").exists()
    photo.unlink()
    assert make_masks.main(options) == make_masks.main(options) == 0


def test_masks_are_replaced_by_masks_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "000001.png")
    for kind in ("thick", "ev2li"):
        make_masks.main(["--kind", kind, "--size", "32", "--count", "2", "--out", str(tmp_path)])
    monkeypatch.undo()
    for path in tmp_path.iterdir():
        assert np.array_equal(np.array(Image.open(path)), draw("ev2li", 32))
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.JPG", "JPEG")
    with pytest.warns(UserWarning, match=r"1 other pictures, such as holiday\.JPG"):
        make_masks.main(["--kind", "nn2", "--size", "8", "--count", "2", "--out", str(tmp_path)])


def test_as_a_script_from_any_folder(tmp_path):
    done = run("--kind", "ev2li", "--size", "16", "--count", "2", "--out", "m", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean 50.0 %, min 50.0 %, max 50.0 %" in done.stdout
    assert np.array_equal(np.array(Image.open(tmp_path / "m/000001.png")), draw("ev2li", 16))
    (tmp_path / "file").write_text("in the way")
    done = run("--kind", "thick", "--out", "file", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: file: results cannot be written")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--kind": "thik"}, "argument --kind: invalid choice: 'thik' (choose from"),
        ({"--count": "0"}, "--count: expected a whole number in 1..1000000, found 0"),
        ({"--size": "7"}, "--size: expected a whole number in 8..16384, found 7"),
        ({"--out": ""}, "--out: the path is empty"),
    ],
)
def test_bad_options_make_no_folder(tmp_path, change, message):
    options = {"--kind": "thick", "--out": str(tmp_path / "m")} | change
    words = [word for option in options.items() for word in option]
    with pytest.raises(UserError) as caught:
        make_masks.main(words)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []
