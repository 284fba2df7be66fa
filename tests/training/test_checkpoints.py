"""A training's files: complete or absent, refused where they do not fit, ready for test.py."""

import collections
import os
import warnings
from pathlib import Path

import pytest
import torch
from train_cases import make_trainer, tiny_conf, write_pictures

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import pair_images
from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.io.files import write_checkpoint
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model,
    create_schedule,
    load_model,
)
from guided_diffusion.training import checkpoints
from guided_diffusion.training.checkpoints import check, checkpoint_path, export, newest_step
from guided_diffusion.training.pictures import TrainingImages

CPU = torch.device("cpu")


def saved(conf, step=3):
    trainer = make_trainer(conf)
    trainer.step = step
    checkpoints.save(trainer, TrainingImages(conf))
    return trainer


def average(conf, step=3):
    return checkpoint_path(conf, f"ema_{conf.ema_rates[0]}_", step)


def test_files_have_the_names_that_users_of_guided_diffusion_know(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        checkpoints,
        "write_checkpoint",
        lambda path, state: (written.append(Path(path).name), write_checkpoint(path, state)),
    )
    conf = tiny_conf(tmp_path, ema_rate="0.9999,0.99")
    trainer = saved(conf, step=1000)
    expected = ["model001000.pt", "ema_0.9999_001000.pt", "ema_0.99_001000.pt", "opt001000.pt"]
    assert written == expected  # the optimizer's file last
    assert {path.name for path in (tmp_path / "out").glob("*.pt")} == set(expected)
    state = load_state_dict(average(conf, 1000))
    assert list(state) == list(create_model(conf).state_dict())
    assert all(value.is_contiguous() for value in state.values())
    assert torch.equal(state["out.2.weight"], trainer.model.out[2].weight)


def test_the_newest_set_is_the_last_that_is_complete(conf):
    assert newest_step(conf) is None
    for step in (9, 20, 1_000_000):
        saved(conf, step)
    assert newest_step(conf) == 1_000_000
    average(conf, 1_000_000).unlink()
    assert newest_step(conf) == 20
    checkpoint_path(conf, "opt", 20).unlink()
    assert newest_step(conf) == 9


def test_a_training_goes_on_where_its_files_are_whole(conf):
    assert check(conf, CPU, resume=False) == check(conf, CPU, resume=True) == 0
    saved(conf)
    assert check(conf, CPU, resume=True) == 3
    checkpoint_path(conf, "model", 3).unlink()
    with pytest.raises(UserError, match="files of every checkpoint are missing"):
        check(conf, CPU, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5, "batch_size": 2}, r"batch_size and lr: .*expected 4, 0\.001, found 2, 0\.5"),
        ({"ema_rate": "0.5"}, "ema_rate: cannot be"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, conf, changes, message):
    saved(conf)
    for resume, problem in ((True, message), (False, "already holds a training, of 3 steps; add")):
        with pytest.raises(UserError, match=problem):
            check(tiny_conf(tmp_path, **changes), CPU, resume=resume)


def test_how_far_how_fast_and_how_visibly_may_change(tmp_path):
    saved(tiny_conf(tmp_path))
    changes = {"iterations": 99, "microbatch": 2, "log_interval": 7, "compile": True, "name": "b"}
    changes |= {"sample_count": 5, "init_from": "x.pt", "use_checkpoint": True, "cache_gb": 1}
    assert check(tiny_conf(tmp_path, **changes), CPU, resume=True) == 3
    assert set(checkpoints.FREE_KEYS) <= TrainConf.__dataclass_fields__.keys()


def test_missing_and_new_pictures_are_named_and_moved_ones_are_taken(tmp_path):
    saved(tiny_conf(tmp_path))
    folder = (tmp_path / "pictures").rename(tmp_path / "moved")
    for spelling in (folder, f"{folder}/", f"{folder}/../moved//"):
        assert check(tiny_conf(tmp_path, data_dir=str(spelling)), CPU, resume=True) == 3
    for number in range(7):
        path = folder / f"{number:02d}.png"
        path.rename(path.with_name(f"new-{number}.png") if number == 6 else tmp_path / path.name)
    message = (
        r"data_dir: .*missing: 00\.png, 01\.png, 02\.png, 03\.png, 04\.png, and 2 more; "
        r"new: new-6\.png\).*expected '12 pictures .*found '6 pictures"
    )
    with pytest.raises(UserError, match=message):
        check(tiny_conf(tmp_path, data_dir=str(folder)), CPU, resume=True)


def test_what_a_killed_training_left_is_removed_and_nothing_else(tmp_path, conf):
    (tmp_path / "out").mkdir()
    leftover, other = (tmp_path / "out" / n for n in (".0123456789abcdef.tmp", ".notes.tmp"))
    for path in (leftover, other):
        path.touch()
        os.utime(path, (0, 0))  # old: no living process writes it
    check(conf, CPU, resume=True)
    assert not leftover.exists()
    assert other.exists()


def test_a_damaged_or_somebody_elses_optimizer_is_one_line(conf):
    saved(conf)
    path = checkpoint_path(conf, "opt", 3)
    for other in ({**torch.load(path), "step": 6}, {"state": {}}):
        torch.save(other, path)
        with pytest.raises(UserError, match="is not an optimizer's file of step 3"):
            check(conf, CPU, resume=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"opt000003\.pt: is damaged.*from an earlier checkpoint"):
        check(conf, CPU, resume=True)


@pytest.mark.parametrize("kind", ["model", "ema_0.9999_", "opt"])
def test_files_of_another_network_are_refused(tmp_path, conf, kind):
    other = tiny_conf(tmp_path, out_dir=str(tmp_path / "other"), num_channels=64)
    saved(conf)
    saved(other)
    trainer = make_trainer(conf)
    checkpoints.load(trainer, 3)
    checkpoint_path(other, kind, 3).replace(checkpoint_path(conf, kind, 3))
    with pytest.raises(UserError, match=rf"{kind}000003\.pt: .*(time_embed|num_channels)"):
        check(conf, CPU, resume=True)
        checkpoints.load(trainer, 3)


def test_batches_have_to_divide_and_a_precision_for_gpus_is_told(tmp_path, conf, monkeypatch):
    with pytest.warns(UserWarning, match="precision: tf32 is for GPUs"):
        check(tiny_conf(tmp_path, precision="tf32"), CPU, resume=False)
    with pytest.raises(UserError, match=r"batch_size and microbatch: 4 pictures .* parts of 3"):
        check(tiny_conf(tmp_path, microbatch=3), CPU, resume=False)
    check(tiny_conf(tmp_path, microbatch=5), CPU, resume=False)  # more than there are: all of them
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"batch_size: .*among 3 processes; found 4"):
        check(conf, CPU, resume=False)


def test_a_full_disk_is_found_before_it_is_full(tmp_path, conf, monkeypatch):
    trainer = saved(conf)
    trainer.train_step(torch.zeros(4, 3, 8, 8), None)  # Adam's numbers are written from now on
    checkpoints.save(trainer, TrainingImages(conf))
    parameters = sum(p.numel() for p in trainer.parameters)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*000004.pt"))
    Usage = collections.namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, size - 1))
    with pytest.raises(UserError, match="too full for the next checkpoint"):
        checkpoints.check_disk(conf, parameters)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, size + 2**20))
    checkpoints.check_disk(conf, parameters)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"depth_min": -100.0, "depth_max": 4095.0, "all_formats": True}, 250),
        ({"diffusion_steps": 100}, 100),
        ({"timestep_respacing": "20,30"}, 50),
        ({"learn_sigma": False, "noise_schedule": "cosine", "norm_groups": 8}, 250),
    ],
)
def test_the_yaml_beside_the_checkpoint_runs_at_once(tmp_path, changes, steps):
    conf = tiny_conf(tmp_path, **changes)
    trainer = saved(conf)
    test = load_conf(tmp_path / "out" / "test.yml", InpaintConf)
    diffusion = create_gaussian_diffusion(test)
    assert diffusion.num_timesteps == steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert create_schedule(test, diffusion)[0] == steps - 1
        model = load_model(test, CPU)
    assert set(diffusion.timestep_map) <= set(trainer.diffusion.timestep_map)
    assert torch.equal(model.out[2].weight, trainer.model.out[2].weight)
    assert len(pair_images(test.data.gt_path, test.data.mask_path, max_len=test.data.max_len)) == 8
    for key in ("noise_schedule", "learn_sigma", "diffusion_steps", "name", *changes):
        if key != "timestep_respacing":
            assert getattr(test, key) == getattr(conf, key)


def test_the_yaml_names_the_classes_whatever_bytes_their_names_have(tmp_path):
    names = {b"cats": "cats", b"dogs\nand: wolves": "dogs and: wolves"}
    if os.name == "posix":
        names |= {b"caf\xe9": "caf\\udce9", b"bell\x07\x1b[31m": "bell\\x07\\x1b[31m"}
        names["line\u2028\x85".encode()] = "line"
    for name in names:
        write_pictures(tmp_path / "classes" / os.fsdecode(name), 1)
    changes = {"data_dir": str(tmp_path / "classes"), "num_classes": len(names)}
    conf = tiny_conf(tmp_path, holdout=0, class_cond=True, **changes)
    saved(conf)
    assert check(conf, CPU, resume=True) == 3
    text = (tmp_path / "out" / "test.yml").read_text(encoding="utf-8")
    assert all(f" is {name}\n" in text for name in names.values())
    assert load_conf(tmp_path / "out" / "test.yml", InpaintConf).num_classes == len(names)


@pytest.mark.parametrize("name", ["small.pt", "small.safetensors"])
def test_the_newest_first_average_is_exported_in_half_precision(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    conf = tiny_conf(tmp_path, ema_rate="0.9,0.99")
    saved(conf, 3)
    trainer = make_trainer(conf)
    trainer.step = 6
    trainer.emas[0.9].out[2].bias += 1
    checkpoints.save(trainer, TrainingImages(conf))
    for _ in range(2):  # it may be repeated
        assert "ema_0.9_000006.pt" in export(conf, str(tmp_path / name))
    exported, state = load_state_dict(tmp_path / name), load_state_dict(average(conf, 6))
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key].half()) for key in state)
    model = create_model(conf)
    checkpoints.load_into(model, tmp_path / name)
    assert model.time_embed[0].weight.dtype == torch.float32
    assert torch.equal(model.time_embed[0].weight, exported["time_embed.0.weight"].float())


def test_weights_beyond_half_precision_are_exported_as_they_are(tmp_path, conf):
    saved(conf)
    state = torch.load(average(conf))
    state["out.2.bias"] += 70_000
    torch.save(state, average(conf))
    assert "out.2.bias" in export(conf, str(tmp_path / "small.pt"))
    exported = torch.load(tmp_path / "small.pt")
    assert torch.equal(exported.pop("out.2.bias"), state["out.2.bias"])
    assert {value.dtype for value in exported.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["out/model000003.pt", "pictures/00.png"])
def test_only_an_earlier_export_is_replaced(tmp_path, conf, name):
    saved(conf)
    path = tmp_path / name
    before = path.read_bytes()
    (tmp_path / "link.pt").symlink_to(path)
    for target in (path, tmp_path / "link.pt", os.devnull, tmp_path):
        with pytest.raises(UserError, match="exists, and is not an earlier export"):
            export(conf, str(target))
    assert path.read_bytes() == before


def test_an_export_needs_a_name_and_a_checkpoint(conf):
    for name, problem in (("x.pt", "no complete checkpoint to export"), ("", "path is empty")):
        with pytest.raises(UserError, match=problem):
            export(conf, name)


def test_weights_to_start_from_have_to_fit(tmp_path):
    small, large = tiny_conf(tmp_path), tiny_conf(tmp_path, channel_mult="2")
    path = tmp_path / "small.pt"
    torch.save(create_model(small).state_dict(), path)
    with pytest.raises(UserError, match=r"small.pt: init_from: does not fit the network: .*size"):
        checkpoints.load_into(create_model(large), path, key="init_from")
    torch.save({"temb.dense.0.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"small.pt: init_from: .*layout, found a network of DDPM"):
        checkpoints.load_into(create_model(large), path, key="init_from")
