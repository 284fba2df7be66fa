"""Finding pictures: in a folder and its subfolders, or in a store that blobfile reads."""

import os
import stat
import warnings
from collections.abc import Iterable, Iterator

from guided_diffusion.errors import UserError, looked_in
from guided_diffusion.io.images import _blobfile

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")  # the published program's, which decide first
OTHER_SUFFIXES = (".webp", ".tif", ".tiff", ".bmp", ".jfif", ".jpe", ".avif")
_UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".psd", ".jxl", ".jp2", ".svg", ".tga", ".ppm", ".pgm", ".exr", ".dcm"),
)
_ALL_SUFFIXES = IMAGE_SUFFIXES + OTHER_SUFFIXES + _UNREAD_SUFFIXES
# A picture called .png has no name rather than a hidden one.
_BARE_SUFFIXES = {suffix[1:] for suffix in _ALL_SUFFIXES}
# Folders that programs and systems fill beside the user's pictures, besides those with a dot.
_FOREIGN_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})


def list_images(path: str, *, key: str | None = None, all_formats: bool = False) -> list[str]:
    """List the pictures below a folder, or the one file that ``path`` is.

    Folders are searched recursively, links followed; what ends in one of ``IMAGE_SUFFIXES`` (any
    case) counts, and with ``all_formats``, or where there is nothing else, in one of
    ``OTHER_SUFFIXES``. What is hidden or a system's is passed over. Sorted by the full path as a
    string. A path with ``://`` goes through blobfile. Warns of pictures that are left out.
    Raises ``UserError`` (naming ``key``) for a missing or unreadable path, or nothing found.
    """
    path = os.fspath(path)
    if not path:
        raise UserError("the path is empty", key=key)
    found = sorted(_list_remote(path, key) if "://" in path else _list_local(path, key))
    if found == [path]:
        return found
    chosen = _with_suffix(found, IMAGE_SUFFIXES)
    if all_formats or not chosen:
        chosen = _with_suffix(found, IMAGE_SUFFIXES + OTHER_SUFFIXES)
    _tell_left_out(path, key, found, chosen)
    return chosen


def _with_suffix(paths: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    return [path for path in paths if path.lower().endswith(suffixes)]


def _tell_left_out(path: str, key: str | None, found: list[str], chosen: list[str]) -> None:
    """Warn of pictures in a folder that are not among the chosen; refuse where none is."""
    there = {stem_of(one) for one in chosen}  # a raw picture beside its JPEG is nobody's loss
    left = [one for one in found if stem_of(one) not in there]
    suffixes = {"." + one.lower().rpartition(".")[2] for one in left}
    told = f"{len(left)} of {len(chosen) + len(left)} pictures are left out"
    told += f" ({' '.join(sorted(suffixes))})"
    readable = suffixes & set(OTHER_SUFFIXES)
    mends = [f"all_formats: true takes {' '.join(sorted(readable))} too"] if readable else []
    if unread := sorted(suffixes - readable):
        mends.append(f"convert {' '.join(unread)} to JPEG or PNG")
    if not chosen:
        looked = " ".join(IMAGE_SUFFIXES + OTHER_SUFFIXES)
        problem = "; ".join([f"no pictures in this folder (looked for {looked})", *mends])
        raise UserError(problem, path=path, key=key)
    if left:
        # The stack level is this module's, so that what is listed twice is told once.
        warnings.warn(f"{path}: {told}; {', '.join(mends)}", stacklevel=1)


def stem_of(path: str) -> str:
    """Return a path without its last suffix."""
    return path.rpartition(".")[0]


def _list_local(path: str, key: str | None) -> list[str]:
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):  # noqa: PTH116 - a Path would lose "./"
            return list(_walk(path, frozenset()))
    except OSError as error:
        problem = f"no such file or folder{looked_in(path)}"
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            path, problem = error.filename or path, error.strerror or str(error)
        raise UserError(problem, path=path, key=key) from error
    except ValueError as error:  # a null character
        raise UserError(str(error), path=repr(path), key=key) from error
    return [path]


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    """Yield the pictures below ``folder``; a link back to a folder ``above`` is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_foreign(entry.name):
                continue
            # A folder or a pipe called x.png is listed too: reading refuses it by name, which is
            # better than pairing everything after it with the wrong mask.
            if entry.name.lower().endswith(_ALL_SUFFIXES):
                yield entry.path
            elif entry.is_dir():
                yield from _walk(entry.path, above | {real})


def _is_foreign(name: str) -> bool:
    """Whether a file or folder is hidden, or was put there by a system or program."""
    is_hidden = name.startswith(".") and name.lstrip(".").lower() not in _BARE_SUFFIXES
    return is_hidden or name.lower() in _FOREIGN_FOLDERS


def _list_remote(path: str, key: str | None) -> list[str]:
    bf = _blobfile(path)
    try:
        if not bf.isdir(path):
            if bf.exists(path):
                return [path]
            raise UserError("no such file or folder", path=path, key=key)
        return [
            f"{folder.rstrip('/')}/{name}"
            for folder, _, names in bf.walk(path)
            for name in names
            if name.lower().endswith(_ALL_SUFFIXES)
            and not any(map(_is_foreign, f"{folder}/{name}".removeprefix(path).split("/")))
        ]
    except UserError:
        raise
    except Exception as error:  # each storage service has exceptions of its own
        raise UserError(f"cannot be listed: {str(error)[:200]}", path=path, key=key) from error


def output_name(path: str) -> str:
    """Name the result of an input: its file name with the last suffix replaced by ``.png``."""
    base = os.path.basename(path.rstrip("/"))  # noqa: PTH119 - also for paths with ://
    stem, dot, _ = base.rpartition(".")
    return f"{stem if dot else base}.png"
