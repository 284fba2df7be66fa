"""Requests of the page: what is made of them, and that test.py makes the same."""

import base64
import io
import shutil
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_cases import ROOT, pixels, run_here, write_run

from guided_diffusion.errors import UserError
from page import jobs
from page.jobs import Cancelled, Chosen, Job, Request, Worker, read


@pytest.fixture
def worker(tmp_path, monkeypatch):
    write_run(tmp_path, images=1)
    monkeypatch.chdir(tmp_path)
    return Worker("c.yml")


def strokes(size=(40, 32)):
    """Return a layer in which a part is painted, at twice the photo's size."""
    layer = Image.new("RGBA", size)
    layer.paste((255, 0, 80, 255), (12, 8, 24, 18))
    stream = io.BytesIO()
    layer.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def chosen(tmp_path, name="photo.png", **options):
    """Return a photo, 20 pixels wide."""
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
    photo.save(tmp_path / name, **options)
    return Chosen(tmp_path / name, (20, 16))


def request(tmp_path, **changes):
    values = {
        "picture": changes.pop("picture", None) or chosen(tmp_path), "strokes": strokes(),
        "hole": "painted", "mask": None, "mask_hole": "auto", "method": "repaint", "samples": 1,
        "seed": 3, "full_size": True, "mask_grow": 0,
    }  # fmt: skip
    return Request(**values | changes)


def start(worker, wish, tmp_path):
    folder = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
    folder.mkdir()
    job = Job(wish, folder)
    worker.submit(job)
    return job


def finish(job):
    while not job.finished:
        job.asked = time.monotonic()
        time.sleep(0.01)
    if job.error:
        raise job.error
    return job


def do(worker, wish, tmp_path):
    return finish(start(worker, wish, tmp_path))


CASES = [
    {},
    {"samples": 3, "full_size": False},
    {"hole": "genhalf", "mask_grow": 2},
    {"method": "fast", "seed": None},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_downloads_repeat_a_result_byte_for_byte(worker, tmp_path, capsys, changes):
    job = do(worker, request(tmp_path, **changes), tmp_path)
    downloads = {path.name for path in job.folder.iterdir() if path.is_file()}
    for name in downloads - {path.name for path in job.results}:
        shutil.copy(job.folder / name, tmp_path)
    shutil.rmtree(job.folder / "out")
    again = run_here(capsys, "--conf_path", "repeat.yml")
    assert again.status == 0, again.err
    made = sorted((tmp_path / "log" / "page" / "inpainted").iterdir())
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in job.results]
    assert len(made) == job.request.samples
    assert {"picture.png", "mask.png", "repeat.yml"} <= downloads


def test_a_result_changes_only_where_it_is_painted_and_keeps_its_size(worker, tmp_path):
    job = do(worker, request(tmp_path), tmp_path)
    before, after = pixels(tmp_path / "photo.png"), pixels(job.results[0])
    changed = (before != after).any(axis=2)
    assert changed[4:9, 6:12].all()
    feather = worker.conf.feather
    assert before.shape == after.shape
    assert not changed[9 + feather :].any()


def test_networks_are_loaded_once(worker, tmp_path, monkeypatch):
    built, build = [], jobs.RePaint
    monkeypatch.setattr(jobs, "RePaint", lambda conf: built.append(1) or build(conf))
    results = [do(worker, request(tmp_path, seed=seed), tmp_path).results[0] for seed in (1, 2, 1)]
    assert built == [1]
    first, other, again = (path.read_bytes() for path in results)
    assert first == again != other


def replace_checkpoint(folder, path):
    state = torch.load(folder / "model.pt", weights_only=True)
    torch.save({name: 1.5 * tensor for name, tensor in state.items()}, folder / path)


def test_networks_are_loaded_anew_where_the_checkpoint_is_another(worker, tmp_path):
    first = do(worker, request(tmp_path), tmp_path).results[0].read_bytes()
    replace_checkpoint(tmp_path, "model.pt")
    again = do(worker, request(tmp_path), tmp_path).results[0].read_bytes()
    fresh = do(Worker("c.yml"), request(tmp_path), tmp_path).results[0].read_bytes()
    assert first != again == fresh


def test_a_request_of_every_kind_shares_the_networks(worker, tmp_path, monkeypatch):
    built, build = [], jobs.RePaint
    monkeypatch.setattr(jobs, "RePaint", lambda conf: built.append(1) or build(conf))
    for changes in CASES:
        do(worker, request(tmp_path, **changes), tmp_path)
    assert built == [1]


@pytest.mark.parametrize("changes", [{"windows": True}, {"output_format": "same"}], ids=str)
def test_keys_for_whole_photos_do_not_spoil_squares(tmp_path, monkeypatch, changes):
    write_run(tmp_path, images=1, full_size=True, **changes)
    monkeypatch.chdir(tmp_path)
    built, build = [], jobs.RePaint
    monkeypatch.setattr(jobs, "RePaint", lambda conf: built.append(1) or build(conf))
    worker = Worker("c.yml")
    for full_size in (True, False, True):
        job = do(worker, request(tmp_path, full_size=full_size), tmp_path)
        with Image.open(job.results[0]) as result:
            assert (result.size == (20, 16)) == full_size
    assert built == [1]


def test_calls_are_counted_beforehand(worker, tmp_path):
    job = do(worker, request(tmp_path, samples=2), tmp_path)
    assert job.calls == job.total > 0


def test_a_job_ends_at_the_next_call_and_leaves_no_files(worker, tmp_path, monkeypatch):
    see = Job.see

    def cancelling(job, call, x, pred_xstart):
        job.is_cancelled = call == 2
        see(job, call, x, pred_xstart)

    monkeypatch.setattr(Job, "see", cancelling)
    job = start(worker, request(tmp_path), tmp_path)
    with pytest.raises(Cancelled):
        finish(job)
    assert job.calls == 1
    assert not job.folder.exists()


def test_a_job_that_nobody_asks_after_ends(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_SILENT_SECONDS", -1)
    with pytest.raises(Cancelled):
        do(worker, request(tmp_path), tmp_path)


def test_jobs_wait_for_one_another_in_their_order(worker, tmp_path, monkeypatch):
    queue = [start(worker, request(tmp_path), tmp_path) for _ in range(3)]
    assert [worker.count_before(job) for job in queue] == [0, 1, 2]
    monkeypatch.setattr(jobs, "MAX_WAITING", 2)
    with pytest.raises(UserError, match="queue full"):
        start(worker, request(tmp_path), tmp_path)
    ends = [finish(job).finished for job in queue]
    assert ends == sorted(ends)
    assert worker.count_before(queue[0]) == 0


def test_the_next_step_keeps_its_history(worker, tmp_path, capsys):
    first = do(worker, request(tmp_path, samples=2, seed=5), tmp_path)
    picture = Chosen(first.results[1], (20, 16), (first.folder,))
    job = do(worker, request(tmp_path, picture=picture), tmp_path)
    names = [path.name for path in job.downloads()]
    first_names = {"result1.png", "result2.png", "picture.png", "mask.png", "repeat.yml"}
    assert set(names) - first_names == {"result-2.png", "mask-2.png", "repeat-2.yml"}
    for path in job.downloads():
        if not path.name.startswith("result-2"):
            shutil.copy(path, tmp_path)
    again = run_here(capsys, "--conf_path", "repeat-2.yml")
    assert again.status == 0, again.err
    made = tmp_path / "log/page-2/inpainted/result2.png"
    assert made.read_bytes() == job.results[0].read_bytes()


def test_a_result_has_the_format_of_its_photo_and_what_its_file_knew(worker, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 3, "Maker"  # upside down
    job = do(worker, request(tmp_path, picture=chosen(tmp_path, "photo.jpg", exif=exif)), tmp_path)
    with Image.open(job.folder / "result.jpg") as image:
        assert (image.getexif().get(0x0112, 1), image.getexif()[0x010F]) == (1, "Maker")
    for path in job.downloads()[1:]:
        shutil.copy(path, tmp_path)
    assert run_here(capsys, "--conf_path", "repeat.yml").status == 0
    made = tmp_path / "log/page/inpainted/picture.jpg"
    assert made.read_bytes() == job.results[0].read_bytes()


MISTAKES = [
    ({"strokes": None}, "nothing painted"),
    ({"strokes": "data:image/png;base64,AAAA"}, "nothing painted"),
    ({"hole": "uploaded"}, "no mask"),
    ({"hole": "../etc/passwd"}, "hole: expected painted, uploaded, thin"),
    ({"method": ["fast"]}, "method: expected fast, repaint, found ['fast']"),
    ({"mask_hole": None}, "mask_hole: expected auto, black"),
    ({"mask_grow": -1}, "mask_grow: expected a whole number from 0 to 64, found -1"),
    ({"mask_grow": 65}, "mask_grow: expected a whole number from 0 to 64, found 65"),
    ({"samples": "2"}, "samples: expected a whole number from 1 to 4, found '2'"),
    ({"samples": True}, "samples: expected a whole number from 1 to 4, found True"),
    ({"seed": 1.7}, "seed: expected a whole number from 0 to 2147483647, found 1.7"),
    ({"seed": -1}, "seed: expected a whole number from 0"),
    ({"full_size": "no"}, "full_size: expected true or false, found 'no'"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=str)
def test_a_mistake_names_the_argument_what_was_expected_and_found(
    worker, tmp_path, changes, message
):
    with pytest.raises(UserError) as caught:
        do(worker, request(tmp_path, **changes), tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ground", "part", "rule"),
    [
        ((9, 9, 9, 255), (0, 0, 0, 0), "alpha"),
        ((0, 0, 0, 0), (255, 0, 80, 255), "auto"),
        ((255, 255, 255, 255), (0, 0, 0, 255), "auto"),
        ((255, 255, 255, 255), (255, 0, 0, 255), "color"),
    ],
)
def test_the_hole_of_a_mask_file(worker, tmp_path, capsys, ground, part, rule):
    mask = Image.new("RGBA", (20, 16), ground)
    mask.paste(part, (6, 4, 12, 9))
    mask.save(tmp_path / "layer.png")
    wish = request(tmp_path, hole="uploaded", mask=str(tmp_path / "layer.png"), mask_hole=rule)
    job = do(worker, wish, tmp_path)
    known = np.asarray(Image.open(job.folder / "out/gt_keep_masks/picture.png"))
    known = known.reshape(16, 20, -1)[:, :, 0]
    assert (known == 0).sum() == 6 * 5
    assert not known[4:9, 6:12].any()
    for path in job.downloads()[1:]:
        shutil.copy(path, tmp_path)
    assert run_here(capsys, "--conf_path", "repeat.yml").status == 0
    made = tmp_path / "log/page/inpainted/picture.png"
    assert made.read_bytes() == job.results[0].read_bytes()


def test_too_many_pixels_are_refused_before_they_are_decoded(worker, tmp_path, monkeypatch):
    Image.new("L", (21, 16)).save(tmp_path / "large.png")
    wish = request(tmp_path, hole="uploaded", mask=str(tmp_path / "large.png"))
    monkeypatch.setattr(jobs, "MAX_PIXELS", 320)
    with pytest.raises(UserError, match=r"large\.png: .*at most 320 pixels, found 21 x 16 pixels"):
        read(tmp_path / "large.png")
    with pytest.raises(UserError, match="at most 320 pixels"):
        do(worker, wish, tmp_path)


def test_a_fault_of_a_run_is_told(worker, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("the disk is full")

    monkeypatch.setattr(jobs, "write_result", fail)
    with pytest.raises(UserError, match=r"^the disk is full$"):
        do(worker, request(tmp_path), tmp_path)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert do(worker, request(tmp_path), tmp_path).results


@pytest.mark.parametrize("key", ["model_path", "classifier_path", "device"])
def test_what_no_request_could_use_is_told_at_once(worker, key):
    with pytest.raises(UserError, match="absent"):
        Worker("c.yml", [f"{key}=absent", "classifier_scale=1", "class_cond=true"])


def test_the_yaml_names_no_folder_of_this_machine(worker, tmp_path):
    absolute = Worker("c.yml", [f"model_path={tmp_path / 'model.pt'}"])
    job = do(absolute, request(tmp_path), tmp_path)
    text = (job.folder / "repeat.yml").read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert yaml.safe_load(text)["model_path"] == "model.pt"
