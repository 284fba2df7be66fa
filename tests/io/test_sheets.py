"""Overview, film strip, GIF and grids."""

from pathlib import Path

import numpy as np
import pytest
from picture_cases import noise
from PIL import Image
from run_cases import pixels

from guided_diffusion.io import images, results, sheets


def plain(colour, side=16):
    return np.full((side, side, 3), colour, np.uint8)


def row(name="a.png", samples=1, side=16):
    greens = [plain((0, 100 + number, 0), side) for number in range(samples)]
    return name, [plain((200, 0, 0), side), *greens, plain((0, 0, 200), side)]


def test_a_row_shows_input_samples_and_truth_from_left_to_right():
    sheet = np.asarray(sheets.overview([row(samples=2)])).astype(int)
    places = [
        np.argwhere((sheet == colour).all(-1)).mean(0)
        for colour in ((200, 0, 0), (0, 100, 0), (0, 101, 0), (0, 0, 200))
    ]
    assert np.all(np.diff([place[1] for place in places]) > 0)
    assert len({place[0] for place in places}) == 1


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


def test_large_runs_are_paged_from_a_generator(tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "ROWS_PER_PAGE", 2)
    rows = (row(f"{number}.png") for number in range(5))
    paths = sheets.write_overview(tmp_path / "overview.png", rows)
    assert [path.name for path in paths] == ["overview.png", "overview_2.png", "overview_3.png"]
    assert pixels(paths[0]).size > pixels(paths[2]).size
    assert sheets.write_overview(tmp_path / "none.png", []) == []
    assert len(list(tmp_path.iterdir())) == 3
    assert sheets.write_overview(tmp_path / "overview.png", [row()]) == paths[:1]
    assert list(tmp_path.iterdir()) == paths[:1]  # no page of the larger one stays


def test_a_page_holds_few_pictures_and_none_larger_than_a_tile(folders):
    gt, names = noise(300, 600, 3), [f"a_{number}.png" for number in range(10)]
    for name in names:
        results.write_result(folders, "a.png", gt, gt, gt, sample_name=name)
    [(_, tiles)] = sheets.finished_rows(folders, [("a.png", names)])
    assert [tile.shape for tile in tiles] == [(128, 256, 3)] * (1 + 8 + 1)


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
    assert [name for name, _ in rows] == ["a.png", "b.png"]
    for found, expected in zip(rows[0][1], (images.masked_u8(gt, mask), sample, gt), strict=True):
        assert np.array_equal(found, expected)
    assert len(rows[1][1]) == 3
    [(_, tiles)] = sheets.finished_rows(folders | {"gts": None}, rows_of)
    assert len(tiles) == 2


def frames(count, side=16):
    return [
        sheets.ProcessFrame(t, plain((200, 0, t), side), plain((0, 200, t), side))
        for t in reversed(range(count))
    ]


def test_film_strip_puts_noise_above_and_prediction_below(tmp_path):
    sheets.write_film_strip(tmp_path / "strip.png", frames(3, side=20))
    strip = pixels(tmp_path / "strip.png")
    for t in range(3):
        x = np.argwhere((strip == (200, 0, t)).all(-1))
        pred = np.argwhere((strip == (0, 200, t)).all(-1))
        assert len(x) == len(pred) == 120 * 120  # small pictures grow by a whole factor to 128
        assert x[:, 0].max() < pred[:, 0].min()
        assert x[:, 1].min() == pred[:, 1].min()
    assert np.argwhere((strip == (200, 0, 2)).all(-1))[0, 1] == 0  # the noisiest comes first


def test_long_strips_are_wrapped(tmp_path):
    sheets.write_film_strip(tmp_path / "strip.png", frames(30))
    strip = pixels(tmp_path / "strip.png")
    assert strip.shape[1] < 13 * 130
    seen = {tuple(colour) for colour in strip.reshape(-1, 3)}
    assert all((200, 0, t) in seen for t in range(30))


def test_gif_plays_all_frames_and_holds_the_last(tmp_path):
    sheets.write_gif(tmp_path / "x.gif", frames(5))
    with Image.open(tmp_path / "x.gif") as film:
        assert film.format == "GIF"
        assert film.n_frames == 5
        assert film.info["loop"] == 0
        durations = []
        for number in range(5):
            film.seek(number)
            durations.append(film.info["duration"])
        assert durations == [1200] * 4 + [2000]
        last = np.asarray(film.convert("RGB")).astype(int)
    assert np.abs(last[5, 5] - (200, 0, 0)).max() < 9
    assert np.abs(last[256 + 10, 5] - (0, 200, 0)).max() < 9


def test_montage_fills_lines_and_leaves_the_rest_white():
    pictures = np.stack([plain((number, 0, 0), 2) for number in range(5)])
    grid = sheets.montage(pictures, 3)
    assert grid[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
