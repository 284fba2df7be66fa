"""Free memory, and how many threads it allows."""

import threading

import pytest

from guided_diffusion.errors import UserError
from guided_diffusion.io import limits

GIB = 1 << 30


# A group around this one, and that of a container, which sees its own group alone.
@pytest.mark.parametrize(("path", "where"), [("/a/b", "a"), ("/host/path", ".")])
def test_limits_of_containers_count(tmp_path, path, where):
    (tmp_path / "cgroup").write_text(f"9:pids:/x\n0::{path}\n")
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / "memory.current").write_text("700\n")
    (tmp_path / where / "memory.stat").write_text("anon 9\ninactive_file 100\n")
    for limit, free in ((1000, [1000 - 700 + 100]), ("max", [])):
        (tmp_path / where / "memory.max").write_text(f"{limit}\n")
        assert limits._free_of_cgroups(tmp_path, tmp_path / "cgroup") == free


def test_free_memory_is_the_least_that_anything_leaves(monkeypatch):
    assert limits.free_memory() > 1 << 20
    monkeypatch.setattr(limits, "_free_of_system", lambda: 5)
    monkeypatch.setattr(limits, "_free_of_cgroups", lambda: [3, 4])
    assert limits.free_memory() == 3
    with pytest.raises(UserError, match=r"p\.png: the cut does not fit into the memory"):
        limits.check_memory(4, "p.png", "the cut")
    limits.check_memory(3, "p.png")
    monkeypatch.setattr(limits, "_free_of_system", lambda: None)
    monkeypatch.setattr(limits, "_free_of_cgroups", list)
    assert limits.free_memory() is None
    limits.check_memory(1 << 60, "p.png")


@pytest.mark.parametrize(
    ("free", "memory", "threads"),
    [(None, 0, 8), (8 * GIB, GIB // 3, 3), (GIB, GIB // 4, 2), (GIB, 5 * GIB, 1)],
)
def test_threads_are_as_many_as_memory_allows(monkeypatch, free, memory, threads):
    monkeypatch.setattr(limits, "free_memory", lambda: free)
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 16)
    assert limits.threads_within(memory) == threads
    together = threading.Barrier(threads, timeout=9)  # lets so many threads go on at once

    def work(item):
        together.wait()
        return item

    assert limits.in_threads(work, range(24), "t", False, memory=memory) == [*range(24)]
