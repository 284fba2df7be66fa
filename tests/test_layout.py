"""The layout that CONTRIBUTING.md draws: imports point downward, and only some see YAML."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "guided_diffusion"
FLOORS = [
    {"inpaint_util", "train_util"},
    {"inpaint_plan", "train_files", "train_report"},
    {"script_util"},
    {"image_datasets", "image_writer", "fast", "fused"},
    {"gpu_kernels"},
    {"unet"},
    {
        "gaussian_diffusion",
        "masks",
        "dist_util",
        "resample",
        "respace",
        "scheduler",
        "nn",
        "conf",
        "kernels",
        "triton_kernels",
    },
    {"schema"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
SEES_YAML = {"script_util", "inpaint_plan", "inpaint_util", "train_files", "train_report"}


def imports_of(name):
    """Modules of ours that ``name`` imports when it is imported."""
    found = set()
    for node in ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "guided_diffusion":
            found |= {alias.name for alias in node.names if alias.name in FLOOR}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("guided_diffusion."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_its_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_point_downward(name):
    assert {other for other in imports_of(name) if FLOOR[other] <= FLOOR[name]} == set()


def test_few_see_configurations():
    seeing = {name for name in FLOOR if imports_of(name) & {"conf", "schema"}} - {"conf"}
    assert seeing - SEES_YAML <= {"train_util"}


def test_contributing_names_every_module():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [name for name in FLOOR if f"`{name}`" not in text] == []
