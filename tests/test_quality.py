"""benchmarks/quality.py: its numbers, that it goes on where it was stopped, and what it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips_cases import alexnet_state
from PIL import Image
from run_cases import run_here, tiny_tree, write_run, write_tree

from guided_diffusion.errors import UserError

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import quality
import quality_report

SIDE = 32


def names(settings):
    return [setting.name for setting in settings]


def test_settings_are_chosen_by_group_name_and_pattern():
    assert names(quality.choose_settings(["resampling"])) == [
        "repaint-t25", "repaint-r10-t25", "repaint-t205",
    ]  # fmt: skip
    chosen = names(quality.choose_settings(["mirror", "ddnm0.85-r5*", "mirror"]))
    assert chosen == ["mirror", "ddnm0.85-r5-t25", "ddnm0.85-r5-t50", "ddnm0.85-r5-t100"]
    settings = quality.choose_settings(["ddnm1-r5-t50", "repaint-j20-r4-t50", "ddim-t7"])
    assert settings[0].overrides == {
        "timestep_respacing": "50", "schedule_jump_params.t_T": 50,
        "schedule_jump_params.jump_length": 10, "schedule_jump_params.jump_n_sample": 5,
        "use_ddim": False, "sampler": "ddnm", "ddnm_eta": 1.0,
    }  # fmt: skip
    assert settings[1].overrides["schedule_jump_params.jump_length"] == 20
    assert [quality_report.label(one.name) for one in settings] == [
        "DDNM 1, r = 5, t_T 50", "RePaint, r = 4, jumps of 20, t_T 50", "DDIM steps, t_T 7",
    ]  # fmt: skip
    for word in ("fast", "ddnm-t50", "repaint-t", "repaint0.85-t50", ""):
        with pytest.raises(UserError, match=r"--settings: expected curve, "):
            quality.choose_settings(["curve", word])


def test_the_curve_reaches_from_10_to_1000_calls():
    assert len(set(quality.CURVE)) == len(quality.CURVE) == 35
    wanted = {"repaint-t10", "repaint-t1000", "repaint-r10-t250", "ddim-t50", "ddnm1-r5-t100"}
    assert wanted < set(quality.CURVE)


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


def inputs_of(gt, holes):
    masks = np.where(holes[..., None], 0, 255).repeat(3, axis=3)
    return quality.Inputs([f"{i}.png" for i in range(len(gt))], gt, masks)


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
    results = quality.Nearest(str(tmp_path / "train"), SIDE)(inputs_of(gt, holes))
    for i in range(3):
        known = ~holes[i]
        errors = [np.square(training[k].astype(float) - gt[i])[known].sum() for k in order]
        wanted = training[order[int(np.argmin(errors))]]
        assert np.array_equal(results[i][holes[i]], wanted[holes[i]])
        assert np.array_equal(results[i][known], gt[i][known])
    assert not results[1][holes[1]].any()


def test_the_mirror_image_is_pasted_in():
    gt = random_pictures(1)
    holes = np.zeros((1, SIDE, SIDE), bool)
    holes[0, :, SIDE // 2 :] = True
    result = quality.mirror(inputs_of(gt, holes))[0]
    assert np.array_equal(result, result[:, ::-1])
    assert np.array_equal(result[:, : SIDE // 2], gt[0, :, : SIDE // 2])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model with three pictures of noise, and AlexNet with random weights."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, image_size=SIDE)
    write_pictures(tmp_path / "pictures", random_pictures(3))
    torch.save(alexnet_state(), tmp_path / "alexnet.pth")
    return tmp_path


def start(*more, out="out", count=3, settings="mirror,repaint-t10,ddim-t10", batch_size=2):
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
            for key in ("picture", "pixels"):
                assert one.pop(key) == other.pop(key)
            assert one == pytest.approx(other, rel=1e-4), name


def test_more_pictures_are_added_and_the_others_stay(folder, capsys):
    start(count=1)
    earlier = {path: path.read_bytes() for path in Path("out/blocks").rglob("*.json")}
    told = capsys.readouterr().out
    assert "| LPIPS | calls | nn2 | genhalf | mean |" in told
    assert "| RePaint, r = 1, t_T 10 | 10 |" in told
    assert len(earlier) == 6
    start(count=1)
    assert "0 blocks of 6 to make" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in earlier} == earlier
    start(count=3)
    start(out="at_once", count=3, batch_size=3)
    assert_same_numbers(blocks(), blocks("at_once"))
    for path in Path("out/blocks").rglob("*.png"):
        other = Path("at_once", *path.parts[1:])
        assert np.array_equal(Image.open(path), Image.open(other)), path
    told = Path("out/quality.md").read_text()
    assert "n = 3 pictures" in told
    assert "Means over nn2, genhalf." in told
    assert Image.open("out/quality.png").width > 300


def test_it_goes_on_where_it_was_stopped(folder, monkeypatch):
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
    setting = quality.setting_of("repaint-t10")
    overrides = [f"{key}={json.dumps(value)}" for key, value in setting.overrides.items()]
    options = [word for text in [*overrides, "paste_known=true"] for word in ("--set", text)]
    ended = run_here(
        capsys, "--conf_path", "c.yml", "--gt", f"pictures/{picture}", "--mask", "nn2",
        "--out", "own", *options,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    sheet = np.asarray(Image.open("out/blocks/nn2/repaint-t10.png"))
    own = np.asarray(Image.open(f"own/inpainted/{picture}"))
    assert np.array_equal(sheet[:SIDE, :SIDE], own)


def test_what_the_program_does_not_know_is_left_out(folder, monkeypatch, capsys):
    later = quality.Setting("repaint-t10", {"a_key_of_tomorrow": 1})
    monkeypatch.setattr(
        quality, "setting_of", lambda n: later if n == later.name else quality.Setting(n)
    )
    start("--dry_run", settings="repaint-t10,nearest,mirror")
    told = capsys.readouterr().out
    assert (
        "left out: repaint-t10: --set a_key_of_tomorrow=1: a_key_of_tomorrow: unknown key" in told
    )
    assert "left out: nearest: needs --train" in told
    assert "mirror: 0 calls a picture" in told
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "seed=9"], r"repaint-t10\.json: was made with another model, seed or YAML"),
        (["--pictures", "others"], r"repaint-t10\.json: was made with other --pictures"),
        (["--masks", "nn"], "--masks: expected of thin, thick"),
        (["--count", "4"], "--count: too few; expected 4, found 3"),
        (["--batch_size", "0"], "--batch_size: expected 1 or more"),
        (["--set", "image_size=16"], "image_size: expected at least 31, for LPIPS, found 16"),
        (["--set", "model_path=no.pt"], r"no\.pt: no such checkpoint"),
    ],
)
def test_blocks_of_other_runs_and_bad_options_are_refused(folder, more, message):
    start(settings="repaint-t10", count=1)
    before = blocks()
    pictures = folder / "others"
    pictures.mkdir()
    for number, pixels in enumerate(random_pictures(3)):
        Image.fromarray(pixels).save(pictures / f"other{number}.png")
    count = [] if "--count" in more else ["--count", "2"]
    with pytest.raises(UserError, match=message):
        start(*count, *more, settings="repaint-t10")
    assert blocks() == before


def test_a_key_at_its_default_leaves_blocks_valid(folder):
    start(settings="repaint-t10", count=1)
    write_tree(folder, tiny_tree(image_size=SIDE, clip_denoised=True, name="renamed"))
    start(settings="repaint-t10", count=1)
    write_tree(folder, tiny_tree(image_size=SIDE, clip_denoised=False))
    with pytest.raises(UserError, match="another model, seed or YAML"):
        start(settings="repaint-t10", count=1)


def test_finished_blocks_of_other_pictures_are_refused_and_the_tables_stay(folder):
    start(settings="mirror", count=2)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    write_pictures(folder / "others", random_pictures(3, seed=9))  # of the same names
    problem = r"mirror\.json: was made with other --pictures: .*; expected \d\.png with pixels "
    for settings in ("mirror", "repaint-t10"):  # also where they are not asked for
        with pytest.raises(UserError, match=problem):
            start("--pictures", "others", settings=settings, count=2)
    assert {path: path.read_bytes() for path in before} == before


def test_blocks_of_another_model_do_not_enter_the_tables(folder):
    start(settings="ddim-t10", count=1)
    for more in (["--set", "seed=9"], ["--set", "clip_denoised=false"]):
        with pytest.raises(UserError, match=r"ddim-t10\.json: was made with another model"):
            start(*more, settings="mirror", count=1)
    assert blocks().keys() == {"nn2/ddim-t10", "genhalf/ddim-t10"}


def test_baselines_are_of_one_size_and_nearest_of_one_set(folder):
    write_pictures(folder / "train", random_pictures(2, seed=4))
    start("--train", "train", settings="baselines", count=1)
    start(settings="baselines", count=1)  # nearest is left out, and its blocks stay
    with pytest.raises(UserError, match=r"nearest\.json: was made with another model"):
        start("--train", "pictures", settings="baselines", count=1)
    for name in ("nearest", "mirror"):
        setting = quality.Setting(name)
        digests = {quality.digest_of(setting, quality.Model([], [], 0, size)) for size in (32, 64)}
        assert len(digests) == 2


def test_blocks_without_the_pixels_of_their_pictures_are_told_by_name(folder):
    start(settings="mirror", count=1)
    for path in Path("out/blocks").rglob("*.json"):
        tree = json.loads(path.read_text())
        del tree["rows"][0]["pixels"]
        path.write_text(json.dumps(tree))
    start(settings="mirror", count=2)
    assert {tuple("pixels" in row for row in rows) for rows in blocks().values()} == {(False, True)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\0",
        lambda text: text.replace('"lpips"', '"lp"'),
        lambda text: text.replace('"digest"', '"dig"'),
        lambda text: text.replace('"setting": "mirror"', '"setting": "m"'),
    ],
    ids=range(6),
)
def test_a_damaged_block_is_one_line(folder, damage):
    start(settings="mirror", count=1)
    path = Path("out/blocks/nn2/mirror.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"nn2/mirror\.json: is no whole block: remove it"):
        start(settings="mirror", count=1)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "No such file or directory"), (b"\xff", "'utf-8' codec")]
)
def test_a_list_of_pictures_that_cannot_be_read_is_one_line(folder, content, problem):
    if content:
        (folder / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"list.txt: --pictures: cannot be read: {problem}"):
        start("--pictures", "list.txt")


def test_the_machine_is_the_one_of_the_configuration(folder, monkeypatch):
    asked = []

    def get_device(name=None):
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(quality, "get_device", get_device)
    start("--set", "device=cpu", settings="mirror", count=1)
    assert set(asked) == {"cpu"}


def numbers(setting, calls, lpips):
    values = {key: np.array(lpips) for key in quality_report.MEASURES}
    return quality_report.Numbers(setting, calls, 1.0, values)


def by_mask(*found):
    return {"thick": {one.setting: one for one in found}}


def test_a_curve_has_a_mean_where_all_masks_are_measured():
    found = {
        "thick": {"ddim-t10": numbers("ddim-t10", 10, [0.1, 0.3])},
        "nn2": {
            "ddim-t10": numbers("ddim-t10", 10, [0.5, 0.7]),
            "ddnm1-t10": numbers("ddnm1-t10", 10, [0.2, 0.2]),
        },
    }
    assert quality_report.curve_table(found, "hole").splitlines()[2:] == [
        "| DDIM steps, t_T 10 | 10 | 0.2000 ± 0.1000 | 0.6000 ± 0.1000 | 0.4000 ± 0.1000 |",
        "| DDNM 1, t_T 10 | 10 |  | 0.2000 ± 0.0000 |  |",
    ]


def test_only_blocks_of_enough_pictures_are_shown(folder):
    start(settings="ddim-t10", count=3)
    start(settings="mirror", count=2)
    told = Path("out/quality.md").read_text()
    assert "n = 2 pictures" in told
    assert "DDIM steps, t_T 10" in told  # its first two
    start(settings="ddim-t10", count=3)
    told = Path("out/quality.md").read_text()
    assert "mirror image" not in told


def test_the_best_and_the_cheapest_as_good_are_named():
    found = by_mask(
        numbers("mirror", 0, [0.0] * 4),
        numbers("repaint-t10", 10, [0.30, 0.40, 0.50, 0.60]),
        numbers("ddnm0.85-t100", 100, [0.11, 0.20, 0.30, 0.40]),
        numbers("repaint-r10-t50", 410, [0.10, 0.205, 0.295, 0.40]),
    )
    rows = [line.split(" | ") for line in quality_report.budget_table(found).splitlines()[4:]]
    assert [(row[0].strip("| "), row[1], row[4]) for row in rows] == [
        ("10", "RePaint, r = 1, t_T 10", "RePaint, r = 1, t_T 10"),
        ("100", "DDNM 0.85, t_T 100", "DDNM 0.85, t_T 100"),
        ("500", "RePaint, r = 10, t_T 50", "DDNM 0.85, t_T 100"),
    ]


def test_resampling_is_compared_picture_by_picture():
    found = by_mask(
        numbers("repaint-t50", 50, [0.5, 0.6, 0.7]),
        numbers("repaint-r10-t50", 410, [0.2, 0.3, 0.9]),
        numbers("repaint-t410", 410, [0.4, 0.4, 0.4]),
    )
    lines = quality_report.resampling_table(found).splitlines()
    assert "| thick | slowly down (RePaint, r = 1, t_T 410; 410 calls) | 0.4000 ±" in lines[4]
    assert "0.0667 ± 0.2186; lower in 2 of 3" in lines[5]
    assert len(lines) == 6
    assert quality_report.resampling_table(by_mask(numbers("mirror", 0, [1.0]))) is None
