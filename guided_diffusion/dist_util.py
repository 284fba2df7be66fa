"""Device, processes and signals, and the reading of checkpoints.

A checkpoint is somebody else's file: it is mapped into memory, never executed, and whatever is
wrong with it is told in one line.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

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
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this machine or this PyTorch has no Metal GPU", key="device", got=name)
    return device


class Team:
    """The processes that torchrun started, or this one alone, and the few words they exchange.

    Words go through torchrun's key-value store and not through collectives: nobody is ever stuck
    in a call that a signal cannot end, and a process that is done need not wait for the others.
    Values are what JSON can hold. Raises UserError where torchrun's addresses are missing, and
    when the store is gone, because torchrun or the main process is.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._own = rank(), world_size(), {}
        self.is_main = is_main()
        self._store = self._join() if self.size > 1 else None
        # After a restart by torchrun the store still holds the words of the attempt before.
        self._prefix = f"repaint/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"

    def _join(self) -> dist.TCPStore:
        host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        if not host or not port.isdigit():
            problem = "is above 1 without MASTER_ADDR and MASTER_PORT: start with torchrun"
            raise UserError(problem, key="WORLD_SIZE")
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        with _told_of_lost_store():
            return dist.TCPStore(
                host, int(port), is_master=self.is_main and not hosted, wait_for_workers=False
            )

    def from_main(self, name: str, value: Value) -> Value:
        """Return the main process's ``value`` in every process; the others wait for it."""
        if self._store is None:
            return value
        if self.is_main:
            self.say(name, value)
            return value
        while not self._said(name):
            time.sleep(0.05)
        return self._hear(name)

    def say(self, name: str, value: Any) -> None:
        """Leave ``value`` for the others."""
        with _told_of_lost_store():
            self._store.set(self._prefix + name, json.dumps(value))

    def from_all(self, name: str, value: Value) -> list[Value] | None:
        """Leave ``value``, and return every process's by rank, or None while some are missing."""
        if self._store is None:
            return [value]
        self.say(f"{name}/{self.rank}", value)
        names = [f"{name}/{number}" for number in range(self.size)]
        return [self._hear(each) for each in names] if self._said(*names) else None

    def count(self, name: str, amount: int = 0) -> int:
        """Add ``amount`` to a number that all processes count up, and return the sum so far."""
        if self._store is None:
            self._own[name] = self._own.get(name, 0) + amount
            return self._own[name]
        with _told_of_lost_store():
            return self._store.add(self._prefix + name, amount)

    def _said(self, *names: str) -> bool:
        with _told_of_lost_store():
            return self._store.check([self._prefix + name for name in names])

    def _hear(self, name: str) -> Any:
        with _told_of_lost_store():
            return json.loads(self._store.get(self._prefix + name))


@contextlib.contextmanager
def _told_of_lost_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistNetworkError and its kin
        raise UserError(
            "no connection to the other processes; what they finished is kept, and the same "
            "command with --resume goes on"
        ) from error


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal, put off to where the program may end.

    Within the ``with`` block a first signal is only noted, and ``check()`` raises
    KeyboardInterrupt for it; a second one acts at once. Signals that this process was started to
    ignore (nohup, a shell's &) stay ignored. In a thread other than the main one it does nothing.
    """

    def __enter__(self) -> "Interrupts":
        self._arrived, self._earlier = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
                if number and signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _note(self, *_: object) -> None:
        self._arrived = True
        self.__exit__()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self._arrived:
            raise KeyboardInterrupt


def is_out_of_memory(error: Exception) -> bool:
    """Return whether this is how torch, on any device, or Python says that memory is full."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


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


def file_mappings() -> list[range]:
    """Return the addresses where this process has files mapped; none where no one can tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    mappings = []
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            mappings.append(range(*(int(address, 16) for address in addresses.split("-"))))
    return mappings


def forget_pages(tensor: torch.Tensor, mapped: list[range]) -> None:
    """Give memory back if it is ``mapped``; who reads the tensor again reads the file again."""
    if not any(tensor.data_ptr() in addresses for addresses in mapped):
        return
    page, dont_need = os.sysconf("SC_PAGE_SIZE"), 4  # the latter's name is in sys/mman.h
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)
