"""The cache folder, which is used only if no other user may write there."""

import os
import stat
from pathlib import Path

_CACHE = os.path.expanduser("~/.cache/repaint")  # noqa: PTH111 - pathlib's fails without a home


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
