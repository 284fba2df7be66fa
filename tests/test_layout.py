"""The layout that CONTRIBUTING.md draws: imports point downward, in no circle; few see YAML."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "guided_diffusion"
FLOORS = (  # from the top; a name is a module or a room
    {"tools"},
    {"run"},
    {"training", "script_util"},
    {"accel", "models", "image_datasets", "config"},
    {"unet", "dist_util", "io", "cli"},
    {"samplers", "gaussian_diffusion", "scheduler", "respace", "nn", "masks", "errors"},
)
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
SEES_CONFIGURATIONS = {"config", "script_util", "run", "training", "tools"}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def floor(module):
    return FLOOR[module.split(".")[0]]


def imports_of(module):
    """Modules of ours that ``module`` imports, also from inside functions."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.removeprefix("guided_diffusion.") for name in names} & set(MODULES)
    return found


def test_every_module_has_its_floor():
    assert {module.split(".")[0] for module in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_up(module):
    assert {other for other in imports_of(module) if floor(other) < floor(module)} == set()


def test_no_circles():
    left = {module: imports_of(module) for module in MODULES}
    while leaves := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in leaves}
    assert left == {}


def test_few_see_configurations():
    seeing = {module for module in MODULES if "config.keys" in imports_of(module)}
    assert {module.split(".")[0] for module in seeing} <= SEES_CONFIGURATIONS


def test_accel_has_one_door():
    """What is fast is checked there; another way in would go unchecked."""
    outside = {module for module in MODULES if not module.startswith("accel.")}
    used = {other for module in outside for other in imports_of(module)}
    assert {other for other in used if other.startswith("accel.")} == {"accel.accelerate"}


def test_contributing_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [name for name in FLOOR if f"`{name}" not in text] == []
