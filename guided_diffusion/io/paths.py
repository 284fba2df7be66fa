"""Where results may go: into folders of this machine, away from inputs; and the cache folder."""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from guided_diffusion.errors import UserError

_CACHE = os.path.expanduser("~/.cache/repaint")  # noqa: PTH111 - pathlib's fails without a home
_REMOTE = re.compile(r"[A-Za-z][\w+.-]+:[/\\]")  # one letter alone is a drive of Windows


def refuse_remote(path: str | os.PathLike) -> None:
    """Raise ``UserError`` for an address such as gs://bucket/x, or what ``Path`` makes of it."""
    if _REMOTE.match(os.fspath(path)):
        problem = "results are written to folders of this machine only: copy them from there"
        raise UserError(problem, path=path)


def check_folder(folder: str | os.PathLike) -> Path:
    """Return the part of ``folder`` that exists; UserError where results could not go there."""
    refuse_remote(folder)
    parts = (Path(folder), *Path(folder).absolute().parents)
    existing = next(part for part in parts if os.path.lexists(part))
    problem = ""
    if max(len(os.fsencode(part.name)) for part in parts) > 255:
        problem, existing = "the name is too long", Path(folder)
    elif not existing.is_dir():
        problem = "not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem = "no permission"
    if problem:
        raise UserError(f"results cannot be written there: {problem}", path=existing)
    return existing


def refuse_inside(folder: str | os.PathLike, inputs: str | os.PathLike, *, key: str) -> None:
    """Raise ``UserError`` where a folder of results is the folder of inputs, or lies in it.

    The next run would take results for inputs. Links are followed, and letters compared as the file
    system does. ``inputs`` may be a file; ``key`` is theirs.
    """
    try:
        real = Path(os.path.realpath(folder))
        parts = (real, *real.parents) if Path(inputs).is_dir() else ()
        lies_inside = any(part.exists() and part.samefile(inputs) for part in parts)
    except (OSError, ValueError):  # other checks tell what is wrong with the path
        return
    if lies_inside:
        problem = f"results would go into the folder of inputs {inputs}"
        reason = "the next run would take them for inputs; choose a folder elsewhere"
        raise UserError(f"{problem}, and {reason}", path=folder, key=key)


def refuse_overwriting(
    targets: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]
) -> None:
    """Raise ``UserError`` where a file to write is one to read, under any of its names."""

    def identity(path: str | os.PathLike) -> tuple[int, int] | None:
        try:
            status = Path(path).stat()
        except (OSError, ValueError):  # it does not exist yet, or is not on this machine
            return None
        return status.st_dev, status.st_ino

    owners = {identity(path): path for path in inputs}
    for target in targets:
        found = identity(target)
        if found is not None and found in owners:
            problem = f"a result would overwrite the input {owners[found]}; choose another folder"
            raise UserError(problem, path=target)


# ---- The cache folder, which is used only if no other user may write there -----------------------


def cache_folder() -> Path | None:
    """Return the cache folder, made if need be, or None if others may write there or above it.

    It is TORCHINDUCTOR_CACHE_DIR, where Inductor's code is, or ~/.cache/repaint.
    """
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _CACHE)
    try:
        if not folder.is_absolute():  # a user without a home
            return None
        folder = folder.resolve()
        for missing in [each for each in (*reversed(folder.parents), folder) if not each.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)  # parents=True ignores the mode
        is_private = all(is_own_path(parent, is_parent=True) for parent in folder.parents)
        return folder if is_private and is_own_path(folder) else None
    except (OSError, AttributeError):  # AttributeError: a system without user numbers
        return None


def is_own_path(path: Path, *, is_parent: bool = False) -> bool:
    """Whether only this user and root may write to ``path`` itself; raises OSError.

    A parent folder may have the sticky bit instead, as /tmp has: others cannot replace what is in
    it.
    """
    status = path.lstat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_safe = not others_write or (is_parent and status.st_mode & stat.S_ISVTX)
    return bool(is_safe) and status.st_uid in (0, os.geteuid()) and not path.is_symlink()
