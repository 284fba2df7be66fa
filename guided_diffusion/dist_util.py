"""The device, and the messages between processes."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from guided_diffusion.cli import place
from guided_diffusion.errors import UserError

Value = TypeVar("Value")
_JOIN_SECONDS = 60.0  # for which a process waits until the first one is there


def rank() -> int:
    """Return this process's number among all of torchrun's, 0 without torchrun."""
    return place().rank


def world_size() -> int:
    """Return how many processes torchrun started on all machines, 1 without torchrun."""
    return place().world_size


def local_rank() -> int:
    """Return this process's number on its own machine, which is also its GPU's."""
    return place().local_rank


def local_world_size() -> int:
    """Return how many processes torchrun started on this machine, 1 without torchrun."""
    return place().local_world_size


def is_main() -> bool:
    """Return whether this is the main process, which prints and writes for all."""
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
    elif device.type not in ("cpu", "mps"):
        raise UserError(key="device", expected="cpu, cuda or cuda:N", got=repr(name))
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this machine or this PyTorch has no Metal GPU", key="device", got=name)
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU the current one of this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Team:
    """The processes that torchrun started, or this one alone, and their messages.

    Messages go through torchrun's key-value store. Collectives would not do: a signal cannot end
    them, and a process that has finished would have to wait for the others. A value is what JSON
    can hold. Raises UserError where torchrun's addresses are missing, and where the connection to
    the store is lost because torchrun or the main process has ended.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._counts = rank(), world_size(), {}
        self.is_main = is_main()
        self._store = self._join() if self.size > 1 else None
        # After a restart by torchrun the store still holds the messages of the last attempt.
        self._prefix = f"repaint/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"

    def _join(self) -> dist.TCPStore:
        host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        if not host or not port.isdigit():
            problem = "is above 1 without MASTER_ADDR and MASTER_PORT: start with torchrun"
            raise UserError(problem, key="WORLD_SIZE")
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_host, patience = self.is_main and not hosted, _JOIN_SECONDS if not hosted else 10
        parent, deadline = os.getppid(), time.monotonic() + patience
        with _explain_lost_store():
            while not is_host:  # torch would write its own lines about each refused connection
                try:
                    socket.create_connection((host, int(port)), 5).close()
                    break
                except OSError as error:  # torchrun is slow, or it is gone
                    if os.getppid() != parent or time.monotonic() > deadline:
                        raise RuntimeError(str(error)) from error
                    time.sleep(0.2)
            return dist.TCPStore(host, int(port), is_master=is_host, wait_for_workers=False)

    def store(self, timeout: timedelta) -> dist.Store:
        """Return the store for use by torch.distributed, under a prefix of its own."""
        store = dist.PrefixStore(f"{self._prefix}torch", self._store)
        store.set_timeout(timeout)
        return store

    def from_main(self, name: str, value: Value) -> Value:
        """Return the main process's ``value`` in every process; the others wait for it."""
        if self._store is None:
            return value
        if self.is_main:
            self.publish(name, value)
            return value
        while not self._are_published(name):
            time.sleep(0.05)
        return self._read(name)

    def publish(self, name: str, value: Any) -> None:
        """Publish ``value`` for the other processes."""
        with _explain_lost_store():
            self._store.set(self._prefix + name, json.dumps(value))

    def from_all(self, name: str, value: Value) -> list[Value] | None:
        """Publish ``value``; return all processes' values by rank, None while some lack."""
        if self._store is None:
            return [value]
        self.publish(f"{name}/{self.rank}", value)
        names = [f"{name}/{number}" for number in range(self.size)]
        return [self._read(each) for each in names] if self._are_published(*names) else None

    def count(self, name: str, amount: int = 0) -> int:
        """Add ``amount`` to a number that all processes count up, and return the sum so far."""
        if self._store is None:
            self._counts[name] = self._counts.get(name, 0) + amount
            return self._counts[name]
        with _explain_lost_store():
            return self._store.add(self._prefix + name, amount)

    def _are_published(self, *names: str) -> bool:
        with _explain_lost_store():
            return self._store.check([self._prefix + name for name in names])

    def _read(self, name: str) -> Any:
        with _explain_lost_store():
            return json.loads(self._store.get(self._prefix + name))


@contextlib.contextmanager
def _explain_lost_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistNetworkError and its kin
        raise UserError(
            "no connection to the other processes; what they finished is kept, and the same "
            "command with --resume goes on"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch or Python means that memory is full."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed",
             "could not create a primitive")  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
