"""How a command line ends: exit status, one line for a mistake, signals."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from guided_diffusion.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """A parser whose complaint is one line like every other of these programs."""

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
        text.encode()
        return text
    except UnicodeEncodeError:  # it holds bytes that the system's encoding does not have
        raw = os.fsencode(text)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        problem = "the name is not UTF-8: rename it, or give the folder that it is in"
        raise UserError(problem, got=repr(raw)[1:]) from None


class _Outliving:
    """A stream that may break while the program goes on: a closed terminal ends no night's work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def command_line(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a program: exit status 2 and one line on stderr for a ``UserError``.

    Warnings become one line each as well. Ctrl-C exits with 130; any other exception keeps its
    traceback, because it is a defect of the program and not of its input. Of several processes
    that torchrun started, the first speaks for all.
    """
    # Before torch loads GNU OpenMP. Its threads wait busily, by default for so long that two
    # programs that share the cores keep each other from working; a longer wait gains about 2 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    is_main = os.environ.get("RANK", "0") == "0"

    def show(text: object, *_: object, **__: object) -> None:
        if is_main:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    out, err = _Outliving(sys.stdout), _Outliving(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.showwarning = show
        try:
            status = main()
        except UserError as error:
            if not is_main:
                time.sleep(10)  # if the first met it too, torchrun ends this one meanwhile
                err.write("\n")  # off the line of the first one's progress bar
            tqdm.write(f"error: {error}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt as interrupt:
            if is_main or str(interrupt):
                line = f"interrupted: {interrupt}".removesuffix(": ")
                tqdm.write(line, file=sys.stderr)
            status = 130
        out.flush()
    sys.exit(status)


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
