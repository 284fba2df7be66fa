"""``train.py --export``: weights in the form that the file's name asks for."""

import pytest
import torch
import yaml
from train_cases import tiny_conf, tiny_tree

import train
from guided_diffusion.errors import UserError
from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.io.files import write_checkpoint
from guided_diffusion.script_util import create_model
from guided_diffusion.training import checkpoints


def saved(conf):
    state = create_model(conf).state_dict()
    for kind in ("model", f"ema_{conf.ema_rates[0]}_", "opt"):
        write_checkpoint(checkpoints.checkpoint_path(conf, kind, 3), state)
    return state


@pytest.mark.parametrize("name", ["small.pt", "small.safetensors"])
def test_averages_are_exported_in_half_precision(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    conf = tiny_conf(tmp_path)
    state = saved(conf)
    assert name in checkpoints.export(conf, str(tmp_path / name))
    exported = load_state_dict(tmp_path / name)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key].half()) for key in state)
    model = create_model(conf)
    checkpoints.load_initial(model, str(tmp_path / name))


@pytest.mark.parametrize("kind", ["model", "ema_0.9999_", "opt"])
def test_a_file_of_the_training_is_not_exported_over(tmp_path, kind):
    conf = tiny_conf(tmp_path)
    saved(conf)
    path = checkpoints.checkpoint_path(conf, kind, 3)
    before = path.read_bytes()
    (tmp_path / "link.pt").symlink_to(path)
    for name in (path, tmp_path / "link.pt"):
        with pytest.raises(UserError, match=r"would overwrite .*000003\.pt"):
            checkpoints.export(conf, str(name))
    assert path.read_bytes() == before


def test_an_export_beside_the_checkpoints_may_be_repeated(tmp_path):
    conf = tiny_conf(tmp_path)
    saved(conf)
    for _ in range(2):
        checkpoints.export(conf, str(tmp_path / "out" / "small.pt"))


def test_of_several_processes_one_exports(tmp_path, monkeypatch, capsys):
    tree = tiny_tree(tmp_path)
    (tmp_path / "train.yml").write_text(yaml.safe_dump(tree))
    saved(tiny_conf(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    options = ["--conf_path", str(tmp_path / "train.yml"), "--export", str(tmp_path / "small.pt")]
    assert train.main(options) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "small.pt").exists()
