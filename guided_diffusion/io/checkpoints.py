"""Reading checkpoints: mapped into memory, never executed.

A checkpoint may come from anywhere: whatever is wrong with it ends in one line. Weights inside a
dictionary of other things, or under longer names, are found by names that every such network has.

The tensors stay in the file: one that is truncated or overwritten in place while a run reads it
ends the run by the signal SIGBUS. A file that is replaced by a rename, as this program does it, is
safe.
"""

import contextlib
import hashlib
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.errors import UserError, looked_in
from guided_diffusion.io.checksums import (
    DAMAGED,
    ZIP_ERRORS,
    can_be_mapped,
    check_archive,
    once_a_file,
)
from guided_diffusion.io.files import atomic_path, write_checkpoint
from guided_diffusion.io.weights import Weights, find_weights, is_plain, short

# First bytes of files that people take for a checkpoint.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run git lfs pull"),
    (b"<", "is a web page and not a checkpoint: the download failed, often by a quota"),
    (b"{", "is JSON and not a checkpoint: for a diffusers model, give its folder"),
    (b"\x1f\x8b", "is packed by gzip: unpack it first"),
    (b"\x89HDF", "is an HDF5 file and not a checkpoint saved by torch"),
)
SAFETENSORS = ".safetensors"
NEEDS_SAFETENSORS = "needs safetensors: pip install -r requirements-diffusers.txt"
# Packages whose objects programs save beside the weights. They are replaced by empty objects.
_HARMLESS = re.compile(
    r"(numpy|_codecs|omegaconf|pytorch_lightning|lightning|lightning_fabric|pathlib|argparse"
    r"|datetime|ml_collections|easydict|addict)\."
)
# A class in a pickle is the letter c, its module and its name, each with a newline.
_CLASS = re.compile(rb"(?=c([\w.]+)\n([\w.]+)\n)")

# ---- Looking at a file ---------------------------------------------------------------------------


def fingerprint(path: str | os.PathLike) -> str:
    """Return a short text that changes with a checkpoint's content, without reading all of it.

    It is made of the checksums in a zip archive's table, of the size and of samples.
    """
    path, table = Path(path), []
    with contextlib.suppress(*ZIP_ERRORS), zipfile.ZipFile(path) as archive:
        table = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    size = path.stat().st_size
    digest = hashlib.sha256(repr((size, table)).encode(errors="surrogateescape"))
    with path.open("rb") as stream:
        for place in range(0, size, max(4096, size // 256)):
            stream.seek(place)
            digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def check_beginning(path: str | os.PathLike) -> str:
    """Refuse what is no checkpoint by its first bytes; return its form: zip, pickle, safetensors.

    Raises UserError.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not path.is_dir():
            raise UserError("is a pipe or device and not a file", path=path)
        with path.open("rb") as stream:
            first = stream.read(64)
    except FileNotFoundError:
        raise UserError(f"no such checkpoint{looked_in(path)}", path=path) from None
    except (OSError, ValueError) as error:  # a name may hold what no file system takes
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read: {reason}", path=path) from error
    header = int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and header <= status.st_size - 8:
        return "safetensors"
    beginning = first.lstrip()
    if not beginning:
        raise UserError("is empty", path=path)
    for start, problem in _IMPOSTORS:
        if beginning.startswith(start):
            raise UserError(problem, path=path)
    if path.suffix == SAFETENSORS:
        raise UserError(DAMAGED, path=path)
    is_zip = beginning.startswith(b"PK")
    if not is_zip and not beginning.startswith(b"\x80"):
        raise UserError("is not a checkpoint saved by torch", path=path)
    return "zip" if is_zip else "pickle"


def check_checkpoint(path: str | os.PathLike) -> None:
    """Find what is wrong with a file: its form, its checksums, its numbers; raises UserError.

    All of it is read once, about two seconds for 2 GB, and that it is whole is remembered.
    """
    check_beginning(path)
    path = Path(path)
    with once_a_file(path, "finite") as is_new:
        if is_new:
            _check_finite(path, find_weights(path, read_tree(path)).tensors)


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, mapped from the file and not copied.

    Weights in a dictionary of other things are found, averaged ones preferred; a warning says what
    was taken. Raises UserError for a file that is missing, unreadable, damaged, no checkpoint,
    would run code, holds something else than one ``state_dict``, or a number that is not finite.
    """
    check_checkpoint(path)  # whose tensors are unmapped again: reading them filled the memory
    weights = read_weights(Path(path))
    if weights.note:
        warnings.warn(f"{path}: {weights.note}", stacklevel=2)
    return weights.tensors


def read_weights(path: Path) -> Weights:
    """Return a checkpoint's weights and their place; their numbers are not checked."""
    return find_weights(path, read_tree(path))


def state_dict_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape without reading the weights; raises as ``load_state_dict``."""
    weights = find_weights(Path(path), read_tree(Path(path), "meta"))
    return {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}


def write_weights(path: str | os.PathLike, state: Mapping[str, Tensor]) -> None:
    """Write a ``state_dict``, by safetensors where ``path`` ends so; raises as ``atomic_path``."""
    if Path(path).suffix != SAFETENSORS:
        write_checkpoint(path, dict(state))
        return
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError(NEEDS_SAFETENSORS, path=path) from None
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(dict(state), metadata={"format": "pt"}))


# ---- Reading -------------------------------------------------------------------------------------


def read_tree(path: Path, map_location: str = "cpu") -> Any:
    """Return the tensors of a file with whatever is around them; raises as ``load_state_dict``.

    Their numbers are not checked. ``map_location`` is "cpu", or "meta" for shapes alone.
    """
    form = check_beginning(path)
    if form == "safetensors":
        return _read_safetensors(path)
    if form == "zip":
        with once_a_file(path, "checksums") as is_new:
            if is_new:
                check_archive(path)
        if _is_program(path):  # torch.load of PyTorch 2.4 would load it as one
            problem = "is a TorchScript program, which is never run"
            raise UserError(f"{problem}: save model.state_dict() instead", path=path)
    mapped = (form == "zip" and can_be_mapped(path)) or None
    try:
        with warnings.catch_warnings(), _stand_ins_for(_harmless_names(path)):
            warnings.simplefilter("ignore")  # the error says what torch warned of
            return torch.load(path, map_location=map_location, mmap=mapped, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for a damaged file
        is_repacked = form == "zip" and not mapped
        raise _unreadable(path, error, is_repacked=is_repacked) from error


def _unreadable(path: Path, error: Exception, *, is_repacked: bool) -> UserError:
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        problem = "holds pickled code, which is never run: save model.state_dict() instead"
        return UserError(problem, path=path)
    if is_repacked:
        problem = f"{DAMAGED}; or, if it was packed anew, save it by torch.save"
        return UserError(problem, path=path)
    return UserError(DAMAGED, path=path)


def _is_program(path: Path) -> bool:
    """Whether an archive is TorchScript, by torch's own rule."""
    with contextlib.suppress(*ZIP_ERRORS), zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
    return False


def _harmless_names(path: Path) -> list[str]:
    """Return the classes that a checkpoint names and that may be replaced by a stand-in."""
    with contextlib.suppress(*ZIP_ERRORS):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                pickled = archive.read(name)
        else:
            with path.open("rb") as file:
                pickled = file.read(1 << 24)  # the storages follow the pickle
        named = {f"{module.decode()}.{name.decode()}" for module, name in _CLASS.findall(pickled)}
        return [name for name in sorted(named) if _HARMLESS.match(name)]
    return []  # reading the file finds the reason


class _StandIn:
    """Takes the place of an object beside the weights, such as a number of NumPy's."""

    def __new__(cls, *_: object, **__: object) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


@contextlib.contextmanager
def _stand_ins_for(names: Iterable[str]) -> Iterator[None]:
    """Let ``torch.load`` find a stand-in for each of ``names`` (module.class) within the block.

    Its list of safe classes is the only way in PyTorch 2.4, which looks up a class's own name.
    """
    before = torch.serialization.get_safe_globals()
    places = [name.rpartition(".") for name in dict.fromkeys(names)]
    stand_ins = [type(name, (_StandIn,), {"__module__": module}) for module, _, name in places]
    torch.serialization.add_safe_globals(stand_ins)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(NEEDS_SAFETENSORS, path=path) from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(DAMAGED, path=path) from error


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that has no numbers, or one that is not finite; raises UserError."""
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise UserError(path=path, expected=f"numbers in {short(name)}", got="a meta tensor")
        if not is_plain(tensor) or not tensor.numel():
            continue  # an error where it is needed as a weight
        kept = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.numel() > kept:  # a tensor that repeats a few numbers
            tensor = tensor.as_strided((kept,), (1,), 0)
        low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            problem = "holds weights that are NaN or infinite, which no picture survives"
            raise UserError(problem, path=path, got=short(name))
