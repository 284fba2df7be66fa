import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.io import files, images, results, sheets


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def colours(image):
    return {colour for _, colour in image.getcolors(1 << 24)}


@pytest.fixture
def folders(tmp_path):
    return {key: str(tmp_path / "log" / key) for key in ("srs", "lrs", "gts", "gt_keep_masks")}


# ---- whole files -------------------------------------------------------------------------------


def test_a_file_appears_whole_and_alone(tmp_path):
    target = tmp_path / "new" / "folder" / "x.txt"
    with files.atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path, exception):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(exception), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise exception
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), real_sync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append("name"), real_replace(self, to))[1]
    )
    files.write_text_atomic(tmp_path / "x.txt", "text")
    assert events == ["sync", "name", "sync"]


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    files.write_text_atomic(tmp_path / "x.txt", "text")
    assert (tmp_path / "x.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_text_is_utf8_with_its_own_line_ends(tmp_path):
    files.write_text_atomic(tmp_path / "名.yml", "größe: 1\n")
    assert (tmp_path / "名.yml").read_bytes() == "größe: 1\n".encode()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_the_system_refuses_is_one_line_with_the_path(tmp_path, monkeypatch, code):
    def refuse(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=os.strerror(code)) as caught:
        files.write_png(tmp_path / "x.png", noise(4, 4, 3))
    assert caught.value.path == tmp_path / "x.png"
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys, torch
import numpy as np
from guided_diffusion.errors import UserError
from guided_diffusion.io import files, sheets
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # refuses to write on, as a full disk
pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
frame = sheets.ProcessFrame(1, pixels, pixels)
for name, write in {
    "x.png": lambda path: files.write_png(path, pixels),
    "x.txt": lambda path: files.write_text_atomic(path, "x" * 30_000),
    "x.gif": lambda path: sheets.write_gif(path, [frame, frame]),
    "x.pt": lambda path: files.write_checkpoint(path, {"a": torch.zeros(30_000)}),
}.items():
    try:
        write(f"{sys.argv[1]}/{name}")
    except UserError as error:
        print(error)
"""


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    reason = os.strerror(errno.EFBIG)
    assert lines == [
        f"{tmp_path}/{name}: cannot be written: {reason}"
        for name in ("x.png", "x.txt", "x.gif", "x.pt")
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "log").touch()
    with pytest.raises(UserError, match=r"log/x\.png: cannot be written"):
        files.write_png(tmp_path / "log" / "x.png", noise(4, 4, 3))
    (tmp_path / "y.png").mkdir()
    with pytest.raises(UserError, match=r"y\.png: cannot be written"):
        files.write_png(tmp_path / "y.png", noise(4, 4, 3))


def test_a_folder_deleted_under_the_run_is_made_again(tmp_path):
    for _ in range(2):
        files.write_png(tmp_path / "log" / "x.png", noise(4, 4, 3))
        (tmp_path / "log" / "x.png").unlink()
        (tmp_path / "log").rmdir()
    with (
        pytest.raises(UserError, match=r"x\.png"),
        files.atomic_path(tmp_path / "log" / "x.png") as temporary,
    ):
        temporary.touch()
        temporary.unlink()
        (tmp_path / "log").rmdir()


def test_checkpoints_come_back_and_failures_of_ones_own_stay_tracebacks(tmp_path):
    state = {"weights": torch.arange(5.0), "step": 7, "rng": {"state": 2**100}}
    files.write_checkpoint(tmp_path / "x.pt", state)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert torch.equal(loaded["weights"], state["weights"])
    assert loaded["rng"] == state["rng"]
    with pytest.raises((AttributeError, TypeError)):  # a lambda cannot be stored
        files.write_checkpoint(tmp_path / "y.pt", {"no": lambda: None})
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)])
def test_pictures_of_another_kind_are_a_defect(tmp_path, array):
    with pytest.raises(ValueError, match="not uint8") as caught:
        files.write_png(tmp_path / "x.png", array)
    assert not isinstance(caught.value, UserError)


# ---- results -----------------------------------------------------------------------------------


def test_every_level_survives_the_way_through_the_model_range():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    x = torch.from_numpy(levels).float() / 127.5 - 1
    assert np.array_equal(images.to_uint8(x), levels.transpose(0, 2, 3, 1))
    # A third of a level either way rounds back, where truncation would lose the lower ones.
    for shift in (-0.33, 0.33):
        moved = images.to_uint8(x + shift / 127.5)
        assert np.array_equal(moved, levels.transpose(0, 2, 3, 1))


def test_values_outside_are_clamped():
    x = torch.tensor([-9.0, -1.001, 1.001, 9.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert images.to_uint8(x)[0, :, :, 0].tolist() == [[0, 0], [255, 255]]


def test_half_precision_is_rounded_once():
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8).bfloat16()
    assert np.array_equal(images.to_uint8(x), images.to_uint8(x.float()))


def test_masked_picture_is_the_formula_for_every_pair_of_levels():
    gt, mask = np.meshgrid(np.arange(256), np.arange(256))
    m, x0 = mask / 255, gt / 127.5 - 1
    expected = np.rint((m * x0 - (1 - m) + 1) * 127.5)
    assert np.array_equal(images.masked_u8(gt.astype(np.uint8), mask.astype(np.uint8)), expected)


def test_four_folders_hold_exactly_the_pixels(folders):
    gt, mask, sample = (noise(8, 8, 3, seed=seed) for seed in range(3))
    paths = results.write_result(folders, "two.dots.png", sample, gt, mask)
    assert {str(path) for path in paths} == {f"{f}/two.dots.png" for f in folders.values()}
    assert paths[-1].parent.name == "srs"
    assert np.array_equal(read(f"{folders['srs']}/two.dots.png"), sample)
    assert np.array_equal(read(f"{folders['gts']}/two.dots.png"), gt)
    assert np.array_equal(read(f"{folders['gt_keep_masks']}/two.dots.png"), mask)
    masked = read(f"{folders['lrs']}/two.dots.png")
    assert np.array_equal(masked, images.masked_u8(gt, mask))


@pytest.mark.parametrize("absent", [{}, {"gts": None}])
def test_ground_truth_is_optional(folders, tmp_path, absent):
    del folders["gts"]
    picture = noise(8, 8, 3)
    assert len(results.write_result(folders | absent, "a.png", picture, picture, picture)) == 3
    assert not (tmp_path / "log" / "gts").exists()


def test_samples_have_names_of_their_own(folders):
    picture = noise(8, 8, 3)
    for number in (1, 2):
        results.write_result(
            folders, "a.png", picture, picture, picture, sample_name=f"a_{number}.png"
        )
    assert {path.name for path in Path(folders["srs"]).iterdir()} == {"a_1.png", "a_2.png"}
    assert [path.name for path in Path(folders["gts"]).iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/b.png", "..", ".", "", "a/../../x.png", "x\0.png"]
)
@pytest.mark.parametrize("as_sample", [False, True])
def test_a_name_cannot_leave_its_folder(folders, tmp_path, name, as_sample):
    picture = noise(8, 8, 3)
    names = {"name": "a.png", "sample_name": name} if as_sample else {"name": name}
    if as_sample and not name:
        return  # no name of its own: that of the image
    with pytest.raises(UserError, match="plain name"):
        results.write_result(folders, sample=picture, gt_u8=picture, mask_u8=picture, **names)
    assert list(tmp_path.iterdir()) == []  # nothing was written, not even the good ones


# ---- overview ----------------------------------------------------------------------------------


def plain(colour, side=16):
    return np.full((side, side, 3), colour, np.uint8)


def row(name="a.png", samples=1, side=16, gt=True):
    greens = [plain((0, 100 + number, 0), side) for number in range(samples)]
    truth = plain((0, 0, 200), side) if gt else None
    return sheets.OverviewRow(name, plain((200, 0, 0), side), greens, truth)


def test_a_row_shows_input_samples_and_truth_from_left_to_right():
    sheet = np.asarray(sheets.overview([row(samples=2)])).astype(int)
    places = [
        np.argwhere((sheet == colour).all(-1)).mean(0)
        for colour in ((200, 0, 0), (0, 100, 0), (0, 101, 0), (0, 0, 200))
    ]
    assert np.all(np.diff([place[1] for place in places]) > 0)
    assert len({place[0] for place in places}) == 1
    assert (0, 0, 200) not in colours(sheets.overview([row(gt=False)]))


@pytest.mark.parametrize("name", ["a.png", "x" * 300, "名前.png", "\ud800\n.png", ""])
def test_names_of_every_kind_stand_below(name):
    with_name = np.asarray(sheets.overview([row(name)]))
    without = np.asarray(sheets.overview([row("")]))
    assert with_name.shape == without.shape
    assert np.array_equal(with_name, without) == (name == "")


def test_the_sheet_grows_and_stays_within_bounds():
    sizes = [sheets.overview([row(side=256)] * count).size for count in (1, 4, 8, 9, 100)]
    assert sizes[0][0] < sizes[1][0] * 2
    assert max(sizes[-1]) < 5000
    assert sizes[3][0] * sizes[3][1] < sizes[2][0] * sizes[2][1]  # nine tiles are smaller
    assert 0.5 < sizes[-1][0] / sizes[-1][1] < 2
    many = sheets.overview([row(samples=50, side=64)])
    assert len([c for c in colours(many) if c[0] == c[2] == 0]) == 8


def test_large_runs_are_paged_from_a_generator(tmp_path):
    rows = (row(f"{number}.png") for number in range(sheets.ROWS_PER_PAGE + 1))
    paths = sheets.write_overview(tmp_path / "overview.png", rows)
    assert [path.name for path in paths] == ["overview.png", "overview_2.png"]
    assert read(paths[0]).size > 10 * read(paths[1]).size
    assert sheets.write_overview(tmp_path / "none.png", []) == []
    assert len(list(tmp_path.iterdir())) == 2
    assert sheets.write_overview(tmp_path / "overview.png", [row()]) == paths[:1]
    assert list(tmp_path.iterdir()) == paths[:1]  # no page of the larger one stays


def test_a_page_holds_no_pictures_larger_than_a_tile(folders):
    gt = noise(300, 600, 3)
    results.write_result(folders, "a.png", gt, gt, gt)
    [row] = sheets.finished_rows(folders, [("a.png", ["a.png"])])
    shapes = [tile.shape for tile in (row.masked, *row.samples, row.gt)]
    assert shapes == [(128, 256, 3)] * 3


def test_results_are_read_back_whatever_their_size_and_profile(folders, monkeypatch, recwarn):
    gt, mask = noise(8, 8, 3), noise(8, 8, 3, seed=1)
    photo = Image.fromarray(gt)
    photo.info["icc_profile"] = noise(3 << 20).tobytes()
    results.write_result(folders, "a.png", photo, gt, mask, mark="m")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert results.read_mark(Path(folders["srs"], "a.png")) == "m"
    assert np.array_equal(results.read_result(Path(folders["srs"], "a.png")), gt)
    assert results.is_written(folders, "a.png", gt, mask, mark="m")
    assert not recwarn.list


def test_rows_are_read_back_from_disk(folders):
    gt, mask, sample = (noise(8, 8, 3, seed=seed) for seed in range(3))
    results.write_result(folders, "a.png", sample, gt, mask)
    results.write_result(folders, "b.png", sample, gt, mask, sample_name="b_2.png")
    Path(folders["srs"], "bad.png").write_text("no picture")
    Path(folders["lrs"], "bad.png").write_text("no picture")
    Path(folders["srs"], "half.png").write_bytes(Path(folders["srs"], "a.png").read_bytes())
    rows_of = [
        ("half.png", ["half.png"]),
        ("absent.png", ["absent.png"]),
        ("bad.png", ["bad.png"]),
        ("a.png", ["a.png"]),
    ]
    rows = list(sheets.finished_rows(folders, [*rows_of, ("b.png", ["b_1.png", "b_2.png"])]))
    assert [row.name for row in rows] == ["a.png", "b.png"]
    assert np.array_equal(rows[0].masked, images.masked_u8(gt, mask))
    assert np.array_equal(rows[0].gt, gt)
    assert [len(row.samples) for row in rows] == [1, 1]
    without = next(sheets.finished_rows(folders | {"gts": None}, rows_of))
    assert without.gt is None


# ---- the process -------------------------------------------------------------------------------


def frames(count, side=16):
    return [
        sheets.ProcessFrame(t, plain((200, 0, t), side), plain((0, 200, t), side))
        for t in reversed(range(count))
    ]


def test_film_strip_puts_noise_above_and_prediction_below():
    strip = np.asarray(sheets.film_strip(frames(3), tile=32)).astype(int)
    for t in range(3):
        x = np.argwhere((strip == (200, 0, t)).all(-1))
        pred = np.argwhere((strip == (0, 200, t)).all(-1))
        assert len(x) == len(pred) == 32 * 32  # small pictures grow to the tile
        assert x[:, 0].max() < pred[:, 0].min()
        assert x[:, 1].min() == pred[:, 1].min()
    assert np.argwhere((strip == (200, 0, 2)).all(-1))[0, 1] == 0  # the noisiest comes first


def test_small_pictures_grow_by_whole_pixels():
    pixels = noise(8, 8, 3)
    strip = np.asarray(sheets.film_strip([sheets.ProcessFrame(0, pixels, pixels)], tile=20))
    assert np.array_equal(strip[:16], pixels.repeat(2, 0).repeat(2, 1))


def test_long_strips_are_wrapped(tmp_path):
    sheets.write_film_strip(tmp_path / "strip.png", frames(30), tile=16)
    strip = read(tmp_path / "strip.png")
    assert strip.shape[1] < 13 * 18
    seen = colours(Image.fromarray(strip))
    assert all((200, 0, t) in seen for t in range(30))


def test_strips_take_wide_pictures():
    wide = sheets.montage(np.stack([plain((9, 9, 9))] * 4))
    assert wide.shape == (16, 64, 3)
    strip = sheets.film_strip([sheets.ProcessFrame(5, wide, wide)], tile=32)
    assert strip.width == 32


def test_gif_plays_all_frames_and_holds_the_last(tmp_path):
    sheets.write_gif(tmp_path / "x.gif", frames(5), seconds=1.0, tile=64)
    with Image.open(tmp_path / "x.gif") as film:
        assert film.format == "GIF"
        assert film.n_frames == 5
        assert film.info["loop"] == 0
        durations = []
        for number in range(5):
            film.seek(number)
            durations.append(film.info["duration"])
        assert durations == [200] * 4 + [2000]
        last = np.asarray(film.convert("RGB")).astype(int)
    assert np.abs(last[5, 5] - (200, 0, 0)).max() < 9
    assert np.abs(last[64 + 10, 5] - (0, 200, 0)).max() < 9


def test_montage_fills_lines_and_leaves_the_rest_white():
    pictures = np.stack([plain((number, 0, 0), 2) for number in range(5)])
    grid = sheets.montage(pictures, 3)
    assert grid[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
