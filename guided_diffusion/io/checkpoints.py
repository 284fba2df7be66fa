"""Reading checkpoints: mapped into memory, never executed.

A checkpoint may come from anywhere: whatever is wrong with it ends in one line. Weights inside a
dictionary of other things, or under longer names, are found by names that every such network has.

The tensors stay in the file. If it is truncated or overwritten in place while a run reads it, the
signal SIGBUS ends the run. A file that is replaced by a rename, as this program does it, is safe.

A checkpoint saved by torch is a zip archive with a checksum of every entry, which torch does not
compare. A file that was found whole is remembered by path, size, time and inode.
"""

import contextlib
import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.errors import UserError, looked_in
from guided_diffusion.io.files import atomic_path, open_regular, stamp_of, write_checkpoint
from guided_diffusion.io.paths import cache_folder
from guided_diffusion.io.weights import Weights, find_weights, is_plain, shapes_of, short

_DAMAGED = "is damaged or incomplete: download it again"
_NOT_OF_TORCH = "is not a checkpoint saved by torch"
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
# What zipfile raises for a damaged table of contents.
_ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, LookupError, EOFError,
    OSError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
_found_whole: set[str] = set()  # in this process

# ---- Looking at a file ---------------------------------------------------------------------------


def fingerprint(path: str | os.PathLike) -> str:
    """Return a short text that changes with a checkpoint's content, without reading all of it.

    It is made of the checksums in a zip archive's table, of the size and of samples.
    """
    path, table = Path(path), []
    with contextlib.suppress(*_ZIP_ERRORS), zipfile.ZipFile(path) as archive:
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
        with open_regular(path) as stream:
            first = stream.read(64)
    except FileNotFoundError:
        raise UserError(f"no such checkpoint{looked_in(path)}", path=path) from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name may hold what no file system takes
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read: {reason}", path=path) from error
    header = int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and header <= path.stat().st_size - 8:
        return "safetensors"
    beginning = first.lstrip()
    if not beginning:
        raise UserError("is empty", path=path)
    for start, problem in _IMPOSTORS:
        if beginning.startswith(start):
            raise UserError(problem, path=path)
    if path.suffix == SAFETENSORS:
        raise UserError(_DAMAGED, path=path)
    is_zip = beginning.startswith(b"PK")
    if not is_zip and not beginning.startswith(b"\x80"):
        raise UserError(_NOT_OF_TORCH, path=path)
    return "zip" if is_zip else "pickle"


def check_checkpoint(path: str | os.PathLike) -> None:
    """Find what is wrong with a file: its form, its checksums, its numbers; raises UserError.

    It is read once, about two seconds for 2 GB. The cache folder remembers that it is whole.
    """
    check_beginning(path)  # also of what is remembered: it may no longer be read
    _once_a_file(_check_finite, Path(path))


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
    return shapes_of(find_weights(Path(path), read_tree(Path(path), "meta")).tensors)


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
        _once_a_file(_check_archive, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says what torch warned of
            return _load(path, {}, map_location=map_location, mmap=form == "zip" or None)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for a damaged file
        problem = _NOT_OF_TORCH if form == "zip" else _DAMAGED
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            problem = "holds pickled code, which is never run: save model.state_dict() instead"
        raise UserError(problem, path=path) from error


def _load(path: Path, stand_ins: dict[str, type], **options: Any) -> Any:
    """Call ``torch.load``, with stand-ins for harmless classes that it does not know.

    Its error names one such class at a time: ``stand_ins`` are for those named so far.
    """
    try:
        with _safe_globals(list(stand_ins.values())):
            return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+) was", str(error))
        name = found[1] if found else ""
        if not _HARMLESS.match(name) or name in stand_ins:
            raise
    module, _, last = name.rpartition(".")
    stand_in = type(last, (_StandIn,), {"__module__": module})
    return _load(path, {**stand_ins, name: stand_in}, **options)


class _StandIn:
    """Takes the place of an object beside the weights, such as a number of NumPy's."""

    def __new__(cls, *_: object, **__: object) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


@contextlib.contextmanager
def _safe_globals(classes: list[type]) -> Iterator[None]:
    """Let ``torch.load`` use ``classes`` in the block: torch's own, which PyTorch 2.4 lacks."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(classes)
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
        raise UserError(_DAMAGED, path=path) from error


# ---- Whether a file is whole ---------------------------------------------------------------------


def _once_a_file(check: Callable[[Path], None], path: Path) -> None:
    """Call ``check(path)``, unless a file of this path, size, time and inode has passed it."""
    what = (check.__name__, stamp_of(os.path.realpath(path)))
    name = hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_folder()
    verdict = folder / "checkpoints" / name if folder else None
    if name in _found_whole or (verdict and verdict.exists()):
        return
    check(path)
    _found_whole.add(name)
    if verdict:
        with contextlib.suppress(OSError):
            verdict.parent.mkdir(mode=0o700, exist_ok=True)
            verdict.touch()


def _check_archive(path: Path) -> None:
    """Compare every entry of a zip archive with its checksum; raises UserError if one differs.

    Raises it for a compressed archive, too, which cannot be mapped, and for a TorchScript program,
    which PyTorch 2.4 would load as one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
                problem = "is a TorchScript program, which is never run"
                raise UserError(f"{problem}: save model.state_dict() instead", path=path)
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError("is compressed; unpack it, and save it by torch.save", path=path)

            def check(entry: zipfile.ZipInfo) -> None:
                with archive.open(entry) as stream:  # which compares the checksum at the end
                    while stream.read(1 << 22):
                        pass

            with ThreadPoolExecutor(4) as pool:
                # torch can be told to leave checksums out, and then writes 0.
                list(pool.map(check, (entry for entry in entries if entry.CRC)))
    except UserError:
        raise
    except _ZIP_ERRORS as error:
        raise UserError(f"{_DAMAGED} ({short(error, 120)})", path=path) from error


def _check_finite(path: Path) -> None:
    """Refuse a tensor that has no numbers, or one that is not finite; raises UserError."""
    for name, tensor in read_weights(path).tensors.items():
        if tensor.device.type == "meta":
            raise UserError(path=path, expected=f"numbers in {short(name)}", got="a meta tensor")
        if not is_plain(tensor) or not tensor.numel():
            continue  # an error where it is needed as a weight
        low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            problem = "holds weights that are NaN or infinite, which no picture survives"
            raise UserError(problem, path=path, got=short(name))
