"""Memory: what was copied from a file leaves, freed memory is kept for the next call."""

import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from network_cases import randomised
from torch import nn

from guided_diffusion.accel import accelerate, fused_unet, layout, memory
from guided_diffusion.unet import TrunkConfig, UNetModel

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")


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


def resident(tensor):
    """How many kB of the mapping that holds a tensor are in memory."""
    address, text = tensor.data_ptr(), Path("/proc/self/smaps").read_text()
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        start, end = (int(edge, 16) for edge in entry.split()[0].split("-"))
        if start <= address < end:
            return int(re.search(r"Rss: +(\d+)", entry)[1])
    raise LookupError("no such mapping")


def map_weights(module, path):
    """Save a module's weights and let it read them from the file."""
    torch.save(module.state_dict(), path)
    module.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
    return module.requires_grad_(False)


def lay_out(conv, kernels):
    layout.lay_out(nn.Sequential(conv), torch.device("cpu"))


def fold(conv, kernels):
    layout.FoldedConv2d(conv)


def pack(conv, kernels):
    fused_unet.PackedConv(kernels, conv)(torch.randn(1, 4, 4, 1024))


def differentiate(conv, kernels):
    fused_unet.PackedConv(kernels, conv).gradient(torch.randn(1, 4, 4, 1024))


@needs_proc
@pytest.mark.parametrize("copy", [lay_out, fold, pack, differentiate])
def test_a_mapped_checkpoints_pages_go_as_its_weights_are_copied(copy, kernels, tmp_path):
    conv = map_weights(nn.Conv2d(1024, 1024, 3, padding=1), tmp_path / "conv.pt")
    weight = conv.weight
    expected = weight.sum()  # reads all of the 38 MB
    assert resident(weight) > 30_000
    copy(conv, kernels)
    assert resident(weight) < 400
    assert weight.sum() == expected  # reads the file again


@needs_proc
def test_the_check_leaves_no_second_copy_of_the_weights_in_memory(kernels, tmp_path):
    cfg = TrunkConfig(32, 128, (1, 2), 1, (16,), num_heads=4, num_head_channels=32)
    model = map_weights(randomised(UNetModel(cfg, 6)), tmp_path / "model.pt")
    network = accelerate.accelerate(model, torch.device("cpu"), "auto")
    with torch.inference_mode():
        network(torch.randn(1, 3, 32, 32), torch.tensor([500]))
    size, weight = (tmp_path / "model.pt").stat().st_size / 1024, next(model.parameters())
    assert size > 20_000
    assert resident(weight) < 0.3 * size  # all but the smallest ones
    assert sum(p.sum() for p in model.parameters()).isfinite()
    assert resident(weight) > 0.5 * size


def test_addresses_of_other_devices_are_not_those_of_this_process(monkeypatch):
    """A GPU's pointer may be a number that is mapped here, too."""
    monkeypatch.setattr(memory, "file_mappings", lambda: pytest.fail("looked"))
    memory.forget_pages(torch.empty(2**20, device="meta"))
    memory.forget_pages(torch.empty(2))  # nor is it worth a look
