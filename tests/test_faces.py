"""data/faces: the programs that make the demo's pictures, beside packages that draw stripes."""

import importlib.util
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import quality_baselines
from run_cases import ROOT

from guided_diffusion.errors import UserError

FACES = ROOT / "data" / "faces"
SIDE = 4
# A face is four stripes: background, skin, hair and clothes, in colours that its seed chooses.
STAND_INS = {
    "@dicebear/core": """
        const names = ["backgroundColor", "skinColor", "hairColor", "clothesColor"];
        export const createAvatar = (style, options) => {
          const seed = Number(options.seed ?? 0);
          const colors = names.map((name) => options[name][seed % options[name].length]);
          const [primaryBackgroundColor, ...others] = colors.map((color) => `#${color}`);
          const extra = { primaryBackgroundColor, eyes: "open" };
          names.slice(1).forEach((name, i) => (extra[name] = others[i]));
          return { toString: () => colors.join(" "), toJson: () => ({ extra }) };
        };""",
    "@dicebear/toon-head": """
        const names = ["clothes", "eyebrows", "eyes", "hair", "mouth", "beard", "rearHair"];
        const one = (name) => [name, { items: { enum: ["open"] } }];
        export const schema = { properties: Object.fromEntries(names.map(one)) };""",
    "@resvg/resvg-js": """
        export class Resvg {
          constructor(colors) { this.colors = colors; }
          render() {
            const row = (c) => Array(4).fill([...Buffer.from(c, "hex"), 255]).flat();
            return { asPng: () => "png", pixels: Buffer.from(this.colors.split(" ").flatMap(row)) };
          }
        }""",
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
def faces(tmp_path):
    """Return a folder of the programs, beside the stand-ins."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    for name in ("style.mjs", "make.mjs", "posterior.mjs"):
        shutil.copy(FACES / name, tmp_path)
    for name, code in STAND_INS.items():
        package = tmp_path / "node_modules" / name
        package.mkdir(parents=True)
        described = {"name": name, "type": "module", "exports": "./index.js"}
        (package / "package.json").write_text(json.dumps(described))
        (package / "index.js").write_text(code)
    return tmp_path


@pytest.fixture
def draw(faces):
    """Run make.mjs."""
    return lambda *options: subprocess.run(
        ["node", "make.mjs", *options], cwd=faces, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--count=abc", 'expected a whole number, at least 1, found "abc"'),
        ("--count=0", 'expected a whole number, at least 1, found "0"'),
        ("--start=-1", 'expected a whole number, at least 0, found "-1"'),
        ("--sizes=64", ""),
    ],
)
def test_a_wrong_option_is_one_line_and_makes_nothing(draw, tmp_path, option, words):
    ended = draw("--out", "faces", option)
    assert ended.returncode == 2
    assert re.fullmatch(rf"error: .*{option.partition('=')[0]}.*{words}.*\n", ended.stderr)
    assert not (tmp_path / "faces").exists()


def test_faces_have_their_numbers_for_names(draw, tmp_path):
    assert draw("--out", "faces", "--start", "7", "--count", "2").returncode == 0
    assert sorted(path.name for path in (tmp_path / "faces").iterdir()) == [
        "0000007.png", "0000008.png",
    ]  # fmt: skip


def stripes(seed):
    """Return the face of a seed, uint8 (4, 4, 3), by the colours in style.mjs."""
    text = (FACES / "style.mjs").read_text()
    names = ("backgroundColor", "skinColor", "hairColor", "clothesColor")
    parts = [text.split(f"{name}:")[1].split("Color:")[0] for name in names]
    colors = [re.findall(r'"([0-9a-f]{6})"', part) for part in parts]
    rows = [list(bytes.fromhex(values[seed % len(values)])) for values in colors]
    return np.repeat(np.array(rows, np.uint8)[:, None], SIDE, axis=1)


@pytest.fixture
def posterior(faces, monkeypatch):
    monkeypatch.setattr(quality_baselines, "FACES", faces)
    posterior = quality_baselines.Posterior()
    yield posterior
    posterior._program.communicate()


def test_behind_a_hole_is_any_face_with_the_same_known_pixels(posterior):
    seeds = range(1_000_000, 1_000_060)
    gt = np.stack([stripes(seed) for seed in seeds])
    holes = np.zeros((len(gt), SIDE, SIDE), bool)
    holes[:, 3] = True  # all of the clothes
    holes[:, 1, 1:] = True  # of the skin a pixel is known
    names = [f"{seed}.png" for seed in seeds]
    results = posterior(names, gt, holes)
    assert np.array_equal(results[:, :3], gt[:, :3])
    clothes, counts = np.unique(results[:, 3, 0], axis=0, return_counts=True)
    assert len(clothes) == 8
    assert counts.max() < 20
    assert (results[:, 3] == gt[:, 3]).all(axis=(1, 2)).mean() < 0.5
    assert np.array_equal(results, posterior(names, gt, holes))


def test_what_is_no_drawn_face_is_told(posterior):
    gt, holes = stripes(5)[None], np.ones((1, SIDE, SIDE), bool)
    holes[0, 0] = False
    with pytest.raises(UserError, match=r"^7\.png: is not the face that make\.mjs draws from 7$"):
        posterior(["7.png"], gt, holes)
    with pytest.raises(
        UserError, match=r"^anna\.png: is not a face .* expected its seed as its name"
    ):
        posterior(["anna.png"], gt, holes)
