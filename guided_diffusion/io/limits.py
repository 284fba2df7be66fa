"""How much memory is free, and how many pictures are decoded at once."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from guided_diffusion.errors import UserError

_MOST_THREADS = 8
_MOST_MEMORY = 1 << 30  # bytes that decoding may take in all threads together


def free_memory() -> int | None:
    """Return how many bytes this process may still use, or None where the system does not say.

    Limits of containers (control groups, version 2) count. macOS only tells its total memory.
    """
    found = [_free_of_system(), *_free_of_cgroups()]
    return min((size for size in found if size is not None), default=None)


def check_memory(needed: int, path: str, what: str = "the picture") -> None:
    """Raise ``UserError`` where ``what``, of the file ``path``, needs more bytes than are free."""
    free = free_memory()
    if free is not None and needed > free:
        problem = f"{what} does not fit into the memory that is free"
        expected, got = f"at most {free >> 20} MiB", f"about {needed >> 20} MiB"
        raise UserError(problem, path=path, expected=expected, got=got)


def _free_of_system() -> int | None:
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX, which begins with its own size
        is_known = ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2] if is_known else None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _free_of_cgroups(
    root: Path = Path("/sys/fs/cgroup"), proc: str = "/proc/self/cgroup"
) -> list[int]:
    """Return what each control group around this process leaves free, in bytes."""
    free = []
    with contextlib.suppress(OSError):
        lines = Path(proc).read_text().splitlines()
        inner = next((Path(line[4:]) for line in lines if line.startswith("0::/")), Path())
        # In a container the path may be that of the host, and only ``root`` be there.
        for folder in {root / inner, *(root / parent for parent in inner.parents)}:
            with contextlib.suppress(OSError, ValueError):  # no such group, or no limit: "max"
                most, used = (
                    int((folder / name).read_text()) for name in ("memory.max", "memory.current")
                )
                # Cached files count as used, and are dropped when the memory is wanted.
                stat = (folder / "memory.stat").read_text().splitlines()
                used -= sum(int(line[14:]) for line in stat if line.startswith("inactive_file "))
                free.append(max(0, most - used))
    return free


def threads_within(memory: int, most: int = _MOST_THREADS) -> int:
    """Return how many threads may each take ``memory`` bytes: at least 1, at most ``most``."""
    room = min(_MOST_MEMORY, (free_memory() or _MOST_MEMORY) // 2)
    return max(1, min(most, os.cpu_count() or 1, room // max(1, memory)))


def in_threads(
    work: Callable, items: Iterable, title: str, show_progress: bool, *, memory: int = 0
) -> list:
    """Return ``work(item)`` of each item, computed in as many threads as memory allows.

    ``memory`` is how many bytes the work on one item takes at most. A progress bar appears when it
    takes more than 2 s.
    """
    items = list(items)
    hidden = None if show_progress else True  # None: tqdm hides it where no terminal is
    count = threads_within(memory)  # a single thread beside this one would keep what it freed
    with ThreadPoolExecutor(count) as pool:  # whose map cancels what has not begun if one raises
        results = pool.map(work, items) if count > 1 else map(work, items)
        return list(tqdm(results, title, len(items), leave=False, delay=2, disable=hidden))
