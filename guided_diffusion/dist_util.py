"""Device, ranks and the reading of checkpoints.

A checkpoint is somebody else's file: it is mapped into memory, never executed, and whatever is
wrong with it is told in one line.
"""

import contextlib
import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from guided_diffusion import UserError

Value = TypeVar("Value")

# How the files begin that people save in a checkpoint's place.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run git lfs pull"),
    (b"<", "is a web page and not a checkpoint: the download failed, often by a quota"),
    (b"{", "is JSON text and not a checkpoint"),
)


def rank() -> int:
    """Return this process's number among all of torchrun's, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes torchrun started on all machines, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Return this process's number on its own machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Return whether this process speaks for all."""
    return rank() == 0


def get_device(name: str | None = None) -> torch.device:
    """Return the device called ``name``, by default this process's GPU, or the CPU without one.

    ``cuda`` without a number is the process's own GPU. Raises UserError for a device that torch
    does not know or this machine does not have.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(key="device", expected="cpu, cuda or cuda:N", got=repr(name)) from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank())
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError("no such GPU", key="device", got=f"{name} with {count} GPUs")
        torch.cuda.set_device(device)
    elif device.type not in ("cpu", "mps"):
        raise UserError(key="device", expected="cpu, cuda or cuda:N", got=repr(name))
    return device


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, over the network of CPUs; nothing for one alone.

    Only small messages pass: each process computes on its own device. Waiting has no limit worth
    the name, because a process may be hours behind.
    """
    if world_size() == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_main(value: Value) -> Value:
    """Return the main process's ``value`` in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value: Value) -> list[Value]:
    """Return every process's ``value``, by rank, in every process."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


class SharedCounter:
    """A number that all processes count up together, without waiting for one another."""

    def __init__(self, name: str) -> None:
        self._name, self._own = name, 0

    def add(self, amount: int = 0) -> int:
        """Add and return the sum over all processes."""
        if world_size() == 1:
            self._own += amount
            return self._own
        return dist.distributed_c10d._get_default_store().add(self._name, amount)


def fingerprint(path: str | os.PathLike) -> str:
    """Return a short text that changes with a checkpoint's content, without reading all of it.

    It is made of the checksums in a zip archive's table, or of an old file's size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            table = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    except zipfile.BadZipFile:
        table = [Path(path).stat().st_size]
    return hashlib.sha256(repr(table).encode()).hexdigest()[:16]


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
        state = torch.load(
            path, map_location=map_location or "cpu", mmap=is_zip or None, weights_only=True
        )
    except pickle.UnpicklingError as error:
        if "weights" in str(error).lower():
            problem = "holds pickled code, which is never run: save model.state_dict() instead"
            raise UserError(problem, path=path) from error
        raise UserError("is not a checkpoint", path=path) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError) as error:
        raise UserError("is damaged or incomplete: download it again", path=path) from error
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    if not tensors or not state:
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
        raise UserError("no such checkpoint", path=path) from None
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
