"""The tool that says what a network is: its output is YAML that runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import conf_from_dict
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import (
    create_classifier,
    create_model,
    load_classifier,
    load_model,
)
from guided_diffusion.tools.inspect_model import main

TOOLS = Path(__file__).parents[2] / "guided_diffusion" / "tools"
CPU = torch.device("cpu")
DATA = {"name": "x", "data": {"eval": {"x": {"gt_path": "a", "mask_path": "b"}}}}
SMALL = {
    "image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2,2",
    "attention_resolutions": "16", "num_head_channels": 32,
}  # fmt: skip


def conf(**keys):
    return conf_from_dict({"model_path": "m.pt", **keys, **DATA}, InpaintConf)


def expanded(network):
    """A state_dict whose file is small: every tensor repeats one number."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}


def output(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    text = capsys.readouterr().out
    assert all(len(line) < 600 for line in text.splitlines())
    return text, yaml.safe_load(text)


@pytest.mark.parametrize(
    "keys",
    [
        SMALL,
        {**SMALL, "class_cond": True, "num_classes": 7, "learn_sigma": False},
        {**SMALL, "resblock_updown": False, "num_heads": 4, "num_head_channels": -1},
        {**SMALL, "use_scale_shift_norm": False, "attention_resolutions": "", "in_channels": 1},
        {**SMALL, "channel_mult": "1,2,2,2", "attention_resolutions": "32,16,8"},
    ],
    ids=str,
)
def test_what_it_says_loads_the_checkpoint(tmp_path, capsys, keys):
    path = tmp_path / "m.pt"
    with torch.device("meta"):
        network = create_model(conf(**keys))
    torch.save({"model": {}, "ema": expanded(network), "step": 3}, path)
    text, tree = output(capsys, path)
    assert f"# {path}: a network of" in text
    assert "takes ema" in text
    assert "improved-diffusion" in text or keys.get("resblock_updown", True)
    if keys["attention_resolutions"]:
        assert tree["image_size"] == keys["image_size"]
        assert conf(**tree).attention_resolutions == conf(**keys).attention_resolutions
    with pytest.warns(UserWarning, match="takes ema"):
        load_model(conf(**tree), CPU)


@pytest.mark.parametrize("name", ["m #3.pt", "a: b.pt", "it's.pt", "12", "模型.pt"])
def test_paths_are_written_as_yaml(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    torch.save(expanded(create_model(conf(**SMALL))), name)
    assert output(capsys, name)[1]["model_path"] == name


def test_a_stated_size_moves_the_sides_with_attention(tmp_path, capsys):
    torch.save(expanded(create_model(conf(**SMALL))), tmp_path / "m.pt")
    text, tree = output(capsys, tmp_path / "m.pt", "--image_size", 128)
    assert (tree["image_size"], tree["attention_resolutions"]) == (128, "32")
    assert "shapes cannot tell image_size" not in text
    assert "shapes cannot tell num_head_channels" in text


def test_a_published_checkpoint_gets_the_keys_that_shapes_do_not_tell(tmp_path, capsys):
    keys = {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "class_cond": True}
    with torch.device("meta"):
        network = create_model(conf(**keys))
    torch.save(expanded(network), tmp_path / "m.pt")
    _, tree = output(capsys, tmp_path / "m.pt")
    assert (tree["noise_schedule"], tree["use_new_attention_order"]) == ("cosine", True)


def test_a_classifier(tmp_path, capsys):
    path = tmp_path / "c.pt"
    keys = {"image_size": 64, "classifier_width": 64, "classifier_pool": "spatial"}
    torch.save(expanded(create_classifier(conf(**keys))), path)
    text, tree = output(capsys, path)
    assert "a classifier" in text
    load_classifier(conf(**tree), CPU)


def test_a_folder(tmp_path, capsys):
    cases = pytest.importorskip("diffusers_cases", reason="needs requirements-diffusers.txt")
    cases.save(tmp_path, cases.tiny_unet(num_class_embeds=3))
    text, tree = output(capsys, tmp_path)
    assert "UNet2DModel" in text
    assert "num_classes: 3" in text
    assert "20 steps" in text
    assert load_model(conf(**tree), CPU)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    text, tree = output(capsys, tmp_path)
    assert "warning: the files do not tell noise_schedule, predict_v, diffusion_steps" in text
    assert tree["diffusion_steps"] == 1000


def test_a_network_of_denoising_diffusion_pytorch(tmp_path, capsys):
    cases = pytest.importorskip("lucidrains_cases", reason="needs requirements-lucidrains.txt")
    path = tmp_path / "m.pt"
    torch.save(cases.trainer_file(cases.tiny())[0], path)
    text, tree = output(capsys, path, "--image_size", "8")
    assert "denoising-diffusion-pytorch 2.1.1" in text
    assert "predict_v: true" in text
    assert "warning" not in text
    with pytest.warns(UserWarning, match="averaged"):
        load_model(conf(**tree), CPU)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"temb.dense.0.weight": torch.ones(1)}, "DDPM's PyTorch port"),
        ({"input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}, "in_channels: .*python.md .*found 4"),
        ({"some.weight": torch.ones(1)}, "found tensors named some.weight"),
        ({"x" * 10_000: torch.ones(1)}, "not a whole network"),
    ],
)
def test_what_is_none_is_told_in_one_line(tmp_path, state, words):
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(UserError, match=words) as caught:
        main([str(tmp_path / "m.pt")])
    assert len(str(caught.value)) < 600


PROGRAMS = [path.name for path in TOOLS.glob("*.py") if "__main__" in path.read_text("utf-8")]


@pytest.mark.parametrize("tool", sorted(PROGRAMS))
def test_every_program_of_the_folder_starts(tool, tmp_path):
    """A program's folder is on Python's path: no file there may hide a module of Python's own."""
    command = [sys.executable, str(TOOLS / tool), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
