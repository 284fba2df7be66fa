"""How a command line ends: exit status, one line for a mistake, signals."""

import argparse
import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from guided_diffusion import end_at_once_on_ctrl_c
from guided_diffusion.errors import UserError, printable

# ---- Processes -----------------------------------------------------------------------------------

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among those that torchrun started, on all machines and on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place() -> Place:
    """Return this process's place, as torchrun's variables say; that of one alone without them.

    Raises ValueError for a variable that is no whole number. ``leave_stray_team`` decides whether
    the variables count.
    """
    return Place(**{name.lower(): int(os.environ[name]) for name in _PLACE if name in os.environ})


def leave_stray_team() -> str | None:
    """Remove torchrun's variables from the environment unless they are complete and consistent.

    With some of them, set by a shell or a cluster, this process would wait for others that nobody
    starts, or leave pictures to them. Returns a warning, or None where nothing changes.
    """
    is_team, is_one = False, False
    with contextlib.suppress(ValueError):
        here = place()
        is_one = here == Place()
        is_team = all(os.environ.get(name) for name in (*_PLACE, *_ADDRESS))
        is_team &= 0 <= here.local_rank < here.local_world_size <= here.world_size
        is_team &= 0 <= here.rank < here.world_size
    if is_team:
        return None
    found = {name: os.environ.pop(name) for name in _PLACE if name in os.environ}
    if is_one:
        return None
    values = ", ".join(f"{name}={value!r}" for name, value in found.items())
    return (
        f"{values} in the environment is ignored, and this is one process alone: torchrun sets "
        f"{', '.join((*_PLACE, *_ADDRESS))} together, with numbers that fit each other"
    )


# ---- The command line ----------------------------------------------------------------------------


class OptionParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, as a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing how the program is used."""
        raise UserError(f"{message} (--help lists the options)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Read the options as UTF-8, whatever the system takes them for; else raise UserError."""
        given = sys.argv[1:] if args is None else args
        return super().parse_args([_as_utf8(text) for text in given], namespace)


def _as_utf8(text: str) -> str:
    """Return an option as text that can be written, also where the system's names are ASCII."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        problem = "the name is not UTF-8: rename it, or give the folder that it is in"
        raise UserError(problem, got=repr(os.fsencode(text))[1:]) from None


class BreakableStream:
    """A stream whose errors do not end the program, such as those of a terminal that was closed.

    A character that its encoding lacks is written as an escape sequence.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written, and count all of it as written."""
        with contextlib.suppress(OSError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                raw = text.encode(encoding, "backslashreplace")
                self._stream.write(raw.decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, unless the stream is broken."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_closed_streams() -> None:
    """Give the streams that were closed at the start (``>&-``) to the null device.

    Otherwise the next file that is opened, such as a result, gets the stream's number, and
    libraries write their messages into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def command_line(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a program: exit status 2 and one line on stderr for a ``UserError``.

    Warnings become one line each as well. Ctrl-C exits with 130; any other exception keeps its
    traceback, because it is a defect of the program and not of its input. Of several processes
    that torchrun started, the first speaks for all.
    """
    # Before torch loads GNU OpenMP. Its threads wait busily, by default for so long that two
    # programs that share the cores keep each other from working; a longer wait gains about 2 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack frames beside our one line
    _open_closed_streams()
    stray = leave_stray_team()
    is_main = place().rank == 0

    def show(text: object, *_: object, **__: object) -> None:
        if is_main:
            tqdm.write(f"warning: {printable(str(text))}", file=sys.stderr)

    out, err = BreakableStream(sys.stdout), BreakableStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.showwarning = show
        warnings.filterwarnings("ignore", module=r"PIL\.\w+ImagePlugin")  # they name no file
        if stray:
            warnings.warn(stray, stacklevel=2)
        try:
            status = main()
        except UserError as error:
            if not is_main:
                time.sleep(10)  # if the first met it too, torchrun ends this one meanwhile
                err.write("\n")  # off the line of the first one's progress bar
            tqdm.write(f"error: {error}", file=sys.stderr)
            status = error.status
        except MemoryError:
            tqdm.write("error: there is not enough memory", file=sys.stderr)
            status = 1
        except KeyboardInterrupt as interrupt:
            if is_main or str(interrupt):
                line = f"interrupted: {interrupt}".removesuffix(": ")
                tqdm.write(line, file=sys.stderr)
            status = 130
        out.flush()
    atexit.register(end_at_once_on_ctrl_c)  # the interpreter tidies up for a while
    sys.exit(status)


# ---- Signals -------------------------------------------------------------------------------------


# A terminal's Ctrl-C reaches processes and torchrun, which passes it on: the same one once more.
_ECHO = 2.0  # seconds


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal, put off to where the program may end.

    Within the ``with`` block a first signal is only noted, and ``check()`` raises
    KeyboardInterrupt for it, or ``has_arrived`` says so; a second one acts at once. Signals that
    this process was started to ignore (nohup, a shell's &) stay ignored. In a thread other than
    the main one it does nothing. ``notice`` is what the first signal prints.
    """

    def __init__(self, notice: str = "") -> None:
        self._notice = notice

    def __enter__(self) -> "Interrupts":
        self.has_arrived, self._earlier, self._first = False, {}, 0.0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
                if number and signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _note(self, number: int, _: object) -> None:
        if not self.has_arrived:
            self.has_arrived, self._first = True, time.monotonic()
            if self._notice:
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{self._notice}\n".encode())
            if place().world_size == 1:
                self.__exit__()
        elif time.monotonic() - self._first > _ECHO:
            self.__exit__()
            signal.raise_signal(number)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.has_arrived:
            raise KeyboardInterrupt
