"""The folder of what is kept between runs, and whether others could have written there."""

import os
import stat
from pathlib import Path

_CACHE = os.path.expanduser("~/.cache/repaint")  # noqa: PTH111 - pathlib's fails without a home


def cache_folder() -> Path | None:
    """Return the folder of what is kept, or None where others may write on the way to it.

    It is TORCHINDUCTOR_CACHE_DIR, where Inductor's code is, or ~/.cache/repaint.
    """
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _CACHE)
    try:
        if not folder.is_absolute():  # a user without a home
            return None
        folder = folder.resolve()
        for missing in [path for path in (*reversed(folder.parents), folder) if not path.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)
        is_own = all(is_own_path(parent, leads_there=True) for parent in folder.parents)
        is_own = is_own and is_own_path(folder)
    except (OSError, AttributeError):  # of a system without users, too
        return None
    return folder if is_own else None


def is_own_path(path: Path, *, leads_there: bool = False) -> bool:
    """Whether only this user and root may write to ``path`` itself; raises OSError.

    A folder that ``leads_there`` may have the sticky bit instead, as /tmp has: nobody can replace
    in it what is another's.
    """
    status = path.lstat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_safe = not others_write or (leads_there and status.st_mode & stat.S_ISVTX)
    return bool(is_safe) and status.st_uid in (0, os.geteuid()) and not path.is_symlink()
