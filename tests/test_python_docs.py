"""Every block of docs/python.md runs, in order, as a reader would run them."""

import re
import shutil

import torch
from run_cases import ROOT

TEXT = (ROOT / "docs/python.md").read_text(encoding="utf-8")


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "confs", tmp_path / "confs")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.S):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert (tmp_path / "result.png").exists()
    printed = capsys.readouterr()
    assert "(80, 96, 3) True" in printed.out
    assert printed.err == ""
    scan, result, x = names["scan"], names["result"], names["x"]
    known = names["keep_mask"][0, 0].numpy() == 1
    assert (result == scan)[known].all()
    assert x.isfinite().all()
    assert [len(each) for each in names["results"]] == [2 // len(names["painters"])] * len(
        names["painters"]
    )
