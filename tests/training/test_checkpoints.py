"""A training's files: complete or not there, refused where they do not fit, ready for test.py."""

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
from guided_diffusion.training.batches import batches, load_images
from guided_diffusion.training.checkpoints import check, checkpoint_path, newest_step

CPU = torch.device("cpu")


def saved(conf, step=3):
    trainer = make_trainer(conf)
    trainer.step = step
    checkpoints.save(trainer, load_images(conf))
    return trainer


# ---- names ---------------------------------------------------------------------------------------


def test_files_have_the_names_that_users_of_guided_diffusion_know(tmp_path):
    saved(tiny_conf(tmp_path, ema_rate="0.9999,0.99"), step=1000)
    names = {path.name for path in (tmp_path / "out").glob("*.pt")}
    expected = {"model001000.pt", "ema_0.9999_001000.pt", "ema_0.99_001000.pt", "opt001000.pt"}
    assert names == expected


def test_the_newest_set_is_the_last_that_is_complete(tmp_path):
    conf = tiny_conf(tmp_path)
    assert newest_step(conf) is None
    for step in (9, 20, 1_000_000):
        saved(conf, step)
    assert newest_step(conf) == 1_000_000
    checkpoint_path(conf, "ema_0.9999_", 1_000_000).unlink()
    assert newest_step(conf) == 20
    checkpoint_path(conf, "opt", 20).unlink()
    assert newest_step(conf) == 9


def test_the_optimizers_file_comes_last(tmp_path, monkeypatch):
    written = []
    original = write_checkpoint
    monkeypatch.setattr(
        "guided_diffusion.training.checkpoints.write_checkpoint",
        lambda path, state: (written.append(Path(path).name[:3]), original(path, state)),
    )
    saved(tiny_conf(tmp_path))
    assert written == ["mod", "ema", "opt"]


def test_checkpoints_are_plain_state_dicts_of_memory_of_their_own(tmp_path):
    conf = tiny_conf(tmp_path)
    trainer = saved(conf)
    state = load_state_dict(checkpoint_path(conf, "ema_0.9999_", 3))
    assert list(state) == list(create_model(conf).state_dict())
    assert all(value.is_contiguous() for value in state.values())
    assert torch.equal(state["out.2.weight"], trainer.model.out[2].weight)


# ---- resuming ------------------------------------------------------------------------------------


def test_a_new_training_starts_at_nothing_with_and_without_resume(tmp_path):
    conf = tiny_conf(tmp_path)
    assert check(conf, CPU, resume=False) == 0
    assert check(conf, CPU, resume=True) == 0


def test_a_folder_that_holds_a_training_is_not_written_over(tmp_path):
    conf = tiny_conf(tmp_path)
    saved(conf)
    with pytest.raises(UserError, match="already holds a training, of 3 steps; add --resume"):
        check(conf, CPU, resume=False)
    assert check(conf, CPU, resume=True) == 3


def test_other_settings_are_refused_by_name(tmp_path):
    saved(tiny_conf(tmp_path))
    conf = tiny_conf(tmp_path, lr=0.5, batch_size=2, channel_mult="1,1")
    message = r"channel_mult and batch_size and lr: .*expected '1', 4, 0.001, found '1,1', 2, 0.5"
    with pytest.raises(UserError, match=message):
        check(conf, CPU, resume=True)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("rates", ["0.5", "0.99,0.5"])
def test_another_average_does_not_hide_a_training(tmp_path, rates, resume):
    saved(tiny_conf(tmp_path))
    message = "ema_rate: cannot be resumed" if resume else "already holds a training"
    with pytest.raises(UserError, match=message):
        check(tiny_conf(tmp_path, ema_rate=rates), CPU, resume=resume)


def test_a_training_without_its_weights_is_not_written_over(tmp_path):
    conf = tiny_conf(tmp_path)
    saved(conf)
    checkpoint_path(conf, "model", 3).unlink()
    with pytest.raises(UserError, match="files of every checkpoint are missing"):
        check(conf, CPU, resume=True)


def test_how_far_how_fast_and_how_visibly_may_change(tmp_path):
    saved(tiny_conf(tmp_path))
    changes = {"iterations": 99, "microbatch": 2, "log_interval": 7, "compile": True, "name": "b"}
    changes |= {"sample_count": 5, "init_from": "x.pt", "use_checkpoint": True, "cache_gb": 1}
    assert check(tiny_conf(tmp_path, **changes), CPU, resume=True) == 3


def test_every_free_key_is_a_key():
    assert set(checkpoints.FREE_KEYS) <= {f.name for f in TrainConf.__dataclass_fields__.values()}


def test_other_pictures_are_refused_and_moved_ones_are_not(tmp_path):
    saved(tiny_conf(tmp_path))
    moved = (tmp_path / "pictures").rename(tmp_path / "moved")
    conf = tiny_conf(tmp_path, data_dir=str(moved))
    assert check(conf, CPU, resume=True) == 3
    next(iter(moved.glob("*.png"))).unlink()
    with pytest.raises(UserError, match=r"data_dir: .*expected '12 pictures .*found '11 pictures"):
        check(conf, CPU, resume=True)


@pytest.mark.parametrize("content", [b"", b"PK damaged"])
def test_a_damaged_optimizer_is_one_line(tmp_path, content):
    conf = tiny_conf(tmp_path)
    saved(conf)
    checkpoint_path(conf, "opt", 3).write_bytes(content)
    with pytest.raises(UserError, match=r"opt000003.pt: is damaged and cannot be resumed"):
        check(conf, CPU, resume=True)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("mmap", [True, False])
def test_nothing_in_an_optimizer_is_executed(tmp_path, monkeypatch, mmap):
    monkeypatch.chdir(tmp_path)
    kinds = ("step", "settings", "optimizer", "sampler")
    torch.save({**dict.fromkeys(kinds, 0), "extra": Evil()}, "opt.pt")
    with pytest.raises(UserError, match=r"opt\.pt: is damaged and cannot be resumed"):
        checkpoints.load_opt(Path("opt.pt"), mmap=mmap)
    assert not Path("executed").exists()


def test_an_optimizer_that_the_system_refuses_is_told_as_that(tmp_path):
    with pytest.raises(UserError, match=r"opt\.pt: cannot be read: No such file or directory"):
        checkpoints.load_opt(tmp_path / "opt.pt")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        checkpoints.load_opt(tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr
)
def test_an_optimizer_for_which_memory_is_short_is_not_called_damaged(tmp_path, monkeypatch, error):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)) as caught:
        checkpoints.load_opt(tmp_path / "opt.pt")
    assert caught.value is error


@pytest.mark.parametrize(
    "state", [{"state": {}}, dict.fromkeys(("step", "settings", "optimizer", "sampler"), 3)]
)
def test_somebody_elses_optimizer_is_one_line(tmp_path, state):
    conf = tiny_conf(tmp_path)
    saved(conf)
    torch.save(state, checkpoint_path(conf, "opt", 3))
    with pytest.raises(UserError, match="is not an optimizer's file of this program"):
        check(conf, CPU, resume=True)


def test_what_a_killed_training_left_is_removed_and_nothing_else(tmp_path):
    conf = tiny_conf(tmp_path)
    (tmp_path / "out").mkdir()
    mine, other = (tmp_path / "out" / name for name in (".0123456789abcdef.tmp", ".notes.tmp"))
    for path in (mine, other):
        path.touch()
        os.utime(path, (0, 0))  # of long ago, not of a process that may be alive
    check(conf, CPU, resume=True)
    assert not mine.exists()
    assert other.exists()


@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "{}/../pictures", "{}//"])
def test_the_spelling_of_the_folder_is_not_the_folder(tmp_path, spelling):
    conf = tiny_conf(tmp_path)
    saved(conf)
    assert (
        check(tiny_conf(tmp_path, data_dir=spelling.format(conf.data_dir)), CPU, resume=True) == 3
    )


def test_missing_and_new_pictures_are_named(tmp_path):
    saved(tiny_conf(tmp_path))
    for number in range(7):
        path = tmp_path / "pictures" / f"{number:02d}.png"
        path.rename(path.with_name(f"new-{number}.png") if number == 6 else tmp_path / path.name)
    message = r"missing: 00\.png, 01\.png, 02\.png, 03\.png, 04\.png and 2 more; new: new-6\.png\)"
    with pytest.raises(UserError, match=message):
        check(tiny_conf(tmp_path), CPU, resume=True)


def test_a_training_of_before_pictures_had_names_is_resumed(tmp_path):
    conf = tiny_conf(tmp_path)
    saved(conf)
    path = checkpoint_path(conf, "opt", 3)
    state = torch.load(path)
    del state["pictures"]
    torch.save(state, path)
    assert check(conf, CPU, resume=True) == 3
    (tmp_path / "pictures" / "00.png").unlink()
    with pytest.raises(UserError, match=r"settings; put .*expected '12 pictures .*found '11"):
        check(conf, CPU, resume=True)


@pytest.mark.parametrize("kind", ["model", "ema_0.9999_", "opt"])
@pytest.mark.parametrize("changes", [{"num_channels": 64}, {"channel_mult": "1,1"}], ids=str)
def test_files_of_another_network_are_refused(tmp_path, kind, changes):
    conf = tiny_conf(tmp_path)
    other = tiny_conf(tmp_path, out_dir=str(tmp_path / "other"), **changes)
    for one in (conf, other):
        trainer, images = make_trainer(one), load_images(one)
        for batch in batches(images, one, range(3)):
            trainer.train_step(*batch)
        checkpoints.save(trainer, images)
    model = create_model(conf)
    checkpoints.check_set(conf, model, 3)
    checkpoint_path(other, kind, 3).replace(checkpoint_path(conf, kind, 3))
    with pytest.raises(UserError, match=rf"{kind}000003\.pt: (does not fit|is not the optimizer)"):
        checkpoints.check_set(conf, model, 3)


def test_an_optimizer_of_another_step_is_refused(tmp_path):
    conf = tiny_conf(tmp_path)
    saved(conf, 3)
    saved(conf, 6)
    checkpoint_path(conf, "opt", 3).replace(checkpoint_path(conf, "opt", 6))
    with pytest.raises(UserError, match="is not the optimizer's file of step 6"):
        checkpoints.check_set(conf, create_model(conf), 6)


# ---- checks --------------------------------------------------------------------------------------


def test_batches_have_to_divide(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"batch_size and microbatch: 4 pictures .* parts of 3"):
        check(tiny_conf(tmp_path, microbatch=3), CPU, resume=False)
    check(tiny_conf(tmp_path, microbatch=5), CPU, resume=False)  # more than there are: all of them
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"batch_size: .*among 3 processes; found 4"):
        check(tiny_conf(tmp_path), CPU, resume=False)


def test_a_precision_for_gpus_is_told_on_a_cpu(tmp_path):
    with pytest.warns(UserWarning, match="precision: tf32 is for GPUs"):
        check(tiny_conf(tmp_path, precision="tf32"), CPU, resume=False)


def test_a_full_disk_is_found_before_it_is_full(tmp_path, monkeypatch):
    conf = tiny_conf(tmp_path)
    trainer = make_trainer(conf)
    images = load_images(conf)
    trainer.train_step(*next(batches(images, conf, range(1))))
    trainer.step = 3
    checkpoints.save(trainer, images)
    parameters = sum(p.numel() for p in trainer.parameters)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.pt"))
    Usage = collections.namedtuple("Usage", "total used free")

    def leave(free):
        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, free))

    leave(size - 1)
    with pytest.raises(UserError, match=r"too full for the next checkpoint; .* of step 3"):
        checkpoints.check_disk(conf, parameters)
    leave(size + 2**20)
    checkpoints.check_disk(conf, parameters)


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 250),
        ({"diffusion_steps": 100}, 100),
        ({"timestep_respacing": "20"}, 20),
        ({"timestep_respacing": "20,30"}, 50),
        ({"learn_sigma": False, "noise_schedule": "cosine", "predict_xstart": True}, 250),
        ({"predict_v": True, "norm_groups": 8}, 250),
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
    kept = ("noise_schedule", "predict_xstart", "predict_v", "learn_sigma", "diffusion_steps")
    for key in (*kept, "norm_groups", "name"):
        assert getattr(test, key) == getattr(conf, key)


def test_the_yaml_names_the_classes(tmp_path):
    folder = tmp_path / "classes"
    for name in ("cats", "dogs\nand: wolves"):
        write_pictures(folder / name, 1)
    saved(tiny_conf(tmp_path, data_dir=str(folder), class_cond=True, num_classes=2, holdout=0))
    text = (tmp_path / "out" / "test.yml").read_text()
    assert "# cond_y: 0 is cats\n# cond_y: 1 is dogs and: wolves\n" in text
    assert load_conf(tmp_path / "out" / "test.yml", InpaintConf).num_classes == 2


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_class_names_may_be_any_bytes(tmp_path):
    folder = tmp_path / "classes"
    names = [b"caf\xe9", b"bell\x07\x1b[31m", "line\u2028\x85".encode(), b"tab\t"]
    for name in names:
        write_pictures(folder / os.fsdecode(name), 1)
    conf = tiny_conf(tmp_path, data_dir=str(folder), class_cond=True, num_classes=4, holdout=0)
    saved(conf)
    assert check(conf, CPU, resume=True) == 3
    text = (tmp_path / "out" / "test.yml").read_text(encoding="utf-8")
    assert "is caf\\udce9\n" in text
    assert "is bell\\x07\\x1b[31m\n" in text
    assert load_conf(tmp_path / "out" / "test.yml", InpaintConf).num_classes == 4


def test_export_halves_the_newest_average(tmp_path):
    conf = tiny_conf(tmp_path, ema_rate="0.9,0.99")
    saved(conf, 3)
    trainer = make_trainer(conf)
    trainer.step = 6
    trainer.emas[0.9][0] += 1
    checkpoints.save(trainer, load_images(conf))
    said = checkpoints.export(conf, str(tmp_path / "small.pt"))
    state = load_state_dict(tmp_path / "small.pt")
    assert "ema_0.9_000006.pt" in said
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert torch.allclose(state[trainer.names[0]].float(), trainer.emas[0.9][0], atol=1e-3)


def test_there_has_to_be_something_to_export(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint to export"):
        checkpoints.export(tiny_conf(tmp_path), str(tmp_path / "small.pt"))


def test_an_export_needs_a_name(tmp_path):
    with pytest.raises(UserError, match="--export: the path is empty"):
        checkpoints.export(tiny_conf(tmp_path), "")


def test_weights_to_start_from_have_to_fit(tmp_path):
    small, large = tiny_conf(tmp_path), tiny_conf(tmp_path, channel_mult="2")
    torch.save(create_model(small).state_dict(), tmp_path / "small.pt")
    model = create_model(small)
    checkpoints.load_initial(model, str(tmp_path / "small.pt"))
    expected = torch.load(tmp_path / "small.pt")
    assert torch.equal(model.time_embed[0].weight, expected["time_embed.0.weight"])
    with pytest.raises(UserError, match=r"small.pt: init_from: does not fit the network: .*size"):
        checkpoints.load_initial(create_model(large), str(tmp_path / "small.pt"))


def test_half_precision_is_a_start_too(tmp_path):
    conf = tiny_conf(tmp_path)
    state = {name: value.half() for name, value in create_model(conf).state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    model = create_model(conf)
    checkpoints.load_initial(model, str(tmp_path / "half.pt"))
    assert model.time_embed[0].weight.dtype == torch.float32
    assert torch.equal(model.time_embed[0].weight, state["time_embed.0.weight"].float())


def test_a_training_starts_from_guided_diffusions_layout_alone(tmp_path):
    torch.save({"time_embedding.linear_1.weight": torch.ones(1)}, tmp_path / "unet.pt")
    for path, found in ((tmp_path, "a folder"), (tmp_path / "unet.pt", "a diffusers network")):
        expected = f"init_from: expected a checkpoint in guided-diffusion's layout, .*{found}"
        with pytest.raises(UserError, match=expected):
            checkpoints.load_initial(create_model(tiny_conf(tmp_path)), str(path))


def test_test_py_reads_pictures_as_the_training_did(tmp_path):
    conf = tiny_conf(tmp_path, depth_min=-100.0, depth_max=4095.0, all_formats=True)
    saved(conf)
    tested = load_conf(tmp_path / "out" / "test.yml", InpaintConf)
    assert (tested.depth, tested.all_formats) == ((-100.0, 4095.0), True)
