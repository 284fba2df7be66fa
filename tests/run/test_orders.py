"""Orders of a page: what is made of them, and that test.py makes the same."""

import shutil
import threading

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_cases import ROOT, pixels, run_here, tiny_tree, write_run, write_tree

from guided_diffusion.errors import UserError
from guided_diffusion.run import inpaint, orders
from guided_diffusion.run.orders import Cancelled, Job, Order, Studio


@pytest.fixture
def studio(tmp_path, monkeypatch):
    write_run(tmp_path, images=1)
    monkeypatch.chdir(tmp_path)
    return Studio("c.yml")


def order(tmp_path, **changes):
    """Return an order of a photo, 20 pixels wide, of which a part is painted."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    layer = np.zeros((16, 20, 4), np.uint8)
    layer[4:9, 6:12] = 255, 0, 80, 255
    Image.fromarray(layer).save(tmp_path / "layer.png")
    values = {
        "picture": str(tmp_path / "photo.png"), "strokes": [str(tmp_path / "layer.png")],
        "mask": None, "hole": "painted", "method": "repaint", "samples": 1, "seed": 3,
        "full_size": True, "mask_grow": 0,
    }  # fmt: skip
    return Order(**values | changes)


def do(studio, wish, tmp_path):
    folder = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
    folder.mkdir()
    job = Job(wish, folder)
    studio.work(job)
    if job.error:
        raise job.error
    return job


CASES = [
    {},
    {"samples": 3, "full_size": False},
    {"hole": "genhalf", "mask_grow": 2},
    {"method": "fast", "seed": None},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_downloads_repeat_a_result_byte_for_byte(studio, tmp_path, capsys, changes):
    job = do(studio, order(tmp_path, **changes), tmp_path)
    downloads = {path.name for path in job.folder.iterdir() if path.is_file()}
    for name in downloads - {path.name for path in job.results}:
        shutil.copy(job.folder / name, tmp_path)
    shutil.rmtree(job.folder / "out")
    again = run_here(capsys, "--conf_path", "repeat.yml")
    assert again.status == 0, again.err
    made = sorted((tmp_path / "log" / "page" / "inpainted").iterdir())
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in job.results]
    assert len(made) == job.order.samples
    assert {"picture.png", "mask.png", "repeat.yml"} <= downloads


def test_a_result_changes_only_where_it_is_painted_and_keeps_its_size(studio, tmp_path):
    job = do(studio, order(tmp_path), tmp_path)
    before, after = pixels(tmp_path / "photo.png"), pixels(job.results[0])
    changed = (before != after).any(axis=2)
    assert changed[4:9, 6:12].all()
    feather = studio.conf.feather
    assert before.shape == after.shape
    assert not changed[9 + feather :].any()


def test_networks_are_loaded_once(studio, tmp_path, monkeypatch):
    built, build = [], orders.RePaint
    monkeypatch.setattr(orders, "RePaint", lambda conf: built.append(1) or build(conf))
    results = [do(studio, order(tmp_path, seed=seed), tmp_path).results[0] for seed in (1, 2, 1)]
    assert built == [1]
    first, other, again = (path.read_bytes() for path in results)
    assert first == again != other


def replace_checkpoint(folder, path):
    state = torch.load(folder / "model.pt", weights_only=True)
    torch.save({name: 1.5 * tensor for name, tensor in state.items()}, folder / path)


@pytest.mark.parametrize("how", ["checkpoint", "yaml"])
def test_networks_are_loaded_anew_where_they_are_others(studio, tmp_path, how):
    first = do(studio, order(tmp_path), tmp_path).results[0].read_bytes()
    if how == "checkpoint":
        replace_checkpoint(tmp_path, "model.pt")
    else:
        replace_checkpoint(tmp_path, "other.pt")
        write_tree(tmp_path, tiny_tree(model_path="other.pt"))
    again = do(studio, order(tmp_path), tmp_path).results[0].read_bytes()
    fresh = do(Studio("c.yml"), order(tmp_path), tmp_path).results[0].read_bytes()
    assert first != again == fresh


def test_an_order_of_every_kind_shares_the_networks(studio, tmp_path, monkeypatch):
    built, build = [], orders.RePaint
    monkeypatch.setattr(orders, "RePaint", lambda conf: built.append(1) or build(conf))
    for changes in CASES:
        do(studio, order(tmp_path, **changes), tmp_path)
    assert built == [1]


@pytest.mark.parametrize("changes", [{"windows": True}, {"output_format": "same"}], ids=str)
def test_keys_for_whole_photos_do_not_spoil_squares(tmp_path, monkeypatch, changes):
    write_run(tmp_path, images=1, full_size=True, **changes)
    monkeypatch.chdir(tmp_path)
    built, build = [], orders.RePaint
    monkeypatch.setattr(orders, "RePaint", lambda conf: built.append(1) or build(conf))
    studio = Studio("c.yml")
    for full_size in (True, False, True):
        job = do(studio, order(tmp_path, full_size=full_size), tmp_path)
        with Image.open(job.results[0]) as result:
            assert (result.size == (20, 16)) == full_size
    assert built == [1]


def test_calls_are_counted_beforehand(studio, tmp_path):
    job = do(studio, order(tmp_path, samples=2), tmp_path)
    assert job.calls == job.total > 0


def test_a_job_ends_at_the_next_call_and_leaves_no_files(studio, tmp_path):
    (tmp_path / "job").mkdir()
    job = Job(order(tmp_path), tmp_path / "job")
    see = job.see

    def cancelling(call, x, pred_xstart):
        job.is_cancelled = call == 2
        see(call, x, pred_xstart)

    job.see = cancelling
    studio.work(job)
    assert isinstance(job.error, Cancelled)
    assert job.calls == 1
    assert not job.folder.exists()


def test_a_job_that_nobody_asks_after_ends(studio, tmp_path, monkeypatch):
    monkeypatch.setattr(orders, "_SILENT_SECONDS", -1)
    with pytest.raises(Cancelled):
        do(studio, order(tmp_path), tmp_path)


def test_one_job_at_a_time(studio, tmp_path, monkeypatch):
    at_once, most = [], []

    def make(job):
        at_once.append(job)
        most.append(len(at_once))
        threading.Event().wait(0.05)
        at_once.remove(job)

    monkeypatch.setattr(studio, "_make", make)
    jobs = [Job(order(tmp_path), tmp_path / str(n)) for n in range(3)]
    threads = [threading.Thread(target=studio.work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


MISTAKES = [
    ({"picture": None}, orders.NO_PICTURE),
    ({"strokes": []}, orders.NOTHING_PAINTED),
    ({"hole": "uploaded"}, orders.NO_MASK),
    ({"hole": "../etc/passwd"}, "hole: expected painted"),
    ({"picture": "c.yml"}, "not a picture"),
    ({"mask_grow": -1}, "mask_grow"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(("changes", "told"), MISTAKES, ids=str)
def test_mistakes_are_told_in_one_line(studio, tmp_path, changes, told):
    with pytest.raises(UserError, match=told) as caught:
        do(studio, order(tmp_path, **changes), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["picture", "mask", "strokes"])
def test_more_pixels_than_pillow_takes_for_safe_are_refused(studio, tmp_path, monkeypatch, which):
    large = str(tmp_path / "large.png")
    for width in (21, 60):  # above the limit, and where Pillow itself refuses
        Image.new("RGBA", (width, 16)).save(large)
        wish = order(tmp_path, **{which: [large] if which == "strokes" else large})
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 320)
        with pytest.raises(UserError, match=r"^large\.png: has too many pixels; .* at most 320$"):
            do(studio, wish, tmp_path)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)


def test_a_hole_grows_as_far_as_the_control_goes(tmp_path):
    grown = [order(tmp_path, mask_grow=wish).mask_grow for wish in (None, 3, 64, 1e9)]
    assert grown == [0, 3, 64, 64]


def test_a_fault_of_a_run_is_told_without_the_servers_command(studio, tmp_path, monkeypatch):
    def fail(_):
        raise UserError("the disk is full")

    monkeypatch.setattr(inpaint, "refuse_changed", fail)
    with pytest.raises(UserError, match=r"^the disk is full$"):
        do(studio, order(tmp_path), tmp_path)


@pytest.mark.parametrize("key", ["model_path", "classifier_path", "device"])
def test_what_no_order_could_use_is_told_at_once(studio, key):
    with pytest.raises(UserError, match="absent"):
        Studio("c.yml", [f"{key}=absent", "classifier_scale=1", "class_cond=true"])


def test_the_yaml_names_no_folder_of_this_machine(studio, tmp_path):
    absolute = Studio("c.yml", [f"model_path={tmp_path / 'model.pt'}"])
    job = do(absolute, order(tmp_path), tmp_path)
    text = (job.folder / "repeat.yml").read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert yaml.safe_load(text)["model_path"] == "model.pt"
