"""Building the C++ kernels on the machine that runs them; built libraries are kept."""

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
from pathlib import Path

import torch

from guided_diffusion.io.paths import cache_folder, is_own_path

_FOLDER = Path(__file__).parent
_SOURCE, _HEADER = "cpu_kernels.cpp", "cpu_kernels.h"
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno"]
_COMPILERS = ("g++", "clang++", "c++")
_TIMEOUT = 300  # s; a build takes a few


class KernelError(Exception):
    """The kernels cannot be built or loaded on this machine."""


def load_library() -> ctypes.CDLL:
    """Return the library of kernels, built at the first use; raises KernelError.

    It is kept in the cache folder.
    """
    first_error = None
    for compiler in compilers():
        try:
            return _kept_or_built(compiler)
        except (OSError, KernelError) as error:  # noqa: PERF203 - two or three
            first_error = first_error or error
    raise KernelError(str(first_error)) from first_error


def compilers() -> list[list[str]]:
    """Return the compilers to try, each with its options: CXX alone, or those that are found.

    Raises KernelError if there is none.
    """
    if sys.platform == "win32":  # g++ does not align AVX registers on the stack there (GCC 54412)
        raise KernelError("kernels are not built on Windows")
    chosen = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(chosen)] if chosen else [[name] for name in _COMPILERS]
    except ValueError as error:  # an open quotation
        raise KernelError(f"CXX={chosen}: {error}") from error
    found = [[path, *options] for name, *options in commands if (path := shutil.which(name))]
    if not found:
        names = ", ".join(name for name, *_ in commands)
        raise KernelError(f"no C++ compiler found ({names})")
    return found


def _kept_or_built(compiler: list[str]) -> ctypes.CDLL:
    """Load the library that this compiler made or makes; raises OSError and KernelError."""
    name = f"kernels-{_fingerprint(compiler)}"
    if (folder := cache_folder()) is not None:
        with contextlib.suppress(OSError, KernelError):  # a full disk, or no programs allowed there
            intact = [path for path in folder.glob(f"{name}-*.so") if _is_intact(path)]
            return ctypes.CDLL(str(intact[0] if intact else _build(compiler, folder, name)))
    with tempfile.TemporaryDirectory() as private:
        return ctypes.CDLL(str(_build(compiler, Path(private), name)))


def _is_intact(library: Path) -> bool:
    """Whether a library has the content that its name states, and nobody else may write to it.

    Loading a truncated library would crash the process.
    """
    try:
        is_same = library.stem.endswith(f"-{_digest(library.read_bytes())}")
        return is_same and is_own_path(library)
    except OSError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _fingerprint(compiler: list[str]) -> str:
    """Return a digest of what a built library depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    processor = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    version = _run([*compiler, "--version"])
    parts = [*compiler, version, *_FLAGS, str(torch.__version__), platform.machine()]
    text = "\n".join([*parts, *sorted(processor)])
    sources = b"".join((_FOLDER / name).read_bytes() for name in (_SOURCE, _HEADER))
    return _digest(text.encode(errors="surrogateescape") + sources)


def _build(compiler: list[str], folder: Path, name: str) -> Path:
    """Compile into a temporary folder and rename, as other processes may build at the same time."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as private:
        compiled, linked = f"{private}/kernels.o", f"{private}/kernels.so"
        source = str(_FOLDER / _SOURCE)
        _run([*compiler, *_FLAGS, "-fopenmp", "-c", source, "-o", compiled])
        # First without OpenMP's library, to use the one that torch has loaded already: the threads
        # of two would keep each other from the cores.
        for options in ([], ["-fopenmp"]):
            _run([*compiler, "-shared", *options, compiled, "-o", linked])
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
    """Return what a command writes to stdout; raises KernelError if it fails."""
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
