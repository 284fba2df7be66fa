"""Building the C++ kernels on the machine that runs them, and the cache of what was built."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from guided_diffusion.io.cache import cache_folder, is_own_path
from guided_diffusion.io.files import is_running

Library = TypeVar("Library")
_FOLDER = Path(__file__).parent
_SOURCES = ("cpu_kernels.cpp", "cpu_kernels.h")  # the last is a part of the others
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno"]
_COMPILERS = ("g++", "clang++", "c++")
_TIMEOUT = 300  # s; it takes about one
_BUILDING = "building"  # what names of folders begin with in which a build is under way


class KernelError(Exception):
    """The kernels cannot be built, or not be loaded, on this machine."""


def load_library(opened: Callable[[ctypes.CDLL], Library]) -> Library:
    """Return what ``opened`` makes of the library, built at the first use; raises KernelError.

    Built libraries are kept where Inductor's code is, in TORCHINDUCTOR_CACHE_DIR or
    ~/.cache/repaint, unless others may write there. ``opened`` raises AttributeError where a
    library is another one.
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
    if sys.platform == "win32":  # g++ does not align AVX registers on the stack there (GCC 54412)
        raise KernelError("kernels are not built on Windows")
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
    if (folder := cache_folder()) is not None:
        with contextlib.suppress(OSError, AttributeError, KernelError):
            _remove_leftovers(folder)
            whole = [path for path in folder.glob(f"{name}-*.so") if _is_whole(path)]
            return opened(ctypes.CDLL(str(whole[0] if whole else _build(compiler, folder, name))))
    with tempfile.TemporaryDirectory() as private:
        return opened(ctypes.CDLL(str(_build(compiler, Path(private), name))))


def _is_whole(library: Path) -> bool:
    """Whether a file is as it was built, and nobody else can change it.

    One that was cut short would crash the process; one from somebody else could do anything.
    """
    try:
        is_same = library.stem.endswith(f"-{_digest(library.read_bytes())}")
        return is_same and is_own_path(library)
    except OSError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _remove_leftovers(folder: Path) -> None:
    """Remove the folders of builds on this machine whose process was killed."""
    for path in folder.glob(f"{_BUILDING}-{platform.node()}-*-*"):
        number = path.name.split("-")[-2]
        if number.isdecimal() and not is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


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
    prefix = f"{_BUILDING}-{platform.node()}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=folder, prefix=prefix) as private:
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
        Path(linked).chmod(0o700)  # whatever the umask: see is_own_path
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
