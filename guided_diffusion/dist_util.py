"""The device, and the messages between processes."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from guided_diffusion.cli import place
from guided_diffusion.errors import UserError

Value = TypeVar("Value")


def rank() -> int:
    """Return this process's number among all of torchrun's, 0 without torchrun."""
    return place().rank


def world_size() -> int:
    """Return how many processes torchrun started on all machines, 1 without torchrun."""
    return place().world_size


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
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(key="device", expected="cpu, cuda or cuda:N", got=repr(name))
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this machine or this PyTorch has no Metal GPU", key="device", got=name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", place().local_rank)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError("no such GPU", key="device", got=f"{name} with {count} GPUs")
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU the current one of this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextlib.contextmanager
def _explain_lost_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistNetworkError and its kin
        problem = "no connection to the other processes; what they finished is kept"
        raise UserError(f"{problem}, and the same command with --resume goes on") from error


class Team:
    """The processes that torchrun started, or this one alone, and their messages.

    Messages go through torchrun's key-value store. Collectives would not do: a signal cannot end
    them, and a process that has finished would have to wait for the others. A value is what JSON
    can hold. Raises UserError where the connection to the store is lost because torchrun or the
    main process has ended.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.is_main = rank(), world_size(), is_main()
        store = self._join() if self.size > 1 else dist.HashStore()
        # After a restart by torchrun the store still holds the messages of the last attempt.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self._store = dist.PrefixStore(f"repaint/{attempt}", store)

    @_explain_lost_store()
    def _join(self) -> dist.TCPStore:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # torchrun may have ended before, and this process have another parent by now.
        patience, is_host = 10 if hosted else 60, self.is_main and not hosted
        parent, deadline = os.getppid(), time.monotonic() + patience
        while not is_host:  # torch would write its own lines about each refused connection
            try:
                socket.create_connection((host, port), 5).close()
                break
            except OSError as error:  # torchrun is slow, or it is gone
                if os.getppid() != parent or time.monotonic() > deadline:
                    raise RuntimeError(str(error)) from error
                time.sleep(0.2)
        return dist.TCPStore(host, port, is_master=is_host, wait_for_workers=False)

    def store(self, timeout: timedelta) -> dist.Store:
        """Return the store for use by torch.distributed, under a prefix of its own."""
        store = dist.PrefixStore("torch", self._store)
        store.set_timeout(timeout)
        return store

    @_explain_lost_store()
    def from_main(self, name: str, value: Value) -> Value:
        """Return the main process's ``value`` in every process; the others wait for it."""
        if self.is_main:
            self._store.set(name, json.dumps(value))
            return value
        while not self._store.check([name]):
            time.sleep(0.05)
        return json.loads(self._store.get(name))

    @_explain_lost_store()
    def from_all(self, name: str, value: Value) -> list[Value] | None:
        """Publish ``value``; return all processes' values by rank, None while some lack."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        names = [f"{name}/{number}" for number in range(self.size)]
        is_whole = self._store.check(names)
        return [json.loads(self._store.get(each)) for each in names] if is_whole else None

    @_explain_lost_store()
    def count(self, name: str, amount: int = 0) -> int:
        """Add ``amount`` to a number that all processes count up, and return the sum so far."""
        return self._store.add(name, amount)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch or Python means that memory is full."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed",
             "could not create a primitive")  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
