"""Whole files or none: written under a temporary name, then renamed."""

import contextlib
import hashlib
import io
import os
import platform
import secrets
import stat
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from guided_diffusion.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- reading -----------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read; raises ``UserError`` for a folder, and for a pipe or a device.

    Pipes and devices may have no end, or keep who opens them waiting.
    """
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"is {what}", path=path)
    return Path(path).open("rb")


# ---- whole files -------------------------------------------------------------------------------


def check_folder(folder: str | os.PathLike) -> Path:
    """Return the part of ``folder`` that exists; UserError where results could not go there."""
    parts = (Path(folder), *Path(folder).absolute().parents)
    there = next(part for part in parts if os.path.lexists(part))
    if max(len(os.fsencode(part.name)) for part in parts) > 255:
        raise UserError("results cannot be written there: the name is too long", path=folder)
    if not there.is_dir():
        raise UserError("results cannot be written there: not a folder", path=there)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError("results cannot be written there: no permission", path=there)
    return there


def refuse_inside(folder: str | os.PathLike, inputs: str | os.PathLike, *, key: str) -> None:
    """Raise ``UserError`` where a folder of results lies in one of inputs, or is it.

    The next run would take results for inputs. Links and a file system's letter case are seen
    through. ``inputs`` that are no folder hold nothing; ``key`` is theirs.
    """
    if _lies_in(folder, inputs):
        raise UserError(
            f"results would go into the folder of inputs {inputs}, and the next run would take "
            "them for inputs; choose a folder elsewhere",
            path=folder,
            key=key,
        )


def _lies_in(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    try:
        real = Path(os.path.realpath(path))
        parts = (real, *real.parents) if Path(folder).is_dir() else ()
        return any(part.exists() and part.samefile(folder) for part in parts)
    except (OSError, ValueError):  # not to be looked at, which others will tell
        return False


def refuse_overwriting(
    targets: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]
) -> None:
    """Raise ``UserError`` where a file to write is one to read, by whatever names."""

    def identity(path: str | os.PathLike) -> tuple[int, int] | None:
        try:
            status = Path(path).stat()
        except (OSError, ValueError):  # not there yet, or in a store of its own
            return None
        return status.st_dev, status.st_ino

    owners = {identity(path): path for path in inputs}
    for target in targets:
        found = identity(target)
        if found is not None and found in owners:
            problem = f"a result would overwrite the input {owners[found]}; choose another folder"
            raise UserError(problem, path=target)


FileStamp = tuple[tuple[str, int, int, int], ...]  # path, size, time in ns and inode of each file
_OF_MODEL_FOLDERS = (".json", ".safetensors", ".bin")


def stamp_of(path: str | os.PathLike) -> FileStamp | None:
    """Return what tells a checkpoint, a file or a folder, from a changed one; None if not there."""
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
    when the system refuses (disk full, no permission, read-only).
    """
    path = Path(path)
    temporary = path.with_name(_temporary_name())
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


def _temporary_name() -> str:
    """Name a file by 16 hexadecimal digits: machine, process, and chance."""
    return f".{_machine()}{os.getpid() & 0xFFFFFF:06x}{secrets.token_hex(3)}.tmp"


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]


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
    """Remove the temporary files that killed processes left in ``folder``.

    Those of a process that lives, or of another machine within a day, belong to a run beside this
    one.
    """
    for leftover in Path(folder).glob(f".{'[0-9a-f]' * 16}.tmp"):
        machine, process = leftover.name[1:5], int(leftover.name[5:11], 16)
        with contextlib.suppress(OSError):
            is_old = time.time() - leftover.stat().st_mtime > 24 * 3600
            is_own = process == os.getpid() & 0xFFFFFF  # this one has no files underway yet
            if is_old or (machine == _machine() and (is_own or not is_running(process))):
                leftover.unlink()


def is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # else it is another user's
    return True


# ---- one run a folder --------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep ``folder`` for this process while the block runs; the folder is made if need be.

    The system releases the lock when the process ends, in whatever way. Raises ``UserError``
    that names the other process and its host where one has the folder, and as ``check_folder``.
    On Windows, and on file systems without locks, a warning says that nothing is guarded. A
    folder that was made for the lock and is still empty at the end is removed.
    """
    there, lock = check_folder(folder), Path(folder).absolute() / ".lock"
    handle = _take_lock(lock)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # while the lock is held: it cannot be another process's file
        _release(handle)
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for made in lock.parents:
                if made == there.absolute():
                    break
                made.rmdir()


def _take_lock(lock: Path) -> int:
    """Return the descriptor of the lock file, locked and with this process's name in it."""
    misses = 0
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            misses += 1
            if isinstance(error, FileNotFoundError) and misses < 100:
                time.sleep(0.01)  # another process has just removed its empty folder
                continue
            problem = f"results cannot be written there: {error.strerror}"
            raise UserError(problem, path=lock.parent) from error
        _held.add(handle)
        if _is_refused(handle):
            owner = os.read(handle, 300).decode("utf-8", "replace") or "another process"
            _release(handle)
            problem = f"{owner} is at work there; wait for its end, or choose another folder"
            raise UserError(problem, path=lock.parent)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
                return handle
        _release(handle)  # its owner removed the file before its end


def _is_refused(handle: int) -> bool:
    """Lock an open file; return whether another process has it, and warn if nobody can."""
    try:
        if fcntl is None:
            raise OSError("Windows")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        warnings.warn(
            "this system has no locks: nothing stops a second run into the same folder",
            stacklevel=4,
        )
    return False


# A process that is forked from this one shares its locks. It must not keep them when this one is
# killed.
_held: set[int] = set()


def _release(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _release_all() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


# ---- checkpoints -------------------------------------------------------------------------------


def write_checkpoint(path: str | os.PathLike, state: object) -> None:
    """Write what ``torch.save`` can, whole or not at all; raises as ``atomic_path``."""
    import torch  # it takes seconds, which programs that write pictures alone need not wait

    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        refusals: list[OSError] = []
        try:
            torch.save(state, _ErrorNotingFile(stream, refusals))
        except RuntimeError:  # torch's writer hides the system's refusal behind its own exception
            if refusals:
                raise refusals[0] from None
            raise


class _ErrorNotingFile(io.RawIOBase):
    """A file that notes the exceptions of its writes before passing them on."""

    def __init__(self, stream: io.BufferedWriter, refusals: list[OSError]) -> None:
        self._stream, self._refusals = stream, refusals

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self._refusals.append(error)
            raise
