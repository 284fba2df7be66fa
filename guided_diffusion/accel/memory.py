"""How memory is kept between network calls and given back."""

import ctypes
import os
from pathlib import Path

import torch

_LEAST_BYTES = 2**16  # of a tensor for which reading the process's mappings pays


def file_mappings() -> list[range]:
    """Return the addresses where this process has files mapped; none on systems without /proc."""
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


def forget_pages(*tensors: torch.Tensor) -> None:
    """Release the memory of tensors that are mapped from a file, which a later read reads again."""
    tensors = [t for t in tensors if t.device.type == "cpu" and t.nbytes >= _LEAST_BYTES]
    mapped = file_mappings() if tensors else []  # not kept: addresses are reused
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(start in addresses for addresses in mapped):
            page, dont_need = os.sysconf("SC_PAGE_SIZE"), 4  # MADV_DONTNEED
            start, end = -(-start // page) * page, end // page * page
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need
            )


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
