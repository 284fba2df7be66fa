"""data/faces: what the programs that made the demo's pictures say where they cannot go on."""

import importlib.util
import json
import shutil
import subprocess

import pytest
from run_cases import ROOT

from guided_diffusion.errors import UserError

FACES = ROOT / "data" / "faces"
STAND_INS = {
    "@dicebear/core": "export const createAvatar = () => '';",
    "@dicebear/toon-head": "",
    "@resvg/resvg-js": "export class Resvg { render() { return { asPng: () => 'png' }; } }",
}


def test_the_sheet_asks_for_a_run_of_the_demo(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("hero", FACES / "hero.py")
    hero = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hero)
    monkeypatch.setattr(hero, "ROOT", tmp_path)
    message = "log/demo/gt: first run: python test.py --conf_path confs/demo.yml; expected at least"
    with pytest.raises(UserError, match=message):
        hero.main()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def draw(tmp_path):
    """Run make.mjs in ``tmp_path``, beside packages that draw nothing."""
    node = shutil.which("node") or pytest.skip("node is not installed")
    shutil.copy(FACES / "make.mjs", tmp_path)
    for name, code in STAND_INS.items():
        package = tmp_path / "node_modules" / name
        package.mkdir(parents=True)
        described = {"name": name, "type": "module", "exports": "./index.js"}
        (package / "package.json").write_text(json.dumps(described))
        (package / "index.js").write_text(code)
    return lambda *options: subprocess.run(
        [node, "make.mjs", *options], cwd=tmp_path, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("option", "lowest"),
    [("--count=abc", 1), ("--count=0", 1), ("--count=", 1), ("--start=-1", 0), ("--size=6.4", 1)],
)
def test_what_is_no_number_is_one_line_and_makes_nothing(draw, tmp_path, option, lowest):
    ended = draw("--out", "faces", option)
    key, _, found = option.partition("=")
    expected = f'error: {key}: expected a whole number, at least {lowest}, found "{found}"\n'
    assert (ended.returncode, ended.stderr) == (2, expected)
    assert not (tmp_path / "faces").exists()


def test_faces_have_their_numbers_for_names(draw, tmp_path):
    assert draw("--out", "faces", "--start", "7", "--count", "2").returncode == 0
    assert sorted(path.name for path in (tmp_path / "faces").iterdir()) == [
        "0000007.png", "0000008.png",
    ]  # fmt: skip
