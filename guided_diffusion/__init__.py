"""RePaint: inpainting with denoising diffusion models (Lugmayr et al., CVPR 2022).

Every module stands alone under its stage's name; this root holds only what all of them share:
the one exception for mistakes a user can mend, and how a command line reports it.
"""

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

# Before torch loads GNU OpenMP. Its threads wait for each other busily, by default for so long that
# two programs that share the cores keep each other from working; a longer wait gains about 2 %.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


class UserError(ValueError):
    """A mistake the user can mend, told in one line: where, what was expected, what was found.

    ``path`` is the file at fault, ``key`` the YAML key or option; ``str()`` is a single line
    whatever the parts contain. Command lines print it and exit with status 2.
    """

    def __init__(
        self,
        problem: str = "",
        *,
        path: object = None,
        key: str | None = None,
        expected: object = None,
        got: object = None,
    ) -> None:
        self.problem, self.path, self.key = problem, path, key
        self.expected, self.got = expected, got
        pairs = (("expected", expected), ("found", got))
        contrast = ", ".join(f"{word} {value}" for word, value in pairs if value is not None)
        what = "; ".join(part for part in (problem, contrast) if part)
        where = [str(part) for part in (path, key) if part is not None]
        super().__init__(" ".join(": ".join([*where, what]).split()))


class OptionParser(argparse.ArgumentParser):
    """A parser whose complaint is one line like every other of these programs."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing how the program is used."""
        raise UserError(f"{message} (--help lists the options)")


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
