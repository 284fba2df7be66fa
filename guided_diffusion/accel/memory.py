"""What a network call takes of memory, and how memory is kept and given back."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch


def file_mappings() -> list[range]:
    """Return the addresses where this process has files mapped; none where no one can tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    mappings = []
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            mappings.append(range(*(int(address, 16) for address in addresses.split("-"))))
    return mappings


def forget_pages(tensor: torch.Tensor, mapped: list[range]) -> None:
    """Give memory back if it is ``mapped``; who reads the tensor again reads the file again."""
    if not any(tensor.data_ptr() in addresses for addresses in mapped):
        return
    page, dont_need = os.sysconf("SC_PAGE_SIZE"), 4  # the latter's name is in sys/mman.h
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next feature map instead of returning it.

    By default it maps and unmaps every large block, and the kernel clears each page anew, which
    takes about a tenth of the time of a 256×256 network. Where the C library is not glibc, nothing
    happens.
    """
    mmap_max, trim_threshold = -4, -1  # names of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


class CallMemory:
    """What a call of the network takes of a device's memory beside the weights, and what is left.

    Measured at its first call on a GPU; on a CPU, under Linux, at the second, because at the first
    one weights are packed.
    """

    def __init__(self, device: torch.device, weights: int) -> None:
        self._device, self._weights = device, weights  # bytes
        self._before: int | None = None  # bytes of the process before the second call
        self._is_told = True  # on a CPU, by the system
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # loading is not what a call takes

    def after_call(self) -> tuple[int, int] | None:
        """Return bytes taken at once and bytes that are free without them; None: not known yet."""
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            free += torch.cuda.memory_reserved(self._device) - self._weights
            return max(1, torch.cuda.max_memory_allocated(self._device) - self._weights), free
        if not self._is_told:
            return None
        try:
            if self._before is not None:
                peak = bytes_of("/proc/self/status", "VmHWM")
                free = bytes_of("/proc/meminfo", "MemAvailable")
                return max(1, peak - self._before), free + peak - self._before
            with contextlib.suppress(AttributeError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
            self._before = bytes_of("/proc/self/status", "VmRSS")
        except (OSError, LookupError):  # another system than Linux, or it does not tell
            self._is_told = False  # so that no further call pays for asking
        return None


def bytes_of(path: str, name: str) -> int:
    """Return what Linux states of ``name`` in a file below /proc; raises OSError, LookupError."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(name)
