"""Plots of schedules and what they cost: ``python guided_diffusion/scheduler.py``."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from run_cases import ROOT

from guided_diffusion.config.reading import load_conf
from guided_diffusion.errors import UserError
from guided_diffusion.scheduler import count_steps, get_schedule_jump
from guided_diffusion.tools import plot_schedule


def write_conf(path, **params):
    lines = "".join(f"  {key}: {value}\n" for key, value in params.items())
    path.write_text(
        "name: x\nmodel_path: absent.pt\ntimestep_respacing: '20'\n"
        f"schedule_jump_params:\n{lines}"
        "data:\n  eval:\n    set:\n      gt_path: absent\n      mask_path: absent\n"
    )
    return path


def test_program_plots_the_default(tmp_path):
    program = ROOT / "guided_diffusion" / "scheduler.py"
    environment = {**os.environ, "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(tmp_path))}
    result = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (result.returncode, result.stderr) == (0, "")
    cost, where = result.stdout.splitlines()
    assert cost == "default: 4,570 transitions, 2,410 network calls, 2,160 undos"
    assert where == "plot: schedule.png"
    with Image.open(tmp_path / "schedule.png") as image:
        assert image.size == (2100, 960)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "x.jpg"], ("--out", ".png or .pdf", "x.jpg")),
        (["--conf_path", "absent.yml"], ("absent.yml",)),
        (["--no-such-option"], ("--no-such-option",)),
        (["--conf_path", "a.yml", "--compare", "b.yml"], ("--compare", "--conf_path")),
        (["--measure"], ("--measure", "--conf_path")),
        (["--out", "file/x.png"], ("file/x.png", "cannot be written")),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where a folder would have to be")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        plot_schedule.main(words)
    assert all(part in str(caught.value) for part in told)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_walk_that_does_not_fit_its_chain_names_file_and_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_conf(tmp_path / "high.yml", t_T=21)
    with pytest.raises(UserError, match=r"high\.yml: .*t_T.*at most 20"):
        plot_schedule.main(["--conf_path", str(path)])


def test_measure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ROOT / "tests" / "golden" / "plain" / "model.pt"
    path = write_conf(tmp_path / "tiny.yml", t_T=20, jump_length=2, jump_n_sample=2)
    path.write_text(
        path.read_text().replace("absent.pt", str(model))
        + "      batch_size: 2\n"
        + "image_size: 32\nnum_channels: 32\nchannel_mult: '1,2'\nnum_res_blocks: 1\n"
        "attention_resolutions: '16'\nnum_head_channels: 16\ndevice: cpu\n"
    )
    # A clock that adds 1 s a look: the timed transitions of two pictures take 1 s together.
    monkeypatch.setattr(plot_schedule.time, "perf_counter", iter(range(9)).__next__)
    assert plot_schedule.main(["--conf_path", str(path), "--measure"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    # 19 18 17 16 17 18 17 16 15: eight transitions with six calls, of 38 that an image takes.
    assert line == "tiny: 3.2 s an image on cpu, 0.0833 s a network call"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), (UserError, "data.batch_size: .*1 image")),
        (RuntimeError("a defect"), (RuntimeError, "a defect")),
    ],
)
def test_only_want_of_memory_is_one_line(tmp_path, monkeypatch, error, expected):
    def fail(*_):
        raise error

    monkeypatch.setattr("guided_diffusion.run.inpainter.Inpainter", fail)
    conf = load_conf(write_conf(tmp_path / "tiny.yml", t_T=20))
    with pytest.raises(expected[0], match=expected[1]):
        plot_schedule.measure_call(conf, [1, 0])


def test_plots_of_configurations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = []
    for folder, count in (("one", 1), ("two", 2)):  # the same file name twice
        (tmp_path / folder).mkdir()
        params = {"t_T": 20, "jump_length": 5, "jump_n_sample": count}
        paths.append(str(write_conf(tmp_path / folder / "same.yml", **params)))
    costs = ("20 transitions, 20 network calls, 0 undos", "50 transitions, 35 network calls, 15")
    assert plot_schedule.main(["--compare", *paths]) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == f"{paths[0]}: {costs[0]}"
    assert second.startswith(f"{paths[1]}: {costs[1]}")
    assert plot_schedule.main(["--conf_path", paths[1], "--out", "plots/short.PDF"]) == 0
    assert f"same: {costs[1]}" in capsys.readouterr().out
    assert (tmp_path / "plots" / "short.PDF").read_bytes().startswith(b"%PDF-")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["short.PDF"]


def line_through(axes, label):
    return next(line for line in axes.get_lines() if line.get_label().startswith(label))


@pytest.mark.parametrize("params", [{"t_T": 250}, {"t_T": 20, "jump_length": 5}])
def test_what_the_plot_of_one_walk_shows(params):
    times = get_schedule_jump(**params)
    calls, undos = count_steps(times)
    figure = plot_schedule.plot_schedules({"name": times})
    (axes,) = figure.axes
    assert axes.get_xlabel() == "transition"
    assert axes.get_ylabel() == "diffusion time t"
    assert axes.get_title(loc="left") == f"name: {calls:,} network calls, {undos:,} undos"
    assert list(line_through(axes, "denoise").get_ydata()) == times
    low, high = axes.get_ylim()
    assert low < -1
    assert times[0] < high < 1.2 * times[0] + 2
    # The coloured pieces are the climbs, all of them and nothing else.
    x, y = (np.array(data) for data in line_through(axes, "undo").get_data())
    inside = ~np.isnan(x[:-1] + x[1:])
    climbing = [i for i, (t, t_next) in enumerate(pairwise(times)) if t_next > t]
    assert list(x[:-1][inside & (np.diff(x) == 1)]) == climbing
    assert [times[int(i)] for i in x[~np.isnan(x)]] == list(y[~np.isnan(y)])
    assert not (np.diff(y)[inside] < 0).any()
    assert len(axes.child_axes) == (len(times) > 600)


def test_what_a_comparison_shows():
    walks = {"$a_$": get_schedule_jump(30), "_b": get_schedule_jump(20, jump_n_sample=1)}
    (axes,) = plot_schedule.plot_schedules(walks).axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["210 network calls: $a_$", "20 network calls: _b"]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == list(walks.values())
    assert len({line.get_color() for line in axes.get_lines()}) == 2


def test_measure_looks_for_every_checkpoint_before_it_loads_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "guided_diffusion.tools.plot_schedule.measure_call", lambda *_: pytest.fail("loaded")
    )
    options = ["--compare", str(ROOT / "confs/demo.yml"), str(ROOT / "confs/inet64.yml")]
    (tmp_path / "data/pretrained").mkdir(parents=True)
    (tmp_path / "data/pretrained/demo64.pt").symlink_to(ROOT / "data/pretrained/demo64.pt")
    with pytest.raises(UserError, match=r"64x64_diffusion\.pt: no such checkpoint"):
        plot_schedule.main([*options, "--measure"])
    assert not (tmp_path / "schedule.png").exists()
