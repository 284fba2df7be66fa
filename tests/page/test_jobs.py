"""Requests of the page: what is made of them, and that test.py makes the same."""

import base64
import io
import re
import shutil
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import ROOT, pixels, run_here, tiny_tree, write_run, write_tree

import app
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import conf_from_dict
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import create_model
from page import jobs
from page.jobs import Job, Worker


@pytest.fixture
def worker(tmp_path, monkeypatch):
    write_run(tmp_path, images=1)
    monkeypatch.chdir(tmp_path)
    return Worker(tmp_path, "c.yml")


def strokes():
    """Return a layer in which a part is painted, at twice the photo's size."""
    layer = Image.new("RGBA", (40, 32))
    layer.paste((255, 0, 80, 255), (12, 8, 24, 18))
    stream = io.BytesIO()
    layer.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


STROKES = strokes()
VALUES = {
    "hole": "painted", "mask": None, "mask_hole": "auto", "method": "repaint", "samples": 1,
    "seed": 3, "full_size": True, "mask_grow": 0,
}  # fmt: skip


def photo(folder, name="photo.png", **options):
    """Return a photo, 20 pixels wide."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(
        folder / name, **options
    )
    return folder / name


def start(worker, *, picture=None, layer=STROKES, **changes):
    picture = picture or photo(worker.folder)
    return worker.start(picture, (VALUES | changes).values(), layer, (20, 16))


def do(worker, **changes):
    job = start(worker, **changes)
    job.work.result()
    return job


def repeat(job, capsys, suffix=""):
    """Run test.py with the downloads of a job, but for its results; return what it made."""
    for path in job.downloads():
        if path not in job.results:
            shutil.copy(path, ".")
    ended = run_here(capsys, "--conf_path", f"repeat{suffix}.yml")
    assert ended.status == 0, ended.err
    return [path.read_bytes() for path in sorted(Path(f"log/page{suffix}/inpainted").iterdir())]


CASES = [
    {},
    {"samples": 3, "full_size": False},
    {"hole": "genhalf", "mask_grow": 2},
    {"method": "fast", "seed": None},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_downloads_repeat_a_result_byte_for_byte(worker, capsys, changes):
    job = do(worker, **changes)
    assert repeat(job, capsys) == [path.read_bytes() for path in job.results]
    assert len(job.results) == job.settings["samples"]
    assert {"picture.png", "mask.png", "repeat.yml"} <= {path.name for path in job.downloads()}
    assert job.calls == job.total > 0
    assert f"mask_grow: {changes.get('mask_grow', 0)}\n" in Path("repeat.yml").read_text()


def test_a_result_changes_only_where_it_is_painted_and_keeps_its_size(worker):
    job = do(worker)
    before, after = pixels(job.picture), pixels(job.results[0])
    changed = (before != after).any(axis=2)
    assert changed[4:9, 6:12].all()
    assert before.shape == after.shape
    assert not changed[9 + worker.conf.feather :].any()


@pytest.fixture
def built(monkeypatch):
    """Return a list that grows with each loading of the networks."""
    built, build = [], jobs.RePaint
    monkeypatch.setattr(jobs, "RePaint", lambda conf: built.append(1) or build(conf))
    return built


def test_networks_are_loaded_once_and_anew_where_the_checkpoint_is_another(worker, built):
    for changes in CASES:
        do(worker, **changes)
    first = do(worker).results[0].read_bytes()
    assert do(worker, seed=4).results[0].read_bytes() != first
    assert do(worker).results[0].read_bytes() == first
    assert built == [1]
    state = torch.load("model.pt", weights_only=True)
    torch.save({name: 1.5 * tensor for name, tensor in state.items()}, "model.pt")
    again = do(worker).results[0].read_bytes()
    assert first != again == do(Worker(worker.folder, "c.yml")).results[0].read_bytes()


@pytest.mark.parametrize("changes", [{"windows": True}, {"output_format": "same"}], ids=str)
def test_keys_for_whole_photos_do_not_spoil_squares(tmp_path, monkeypatch, built, changes):
    write_run(tmp_path, images=1, full_size=True, **changes)
    monkeypatch.chdir(tmp_path)
    worker = Worker(tmp_path, "c.yml")
    for full_size in (True, False, True):
        with Image.open(do(worker, full_size=full_size).results[0]) as result:
            assert (result.size == (20, 16)) == full_size
    assert built == [1]


def test_a_job_ends_at_the_next_call_and_leaves_no_files(worker, monkeypatch):
    see = Job.see

    def cancelling(job, call, x, pred_xstart):
        job.is_cancelled = call == 2
        see(job, call, x, pred_xstart)

    monkeypatch.setattr(Job, "see", cancelling)
    job = start(worker)
    with pytest.raises(CancelledError):
        job.work.result()
    assert job.calls == 1
    assert not job.folder.exists()
    monkeypatch.undo()
    monkeypatch.chdir(worker.folder)
    assert do(worker).results


def test_jobs_wait_for_one_another_in_their_order(worker):
    queue = [start(worker) for _ in range(4)]
    assert [worker.count_before(job) for job in queue] == [0, 1, 2, 3]
    queue[1].is_cancelled = True
    assert worker.count_before(queue[3]) == 2
    queue[2].work.result()
    assert queue[0].work.done()
    assert queue[1].calls == 0
    queue[3].work.result()
    assert worker.count_before(queue[3]) == 0


def test_the_next_step_keeps_its_history(worker, capsys):
    first = do(worker, samples=2, seed=5)
    job = do(worker, picture=first.results[1])
    first_names = {path.name for path in first.downloads()}
    assert first_names == {"result1.png", "result2.png", "picture.png", "mask.png", "repeat.yml"}
    names = [path.name for path in job.downloads()]
    assert set(names) - first_names == {"result-2.png", "mask-2.png", "repeat-2.yml"}
    assert set(names) > first_names
    assert names[0] == "result-2.png"
    assert repeat(job, capsys, "-2") == [job.results[0].read_bytes()]


def test_gray_of_sixteen_bits_keeps_its_levels_in_all_steps(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, images=1)
    write_tree(tmp_path, tiny_tree(in_channels=1, depth_max=4095.0))
    monkeypatch.chdir(tmp_path)
    conf = conf_from_dict(tiny_tree(in_channels=1), InpaintConf)
    state = {name: 0.1 * torch.randn_like(p) for name, p in create_model(conf).state_dict().items()}
    torch.save(state, "model.pt")
    levels = np.random.default_rng(0).integers(0, 4096, (16, 20), dtype=np.uint16)
    Image.fromarray(levels).save("deep.png")
    worker = Worker(tmp_path, "c.yml")
    first = do(worker, picture=Path("deep.png").resolve())
    assert first.predicted.shape[1] == 1
    job = do(worker, picture=first.results[0])
    scaled = np.rint(levels * (65535 / 4095))
    for path in (*first.results, *job.results):
        with Image.open(path) as image:
            assert image.mode in ("I;16", "I")
            assert np.array_equal(np.asarray(image)[13:], scaled[13:])
    assert repeat(job, capsys, "-2") == [job.results[0].read_bytes()]


def test_a_result_has_the_format_of_its_photo_and_names_no_folder(worker, capsys):
    worker = Worker(worker.folder, "c.yml", [f"model_path={Path('model.pt').resolve()}"])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 3, "Maker"  # upside down
    job = do(worker, picture=photo(worker.folder, "photo.jpg", exif=exif))
    with Image.open(job.folder / "result.jpg") as image:
        assert (image.getexif().get(0x0112, 1), image.getexif()[0x010F]) == (1, "Maker")
    assert job.notes == []  # that the mask of what is painted is not turned is no news
    assert repeat(job, capsys) == [job.results[0].read_bytes()]
    text = Path("repeat.yml").read_text()
    assert "model_path: model.pt\n" in text
    assert str(worker.folder) not in text
    assert str(ROOT) not in text


def test_a_format_that_is_not_written_is_told(worker):
    Image.open(photo(worker.folder)).save("photo.webp")
    page, say = app.Page(worker), app.speaker(SimpleNamespace(headers={}))
    request = (Path("photo.webp").resolve(), VALUES.values(), STROKES, (20, 16))
    *_, job = page.work(say, *request)
    assert re.fullmatch("Done in . s · seed 3 · The result is a PNG, not a WEBP", job.told)
    assert job.results[0].suffix == ".png"


MISTAKES = [
    ({"layer": None}, "nothing painted"),
    ({"layer": STROKES.replace("iVBOR", "AAAAA")}, "nothing painted"),
    ({"hole": "uploaded"}, "no mask"),
    ({"hole": "uploaded", "mask": "c.yml"}, "c.yml: not a picture"),
    ({"hole": "../etc/passwd"}, "hole: expected painted, uploaded, thin"),
    ({"method": ["fast"]}, "method: expected fast, repaint, found ['fast']"),
    ({"mask_hole": None}, "mask_hole: expected auto, black"),
    ({"mask_grow": 65}, "mask_grow: expected a whole number from 0 to 64, found 65"),
    ({"samples": True}, "samples: expected a whole number from 1 to 4, found True"),
    ({"seed": 1.7}, "seed: expected a whole number from 0 to 2147483647, found 1.7"),
    ({"seed": -1}, "seed: expected a whole number from 0"),
    ({"full_size": "no"}, "full_size: expected true or false, found 'no'"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_names_the_argument_what_was_expected_and_found(worker, changes, message):
    with pytest.raises(UserError) as caught:
        start(worker, **changes)
    assert message in str(caught.value)
    assert not list(worker.folder.glob("job-*"))


@pytest.mark.parametrize(
    ("ground", "part", "rule"),
    [
        ((9, 9, 9, 255), (0, 0, 0, 0), "alpha"),
        ((9, 9, 9, 255), (0, 0, 0, 0), "auto"),
        ((0, 0, 0, 0), (255, 0, 80, 255), "auto"),
        ((255, 255, 255, 255), (0, 0, 0, 255), "auto"),
        ((255, 255, 255, 255), (255, 0, 0, 255), "color"),
    ],
)
def test_the_hole_of_a_mask_file(worker, capsys, ground, part, rule):
    mask = Image.new("RGBA", (20, 16), ground)
    mask.paste(part, (6, 4, 12, 9))
    mask.save("layer.png")
    job = do(worker, hole="uploaded", mask="layer.png", mask_hole=rule)
    assert repeat(job, capsys) == [job.results[0].read_bytes()]
    known = pixels("log/page/gt_keep_mask/picture.png")[:, :, 0]
    assert (known == 0).sum() == 6 * 5
    assert not known[4:9, 6:12].any()


def test_a_mask_file_without_a_hole_gives_no_result(worker):
    Image.new("L", (20, 16), 255).save("white.png")
    with pytest.raises(UserError, match="nothing open"):
        do(worker, hole="uploaded", mask="white.png")


@pytest.mark.parametrize("key", ["model_path", "classifier_path", "device"])
def test_what_no_request_could_use_is_told_at_once(worker, key):
    with pytest.raises(UserError, match="absent"):
        Worker(worker.folder, "c.yml", [f"{key}=absent", "classifier_scale=1", "class_cond=true"])
