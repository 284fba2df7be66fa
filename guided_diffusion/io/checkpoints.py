"""Reading checkpoints: mapped into memory, never executed.

A checkpoint is somebody else's file. Whatever is wrong with it is told in one line.
"""

import contextlib
import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from guided_diffusion.errors import UserError, looked_in

# How the files begin that people save in a checkpoint's place.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run git lfs pull"),
    (b"<", "is a web page and not a checkpoint: the download failed, often by a quota"),
    (b"{", "is JSON text and not a checkpoint"),
)


def fingerprint(path: str | os.PathLike) -> str:
    """Return a short text that changes with a checkpoint's content, without reading all of it.

    It is made of the checksums in a zip archive's table, of the size and of samples.
    """
    path, table = Path(path), []
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        table = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    size = path.stat().st_size
    digest = hashlib.sha256(repr((size, table)).encode())
    with path.open("rb") as stream:
        for place in range(0, size, max(4096, size // 256)):
            stream.seek(place)
            digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def load_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name, mapped from the file and not copied.

    Raises UserError for a file that is missing, unreadable, incomplete, not a checkpoint, would
    run code, or holds something else than one ``state_dict``.
    """
    return _read(path, None)


def state_dict_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape without reading the weights; raises as ``load_state_dict``."""
    return {name: tuple(tensor.shape) for name, tensor in _read(path, "meta").items()}


def _read(path: str | os.PathLike, map_location: str | None) -> dict[str, torch.Tensor]:
    is_zip = check_beginning(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of before it fails says no more
            state = torch.load(
                path, map_location=map_location or "cpu", mmap=is_zip or None, weights_only=True
            )
    except MemoryError:
        raise
    except Exception as error:  # of damaged files torch tells by a dozen types
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            problem = "holds pickled code, which is never run: save model.state_dict() instead"
            raise UserError(problem, path=path) from error
        raise UserError("is damaged or incomplete: download it again", path=path) from error
    is_named = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not is_named or not state:
        got = type(state).__name__
        if isinstance(state, dict):
            got = f"a dictionary of {', '.join(str(name) for name in list(state)[:4]) or 'nothing'}"
        raise UserError(path=path, expected="a state_dict of named tensors", got=got)
    return state


def check_beginning(path: str | os.PathLike) -> bool:
    """Refuse what is no checkpoint by its first bytes; return whether it is a zip archive."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            beginning = stream.read(64).lstrip()
    except FileNotFoundError:
        raise UserError(f"no such checkpoint{looked_in(path)}", path=path) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=path) from error
    if not beginning:
        raise UserError("is empty", path=path)
    for start, problem in _IMPOSTORS:
        if beginning.startswith(start):
            raise UserError(problem, path=path)
    is_zip = beginning.startswith(b"PK")
    if not is_zip and not beginning.startswith(b"\x80"):
        raise UserError("is not a checkpoint saved by torch", path=path)
    return is_zip
