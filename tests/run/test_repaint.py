"""The library: pictures in Python give the very pixels of test.py."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import TINY_CALLS, pixels, run_here, tiny_tree, write_run

from guided_diffusion import RePaint
from guided_diffusion.errors import UserError

LOG = "log/run"


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Write a run of two pictures and go there; return test.py's options and its runner."""
    options = write_run(tmp_path, images=2, show_progress=False)
    monkeypatch.chdir(tmp_path)
    return lambda *more: run_here(capsys, *options, *more)


def inputs(number):
    return Image.open(f"gt/{number:02d}.png"), Image.open(f"mask/{number:02d}.png")


WALKS = [
    {},
    {"fast": True},
    {"paste_known": True, "mask_grow": 1, "masks": "thick"},  # drawn for each picture
    {"full_size": True},
    {"full_size": True, "windows": True, "feather": 2},
]


@pytest.mark.parametrize("keys", WALKS, ids=str)
def test_the_same_seed_gives_the_pixels_of_test_py(here, keys):
    names = {"fast": ["--fast"], "masks": ["--mask", keys.get("masks")]}
    options = [
        option
        for key, value in keys.items()
        for option in names.get(key, [f"--set={key}={str(value).lower()}"])
    ]
    assert here(*options, "--set=seed=7").status == 0
    pictures, masks = zip(inputs(0), inputs(1), strict=True)
    made = RePaint("c.yml")(list(pictures), seed=7, **{"masks": list(masks), **keys})
    for number, result in enumerate(made):
        assert np.array_equal(np.asarray(result), pixels(f"{LOG}/inpainted/{number:02d}.png"))


def test_arrays_paths_and_images_are_one_picture(here):
    repaint = RePaint("c.yml")
    picture, mask = inputs(0)
    known = np.asarray(mask.convert("L")) > 127
    wanted = np.asarray(repaint(picture, mask, seed=3))
    made = repaint(np.asarray(picture), known, seed=3)
    assert isinstance(made, np.ndarray)
    assert np.array_equal(made, wanted)
    assert np.array_equal(np.asarray(repaint("gt/00.png", "mask/00.png", seed=3)), wanted)


def test_samples_seeds_and_generators(here):
    repaint, (picture, mask) = RePaint("c.yml"), inputs(0)
    one, two = repaint([picture, picture], mask, seeds=[4, 9])
    assert np.array_equal(one, repaint(picture, mask, seed=4))
    assert np.array_equal(two, repaint(picture, mask, seed=9))
    samples = repaint(picture, mask, seed=4, samples_per_image=2, batch_size=2)
    assert np.array_equal(samples[0], one)
    assert not np.array_equal(samples[1], one)
    drawn = [repaint(picture, mask, seed=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert np.array_equal(*drawn)


def test_progress_sees_every_call_and_may_stop_the_walk(here):
    repaint, (picture, mask) = RePaint("c.yml"), inputs(0)
    calls = []

    def watch(step, x, pred_xstart):
        calls.append((step, tuple(x.shape), tuple(pred_xstart.shape)))
        return step == 2

    stopped = repaint(picture, mask, seed=1, progress=watch)
    assert calls == [(1, (1, 3, 8, 8), (1, 3, 8, 8)), (2, (1, 3, 8, 8), (1, 3, 8, 8))]
    assert not np.array_equal(stopped, repaint(picture, mask, seed=1))
    calls.clear()
    repaint(picture, mask, seed=1, progress=lambda *seen: calls.append(seen))
    assert len(calls) == TINY_CALLS
    with pytest.raises(ZeroDivisionError):  # what it raises ends the walk
        repaint(picture, mask, seed=1, progress=lambda *_: 1 / 0)


def test_nothing_is_printed_and_no_setting_changes(here, capsys):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    filters = list(warnings.filters)
    first, second = RePaint("c.yml", precision="tf32"), RePaint("c.yml", sampler="ddnm")
    picture, mask = inputs(0)
    one, two = first(picture, mask, seed=1), second(picture, mask, seed=1)
    assert not np.array_equal(one, two)
    assert np.array_equal(one, first(picture, mask, seed=1))
    assert capsys.readouterr() == ("", "")
    after = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    assert (before, filters) == (after, list(warnings.filters))


def test_a_model_file_takes_the_place_of_the_yaml(here):
    tree = tiny_tree()
    others = {key: tree[key] for key in ("num_heads", "num_head_channels") if key in tree}
    walk = {key: tree[key] for key in ("timestep_respacing", "schedule_jump_params")}
    repaint = RePaint("model.pt", image_size=8, **others, **walk)
    picture, mask = inputs(0)
    assert np.array_equal(repaint(picture, mask, seed=5), RePaint("c.yml")(picture, mask, seed=5))


MISTAKES = {
    "a missing YAML": (lambda: RePaint("none.yml"), ["none.yml", "No such file"]),
    "an unknown key": (lambda: RePaint("c.yml", sampel=1), ["sampel", "sampler"]),
    "a key of the networks in a call": (
        lambda: RePaint("c.yml")(*inputs(0), model_path="other.pt"), ["model_path", "RePaint"],
    ),
    "masks that are too few": (
        lambda: RePaint("c.yml")([inputs(0)[0]] * 3, [inputs(0)[1]] * 2), ["3 pictures", "2 masks"],
    ),
    "seeds that are too few": (
        lambda: RePaint("c.yml")([inputs(0)[0]] * 2, "thick", seeds=[1]), ["seeds", "2"],
    ),
    "a seed below 0": (lambda: RePaint("c.yml")(*inputs(0), seed=-1), ["seed", "-1"]),
    "floats in colour": (
        lambda: RePaint("c.yml")(np.zeros((8, 8, 3)), "thick"), ["picture 0", "uint8", "float64"],
    ),
    "a file that is no picture": (
        lambda: RePaint("c.yml")("c.yml", "thick"), ["c.yml", "not a picture"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_raise_one_line(here, what):
    call, facts = MISTAKES[what]
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert [fact for fact in facts if fact not in text] == []
