"""Building the C++ kernels on the machine that runs them, and the cache of what was built."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Library = TypeVar("Library")
_FOLDER = Path(__file__).parent
_SOURCES = ("cpu_kernels.cpp", "cpu_kernels.h")  # the last is a part of the others
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno"]
_COMPILERS = ("g++", "clang++", "c++")
_CACHE = os.path.expanduser("~/.cache/repaint")  # noqa: PTH111 - pathlib's fails without a home
_TIMEOUT = 300  # s; it takes about one


class KernelError(Exception):
    """The kernels cannot be built, or not be loaded, on this machine."""


def load_library(opened: Callable[[ctypes.CDLL], Library]) -> Library:
    """Return what ``opened`` makes of the library, built at the first use; raises KernelError.

    Built libraries are kept where Inductor's code is: in TORCHINDUCTOR_CACHE_DIR, or
    ~/.cache/repaint. ``opened`` raises AttributeError where a library is another one.
    """
    problem = None
    for compiler in _compilers():
        try:
            return _built(compiler, opened)
        except (OSError, AttributeError, KernelError) as error:  # noqa: PERF203 - two or three
            problem = problem or error
    raise KernelError(str(problem)) from problem


def _compilers() -> list[list[str]]:
    """Return the command lines to try; raises KernelError where there is no compiler at all."""
    own = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(own)] if own else [[name] for name in _COMPILERS]
    except ValueError as error:  # an open quotation
        raise KernelError(f"CXX={own}: {error}") from error
    found = [[path, *options] for name, *options in commands if (path := shutil.which(name))]
    if not found:
        names = ", ".join(name for name, *_ in commands)
        raise KernelError(f"no C++ compiler found ({names})")
    return found


def _built(compiler: list[str], opened: Callable[[ctypes.CDLL], Library]) -> Library:
    name = f"kernels-{_fingerprint(compiler)}"
    # A folder that is full or allows no programs leaves the temporary one.
    if (folder := _cache_folder()) is not None:
        with contextlib.suppress(OSError, AttributeError, KernelError):
            whole = [path for path in folder.glob(f"{name}-*.so") if _is_whole(path)]
            return opened(ctypes.CDLL(str(whole[0] if whole else _build(compiler, folder, name))))
    with tempfile.TemporaryDirectory() as private:
        return opened(ctypes.CDLL(str(_build(compiler, Path(private), name))))


def _is_whole(library: Path) -> bool:
    """Whether a file is as it was built; one that was cut short would crash the process."""
    try:
        return library.stem.endswith(f"-{_digest(library.read_bytes())}")
    except OSError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _cache_folder() -> Path | None:
    """Return the folder of compiled code, or None where it is not this user's alone to write."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _CACHE)
    try:
        if not folder.is_absolute():  # a user without a home
            return None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        is_own = status.st_uid == os.geteuid() and not status.st_mode & stat.S_IWOTH
    except (OSError, AttributeError):  # of a system without users, too
        return None
    return folder if is_own else None


def _fingerprint(compiler: list[str]) -> str:
    """Return what the built library depends on, as some hexadecimal digits."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    processor = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    version = _run([*compiler, "--version"])
    parts = [*compiler, version, *_FLAGS, str(torch.__version__), platform.machine()]
    text = "\n".join([*parts, *sorted(processor)])
    sources = b"".join((_FOLDER / name).read_bytes() for name in _SOURCES)
    return _digest(text.encode(errors="surrogateescape") + sources)


def _build(compiler: list[str], folder: Path, name: str) -> Path:
    """Compile to a temporary name and rename: other processes may do the same at this moment."""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        linked, compiled = f"{private}/kernels.so", []
        for source in (_FOLDER / name for name in _SOURCES if name.endswith(".cpp")):
            compiled.append(f"{private}/{source.stem}.o")
            _run([*compiler, *_FLAGS, "-fopenmp", "-c", str(source), "-o", compiled[-1]])
        # First without OpenMP's own library, so that it is the one that torch has loaded already:
        # the threads of two would keep each other from the cores.
        for options in ([], ["-fopenmp"]):
            _run([*compiler, "-shared", *options, *compiled, "-o", linked])
            try:
                ctypes.CDLL(linked)
                break
            except OSError as error:
                problem = error
        else:
            raise KernelError(str(problem))
        return Path(linked).replace(folder / f"{name}-{_digest(Path(linked).read_bytes())}.so")


def _run(command: list[str]) -> str:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{command[0]} cannot be run: {error}") from error
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise KernelError(f"{command[0]} fails: {line[:200]}")
    return run.stdout
