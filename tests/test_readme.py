"""What the READMEs promise is what the program has."""

import re
from pathlib import Path

import pytest

from guided_diffusion.config.docs import configuration_page

ROOT = Path(__file__).parent.parent
READMES = sorted(ROOT.glob("README*.md"))


@pytest.fixture(params=READMES, ids=lambda path: path.name)
def readme(request):
    return request.param.read_text(encoding="utf-8")


def test_the_page_of_keys_is_current():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run python guided_diffusion/config/docs.py"


def test_relative_links_lead_somewhere(readme):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", readme)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_linked_functions_exist(readme):
    stages = re.findall(r"\[((?:`[\w.]+`(?:, )?)+)[^\]]*\]\((guided_diffusion/\w+\.py)\)", readme)
    assert len(stages) >= 6
    for names, path in stages:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            owner, _, function = name.rpartition(".")
            assert re.search(rf"^ *def {function}\(", source, re.M), name
            assert not owner or re.search(rf"^class {owner}\b", source, re.M), name


def test_every_configuration_that_is_named_is_there(readme):
    named = set(re.findall(r"confs/(\w+)\.yml", readme))
    assert {"demo", "face_example"} <= named
    assert {name for name in named if not (ROOT / f"confs/{name}.yml").exists()} <= {"x", "train_x"}


@pytest.mark.parametrize("marker", ["demo", "tests"])
def test_both_commands_are_marked_for_ci(readme, marker):
    block = re.search(rf"^<!-- {marker} -->\n```bash\n(.+)\n```$", readme, re.M)
    assert block and "pip install -r requirements" in block[1]


def test_the_languages_have_the_same_parts():
    if len(READMES) < 2:
        pytest.skip("only one README so far")
    shapes = []
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        shapes.append(
            (
                len(re.findall(r"^## ", text, re.M)),
                re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S),
                len(re.findall(r"^\|", text, re.M)),
                re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text),
            )
        )
    assert shapes[0] == shapes[1]


def test_the_size_of_the_method_is_stated(readme):
    stages = ("gaussian_diffusion", "samplers", "scheduler", "respace", "unet", "nn", "masks")
    sources = [ROOT / "guided_diffusion" / f"{stage}.py" for stage in stages]
    lines = sum(len(source.read_text(encoding="utf-8").splitlines()) for source in sources)
    [stated] = re.findall(r"(?:method is |方法本身是七个文件中的 )([\d,]+)", readme)
    assert abs(int(stated.replace(",", "")) - lines) <= 20
