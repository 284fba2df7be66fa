"""Whether the bytes of a checkpoint are those that were written, looked at once a file.

A checkpoint saved by torch is a zip archive, and a zip archive has a checksum of every entry, which
torch does not look at. What was found whole is remembered by path, size, times and inode.
"""

import contextlib
import hashlib
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from guided_diffusion.errors import UserError
from guided_diffusion.io.cache import cache_folder

DAMAGED = "is damaged or incomplete: download it again"
# What Python's reader of archives raises for a table that is not one.
ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, LookupError, EOFError,
    OSError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
_CHUNK = 1 << 24  # bytes
_MOST_UNPACKED = 20  # times what is packed: weights hardly shrink at all
_ALIGNMENT = 8  # bytes
_STORAGE = re.compile(r"(^|/)data/\d+$")
_found_whole: set[str] = set()  # in this process


def check_archive(path: Path) -> None:
    """Compare every entry of a zip archive with its checksum; raises UserError if one differs."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
            _check_packed(path, archive, [entry for entry in entries if entry not in stored])
        _check_stored(path, stored)
    except UserError:
        raise
    except ZIP_ERRORS as error:
        raise UserError(DAMAGED, path=path) from error


def can_be_mapped(path: Path) -> bool:
    """Whether tensors may stay in the archive: nothing is compressed, and storages are aligned."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        with _mapped(path) as view:
            storages = [entry for entry in entries if _STORAGE.search(entry.filename)]
            starts = [_start(view, entry) for entry in storages]
    except ZIP_ERRORS:
        return False  # the reason why is told by who reads it
    return all(start % _ALIGNMENT == 0 for start in starts)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        yield view


def _check_packed(path: Path, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    packed = sum(entry.compress_size for entry in entries)
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > _MOST_UNPACKED * packed + (1 << 24):
        raise UserError(
            "is packed anew; unpack it, and save it by torch.save",
            path=path,
            expected=f"at most {_MOST_UNPACKED} times what is packed",
            got=f"{unpacked / 1e9:.1f} GB",
        )
    for entry in entries:
        with archive.open(entry) as stream:  # which compares the checksum at the end
            while stream.read(_CHUNK):
                pass


def _check_stored(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    with _mapped(path) as view:
        starts = {entry.filename: _start(view, entry) for entry in entries}

        def differs(entry: zipfile.ZipInfo) -> bool:
            start, checksum = starts[entry.filename], 0
            for place in range(start, start + entry.file_size, _CHUNK):
                end = min(place + _CHUNK, start + entry.file_size)
                with view[place:end] as part:
                    checksum = zlib.crc32(part, checksum)
            return checksum != entry.CRC

        # torch can be told to leave checksums out, and then writes 0.
        checked = [entry for entry in entries if entry.CRC]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            answers = list(pool.map(differs, checked))
    for entry, is_different in zip(checked, answers, strict=True):
        if is_different:
            problem = f"{DAMAGED}; the checksum of {entry.filename[-60:]} is another"
            raise UserError(problem, path=path)


def _start(view: memoryview, entry: zipfile.ZipInfo) -> int:
    """Return where an entry's bytes begin, after its own header; raises as ``zipfile``."""
    at = entry.header_offset
    if bytes(view[at : at + 4]) != b"PK\x03\x04":
        raise zipfile.BadZipFile(entry.filename)
    name, extra = struct.unpack("<HH", view[at + 26 : at + 30])
    start = at + 30 + name + extra
    if start + entry.file_size > len(view) or entry.compress_size != entry.file_size:
        raise zipfile.BadZipFile(entry.filename)
    return start


# ---- Once a file ---------------------------------------------------------------------------------


@contextlib.contextmanager
def once_a_file(path: Path, look: str) -> Iterator[bool]:
    """Yield whether ``look`` at ``path`` is still to be done, and remember it when it ended well.

    A file is the same while its path, size, times and inode are.
    """
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    what = (look, os.path.realpath(path), status.st_size, *times, status.st_ino, status.st_dev)
    name = hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_folder()
    kept = folder / "checkpoints" / name if folder else None
    if name in _found_whole or (kept and kept.exists()):
        yield False
        return
    yield True
    _found_whole.add(name)
    if kept:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            kept.write_text(f"{look}: {os.path.realpath(path)}\n", errors="replace")
