"""What the tests of test.py share: runs of a moment, in this process or in one of their own."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from guided_diffusion.cli import command_line
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import conf_from_dict
from guided_diffusion.script_util import create_model

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FOLDERS = ("inpainted", "gt", "gt_masked", "gt_keep_mask")

TINY = """
name: run
model_path: model.pt
image_size: 8
num_channels: 32
num_res_blocks: 1
channel_mult: '1'
attention_resolutions: ''
num_head_channels: 32
timestep_respacing: '4'
schedule_jump_params: {t_T: 4, jump_length: 2, jump_n_sample: 2}
seed: 5
overview: false
data: {eval: {tiny: {gt_path: gt, mask_path: mask}}}
"""
TINY_CALLS = 6


def load_program():
    """Import test.py, whose name the standard library has too."""
    spec = importlib.util.spec_from_file_location("inpainting_program", ROOT / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


program = load_program()


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def lines(self):
        """What is on stderr but for progress bars."""
        parts = self.err.replace("\r", "\n").replace("\x1b[A", "\n").split("\n")
        return [part.strip() for part in parts if part.strip() and "%|" not in part]


def run_here(capsys, *options):
    """Run test.py's main in this process, as its command line does."""
    capsys.readouterr()
    status = None
    try:
        command_line(lambda: program.main([str(option) for option in options]))
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr()
    return Outcome(status, told.out, told.err)


def command(*options, processes=1):
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*python, str(ROOT / "test.py"), *map(str, options)]


def run_apart(folder, *options, processes=1, **environment):
    """Run test.py in a process of its own, or in several by torchrun."""
    ended = subprocess.run(
        command(*options, processes=processes),
        cwd=folder, capture_output=True, text=True, timeout=300, env=ENVIRONMENT | environment,
    )  # fmt: skip
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def tiny_tree(**changes):
    """Return the YAML tree of a run of a moment; None takes a key away."""
    tree = {**yaml.safe_load(TINY), **changes}
    return {key: value for key, value in tree.items() if value is not None}


@functools.cache
def _tiny_state(in_channels=3):
    torch.manual_seed(0)
    model = create_model(conf_from_dict(tiny_tree(in_channels=in_channels), InpaintConf))
    return {name: torch.randn_like(p) * 0.1 for name, p in model.state_dict().items()}


def write_tree(folder, tree):
    (folder / "c.yml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")


def write_run(folder, images=3, *, data=None, **changes):
    """Write the files of a tiny run into ``folder`` and return the options that start it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(_tiny_state(changes.get("in_channels", 3)), folder / "model.pt")
    rng = np.random.default_rng(0)
    for name in ("gt", "mask"):
        (folder / name).mkdir()
        for number in range(images):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            if name == "mask":
                pixels[:] = 255
                pixels[:, 4:] = 0
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    tree = tiny_tree(**changes)
    tree["data"]["eval"]["tiny"].update(data or {})
    write_tree(folder, tree)
    return ["--conf_path", "c.yml"]


def write_golden(folder, case, **data):
    """Copy a golden case as a run called ``case``."""
    shutil.copytree(GOLDEN / case, folder, dirs_exist_ok=True)
    tree = yaml.safe_load((folder / "conf.yml").read_text())
    data = {"gt_path": "gt", "mask_path": "mask", **data}
    write_tree(folder, {**tree, "name": case, "data": {"eval": {"golden": data}}})
    return ["--conf_path", "c.yml"]


def load_yaml(path):
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def results(folder, kind="inpainted"):
    """Return the pictures of a folder of results by name."""
    return {path.name: pixels(path) for path in sorted((Path(folder) / kind).iterdir())}


def assert_same(first, second, levels=0):
    assert first.keys() == second.keys()
    for name in first:
        assert np.abs(first[name] - second[name]).max() <= levels, name


def snapshot(folder):
    """Return every path below ``folder`` with its time of change."""
    return {str(path): path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}
