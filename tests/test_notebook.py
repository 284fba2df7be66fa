"""The notebook says what is there, is stored without results, and runs from top to bottom."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import describe
from guided_diffusion.config.train_keys import TrainConf

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "Repaint.ipynb"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# What a run needs; downloads of gigabytes may lie beside the demo's files.
PARTS = (
    *("guided_diffusion", "confs", "test.py", "train.py", "requirements.txt", "Repaint.ipynb"),
    *("data/pretrained/demo64.pt", "data/datasets/gts/demo", "data/datasets/gt_keep_masks/demo"),
)


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_it_is_valid_and_stored_without_results(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.id


def test_headings_and_texts_are_in_both_languages(notebook):
    texts = sources(notebook, "markdown")
    headings = [line for text in texts for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 11
    for heading in headings:
        chinese, _, english = heading.partition(" · ")
        assert CHINESE.search(chinese) and english and not CHINESE.search(english), heading
    numbers = [int(n) for n in re.findall(r"^## (\d+)\. ", "\n".join(headings), re.M)]
    assert numbers == list(range(1, 11))
    for text in texts:
        paragraphs = [part for part in text.split("\n\n") if not part.startswith("#")]
        in_chinese = [bool(CHINESE.search(paragraph)) for paragraph in paragraphs]
        assert in_chinese == [True, False], text


def test_what_it_names_is_there(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    confs = set(re.findall(r"confs/\w+\.yml", text))
    programs = set(re.findall(r"\b[\w/]+\.(?:py|sh)\b", text))
    assert "confs/demo.yml" in confs and {"test.py", "train.py"} <= programs
    assert [name for name in sorted(confs | programs) if not (ROOT / name).exists()] == []


def test_keys_that_it_sets_are_keys(notebook):
    code = "\n".join(sources(notebook, "code"))
    known = {doc.key.replace("data.eval.<set>.", "data.") for doc in describe(InpaintConf)}
    settings = set(re.findall(r'"([\w.]+)=\w+"', code))
    assert "save_process" in settings and settings <= known
    [training] = [
        node.value
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "training"
    ]
    keys = {key.value for key in training.keys}
    assert "data_dir" in keys and keys <= {doc.key for doc in describe(TrainConf)}


def images_of(cell):
    kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
    kinds = [kind for kind in kinds if kind != "image/jpeg"]  # a Pillow image shows itself twice
    return sorted(kind for kind in kinds if kind.startswith("image/"))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    from ipykernel.kernelspec import write_kernel_spec
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    copy = tmp_path / "repaint"
    for part in map(Path, PARTS):
        (copy / part).parent.mkdir(parents=True, exist_ok=True)
        copied = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copied(ROOT / part, copy / part)
    # A kernel of this very interpreter, whatever the machine calls python3; its files stay here.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # with Agg there are no inline pictures
    write_kernel_spec(tmp_path / "kernels" / "python3")
    kernels = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    folder = {"metadata": {"path": str(copy)}}
    client = NotebookClient(notebook.copy(), timeout=900, km=manager, resources=folder)
    executed = client.execute()

    shown = {cell.id: images_of(cell) for cell in executed.cells if cell.cell_type == "code"}
    assert {name: kinds for name, kinds in shown.items() if kinds} == {
        "schedule-code": ["image/png"],
        "masks-code": ["image/png"],
        "inpaint-code": ["image/png"],
        "process-code": ["image/gif", "image/png"],
        "own-code": ["image/png"] * 3,
        "progress-code": ["image/png", "image/png"],
        "result-code": ["image/png"],
    }
    for place, count in {"log/notebook/inpainting": 12, "log/notebook/result": 4}.items():
        assert len(list((copy / place / "inpainted").glob("*.png"))) == count, place
    assert (copy / "runs/notebook/inpainted_000240.png").exists()
