"""Fetch the published checkpoints and data into data/: ``sh download.sh``.

gdown writes a partial file, which a later run continues. A file gets its name after its check.
"""

import argparse
import functools
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gdown
from tqdm import tqdm

if __name__ == "__main__":  # as a script its own folder comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.errors import UserError, printable
from guided_diffusion.io.files import locked
from guided_diffusion.tools.catalogue import CATALOGUE, DEFAULT, DRIVE, Published, look_up

ROOT = Path(__file__).resolve().parents[2]
QUOTA = """Google Drive sent a page in place of the file; usually its daily limit for this file is
used up (quota): try again in a day, or set REPAINT_MIRROR"""
JSON_LIMIT, MARGIN = 1 << 20, 16 << 20  # bytes; MARGIN stays free on the disk
TRIES = 3  # in a row without a new byte
PASSING = (408, 425, 429)  # HTTP statuses from 400 to 499 after which another try may help
PLAIN = {0, stat.S_IFREG, stat.S_IFDIR}  # kinds of an archive's entries; 0: not stated


class NotFetchedError(Exception):
    """A source does not give a file; the text says why."""


@dataclass(frozen=True)
class Target:
    """One file: its name below a mirror, its place, its greatest size, and where it lies."""

    name: str
    path: Path
    limit: int  # bytes
    addresses: tuple[str, ...]

    @property
    def part(self) -> Path:
        """Where a whole file waits for its check."""
        return self.path.with_name(f"{self.path.name}.part")

    def leftovers(self) -> list[Path]:
        """Return the part and gdown's partial file, whose name begins with the part's."""
        return list(self.path.parent.glob(f"{self.part.name}*"))

    def remove_leftovers(self) -> None:
        """Remove all that has arrived of the file."""
        for path in self.leftovers():
            path.unlink()


def targets_of(entry: Published, mirror: str = "") -> list[tuple[Target, ...]]:
    """Return the files of an entry; of each tuple one is enough."""

    def target(inner: str) -> Target:
        name = f"{entry.name}/{inner}".rstrip("/")
        address = f"{entry.address}/{inner}".rstrip("/")
        folder = "datasets" if entry.name == "data.zip" else "pretrained"
        addresses = (f"{mirror}/{name}", address) if mirror else (address,)
        limit = JSON_LIMIT if inner.endswith(".json") else entry.limit
        return Target(name, ROOT / "data" / folder / name, limit, addresses)

    return [tuple(target(inner) for inner in row) for row in entry.files]


BAR = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}  # None: but in a terminal
say = functools.partial(print, flush=True)  # flushed, to stay in order with standard error
human = functools.partial(tqdm.format_sizeof, suffix="B")


def complain(text: str) -> None:
    """Print one line to standard error; what a server sent cannot control the terminal."""
    say(printable(" ".join(text.split())), file=sys.stderr)


# ---- transfers -----------------------------------------------------------------------------------


def check_room(target: Target, size: int, missing: int) -> None:
    """Raise NotFetchedError for a ``size`` above the limit, or no room for ``missing`` bytes."""
    if size > target.limit:
        raise NotFetchedError(f"has {human(size)}, expected at most {human(target.limit)}")
    needed, free = missing + MARGIN, shutil.disk_usage(target.path.parent).free
    if needed > free:
        raise NotFetchedError(f"needs {human(needed)}, and the disk has {human(free)}")


def fill_part(target: Target, address: str, timeout: int) -> None:
    """Bring a file to ``target.part``; raises NotFetchedError and OSError.

    A transfer that breaks off is continued, until ``TRIES`` tries in a row bring no new byte.
    """
    if "://" not in address:  # a folder of this machine
        size = Path(address).stat().st_size
        check_room(target, size, size)
        shutil.copyfile(address, target.part)
        return
    failures, most = 0, 0
    while failures < TRIES:
        time.sleep(failures * timeout / 20)
        try:
            transfer(target, address, timeout)
            return
        except gdown.FileURLRetrievalError as error:
            raise NotFetchedError(QUOTA) from error
        except (OSError, gdown.DownloadError) as error:  # all exceptions of requests are OSErrors
            reason = getattr((error.args or [error])[0], "reason", error)
            problem, response = str(reason)[:200], getattr(error, "response", None)
            if response is not None:
                problem = f"HTTP {response.status_code}"
                if 400 <= response.status_code < 500 and response.status_code not in PASSING:
                    break
            elif "byte range" in problem:  # gdown cannot continue what is here
                target.remove_leftovers()
        failures += 1
        size = sum(path.stat().st_size for path in target.leftovers())
        if size > most:
            failures, most = 0, size
    raise NotFetchedError(problem)


def transfer(target: Target, address: str, timeout: int) -> None:
    """Let gdown fetch the rest of a file; raises as gdown, and NotFetchedError as ``check_room``.

    A file above the limit is removed, and one of unknown size that the disk has no room for.
    """
    source = {"id": address.rpartition("/")[2]} if address.startswith(DRIVE) else {"url": address}
    options = {"quiet": True, "resume": True, "use_cookies": False, "timeout": timeout}
    with tqdm(desc=target.name, **BAR) as bar:

        def report(size: int, total: int | None) -> None:
            bar.total = total
            bar.update(size - bar.n)
            check_room(target, max(size, total or 0), (total or size) - size)

        try:
            gdown.download(**source, output=str(target.part), progress=report, **options)
        except NotFetchedError:
            if bar.total is None or bar.total > target.limit:
                target.remove_leftovers()
            raise


# ---- checks --------------------------------------------------------------------------------------


def check(target: Target, path: Path) -> None:
    """Raise UserError unless ``path`` is what the target should be; unpack data.zip."""
    try:
        if target.path.suffix == ".zip":
            say(f"{target.name}: {unpack(path, target)}")
        elif target.path.suffix == ".json":
            if not isinstance(json.loads(path.read_bytes()), dict):
                raise UserError("is not a JSON object", path=path)
        else:
            if target.path.suffix == ".safetensors":
                import safetensors  # noqa: F401
            from guided_diffusion.io.checkpoints import check_checkpoint

            check_checkpoint(path)
    except ImportError as error:
        say(f"{target.name}: not checked: {error}")
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise UserError(f"is damaged: {error}", path=path) from error


def unpack(archive: Path, target: Target) -> str:
    """Unpack the files below datasets/ into data/, and return a summary.

    What exists already ships with the program or is the user's: it stays. Raises UserError, with
    nothing written, for a link, a device, or an archive that is larger than published.
    """
    data, datasets = ROOT / "data", (ROOT / "data/datasets").resolve()
    for leftover in datasets.glob(".unpack-*"):
        shutil.rmtree(leftover)
    with (
        tempfile.TemporaryDirectory(prefix=".unpack-", dir=datasets) as folder,
        zipfile.ZipFile(archive) as opened,
    ):
        entries = opened.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > target.limit:
            problem = f"holds {human(unpacked)}, expected at most {human(target.limit)}"
            raise UserError(problem, path=archive)
        if not {stat.S_IFMT(entry.external_attr >> 16) for entry in entries} <= PLAIN:
            raise UserError("holds a link or a device", path=archive)
        check_room(target, unpacked, unpacked)
        # All is unpacked before the first file is renamed. zipfile removes drives and ".." itself.
        paths = [Path(opened.extract(entry, folder)) for entry in entries if not entry.is_dir()]
        names = [path.relative_to(folder).as_posix().removeprefix("data/") for path in paths]
        wanted = {n: p for n, p in zip(names, paths, strict=True) if n.startswith("datasets/")}
        if not wanted:
            raise UserError("has no files below datasets/", path=archive)
        here = {name for name in wanted if os.path.lexists(data / name)}
        for name in wanted.keys() - here:
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            wanted[name].replace(data / name)
    return f"{len(wanted) - len(here)} files unpacked into data/, {len(here)} were here and stay"


# ---- from start to end ---------------------------------------------------------------------------


def is_here(target: Target) -> bool:
    """Return whether the file is here and whole; a damaged one is renamed."""
    if not target.path.is_file():
        return False
    try:
        check(target, target.path)
    except UserError as error:
        broken = target.path.with_name(f"{target.path.name}.broken")
        complain(f"{target.name}: {error.problem}; renamed to {broken.name}")
        target.path.replace(broken)
        return False
    return True


def fetch_from(target: Target, address: str, timeout: int) -> None:
    """Fill the part, check it and give it its name; raises NotFetchedError and OSError.

    A file that is refused is removed, and fetched once more where an earlier part was continued.
    """
    is_continued = bool(target.leftovers())
    fill_part(target, address, timeout)
    try:
        check(target, target.part)
    except UserError as error:
        target.part.unlink(missing_ok=True)
        if not is_continued:
            raise NotFetchedError(f"what came {error.problem}") from error
        fetch_from(target, address, timeout)
    else:
        target.part.replace(target.path)


def fetch_file(target: Target, timeout: int) -> bool:
    """Bring one file into its place; return whether it is there."""
    target.path.parent.mkdir(parents=True, exist_ok=True)
    for address in target.addresses:
        say(f"{target.name}: from {address}")
        try:
            fetch_from(target, address, timeout)
            return True
        except (NotFetchedError, OSError) as error:
            complain(f"{target.name}: {address}: {error}")
    if address.startswith(DRIVE):
        complain(
            f"by hand: open {address}/view in a browser, save the file as {target.path}, and give "
            "the same command again: it checks the file"
        )
    return False


def fetch(entry: Published, mirror: str, timeout: int) -> bool:
    """Bring a file or a folder into its place; return whether it is there."""
    for alternatives in targets_of(entry, mirror):
        try:
            if any(is_here(target) for target in alternatives):
                continue
            if not any(fetch_file(target, timeout) for target in alternatives):
                return False
        except OSError as error:
            complain(f"{entry.name}: {error}")
            return False
    say(f"{entry.name}: ok")
    return True


def print_list() -> None:
    """Print every published file: its size where known, whether it is here, and its licence."""
    say(f"{'FILE':<28} {'SIZE':<7} {'HERE':<7} LICENCE")
    for entry in CATALOGUE:
        rows = targets_of(entry)
        is_here = all(any(t.path.exists() for t in row) for row in rows)
        parts = (t.path.parent.glob(f"{t.path.name}*") for row in rows for t in row)
        here = "yes" if is_here else "partly" if any(map(any, parts)) else "-"
        size = human(entry.size * 1e9) if entry.size else "-"
        say(f"{entry.name:<28} {size:<7} {here:<7} {entry.licence}")


def read_settings() -> tuple[str, int]:
    """Return the mirror's address, or nothing, and the timeout in seconds; raises UserError."""
    timeout = os.environ.get("REPAINT_TIMEOUT") or "60"
    if not (timeout.isascii() and timeout.isdigit() and 0 < int(timeout) < 10**6):
        raise UserError(key="REPAINT_TIMEOUT", expected="whole seconds", got=timeout)
    mirror = os.environ.get("REPAINT_MIRROR", "").removeprefix("file://").rstrip("/")
    if mirror and not (mirror.startswith(("http://", "https://")) or Path(mirror).is_dir()):
        expected = "an http(s) address or a folder"
        raise UserError(key="REPAINT_MIRROR", expected=expected, got=mirror)
    return mirror, int(timeout)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is asked for; return the exit status."""
    parser = OptionParser(
        prog="sh download.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Fetch models and data into data/. Without a NAME: {", ".join(DEFAULT[:2])},
data.zip (the face example and the masks), {DEFAULT[3]} and {DEFAULT[4]}. The same
command continues a transfer that broke off. Files that are here stay, changed ones too.""",
        epilog="""\
environment:
  REPAINT_MIRROR   an http(s) address or a folder with the files, which is asked first
  REPAINT_TIMEOUT  seconds without data after which a transfer counts as broken (60)

exit status: 0 all is here, 1 something is missing, 2 the command is wrong""",
    )
    names_help = "a name of the list, with or without .pt or .zip"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names_help)
    parser.add_argument("-l", "--list", action="store_true", help="sizes, licences, what is here")
    options = parser.parse_args(argv)
    entries = list(dict.fromkeys(look_up(word) for word in options.names or DEFAULT))
    if options.list:
        print_list()
        return 0
    mirror, timeout = read_settings()
    with locked(ROOT / "data/pretrained"):
        missing = [entry.name for entry in entries if not fetch(entry, mirror, timeout)]
    if missing:
        complain(f"missing: {' '.join(missing)} (the same command tries again)")
        return 1
    say("all is here")
    return 0


if __name__ == "__main__":
    command_line(main)
