"""Planning, records, resuming, and batches that fail or do not fit."""

import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_cases import FOLDERS, TINY_CALLS, assert_same, load_yaml, results, snapshot, write_run

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.schema import conf_to_dict, describe
from guided_diffusion.dist_util import Team
from guided_diffusion.image_datasets import Pair
from guided_diffusion.io import files
from guided_diffusion.run import inpaint, plan
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.run.record import result_mark
from guided_diffusion.run.task import Picture, make_job

LOG = "log/run"


def set_(**changes):
    return [f"--set={key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]


# ---- seeds ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result_at_any_batch_size(here, tmp_path, calls):
    options = write_run(tmp_path, 5)
    for size in (1, 2, 3):
        here(*options, "--out", f"b{size}", *set_(data__batch_size=size))
    assert calls[5:] == [[5, 6], [7, 8], [9], [5, 6, 7], [8, 9]]
    assert_same(results("b1"), results("b2"), levels=1)
    assert_same(results("b1"), results("b3"), levels=1)
    first = results("b1")
    assert (first["00.png"] != first["01.png"]).any()


def test_without_a_seed_one_is_drawn_told_recorded_and_taken_up_by_resume(here, tmp_path):
    options = write_run(tmp_path, 2, seed=None)
    ended = here(*options)
    record = load_yaml(f"{LOG}/run.yml")
    assert f"seed {record['seed']}\n" in ended.out
    first = results(LOG)
    (tmp_path / LOG / "inpainted" / "01.png").unlink()
    ended = here(*options, "--resume")
    assert "1 image, 1 finished earlier" in ended.out
    assert_same(results(LOG), first)
    here(*options)
    assert load_yaml(f"{LOG}/run.yml")["seed"] != record["seed"]


# ---- the record ----------------------------------------------------------------------------------


def test_a_run_is_repeated_from_its_record_alone(here, tmp_path):
    options = write_run(tmp_path, 2, name="run", paste_known=True)
    here(*options, "--mask", "thick", *set_(seed=77, samples_per_image=2, image_size=8))
    first = results(LOG)
    record = (tmp_path / LOG / "run.yml").read_text()
    (tmp_path / "c.yml").unlink()
    ended = here("--conf_path", f"{LOG}/run.yml")
    assert (ended.status, ended.lines) == (0, [])
    assert_same(results(LOG), first)
    old, new = yaml.safe_load(record), load_yaml(f"{LOG}/run.yml")
    for tree in (old, new):
        del tree["record"]["seconds_an_image"]
    assert old == new
    assert record.startswith(f"# python test.py --conf_path {LOG}/run.yml repeats this run.\n")


def test_what_the_record_says(here, tmp_path):
    here(*write_run(tmp_path, 2), *set_(data__batch_size=2))
    tree = load_yaml(f"{LOG}/run.yml")
    record = tree.pop("record")
    conf = load_conf(f"{LOG}/run.yml", InpaintConf)
    assert conf_to_dict(conf) == tree
    documented = {doc.key.split(".")[0] for doc in describe(InpaintConf)}
    optional = {"cond_y", "classifier_path", "device", "precision"}
    assert documented - tree.keys() == optional
    assert record["state"] == "finished"
    assert record["device_type"] == "cpu"
    assert record["steps"] == TINY_CALLS
    assert record["versions"]["torch"] == torch.__version__
    assert record["seconds_an_image"] > 0
    assert record["made"] == 2
    assert record["failures"] == {}
    assert record["seeds"] == {"00.png": 5, "01.png": 6}
    assert record["precision"] == "float32, torch's default"


def test_a_failure_of_torch_keeps_its_traceback_beside_the_record(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 1, use_fp16=True)

    def steps(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Inpainter, "steps", steps)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        here(*options)
    record = load_yaml(f"{LOG}/run.yml")["record"]
    assert record["state"] == "started"
    assert record["precision"] == "float32"  # that was computed in


def test_resuming_a_finished_run_keeps_what_was_measured(here, tmp_path, calls):
    options = write_run(tmp_path, 2, overview=True)
    ended = here(*options, "--resume")  # with nothing there it simply runs
    assert (ended.status, ended.lines) == (0, [])
    before = load_yaml(f"{LOG}/run.yml")["record"]
    (tmp_path / LOG / "overview.png").unlink()
    files = snapshot("log/run/inpainted")
    ended = here(*options, "--resume")
    assert ended.out.splitlines()[-1] == "log/run: 0 images, 2 finished earlier"
    assert len(calls) == 2
    assert snapshot("log/run/inpainted") == files
    assert (tmp_path / LOG / "overview.png").exists()  # a kill may have come just before it
    assert load_yaml(f"{LOG}/run.yml")["record"] == before


# ---- resuming ------------------------------------------------------------------------------------


def test_resume_makes_again_what_is_not_whole(here, tmp_path, calls):
    options = write_run(tmp_path, 8)
    here(*options)
    first = {kind: results(LOG, kind) for kind in FOLDERS}
    calls.clear()
    for number, kind in enumerate(FOLDERS):
        Path(LOG, kind, f"{number:02d}.png").unlink()
    cut, foreign, empty = (Path(LOG, "inpainted", f"{number:02d}.png") for number in (4, 5, 6))
    cut.write_bytes(cut.read_bytes()[:-60])
    shutil.copy("gt/05.png", foreign)
    empty.write_bytes(b"")
    assert "7 images, 1 finished earlier" in here(*options, "--resume").out
    assert calls == [[5 + number] for number in range(7)]
    for kind, pictures in first.items():
        assert_same(results(LOG, kind), pictures)


def test_resume_goes_on_under_settings_that_results_do_not_depend_on(here, tmp_path, calls):
    options = write_run(tmp_path, 4)
    here(*options, *set_(data__max_len=2))
    calls.clear()
    data = {"max_len": 4, "batch_size": 3, "deterministic": False, "drop_last": False}
    others = {"overview": True, "compile": False, "save_process": 2, "show_progress": False}
    changes = {f"data__{key}": value for key, value in data.items()} | others
    ended = here(*options, *set_(**changes, device="cpu", dropout=0.5), "--resume")
    assert (ended.status, ended.lines) == (0, [])
    assert "2 images, 2 finished earlier" in ended.out
    assert sorted(seed for batch in calls for seed in batch) == [7, 8]


def test_resume_goes_on_with_more_samples_and_an_equal_checkpoint_elsewhere(here, tmp_path, calls):
    options = write_run(tmp_path, 1, samples_per_image=2)
    here(*options)
    calls.clear()
    shutil.move("model.pt", "moved.pt")
    ended = here(*options, *set_(samples_per_image=4, model_path="moved.pt"), "--resume")
    assert ended.status == 0
    assert len(calls) == 2
    assert len(results(LOG)) == 4


def test_resume_refuses_other_settings_by_their_keys(here, tmp_path):
    options = write_run(tmp_path, 1)
    here(*options)
    files, state = snapshot("log"), torch.load("model.pt", weights_only=True)
    state["out.2.bias"] += 1e-3
    torch.save(state, "other.pt")
    changes = {
        "data.mask_path": "thick", "data.random_flip": True, "invert_mask": True,
        "model_path": "other.pt", "paste_known": True, "precision": "bfloat16",
        "schedule_jump_params.t_T": 3, "seed": 6, "timestep_respacing": "5", "use_ddim": True,
    }  # fmt: skip
    ended = here(*options, *set_(**changes), "--resume")
    assert ended.status == 2
    [line] = [line for line in ended.lines if not line.startswith("warning: ")]
    assert line.startswith(f"error: {LOG}/run.yml: {' and '.join(changes)}: the results there were")
    assert snapshot("log") == files
    assert here(*options, *set_(**changes)).status == 0  # without --resume they are overwritten


def test_results_of_other_settings_beside_a_new_record_are_made_again(here, tmp_path, calls):
    """A run without --resume that ended early leaves old results under its own record."""
    options = write_run(tmp_path, 2)
    here(*options, *set_(use_ddim=True))
    here(*options, *set_(data__max_len=1))
    calls.clear()
    assert here(*options, "--resume").status == 0
    assert calls == [[6]]


def test_a_picture_or_mask_that_changed_is_made_again(here, tmp_path, calls):
    options = write_run(tmp_path)
    here(*options)
    calls.clear()
    Image.new("RGB", (8, 8), (9, 9, 9)).save("gt/01.png")
    Image.new("RGB", (8, 8), (0, 0, 0)).save("mask/02.png")
    assert here(*options, "--resume").status == 0
    assert calls == [[6], [7]]
    # A new first picture moves the others in the list, and with their places their seeds.
    shutil.copy("gt/00.png", "gt/-000.png")
    shutil.copy("mask/00.png", "mask/-000.png")
    here(*options, "--resume")
    assert calls[2:] == [[5], [6], [7], [8]]


def test_resume_refuses_a_record_that_is_none(here, tmp_path):
    options = write_run(tmp_path, 1)
    (tmp_path / LOG).mkdir(parents=True)
    own = (tmp_path / "c.yml").read_text() + "record: {device_type: cpu, checkpoints: [1]}"
    others = ("", "a: [", "name: other", "[1]", "record: 3\n", "- !!python/name:os.system", own)
    for content in others:
        (tmp_path / LOG / "run.yml").write_text(content)
        ended = here(*options, "--resume")
        assert ended.status == 2
        [line] = ended.lines
        assert line.startswith(f"error: {LOG}/run.yml: is not the record of a run")
    (tmp_path / LOG / "run.yml").write_text(own.replace("[1]", "{model_path: 5}"))
    assert "model_path: the results there were made with oth" in here(*options, "--resume").err
    assert here(*options).status == 0


def test_a_configuration_in_the_place_of_the_record_stays(here, tmp_path):
    options = write_run(tmp_path, 1)
    Path("mine").mkdir()
    before = Path(options[1]).rename("mine/run.yml").read_bytes()
    ended = here("--conf_path", "mine/run.yml", "--out", "mine")
    assert ended.status == 2
    [line] = ended.lines
    assert line.startswith("error: mine/run.yml: ") and "overwrite this configuration" in line
    assert Path("mine/run.yml").read_bytes() == before


# ---- memory --------------------------------------------------------------------------------------


NO_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def limit_memory(monkeypatch, most):
    """Let batches of more than ``most`` images run out of memory in the third step."""
    steps = Inpainter.steps

    def limited(self, gt, mask, seeds, *rest):
        for number, step in enumerate(steps(self, gt, mask, seeds, *rest)):
            if number == 2 and len(seeds) > most:
                raise NO_MEMORY
            yield step

    monkeypatch.setattr(Inpainter, "steps", limited)


@pytest.mark.parametrize(("most", "fitted"), [(1, 1), (2, 1), (3, 3)])
def test_a_batch_that_does_not_fit_is_halved_with_the_same_result(
    here, tmp_path, monkeypatch, most, fitted
):
    options = write_run(tmp_path, 7)
    here(*options)
    first = results(LOG)
    limit_memory(monkeypatch, most)
    ended = here(*options, *set_(data__batch_size=7))
    assert ended.status == 0
    assert ended.lines == [
        f"warning: batch_size: 7 images at once do not fit into memory, {fitted} do"
    ]
    assert_same(results(LOG), first, levels=1)


def test_windows_that_do_not_fit_are_halved_with_the_same_result(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 1, full_size=True, windows=True, data={"mask_path": "genhalf"})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)).save(
        "gt/00.png"
    )
    assert here(*options).status == 0
    first, sizes, steps = results(LOG), [], Inpainter.steps

    def limited(self, gt, mask, seeds, windows_at_once):
        sizes.append(windows_at_once)
        if windows_at_once > 2:
            raise MemoryError
        return steps(self, gt, mask, seeds, windows_at_once)

    monkeypatch.setattr(Inpainter, "steps", limited)
    ended = here(*options, *set_(data__batch_size=8))
    assert (ended.status, sizes) == (0, [8, 4, 2])
    assert ended.lines == ["warning: batch_size: 8 images at once do not fit into memory, 2 do"]
    assert_same(results(LOG), first, levels=1)


def test_one_image_that_does_not_fit_ends_the_run_in_one_line(here, tmp_path, monkeypatch):
    options = write_run(tmp_path)
    limit_memory(monkeypatch, 0)
    ended = here(*options, *set_(data__batch_size=2))
    assert ended.status == 2
    [line] = ended.lines
    assert line.startswith("error: batch_size: one image alone does not fit into memory; 0 of 3")
    assert "--resume" in line


def test_a_mistyped_folder_is_told_before_the_network_is_read(here, tmp_path, monkeypatch):
    options = write_run(tmp_path)
    monkeypatch.setattr(plan, "check_network", lambda _: pytest.fail("reads the network"))
    ended = here(*options, "--gt", "gtt")
    assert ended.status == 2
    assert "gtt" in ended.lines[0]


def test_a_network_that_does_not_fit_is_told_in_one_line(here, tmp_path, monkeypatch):
    options = write_run(tmp_path)

    def init(*_):
        raise NO_MEMORY

    monkeypatch.setattr(Inpainter, "__init__", init)
    ended = here(*options)
    assert (ended.status, len(ended.lines)) == (2, 1)
    assert "model.pt: device: the network does not fit" in ended.lines[0]
    assert not (tmp_path / "log").exists()


# ---- not finite ----------------------------------------------------------------------------------


def spoil(monkeypatch, wanted, value=float("nan")):
    """Put ``value`` into what the network returns where ``wanted(model, call, image)``."""
    steps = Inpainter.steps

    def spoiling(self, gt, mask, seeds, *rest):
        network, call = self.network, [0]

        def spoiled(x, timesteps, y=None):
            out = network(x, timesteps, *([] if y is None else [y]))
            call[0] += 1
            for place, seed in enumerate(seeds):
                if wanted(self.model, call[0], seed - 5):
                    out[place, 0, 0, 7] = value
            return out

        self.network = spoiled
        try:
            yield from steps(self, gt, mask, seeds, *rest)
        finally:
            self.network = network

    monkeypatch.setattr(Inpainter, "steps", spoiling)


@pytest.mark.parametrize(
    ("batch_size", "value"), [(1, math.nan), (2, math.inf), (4, -math.inf), (4, math.nan)]
)
def test_in_float32_the_image_and_the_step_are_named_and_the_others_go_on(
    here, tmp_path, monkeypatch, batch_size, value
):
    options = write_run(tmp_path, 4, clip_denoised=False)
    here(*options)
    first = results(LOG)
    shutil.rmtree(LOG)
    spoil(monkeypatch, lambda model, call, image: image == 1 and call == 3, value)
    ended = here(*options, *set_(data__batch_size=batch_size))
    assert ended.status == 1
    problem = "no finite number after network call 3, at time t = 1"
    assert ended.lines == [f"failed: 01.png: {problem}"]
    assert "3 images, 1 failed (01.png), which --resume tries again" in ended.out
    assert_same(results(LOG), {k: v for k, v in first.items() if k != "01.png"}, levels=1)
    record = load_yaml(f"{LOG}/run.yml")["record"]
    assert record["failures"] == {"01.png": problem}
    assert record["state"] == "failed"
    monkeypatch.undo()
    os.chdir(tmp_path)
    ended = here(*options, "--resume")
    assert ended.status == 0
    assert "1 image, 3 finished earlier" in ended.out
    assert_same(results(LOG), first, levels=1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_in_reduced_precision_what_is_lost_is_made_again_in_float32(
    here, tmp_path, monkeypatch, batch_size
):
    options = write_run(tmp_path, 4)
    here(*options, "--out", "exact")
    bfloat16 = set_(precision="bfloat16")
    here(*options, "--out", "reduced", *bfloat16)
    exact, reduced = results("exact"), results("reduced")
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    spoil(monkeypatch, lambda model, call, image: model.dtype != torch.float32 and image == 1)
    ended = here(*options, *bfloat16, *set_(data__batch_size=batch_size))
    assert ended.status == 0
    assert ended.lines == ["warning: no finite number in reduced precision, in float32: 01.png"]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == flags
    found = results(LOG)
    assert_same({"01.png": found.pop("01.png")}, {"01.png": exact["01.png"]}, levels=1)
    # The others stay what they are in reduced precision, whatever shares their batch.
    del reduced["01.png"]
    worst = max(np.abs(found[name] - reduced[name]).max() for name in reduced)
    assert worst <= 8
    assert (exact["00.png"] != reduced["00.png"]).any()
    assert load_yaml(f"{LOG}/run.yml")["record"]["again_in_float32"] == ["01.png"]


def test_what_float32_does_not_mend_fails(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 2, precision="bfloat16")
    spoil(monkeypatch, lambda model, call, image: image == 0)
    ended = here(*options)
    assert ended.status == 1
    assert ended.lines == [
        "warning: no finite number in reduced precision, in float32: 00.png",
        "failed: 00.png: no finite number after network call 1, at time t = 3",
    ]
    assert list(results(LOG)) == ["01.png"]


def test_a_batch_that_is_lost_as_a_whole_is_not_walked_to_the_end(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 2, schedule_jump_params={"t_T": 4, "n_sample": 60})
    calls = []
    spoil(monkeypatch, lambda model, call, image: calls.append(call) or call > 5)
    ended = here(*options, *set_(data__batch_size=2))
    assert ended.status == 1
    assert max(calls) == 64
    assert "network call 6, at" in ended.lines[0]


def test_looking_for_lost_images_reads_nothing_back_in_a_step(here, tmp_path, monkeypatch):
    options = write_run(tmp_path, 1, compile=False)  # the CPU's kernels look at each output
    assert here(*options).status == 0  # the checkpoint is looked at once a file
    reads, counts = [], []
    for name in ("__bool__", "__float__", "__int__", "item", "tolist", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def noting(*tensor, method=method, **names):
            reads.append(method)
            return method(*tensor, **names)

        monkeypatch.setattr(torch.Tensor, name, noting)
    for repetitions in (1, 10):
        reads.clear()
        walk = set_(schedule_jump_params={"t_T": 4, "n_sample": repetitions})
        assert here(*options, *walk).status == 0
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


# ---- pieces --------------------------------------------------------------------------------------


def test_a_second_run_into_any_of_the_same_folders_is_refused(here, tmp_path):
    options = write_run(tmp_path, 1)
    for folder in (LOG, f"{LOG}/inpainted"):
        with files.locked(folder):
            ended = here(*options)
        assert ended.status == 2
        assert f"{folder}: another run is at work there" in ended.err
    assert here(*options).status == 0


def test_leftovers_of_kills_go_from_every_folder(here, tmp_path):
    options = write_run(tmp_path, 1)
    folders = [Path(LOG), Path(LOG, "process"), Path(LOG, "inpainted")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".0123456789abcdef.tmp").touch()
    assert here(*options).status == 0
    assert [path for folder in folders for path in folder.glob(".*")] == []


def test_a_mark_follows_picture_and_mask():
    job, black = make_job(5, Pair(0, "a", "b", "00.png"), "", 0), np.zeros((8, 8, 3), np.uint8)
    pictures = [Picture(black, black), Picture(black + 1, black), Picture(black, black + 1)]
    assert len({result_mark({}, job, picture) for picture in pictures}) == 3


def test_planning_is_shuffled_by_the_seed_and_not_by_chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, 9, data={"deterministic": False})
    conf = load_conf("c.yml", InpaintConf)
    plans = []
    for number in range(2):
        random.seed(number)
        np.random.seed(number)
        plans.append(plan.plan_run(conf, Team()))
    names = [[job.name for job in plan.jobs] for plan in plans]
    assert names[0] == names[1]
    assert names[0] != sorted(names[0])
    assert all(job.seed == 5 + int(job.name[:2]) for job in plans[0].jobs)


def test_a_worker_counts_results_that_somebody_removed(here, tmp_path, monkeypatch):
    options = write_run(tmp_path)
    write = inpaint.write_result

    def write_and_remove(folders, name, *rest, **names):
        write(folders, name, *rest, **names)
        if name == "01.png":
            shutil.rmtree(LOG)  # with 00.png in it

    monkeypatch.setattr(inpaint, "write_result", write_and_remove)
    ended = here(*options)
    assert ended.status == 1
    removed = "was written, but its file has been removed"
    assert ended.lines == [f"failed: {name}: {removed}" for name in ("00.png", "01.png")]


@pytest.mark.parametrize(("own", "replaced"), [
    ({}, f"repaint with {TINY_CALLS}"),
    ({"sampler": "ddnm", "use_ddim": True}, "the YAML's way"),
])  # fmt: skip
def test_fast_is_ddnm_in_25_calls_and_says_so(here, tmp_path, own, replaced):
    options = write_run(tmp_path, 1, seed=3, **own)
    ended = here(*options, "--fast")
    assert ended.status == 0, ended.err
    line = f"--fast: ddnm with 25 network calls a picture in place of {replaced}; docs/quality.md"
    assert line in ended.out
    conf = load_conf(tmp_path / "log" / "run" / "run.yml")
    assert (conf.sampler, conf.use_ddim) == ("ddnm", False)
    assert (conf.ddnm_eta, conf.ddnm_overshoot) == (0.85, 1)
    assert (conf.timestep_respacing, conf.schedule_jump_params.t_T) == ("25", 25)
    assert conf.schedule_jump_params.jump_n_sample == 1
    ended = here(*options, "--fast", "--set", "sampler=repaint")
    assert "--fast: repaint with 25 network calls a picture" in ended.out
