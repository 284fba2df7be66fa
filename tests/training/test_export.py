"""``train.py --export``: weights in the form that the file's name asks for."""

import pytest
import torch
from train_cases import tiny_conf

from guided_diffusion.io.checkpoints import load_state_dict
from guided_diffusion.io.files import write_checkpoint
from guided_diffusion.script_util import create_model
from guided_diffusion.training import files


@pytest.mark.parametrize("name", ["small.pt", "small.safetensors"])
def test_averages_are_exported_in_half_precision(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    conf = tiny_conf(tmp_path)
    state = create_model(conf).state_dict()
    for kind in ("model", f"ema_{conf.ema_rates[0]}_", "opt"):
        write_checkpoint(files.checkpoint_path(conf, kind, 3), state)
    assert name in files.export(conf, str(tmp_path / name))
    exported = load_state_dict(tmp_path / name)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key].half()) for key in state)
    model = create_model(conf)
    files.load_initial(model, str(tmp_path / name))
