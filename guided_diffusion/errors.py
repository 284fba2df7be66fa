"""The one exception for mistakes that a user can correct."""

import os
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can correct, in one line: where, what was expected, what was found.

    ``path`` is the file at fault, ``key`` the YAML key or option; ``str()`` is a single line
    whatever the parts contain. Command lines print it and exit with ``status``, 2.
    """

    status = 2

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
        super().__init__(printable(" ".join(": ".join([*where, what]).split())))


class StoppedError(UserError):
    """A run cannot go on, though its inputs were right: status 1, and what is finished stays."""

    status = 1


def printable(text: str) -> str:
    """Return ``text`` with its unprintable characters, such as a terminal's escapes, in ASCII."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def looked_in(path: str | os.PathLike) -> str:
    """Return where a relative ``path`` that is missing was looked for, to end a message with.

    Empty for other paths. Where the path is right as seen from the program's own folder, as those
    of the published configurations are, it says so.
    """
    path, program = os.fspath(path), Path(__file__).resolve().parents[1]
    if not path or os.path.isabs(path) or "://" in path:  # noqa: PTH117
        return ""
    try:
        here = Path.cwd()
        elsewhere = (program / path).exists() and not program.samefile(here)
    except (OSError, ValueError):  # the working directory was removed, or a null character
        return ""
    hint = f", but it is in {program}: start the program there" if elsewhere else ""
    return f" (looked for in {here}{hint})"
