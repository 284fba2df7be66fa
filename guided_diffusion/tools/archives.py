"""Downloaded files are somebody else's: they are checked, and unpacked so that nothing escapes."""

import contextlib
import filecmp
import json
import os
import shutil
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)


class Refused(Exception):
    """The file is at fault and of no use; the text follows its name in a sentence."""


def check_beginning(path: Path) -> bytes:
    """Return the first 64 bytes of ``path``; Refused for what a server sends in a file's place."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise Refused("is empty")
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise Refused("is a web page and not the file")
    if head.startswith(b"version https://git-lfs"):
        raise Refused("is a Git LFS pointer and not the file")
    return head


def check_zip(path: Path, *, every_byte: bool, old_torch: bool = False) -> None:
    """Refuse what is not a whole zip archive; ``every_byte`` compares all checksums too.

    With ``old_torch`` torch's format before 1.6 passes: one pickle, which only torch can check.
    """
    if check_beginning(path).startswith(b"\x80\x02") and old_torch:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if every_byte else None
    except _BROKEN as error:
        raise Refused(f"is cut off or damaged ({error})") from None
    if broken:
        raise Refused(f"is damaged (checksum of {broken})")


def check_json(path: Path) -> None:
    """Refuse what is not a JSON object."""
    check_beginning(path)
    try:
        is_object = isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise Refused("is not a JSON object")


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file whose table is unreadable or names more bytes than there are.

    The format: 8 bytes hold the table's length, then JSON, then the tensors without a gap.
    """
    check_beginning(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise Refused("is cut off or damaged (its table does not fit into the file)")
        text = file.read(length)
    try:
        table = json.loads(text)
        ends = [row["data_offsets"][1] for name, row in table.items() if name != "__metadata__"]
        end = 8 + length + max(ends)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise Refused("is damaged (its table cannot be read)") from None
    if end != size:
        raise Refused(f"is cut off or damaged ({size} bytes, and its table names {end})")


# ---- data.zip ----------------------------------------------------------------------------------


def _safe_parts(entry: zipfile.ZipInfo) -> tuple[str, ...]:
    """Return the folders and the name of an entry; Refused unless it is a plain file or folder."""
    name = entry.orig_filename  # zipfile's own name has lost what follows a NUL
    parts = tuple(name.removesuffix("/").split("/"))
    # Links and devices are told by the upper half; a drive or stream of Windows has a colon.
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if (
        kind not in (0, stat.S_IFREG, stat.S_IFDIR)
        or (kind == stat.S_IFDIR) > entry.is_dir()
        or any(part == "" or part != part.rstrip(". ") for part in parts)  # Windows drops these
        or any(sign in "\\:\x7f" or ord(sign) < 32 for sign in name)
    ):
        raise Refused(f"holds an unsafe entry, {name!r}: nothing is unpacked")
    return parts


def _take_in(parts: tuple[str, ...], is_dir: bool, seen: dict[str, tuple[str, bool]]) -> None:
    """Note an entry and its folders in ``seen``; Refused where two would be one file somewhere."""
    for depth in range(1, len(parts) + 1):
        path, is_folder = "/".join(parts[:depth]), is_dir or depth < len(parts)
        # File systems that ignore letter case or the form of accents would mix such names up.
        folded = unicodedata.normalize("NFC", path).casefold()
        found = seen.setdefault(folded, (path, is_folder))
        if found != (path, is_folder):
            problem = f"holds an unsafe entry, {path!r} beside {found[0]!r}: nothing is unpacked"
            raise Refused(problem)


def wanted_entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the files below datasets/ by their path below data/, such as ``datasets/gts/0.png``.

    All entries are looked at first. Refused if one is a link or a device, if its path is absolute,
    has ``.``, ``..``, a backslash, a colon or a control character, or if two are the same name,
    in other letter case too.
    """
    seen: dict[str, tuple[str, bool]] = {}
    files: dict[str, zipfile.ZipInfo] = {}
    wanted = {}
    for entry in archive.infolist():
        parts = _safe_parts(entry)
        if len(parts) > 1 and parts[0] == "data":
            parts = parts[1:]
        _take_in(parts, entry.is_dir(), seen)
        name = "/".join(parts)
        if entry.is_dir():
            continue
        if name in files:
            raise Refused(f"holds an unsafe entry, {name!r} twice: nothing is unpacked")
        files[name] = entry
        # Beside the archive itself lie its parts and the list of what it brought.
        if parts[0] == "datasets" and len(parts) > 1 and not parts[1].startswith("data.zip"):
            wanted[name] = entry
    if not wanted:
        raise Refused("is an archive without files below datasets/")
    return wanted


def unpack(path: Path, data: Path, record: Path) -> str:
    """Unpack the files below datasets/ from the archive ``path`` into ``data``; return a summary.

    They go into a fresh folder first and are then renamed one by one. A file that is there and is
    different is the user's, was changed since, or ships with the program: it stays. ``record``
    becomes the list of what was brought, as JSON: name to size in bytes. Raises Refused, with
    nothing written, and OSError where the disk refuses.
    """
    check_zip(path, every_byte=True)
    datasets = (data / "datasets").resolve()
    for left_over in datasets.glob(".unpack-*"):
        shutil.rmtree(left_over)
    with zipfile.ZipFile(path) as archive:
        entries, total = wanted_entries(archive), len(archive.infolist())
        needed = sum(entry.file_size for entry in entries.values())
        if needed > shutil.disk_usage(datasets).free:
            raise OSError(f"unpacked it takes {needed / 1e9:.1f} GB, and the disk has less")
        for name in entries:
            _check_inside(data / name, datasets)
        folder = Path(tempfile.mkdtemp(prefix=".unpack-", dir=datasets))
        try:
            kept = _bring(archive, entries, folder, data)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    others = {*kept} - {*(_brought(record) or {})}  # that no archive has brought
    sizes = {name: entry.file_size for name, entry in entries.items() if name not in others}
    new = record.with_name(f"{record.name}.new")
    new.write_text(json.dumps(sizes, indent=0), encoding="utf-8")
    put_in_place(new, record)
    summary = f"{len(entries) - len(kept)} files unpacked into data/"
    if kept:
        summary += f"; {len(kept)} kept as they are here, such as data/{kept[0]}"
    outside = total - len(entries)
    return summary if not outside else f"{summary}; {outside} other entries left out"


def _bring(
    archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], folder: Path, data: Path
) -> list[str]:
    """Move the entries by way of ``folder`` below ``data``; return the names left as they were."""
    fresh = {name: Path(archive.extract(entry, folder)) for name, entry in entries.items()}
    for name, source in fresh.items():
        if not source.resolve().is_relative_to(folder) or not source.is_file():
            raise Refused(f"holds an unsafe entry, {name!r}: nothing is unpacked")
    kept = []
    for name, source in fresh.items():
        target = data / name
        if os.path.lexists(target) and not _same(source, target):
            kept.append(name)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(source, target)
    return kept


def _same(source: Path, target: Path) -> bool:
    return target.is_file() and filecmp.cmp(source, target, shallow=False)


def _check_inside(target: Path, datasets: Path) -> None:
    """Raise OSError where a link among the folders leads out: there lie somebody's other files."""
    if not target.parent.resolve().is_relative_to(datasets):
        raise OSError(f"{target.parent} is a link that leads out of data/datasets")


def _brought(record: Path) -> dict[str, int] | None:
    """Return what an earlier archive brought: name below data/ to size in bytes; or None."""
    with contextlib.suppress(OSError, ValueError):
        sizes = json.loads(record.read_text(encoding="utf-8"))
        if isinstance(sizes, dict):
            return sizes
    return None


def check_unpacked(data: Path, record: Path) -> list[str]:
    """Return the files that the archive brought and that have another size now.

    Refused if one is gone.
    """
    sizes = _brought(record)
    if sizes is None:
        raise Refused(f"{record.name} cannot be read")
    for name in sizes:
        if not (data / name).is_file():
            raise Refused(f"data/{name} is gone")
    return [name for name, size in sizes.items() if (data / name).stat().st_size != size]


def put_in_place(path: Path, final: Path) -> None:
    """Give a written file its name, once its bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.replace(final)
