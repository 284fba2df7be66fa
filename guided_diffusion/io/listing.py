"""Finding and opening pictures: below a folder, or in a store that blobfile reads."""

import io
import os
import stat
import types
import warnings
from collections.abc import Iterable, Iterator

from guided_diffusion.errors import UserError, looked_in
from guided_diffusion.io.files import open_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")  # the published program's, which decide first
OTHER_SUFFIXES = (".webp", ".tif", ".tiff", ".bmp", ".jfif", ".jpe", ".avif")
_UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".psd", ".jxl", ".jp2", ".svg", ".tga", ".ppm", ".pgm", ".exr", ".dcm"),
)
_ALL_SUFFIXES = IMAGE_SUFFIXES + OTHER_SUFFIXES + _UNREAD_SUFFIXES
# Folders that programs and systems fill beside the user's pictures, besides those with a dot.
_FOREIGN_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})


def list_images(
    path: str, *, key: str | None = None, all_formats: bool = False, nor: str = ""
) -> list[str]:
    """List the pictures below a folder, or the one file that ``path`` is.

    Folders are searched recursively, links followed, but each folder once; what ends in one of
    ``IMAGE_SUFFIXES`` (any case) counts, and with ``all_formats``, or where there is nothing else,
    in one of ``OTHER_SUFFIXES``. What is hidden or a system's is passed over. Sorted by the full
    path as a string. A path with ``://`` goes through blobfile. Warns of pictures that are left
    out. Raises ``UserError`` (naming ``key``) for a missing or unreadable path, or nothing found;
    ``nor`` is added to the message for a missing path.
    """
    path = os.fspath(path)
    if not path:
        raise UserError("the path is empty", key=key)
    try:
        found = sorted(_list_remote(path) if "://" in path else _list_local(path))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        problem = f"no such file or folder{nor}{looked_in(path)}"
        raise UserError(problem, path=path, key=key) from None
    except Exception as error:  # each storage service has exceptions of its own
        problem = getattr(error, "strerror", None) or f"cannot be listed: {str(error)[:200]}"
        path = repr(path) if "\0" in path else getattr(error, "filename", None) or path
        raise UserError(problem, path=path, key=key) from error
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
    stems = {stem_of(file) for file in chosen}  # a raw picture beside its JPEG is not missed
    omitted = [file for file in found if stem_of(file) not in stems]
    suffixes = {"." + file.lower().rpartition(".")[2] for file in omitted}
    readable = suffixes & set(OTHER_SUFFIXES)
    mends = [f"all_formats: true takes {' '.join(sorted(readable))} too"] if readable else []
    if unread := sorted(suffixes - readable):
        mends.append(f"convert {' '.join(unread)} to JPEG or PNG")
    if not chosen:
        suffixes_read = " ".join(IMAGE_SUFFIXES + OTHER_SUFFIXES)
        problem = "; ".join([f"no pictures in this folder (looked for {suffixes_read})", *mends])
        raise UserError(problem, path=path, key=key)
    if omitted:
        count = f"{len(omitted)} of {len(chosen) + len(omitted)} pictures are left out"
        text = f"{path}: {count} ({' '.join(sorted(suffixes))}); {', '.join(mends)}"
        # Python shows a warning once a line of code: from here, a folder listed twice warns once.
        warnings.warn(text, stacklevel=1)


def stem_of(path: str) -> str:
    """Return a path without its last suffix."""
    return path.rpartition(".")[0]


def _list_local(path: str) -> Iterable[str]:
    is_folder = stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116 - a Path would lose "./"
    return _walk(path) if is_folder else [path]


def _walk(top: str) -> Iterator[str]:
    """Yield the pictures below a folder. A folder that several links lead to is searched once."""
    waiting, seen = [top], set()
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)  # noqa: PTH116 - a Path would lose "./"
        identity = status.st_dev, status.st_ino
        if identity in seen:
            continue
        seen.add(identity)
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in found:
            # A folder or a pipe called x.png is listed too: reading it then fails by its name,
            # and no picture after it gets the wrong mask.
            if _is_foreign(entry.name):
                continue
            if entry.name.lower().endswith(_ALL_SUFFIXES):
                yield entry.path
            elif entry.is_dir():
                waiting.append(entry.path)


def _is_foreign(name: str) -> bool:
    """Whether a file or folder is hidden, or was put there by a system or program."""
    return name.startswith(".") or name.lower() in _FOREIGN_FOLDERS


def _list_remote(path: str) -> list[str]:
    bf = _blobfile()
    if not bf.isdir(path):
        if bf.exists(path):
            return [path]
        raise FileNotFoundError
    return [
        f"{folder.rstrip('/')}/{name}"
        for folder, _, names in bf.walk(path)
        for name in names
        if name.lower().endswith(_ALL_SUFFIXES)
        and not any(map(_is_foreign, f"{folder}/{name}".removeprefix(path).split("/")))
    ]


def output_name(path: str) -> str:
    """Name the result of an input: its file name with the last suffix replaced by ``.png``."""
    base = os.path.basename(path.rstrip("/"))  # noqa: PTH119 - also for paths with ://
    stem, dot, _ = base.rpartition(".")
    return f"{stem if dot else base}.png"


def open_bytes(path: str) -> io.BufferedIOBase:
    """Open a local or remote file; raises UserError if it is not a regular file, or empty."""
    if "://" in path:
        with _blobfile().BlobFile(path, "rb") as remote:
            stream: io.BufferedIOBase = io.BytesIO(remote.read())
    else:
        stream = open_regular(path)
    if not stream.read(1):
        stream.close()
        raise UserError("is empty", path=path)
    stream.seek(0)
    return stream


def _blobfile() -> types.ModuleType:
    """Import blobfile, which gives up soon where a store is out of reach."""
    import blobfile

    blobfile.configure(retry_limit=6, log_callback=lambda _: None)
    return blobfile
