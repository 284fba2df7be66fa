"""Whole files or none, written under a temporary name and renamed; one run a folder."""

import contextlib
import errno
import os
import secrets
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from guided_diffusion.errors import UserError
from guided_diffusion.io.paths import check_folder, refuse_remote

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read; raises ``UserError`` for a folder, and for a pipe or a device.

    Opening a pipe waits for its other end, and reading a device may never end.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        what = "a folder" if path.is_dir() else "a pipe or device and not a file"
        raise UserError(f"is {what}", path=path)
    return path.open("rb")


FileStamp = tuple[tuple[str, int, int, int], ...]  # path, size, time in ns and inode of each file
_OF_MODEL_FOLDERS = (".json", ".safetensors", ".bin")


def stamp_of(path: str | os.PathLike) -> FileStamp | None:
    """Return what changes when a checkpoint, a file or a folder, does; None if it is missing."""
    try:
        path = Path(path)
        inside = sorted((*path.glob("*"), *path.glob("*/*"))) if path.is_dir() else None
        files = [path] if inside is None else [f for f in inside if f.suffix in _OF_MODEL_FOLDERS]
        stats = [(str(file), file.stat()) for file in files]
    except (OSError, ValueError):
        return None
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends well.

    The folder is made if need be. The block must create the file, and must say its format where
    a writer would guess it from the suffix. After an exception, Ctrl-C included, the temporary
    file is removed and what stood at ``path`` is untouched. Raises ``UserError`` naming ``path``
    when the system refuses (disk full, no permission, read-only), and for a remote address.
    """
    refuse_remote(path)
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot be written: {reason}", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all; raises ``UserError`` as ``atomic_path``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files of killed processes from ``folder``, which this run has locked."""
    for leftover in Path(folder).glob(f".{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


@contextlib.contextmanager
def locked(*folders: str | os.PathLike) -> Iterator[None]:
    """Keep folders for this process while the block runs; they are made if need be.

    The system releases the locks when the process ends, in whatever way. Folders that were made
    for the locks and are still empty at the end are removed. Raises ``UserError`` where another run
    has a folder, and as ``check_folder``.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            check_folder(folder)
        for folder in sorted({os.path.realpath(folder) for folder in folders}):  # a parent first
            stack.enter_context(_locked(Path(folder)))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    is_new, path = not folder.exists(), folder / ".lock"
    lock = FileLock(path, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        problem = "another run is at work there: wait for its end, or choose another folder"
        raise UserError(problem, path=folder) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"cannot be locked: {error.strerror}", path=path) from error
        text = f"{folder}: this file system has no locks: nothing stops a second run into it"
        warnings.warn(text, stacklevel=4)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release: afterwards it may be another run's
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_checkpoint(path: str | os.PathLike, state: object) -> None:
    """Write what ``torch.save`` can, whole or not at all; raises as ``atomic_path``."""
    import torch  # it takes seconds, which programs that write pictures alone need not wait

    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:  # which torch's writer raises after the system's refusal
            raise (error.__context__ or error) from None
