"""benchmarks/quality.py: its numbers, that it continues where it was stopped, what it refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import quality
import quality_baselines
import quality_report
import torch
from lpips_cases import alexnet_state
from PIL import Image
from run_cases import run_here, tiny_tree, write_run, write_tree

from guided_diffusion.errors import UserError

SIDE = 32


def test_settings_are_chosen_by_name_and_pattern():
    chosen = quality.choose_names(["posterior", "ddnm*-t1*", "repaint-t7", "posterior"])
    assert chosen == [
        "posterior", "ddnm0.85-t10", "ddnm0.85-t15", "ddnm0.85-t100", "ddnm0.85over1-t10",
        "ddnm0.85over1-t15", "repaint-t7",
    ]  # fmt: skip
    assert quality.choose_names(["curve"]) == list(quality.CURVE)


def test_a_name_stands_for_keys():
    assert quality.overrides_of("ddnm1-r5-t50") == {
        "timestep_respacing": "50", "schedule_jump_params.t_T": 50,
        "schedule_jump_params.jump_length": 10, "schedule_jump_params.jump_n_sample": 5,
        "use_ddim": False, "sampler": "ddnm", "ddnm_eta": 1.0, "ddnm_overshoot": 0.0,
    }  # fmt: skip
    keys = quality.overrides_of("ddnm0.5over1.5-t9")
    assert (keys["ddnm_eta"], keys["ddnm_overshoot"]) == (0.5, 1.5)
    keys = quality.overrides_of("repaint-j20-r4-tddim25")
    assert keys["schedule_jump_params.jump_length"] == 20
    assert (keys["timestep_respacing"], keys["schedule_jump_params.t_T"]) == ("ddim25", 25)
    for name in ("fast", "ddnm-t50", "repaint-t", "repaint0.85-t50", "ddnm1over-t9", ""):
        with pytest.raises(UserError, match=r"--settings: expected curve, "):
            quality.overrides_of(name)


def random_pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def test_errors_are_those_of_hole_and_border():
    result, gt = random_pictures(2)
    hole = np.zeros((SIDE, SIDE), bool)
    hole[3:9, 5:30] = True
    hole[20, 0] = True
    difference = (result.astype(float) - gt) / 255
    inside = [difference[y, x] for y in range(SIDE) for x in range(SIDE) if hole[y, x]]
    across = [
        difference[other] - difference[y, x]
        for y in range(SIDE)
        for x in range(SIDE)
        for other in ((y + 1, x), (y, x + 1))
        if max(other) < SIDE and hole[other] != hole[y, x]
    ]
    assert quality.hole_error(result, gt, hole) == pytest.approx(np.square(inside).mean())
    assert quality.border_error(result, gt, hole) == pytest.approx(np.square(across).mean())


def write_pictures(folder, pictures):
    folder.mkdir()
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_the_nearest_picture_is_pasted_in(tmp_path):
    gt, training = random_pictures(3), random_pictures(20, seed=1)
    holes = np.random.default_rng(2).random((3, SIDE, SIDE)) < 0.5
    training[7] = gt[1]
    training[7][holes[1]] = 0  # the same where it is known
    write_pictures(tmp_path / "train", training)
    order = sorted(range(20), key=str)  # as files are sorted
    results = quality_baselines.Nearest(str(tmp_path / "train"), SIDE)(gt, holes)
    for i in range(3):
        known = ~holes[i]
        errors = [np.square(training[k].astype(float) - gt[i])[known].sum() for k in order]
        wanted = training[order[int(np.argmin(errors))]]
        assert np.array_equal(results[i][holes[i]], wanted[holes[i]])
        assert np.array_equal(results[i][known], gt[i][known])
    assert not results[1][holes[1]].any()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model with three pictures of noise, and AlexNet with random weights."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, image_size=SIDE)
    write_pictures(tmp_path / "pictures", random_pictures(3))
    torch.save(alexnet_state(), tmp_path / "alexnet.pth")
    return tmp_path


def start(*more, out="out", count=3, settings="repaint-t10,ddim-t10", batch_size=2):
    quality.main([
        "--conf_path", "c.yml", "--pictures", "pictures", "--alexnet", "alexnet.pth", "--out", out,
        "--masks", "genhalf,nn2", "--settings", settings, "--count", str(count),
        "--batch_size", str(batch_size), *more,
    ])  # fmt: skip


def blocks(out="out"):
    found = {}
    for path in sorted(Path(out, "blocks").rglob("*.json")):
        tree = json.loads(path.read_text())
        found[f"{path.parent.name}/{path.stem}"] = tree["rows"]
    return found


def assert_same_numbers(first, second):
    assert first.keys() == second.keys()
    for name, rows in first.items():
        for one, other in zip(rows, second[name], strict=True):
            assert one.pop("picture") == other.pop("picture")
            assert one == pytest.approx(other, rel=1e-4), name


def test_more_pictures_are_added_and_the_others_stay(folder, capsys):
    start(count=1)
    earlier = {path: path.read_bytes() for path in Path("out/blocks").rglob("*.json")}
    assert "| LPIPS, n = 1 | calls | nn2 | genhalf | mean |" in capsys.readouterr().out
    assert len(earlier) == 4
    start(count=1)
    assert "0 blocks of 4 to make" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in earlier} == earlier
    start(count=3)
    start(out="at_once", count=3, batch_size=3)
    assert_same_numbers(blocks(), blocks("at_once"))
    for path in Path("out/blocks").rglob("*.png"):
        other = Path("at_once", *path.parts[1:])
        assert np.array_equal(Image.open(path), Image.open(other)), path
    rows = list(csv.DictReader(Path("out/quality.csv").read_text().splitlines()))
    assert [(row["mask"], row["setting"], row["calls"], row["pictures"]) for row in rows] == [
        (mask, setting, "10", "3")
        for mask in ("nn2", "genhalf")
        for setting in ("ddim-t10", "repaint-t10")
    ]
    values = [row["lpips"] for row in blocks()["nn2/ddim-t10"]]
    assert float(rows[0]["lpips"]) == pytest.approx(np.mean(values), abs=1e-6)
    assert float(rows[0]["lpips_se"]) == pytest.approx(np.std(values, ddof=1) / 3**0.5, abs=1e-6)
    assert Image.open("out/quality.png").width > 300


def test_it_continues_where_it_was_stopped(folder, monkeypatch):
    start(out="whole")
    measure, calls = quality.measure, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(quality, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert sum(map(len, blocks().values())) == 8
    monkeypatch.setattr(quality, "measure", measure)
    start()
    assert_same_numbers(blocks(), blocks("whole"))


def test_results_are_those_of_the_program(folder, capsys):
    start(settings="repaint-t10", count=1)
    picture = json.loads(Path("out/blocks/nn2/repaint-t10.json").read_text())["rows"][0]["picture"]
    overrides = [f"{k}={json.dumps(v)}" for k, v in quality.overrides_of("repaint-t10").items()]
    options = [word for text in [*overrides, "paste_known=true"] for word in ("--set", text)]
    ended = run_here(
        capsys, "--conf_path", "c.yml", "--gt", f"pictures/{picture}", "--mask", "nn2",
        "--out", "run", *options,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    sheet = np.asarray(Image.open("out/blocks/nn2/repaint-t10.png"))
    result = np.asarray(Image.open(f"run/inpainted/{picture}"))
    assert np.array_equal(sheet[:SIDE, :SIDE], result)


def test_what_remains_is_listed_and_nothing_written(folder, capsys):
    start("--dry_run", "--most_calls", "10", settings="repaint-t10,repaint-r5-t20,posterior")
    printed = capsys.readouterr().out
    assert "4 blocks of 4 to make: 60 network calls" in printed
    assert "repaint-t10: 10 calls a picture, 60 in all: genhalf, nn2" in printed
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "seed=9"], "out: has results with other keys"),
        (["--set", "clip_denoised=false"], "out: has results with other keys"),
        (["--pictures", "others"], "out: has results with other pictures"),  # of the same names
        (["--masks", "nn"], "--masks: expected of thin, thick"),
        (["--count", "4"], "--count: too few; expected 4, found 3"),
        (["--set", "image_size=16"], "image_size: expected at least 31, for LPIPS, found 16"),
        (["--set", "model_path=no.pt"], r"no\.pt: no such checkpoint"),
        (["--settings", "nearest"], "--settings: needs --train, the training pictures"),
    ],
)
def test_results_of_other_runs_and_bad_options_are_refused(folder, more, message):
    start(settings="repaint-t10", count=1)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    write_pictures(folder / "others", random_pictures(3, seed=9))
    count = [] if "--count" in more else ["--count", "2"]
    settings = [] if "--settings" in more else ["--settings", "ddim-t10"]
    with pytest.raises(UserError, match=message):
        start(*count, *settings, *more)
    assert {path: path.read_bytes() for path in before} == before


def test_a_key_at_its_default_leaves_results_valid(folder):
    start(settings="repaint-t10", count=1)
    write_tree(folder, tiny_tree(image_size=SIDE, clip_denoised=True, name="renamed"))
    start(settings="repaint-t10", count=1)


def numbers(setting, calls, lpips):
    values = {key: np.array(lpips) for key in quality_report.MEASURES}
    return quality_report.Numbers(setting, calls, values)


FOUND = {
    "thick": {
        "ddim-t10": numbers("ddim-t10", 10, [0.1, 0.3]),
        "ddnm1-t20": numbers("ddnm1-t20", 20, [0.1, 0.2, 0.3, 0.4]),
    },
    "nn2": {
        "ddim-t10": numbers("ddim-t10", 10, [0.5, 0.7]),
        "ddnm1-t10": numbers("ddnm1-t10", 10, [0.2, 0.2, 0.2, 0.2]),
        "ddnm1-t20": numbers("ddnm1-t20", 20, [0.3, 0.5, 0.3, 0.5]),
    },
}


def test_a_curve_has_a_mean_where_all_masks_are_measured():
    assert quality_report.curve_table(FOUND, "hole").splitlines()[2:] == [
        "| ddim-t10 | 10 | 0.2000 ± 0.1000 (n = 2) | 0.6000 ± 0.1000 (n = 2) "
        "| 0.4000 ± 0.1000 (n = 2) |",
        "| ddnm1-t10 | 10 |  | 0.2000 ± 0.0000 |  |",
        "| ddnm1-t20 | 20 | 0.2500 ± 0.0645 | 0.4000 ± 0.0577 | 0.3250 ± 0.0520 |",
    ]


def test_settings_are_compared_picture_by_picture():
    found = quality_report.differences(FOUND, "ddnm1-t20")
    assert found["ddim-t10"]["thick"] == pytest.approx([0, 0.1])
    assert found["ddim-t10"]["mean"] == pytest.approx([0.1, 0.15])
    assert found["ddnm1-t10"].keys() == {"nn2"}
    assert quality_report.difference_table(FOUND, "ddnm1-t20").splitlines()[2:] == [
        "| ddim-t10 | 0.0500 ± 0.0500 (n = 2) | 0.2000 ± 0.0000 (n = 2) "
        "| 0.1250 ± 0.0250 (n = 2) |",
        "| ddnm1-t10 |  | -0.2000 ± 0.0577 (n = 4) |  |",
    ]
