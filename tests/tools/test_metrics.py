"""Metrics of runs: numbers against their definitions in numpy, and what is told of bad input."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lpips_cases import alexnet_state, reference
from PIL import Image
from run_cases import run_here, write_run

from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import sample_names
from guided_diffusion.tools import metrics
from guided_diffusion.tools.perceptual import load_lpips

SIDE = 36


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(alexnet_state(), path)
    return str(path)


@pytest.fixture(scope="module")
def lpips(alexnet):
    return load_lpips(alexnet)


def compared(lpips, *pictures):
    return metrics.compare(lpips, *pictures, half())


def picture(seed, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def noisy(gt, seed):
    noise = np.random.default_rng(seed).normal(0, 20, gt.shape)
    return np.clip(gt + noise, 0, 255).round().astype(np.uint8)


def half(side=SIDE):
    hole = np.zeros((side, side), bool)
    hole[:, side // 2 :] = True
    return hole


def ssim_map(x, y):
    """SSIM (Wang et al. 2004, eq. 13) at every pixel, a mean over channels, edges reflected."""
    at = np.arange(-5, 6)
    line = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    total = 0
    for channel in range(3):
        one, two = (
            np.lib.stride_tricks.sliding_window_view(
                np.pad(p[:, :, channel].astype(float), 5, mode="reflect"), (11, 11)
            )
            for p in (x, y)
        )
        mean = [(p * window).sum((2, 3)) for p in (one, two)]
        var = [(p**2 * window).sum((2, 3)) - m**2 for p, m in zip((one, two), mean, strict=True)]
        cov = (one * two * window).sum((2, 3)) - mean[0] * mean[1]
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        total += ((2 * mean[0] * mean[1] + c1) * (2 * cov + c2)) / (
            (mean[0] ** 2 + mean[1] ** 2 + c1) * (var[0] + var[1] + c2)
        )
    return total / 3


def expected(result, gt, hole):
    error = (result.astype(float) - gt) ** 2
    full = ssim_map(result, gt)
    state = alexnet_state()
    chw = [p.astype(float).transpose(2, 0, 1) / 127.5 - 1 for p in (result, gt)]
    whole, inside = reference(state, *chw, hole)
    return {
        "lpips": whole, "lpips_hole": inside,
        "psnr": 10 * math.log10(255**2 / error.mean()),
        "psnr_hole": 10 * math.log10(255**2 / error[hole].mean()),
        "ssim": full[5:-5, 5:-5].mean(), "ssim_hole": full[hole].mean(),
    }  # fmt: skip


def test_numbers_are_their_definitions(lpips):
    gt = picture(0)
    result = noisy(gt, 1)
    result[:4] = 0  # so that the border and the inside differ
    assert compared(lpips, result, gt) == pytest.approx(expected(result, gt, half()), rel=1e-4)


def test_extremes(lpips):
    gt, nothing = picture(0), np.zeros((SIDE, SIDE), bool)
    same = metrics.compare(lpips, gt, gt, nothing)
    assert (same["lpips"], same["psnr"]) == (0, math.inf)
    assert same["ssim"] == pytest.approx(1)
    assert all(math.isnan(same[key]) for key in ("lpips_hole", "psnr_hole", "ssim_hole"))


def test_gray_pictures_have_their_own_peak_and_are_repeated_for_lpips(lpips):
    gt = picture(0)
    gray = [p[:, :, :1] for p in (noisy(gt, 1), gt)]
    expected = pytest.approx(compared(lpips, *(p.repeat(3, axis=2) for p in gray)), rel=1e-5)
    assert compared(lpips, *gray) == expected
    assert compared(lpips, *(p.astype(np.uint16) * 257 for p in gray)) == expected


@pytest.mark.parametrize(("mode", "gt_has_alpha"), [("RGBA", True), ("LA", False), ("P", False)])
def test_transparent_pictures_are_compared_over_one_ground(tmp_path, mode, gt_has_alpha):
    """The result is as transparent as its photo; gt is too, or is what lies below."""
    levels = picture(0)
    if mode == "P":
        photo = Image.fromarray(levels[:, :, 0] // 8).convert("P")
        photo.putpalette(levels[0].tobytes() * 2)
        photo.info["transparency"] = 5
    else:
        photo = Image.fromarray(levels).convert(mode.removesuffix("A"))
        photo.putalpha(Image.fromarray(levels[:, :, 0] // 128 * 255))
    result = photo.convert("RGBA") if mode == "P" else photo
    gt = photo if gt_has_alpha else photo.convert("RGBA").convert("RGB")
    result.save(tmp_path / "a.png")
    gt.save(tmp_path / "b.png")
    x, y = metrics.comparable(*(metrics.read_like(tmp_path / f"{name}.png") for name in "ab"))
    assert x.std() > 10
    assert np.array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_files_keep_their_depth(tmp_path, dtype):
    pixels = picture(0)[:, :, 0].astype(dtype) * (200 if dtype == np.uint16 else 1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = metrics.read_like(tmp_path / "a.png")
    for found in metrics.comparable(image, image):
        assert found.dtype == dtype
        assert np.array_equal(found, pixels[:, :, None])


def test_a_gray_run_says_what_its_lpips_is(tmp_path, lpips):
    for folder in ("inpainted", "gt", "gt_keep_mask"):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture(0)[:, :, 0]).save(tmp_path / folder / "a.png")
    with pytest.warns(UserWarning, match="1 of 1 pictures are gray: LPIPS repeats them"):
        metrics.measure(metrics.find_run(None, str(tmp_path)), lpips)


def write_results(folder, count=3, samples=1, record=True):
    """Write a run's folder by hand; return its pictures by name."""
    found = {}
    for number in range(count):
        gt = picture(number)
        mask = np.full_like(gt, 255)
        mask[half()] = 127
        names = sample_names(f"{number}.png", samples)
        results = [noisy(gt, 100 + 10 * number + j) for j in range(samples)]
        for kind, name, pixels in [
            ("gt", f"{number}.png", gt), ("gt_keep_mask", f"{number}.png", mask),
            *(("inpainted", n, r) for n, r in zip(names, results, strict=True)),
        ]:  # fmt: skip
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / name)
        found[f"{number}.png"] = (gt, dict(zip(names, results, strict=True)))
    if record:
        seeds = dict.fromkeys([n for _, results in found.values() for n in results], 0)
        data = {"eval": {"set": {"gt_path": "x", "mask_path": "y"}}}
        tree = {"name": "test_c256_genhalf", "model_path": "m.pt", "samples_per_image": samples,
                "image_size": 64, "data": data, "record": {"seeds": seeds}}  # fmt: skip
        (folder / "run.yml").write_text(yaml.safe_dump(tree))
    return found


def note(folder, **notes):
    """Let a run have noted more about itself."""
    tree = yaml.safe_load((folder / "run.yml").read_text())
    tree["record"] |= notes
    (folder / "run.yml").write_text(yaml.safe_dump(tree))


def test_several_samples_are_averaged_and_compared(tmp_path, lpips, alexnet, capsys):
    folder = tmp_path / "moved"
    found = write_results(folder, count=3, samples=3)
    Image.fromarray(picture(9)).save(folder / "gt" / "left_over.png")
    assert metrics.main([str(folder), "--alexnet", alexnet, "--each", "--paper"]) == 0
    told = capsys.readouterr().out
    tree = json.loads((folder / "metrics.json").read_text())
    means, diversities = [], []
    for gt, results in found.values():
        each = [expected(result, gt, half()) for result in results.values()]
        means.append({key: np.mean([one[key] for one in each]) for key in each[0]})
        a, b, c = results.values()
        diversities.append(
            np.mean([metrics.distance(lpips, *p, half())[0] for p in [(a, b), (a, c), (b, c)]])
        )
    for key, mean in tree["means"].items():
        values = diversities if key == "diversity" else [one.get(key) for one in means]
        if key != "diversity_hole":
            assert mean["mean"] == pytest.approx(np.mean(values), rel=1e-4)
            error = np.std(values, ddof=1) / 3**0.5
            assert mean["standard_error"] == pytest.approx(error, rel=1e-3)
        assert mean["n"] == 3
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["result"] for row in rows] == [n for _, results in found.values() for n in results]
    gt, results = found["1.png"]
    wanted = expected(results["1_2.png"], gt, half())
    assert float(rows[4]["psnr_hole"]) == pytest.approx(wanted["psnr_hole"])
    assert "n = 3 pictures, 9 results, holes of 50.0% on average" in told
    assert "| CelebA-HQ | genhalf (half) | 0.165 |" in told
    assert told.count("| 2.png |") == 1


def test_a_log_without_record_is_all_its_pictures(tmp_path, alexnet, capsys):
    write_results(tmp_path / "theirs", record=False)
    assert metrics.main([str(tmp_path / "theirs"), "--alexnet", alexnet]) == 0
    assert "theirs: n = 3 pictures, 3 results" in capsys.readouterr().out


def test_a_picture_that_equals_gt_is_left_out_of_the_mean_psnr(tmp_path, alexnet, capsys):
    found = write_results(tmp_path / "log")
    gt, _ = found["1.png"]
    Image.fromarray(gt).save(tmp_path / "log/inpainted/1.png")
    assert metrics.main([str(tmp_path / "log"), "--alexnet", alexnet]) == 0
    mean = json.loads((tmp_path / "log/metrics.json").read_text())["means"]["psnr"]
    values = [expected(r, gt, half())["psnr"] for n in ("0.png", "2.png")
              for gt, results in [found[n]] for r in results.values()]  # fmt: skip
    assert (mean["mean"], mean["n"]) == (pytest.approx(np.mean(values)), 2)
    told = capsys.readouterr().out
    assert "(n = 2)" in told
    assert "1 of them equal gt" in told


def test_what_an_earlier_run_left_in_the_place_of_a_failure_counts_as_missing(tmp_path, lpips):
    write_results(tmp_path / "log", samples=2)
    (tmp_path / "log/inpainted/0_2.png").unlink()
    failures = dict.fromkeys(["1_2.png", "2_1.png", "2_2.png"], "why")
    note(tmp_path / "log", state="started", failures=failures)
    with pytest.warns(UserWarning, match=r"log/run\.yml: this run has not ended, and results of"):
        run = metrics.find_run(None, str(tmp_path / "log"))
    with pytest.warns(UserWarning, match=r"4 of 6 results are missing, such as 0_2\.png"):
        rows = metrics.measure(run, lpips)
    samples = [sample["name"] for row in rows for sample in row["samples"]]
    assert samples == ["0_1.png", "1_1.png"]


@pytest.mark.parametrize("notes", [5, [1], None, {"seeds": None}, {"failures": 3}])
def test_a_record_that_somebody_has_changed_is_refused_by_name(tmp_path, notes):
    write_results(tmp_path / "log")
    path = tmp_path / "log/run.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"record": notes}))
    with pytest.raises(UserError, match=r"log/run\.yml: record: is not the record of a run"):
        metrics.find_run(None, str(tmp_path / "log"))


def test_other_sizes_are_refused_by_name(tmp_path, lpips):
    write_results(tmp_path / "log")
    Image.fromarray(picture(0, 40)).save(tmp_path / "log/inpainted/1.png")
    run = metrics.find_run(None, str(tmp_path / "log"))
    with pytest.raises(UserError, match=r"inpainted/1\.png: .*expected 36 x 36, found 40 x 40"):
        metrics.measure(run, lpips)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either a log folder or --conf_path"),
        (["log", "--conf_path", "c.yml"], "either a log folder or --conf_path"),
        (["absent"], r"absent/inpainted: paths\.srs: no such folder of results"),
        (["log", "--paper"], r"--paper: the paper's figures .* such as test_c256_thick, found log"),
        (["log", "--alexnet", "no.pth"], r"no\.pth: no such checkpoint"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "log", count=1, record=False)
    with pytest.raises(UserError, match=message):
        metrics.main(options)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("test_inet256_ev2li", ("ImageNet", "ev2li (alternating lines)", 0.089)),
        ("mine_c256_thin_again", ("CelebA-HQ", "thin (Narrow)", 0.028)),
        ("test_p256_thick", None),
        ("test_c256_thicker", None),
    ],
)
def test_the_papers_place(name, place):
    if place:
        assert metrics.paper_figure(name) == place
    else:
        with pytest.raises(UserError, match="--paper"):
            metrics.paper_figure(name)


@pytest.mark.parametrize("count", [1, 2])
def test_results_that_are_jpegs_of_odd_names_are_measured(
    count, tmp_path, monkeypatch, capsys, alexnet
):
    monkeypatch.chdir(tmp_path)
    options = write_run(tmp_path, images=1, image_size=32, full_size=True, output_format="same")
    with Image.open("gt/00.png") as image:
        image.resize((32, 32)).save("gt/a\udcff.jpg", format="JPEG")
    with Image.open("mask/00.png") as image:
        image.resize((32, 32)).save("mask/00.png")
    Path("gt/00.png").unlink()
    assert run_here(capsys, *options, "--set", f"samples_per_image={count}").status == 0
    assert metrics.main(["log/run", "--alexnet", alexnet]) == 0
    assert f"run: n = 1 pictures, {count} results" in capsys.readouterr().out
    assert "a\\udcff" in Path("log/run/metrics.csv").read_text()
    [row] = json.loads(Path("log/run/metrics.json").read_text())["each"]
    assert row["name"] == "a\udcff.png"


def test_the_files_that_the_run_has_noted_are_measured(tmp_path, lpips):
    write_results(tmp_path, count=1)
    name = tmp_path / "inpainted" / "0.Jpg"
    Image.open(tmp_path / "inpainted" / "0.png").convert("L").save(name, format="PNG")
    note(tmp_path, seeds={"0.Jpg": 0})  # the PNG is an earlier run's
    with_png = metrics.measure(metrics.find_run(None, str(tmp_path)), lpips)
    (tmp_path / "inpainted" / "0.png").unlink()
    assert metrics.measure(metrics.find_run(None, str(tmp_path)), lpips) == with_png


@pytest.mark.parametrize("by", ["folder", "conf_path"])
def test_a_run_of_the_program_is_measured(by, tmp_path, monkeypatch, capsys, alexnet):
    monkeypatch.chdir(tmp_path)
    options = write_run(tmp_path, images=2, image_size=32)
    out = ["--out", "elsewhere"] if by == "folder" else []
    assert run_here(capsys, *options, "--set", "samples_per_image=2", *out).status == 0
    assert metrics.main([*(out[1:] or options), "--alexnet", alexnet]) == 0
    assert "run: n = 2 pictures, 4 results, holes of 50.0%" in capsys.readouterr().out
    folder = tmp_path / (out[1] if out else "log/run")
    tree = json.loads((folder / "metrics.json").read_text())
    assert tree["means"]["diversity"]["mean"] > 0
