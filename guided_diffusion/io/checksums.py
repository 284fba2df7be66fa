"""Whether a checkpoint's bytes are those that were written, checked once a file.

A checkpoint saved by torch is a zip archive with a checksum of every entry, which torch does not
compare. A file that was found whole is remembered by path, size, times and inode.
"""

import contextlib
import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from guided_diffusion.errors import UserError
from guided_diffusion.io.cache import cache_folder

DAMAGED = "is damaged or incomplete: download it again"
# What zipfile raises for a damaged table of contents.
ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, LookupError, EOFError,
    OSError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CHUNK = 1 << 22  # bytes
_MAX_RATIO = 20  # of unpacked to packed bytes: weights hardly shrink
_ALIGNMENT = 8  # bytes
_STORAGE = re.compile(r"(^|/)data/\d+$")
_MAX_VERDICTS = 1000  # files in the cache
_found_whole: set[str] = set()  # in this process


def check_archive(path: Path) -> None:
    """Compare every entry of a zip archive with its checksum; raises UserError if one differs."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch can be told to leave checksums out, and then writes 0.
            entries = [entry for entry in archive.infolist() if entry.CRC]
            if any(entry.compress_type not in _PACKED for entry in entries):
                raise zipfile.BadZipFile("packed by another method")
            _check_ratio(path, entries)
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                for _ in pool.map(lambda entry: _check_entry(path, archive, entry), entries):
                    pass
    except UserError:
        raise
    except ZIP_ERRORS as error:
        raise UserError(DAMAGED, path=path) from error


def _check_ratio(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > _MAX_RATIO * path.stat().st_size + (1 << 24):
        raise UserError(
            "is packed anew; unpack it, and save it by torch.save",
            path=path,
            expected=f"at most {_MAX_RATIO} times what is packed",
            got=f"{unpacked / 1e9:.1f} GB",
        )


def _check_entry(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    try:
        with archive.open(entry) as stream:  # which compares the checksum at the end
            while stream.read(_CHUNK):
                pass
    except zipfile.BadZipFile as error:
        problem = f"{DAMAGED}; the checksum of {entry.filename[-60:]} is another"
        raise UserError(problem, path=path) from error


def can_be_mapped(path: Path) -> bool:
    """Whether tensors may stay in the archive: nothing is compressed, and storages are aligned."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            storages = [each for each in archive.infolist() if _STORAGE.search(each.filename)]
            is_stored = all(each.compress_size == each.file_size for each in storages)
            return is_stored and all(_start(file, each) % _ALIGNMENT == 0 for each in storages)
    except ZIP_ERRORS:
        return False  # reading the file finds the reason


def _start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return where an entry's bytes begin, after its own header; raises as ``zipfile``."""
    file.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name + extra


# ---- Once a file ---------------------------------------------------------------------------------


@contextlib.contextmanager
def once_a_file(path: Path, check: str) -> Iterator[bool]:
    """Yield whether ``check`` of ``path`` is still to be done, and remember it if nothing raises.

    A file is the same while its path, size, times and inode are.
    """
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    what = (check, os.path.realpath(path), status.st_size, *times, status.st_ino, status.st_dev)
    name = hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_folder()
    verdict = folder / "checkpoints" / name if folder else None
    if name in _found_whole or (verdict and verdict.exists()):
        yield False
        return
    yield True
    _found_whole.add(name)
    if verdict:
        with contextlib.suppress(OSError):
            verdict.parent.mkdir(mode=0o700, exist_ok=True)
            verdict.write_text(f"{check}: {os.path.realpath(path)}\n", errors="replace")
            newest_first = sorted(verdict.parent.iterdir(), key=lambda p: -p.stat().st_mtime)
            for old in newest_first[_MAX_VERDICTS:]:
                old.unlink()
