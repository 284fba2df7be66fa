"""Memory: what was copied from a file leaves, freed memory is kept for the next call."""

import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from guided_diffusion.accel import layout, memory


def test_freed_memory_is_kept():
    """Once warm, a call asks the system for no pages; without glibc nothing breaks either."""
    resource = pytest.importorskip("resource")
    memory.keep_freed_memory()
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")

    def faults():
        large = torch.ones(64 * 2**20 // 4)  # 64 MB: 16,384 pages
        del large
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    for _ in range(20):  # glibc sets the first seven leftovers of an alignment aside, in its tcache
        before = faults()
    assert faults() - before < 1000


def test_without_glibc_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory.keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_weights_laid_out_leave_no_copy_in_memory(tmp_path):
    """A mapped checkpoint's pages go as its weights are copied; the file is as it was."""
    torch.save({"weight": torch.randn(1024, 1024, 3, 3)}, tmp_path / "model.pt")  # 38 MB
    weight = torch.load(tmp_path / "model.pt", mmap=True, weights_only=True)["weight"]
    with torch.device("meta"):
        conv = nn.Conv2d(1024, 1024, 3)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    layout._lay_out_weights(conv)

    def resident():
        address, text = weight.data_ptr(), Path("/proc/self/smaps").read_text()
        for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
            start, end = (int(edge, 16) for edge in entry.split()[0].split("-"))
            if start <= address < end:
                return int(re.search(r"Rss: +(\d+)", entry)[1])  # kB
        raise AssertionError("the weight is in no mapping")

    assert resident() < 100
    assert torch.equal(weight, conv.weight)  # read from the file again
    assert resident() > 30_000


def test_addresses_of_other_devices_are_not_those_of_this_process(monkeypatch):
    """A GPU's pointer may be a number that is mapped here, too."""
    monkeypatch.setattr(memory, "file_mappings", lambda: pytest.fail("looked"))
    memory.forget_pages(torch.empty(2**20, device="meta"))
    memory.forget_pages(torch.empty(2))  # nor is it worth a look
