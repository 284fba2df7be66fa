"""Transfers that go on where they broke off: http(s), a folder, huggingface.co, Google Drive."""

import contextlib
import functools
import hashlib
import http.client
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from guided_diffusion.tools.archives import Refused
from guided_diffusion.tools.catalogue import Published

BLOCK = 1 << 18  # bytes
MARGIN = 16 << 20  # bytes that stay free on the disk
TRY_AGAIN = (408, 416, 425, 429)  # those HTTP statuses from 400 to 499 that may pass


@dataclass(frozen=True)
class Settings:
    """Where files go and come from."""

    root: Path  # the folder of data/
    mirror: str  # address or folder, or empty
    timeout: int  # seconds
    tries: int
    lock: int | None = None  # the descriptor that a child must hold too


@dataclass(frozen=True)
class File:
    """One file on its way: ``name`` below a mirror, ``final`` its place."""

    entry: Published
    name: str
    final: Path
    settings: Settings

    @property
    def part(self) -> Path:
        """Where the bytes gather."""
        return self.final.with_name(f"{self.final.name}.part")

    @property
    def record(self) -> Path:
        """The list of what data.zip brought; the archive itself is removed afterwards."""
        return self.final.with_name(f"{self.final.name}.contents")

    def from_drive(self) -> list[Path]:
        """Return the partial files of gdown, which picks names of its own, the largest first."""
        paths = self.final.parent.glob(f"{self.part.name}.drive*")
        return sorted((path for path in paths if path.is_file()), key=bytes_of, reverse=True)


def file_of(entry: Published, settings: Settings, inner: str = "") -> File:
    """Return the file of ``entry``, for a folder the one called ``inner`` in it."""
    folder = "datasets" if entry.name == "data.zip" else "pretrained"
    name = f"{entry.name}/{inner}" if inner else entry.name
    return File(entry, name, settings.root / "data" / folder / name, settings)


class NotFetched(Exception):
    """The file does not come from this source; the text follows its name and a colon."""


class Missing(NotFetched):
    """The source answers, and has no such file."""


# ---- transfers ---------------------------------------------------------------------------------


def bytes_of(path: Path) -> int:
    """Return the size of a file that need not exist."""
    return path.stat().st_size if path.is_file() else 0


def largest(paths: Iterable[Path]) -> int:
    """Return the size of the largest of some files."""
    return max(map(bytes_of, paths), default=0)


def human(size: int) -> str:
    """Return a number of bytes as people read it."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def check_room(file: File, needed: int) -> None:
    """Raise NotFetched unless the disk has room for ``needed`` more bytes."""
    data = file.settings.root / "data"
    free = shutil.disk_usage(data).free
    if needed + MARGIN > free:
        raise NotFetched(f"needs {human(needed)} and {human(free)} are free on the disk of {data}")


def progress(file: File, total: int | None, initial: int) -> tqdm:
    """Return a bar of bytes with the time to come; it shows in a terminal only."""
    return tqdm(
        desc=file.name,
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    )


def write_part(file: File, blocks: Iterable[bytes], total: int | None, start: int) -> None:
    """Append ``blocks`` to the part after its first ``start`` bytes; what was there goes."""
    try:
        file.part.parent.mkdir(parents=True, exist_ok=True)
        stream = file.part.open("r+b" if start else "wb")
    except OSError as error:
        raise NotFetched(f"{file.part}: cannot be written: {error.strerror}") from error
    with stream, progress(file, total, start) as bar:
        stream.seek(start)
        stream.truncate()
        for block in blocks:
            try:
                stream.write(block)
                stream.flush()
            except OSError as error:  # the disk is full
                raise NotFetched(f"{file.part}: cannot be written: {error.strerror}") from error
            bar.update(len(block))


def ask(url: str, timeout: int, method: str = "GET", start: int = 0) -> http.client.HTTPResponse:
    """Open ``url`` from the byte ``start`` on; raises what urllib raises."""
    headers = {"User-Agent": "repaint-download", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers, method=method)
    return urllib.request.urlopen(request, timeout=timeout)


_UNREACHED = (OSError, http.client.HTTPException, ValueError)  # an HTTPError is an OSError


def announced_length(url: str, timeout: int) -> int | None:
    """Return the length of a file as its server tells it, or None."""
    with contextlib.suppress(*_UNREACHED), ask(url, timeout, "HEAD") as answer:
        length = answer.headers.get("Content-Length", "")
        if answer.status == 200 and length.isascii() and length.isdigit():
            return int(length)
    return None


def transfer(file: File, url: str, total: int | None) -> str:
    """Fetch what the part lacks, once; return what went wrong, or nothing when it is complete."""
    start = bytes_of(file.part)
    try:
        answer = ask(url, file.settings.timeout, start=start)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # ours ends beyond theirs
            file.part.unlink(missing_ok=True)
        if 400 <= error.code < 500 and error.code not in TRY_AGAIN:
            kind = Missing if error.code in (404, 410) else NotFetched
            raise kind(f"{url}: HTTP {error.code}") from error
        return f"HTTP {error.code}"
    except _UNREACHED as error:
        return f"no connection: {getattr(error, 'reason', None) or error}"
    with answer:
        if answer.status == 206 and not _continues(answer, start):
            file.part.unlink(missing_ok=True)
            return "the server sent another part than was asked for"
        start = start if answer.status == 206 else 0
        if total is None and answer.length is not None:
            total = start + answer.length
        with contextlib.suppress(OSError, http.client.HTTPException):
            write_part(file, iter(functools.partial(answer.read1, BLOCK), b""), total, start)
            if total is None or bytes_of(file.part) == total:
                return ""
    return "the line breaks off or stalls"


def _continues(answer: http.client.HTTPResponse, start: int) -> bool:
    return answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def get_http(file: File, url: str) -> None:
    """Fill the part from an http(s) address, with as many transfers as bring new bytes."""
    settings, fruitless, most, answered = file.settings, 0, 0, False
    total = announced_length(url, settings.timeout)
    if total is not None:
        check_room(file, max(0, total - bytes_of(file.part)))
    while True:
        if total is not None and bytes_of(file.part) > total:
            file.part.unlink()
        here = bytes_of(file.part)
        if here and here == total:
            return
        most = max(most, here)
        problem = transfer(file, url, total)
        if not problem:
            return
        here = bytes_of(file.part)
        # Bytes that were never here before are worth another try; so a bad line gets through.
        fruitless = 0 if here > most else fruitless + 1
        # A server that has answered is worth waiting for; without a network two tries will do.
        answered = answered or not problem.startswith("no connection")
        if fruitless >= (settings.tries if answered else min(2, settings.tries)):
            given_up = f"given up after {fruitless} tries ({problem}), {human(here)} kept"
            raise NotFetched(f"{url}: {given_up}")
        time.sleep(max(1, fruitless) * settings.timeout / 12)


def get_folder(file: File, path: str) -> None:
    """Fill the part from a file of this machine."""
    source = Path(path)
    if not source.is_file():
        raise Missing(f"{path}: no such file")
    check_room(file, bytes_of(source))
    try:
        with source.open("rb") as stream:
            blocks = iter(functools.partial(stream.read, BLOCK), b"")
            write_part(file, blocks, bytes_of(source), 0)
    except OSError as error:
        raise NotFetched(f"{path}: cannot be read: {error.strerror}") from error


def get_hub(file: File, url: str) -> None:
    """Fill the part from huggingface.co; Refused unless it has the checksum that is told there.

    Large files lie there in Git LFS, whose pointer holds the SHA-256. A safetensors file has no
    checksum of its own, so that without this one a part of another file would pass.
    """
    get_http(file, url)
    pointer = b""
    with contextlib.suppress(*_UNREACHED):
        raw = url.replace("/resolve/", "/raw/")
        with ask(raw, file.settings.timeout) as answer:
            pointer = answer.read(1024)
    found = re.match(rb"version https://git-lfs[^\n]*\noid sha256:([0-9a-f]{64})\s", pointer)
    if found and found[1].decode() != _sha256(file.part):
        raise Refused("is damaged (its SHA-256 is not the one that is told there)")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


QUOTA = (
    "Google Drive sent a page in place of the file; usually its daily limit for this file is used "
    "up (quota): try again in a day, or set REPAINT_MIRROR"
)
QUOTA_SIGNS = ("too many users", "quota", "many accesses", "retrieve file url", "the public link")


def get_drive(file: File, address: str) -> None:
    """Fill the part from Google Drive, by the program gdown."""
    program = shutil.which("gdown")
    if program is None:
        raise NotFetched("is on Google Drive, and gdown is not installed (pip install gdown)")
    # gdown appends to our name for its partial files, will not choose between two, and takes a
    # file of the very name for complete.
    target = file.part.with_name(f"{file.part.name}.drive")
    target.unlink(missing_ok=True)
    for smaller in file.from_drive()[1:]:
        smaller.unlink()
    total = None
    if file.entry.size.endswith(" GB"):
        total = round(float(file.entry.size.removesuffix(" GB")) * 1e9)
        check_room(file, max(0, total - largest(file.from_drive())))
    with tempfile.TemporaryFile() as output:
        command = [program, "--continue", "-O", str(target), address]
        status = _watch(file, command, output.fileno(), total)
        output.seek(0)
        said = " ".join(output.read().decode(errors="replace").split())
    if status == 0 and bytes_of(target):
        with target.open("rb") as stream:
            is_page = stream.read(1) == b"<"
        if not is_page:
            target.replace(file.part)
            return
        target.unlink()
        raise NotFetched(QUOTA)
    if any(sign in said.lower() for sign in QUOTA_SIGNS):
        raise NotFetched(QUOTA)
    raise NotFetched(f"gdown failed: {said[-300:]}")


def _watch(file: File, command: list[str], output: int, total: int | None) -> int:
    """Run gdown and return its exit status; it is ended when nothing arrives any more."""
    held = () if file.settings.lock is None else (file.settings.lock,)
    child = subprocess.Popen(command, stdout=output, stderr=output, pass_fds=held)
    before = largest(file.from_drive())
    last_growth = time.monotonic()
    try:
        with progress(file, total, before) as bar:
            while child.poll() is None:
                time.sleep(0.1)
                now = largest(file.from_drive())
                if now != before:
                    bar.update(max(0, now - before))
                    before, last_growth = now, time.monotonic()
                if time.monotonic() - last_growth >= file.settings.timeout:
                    seconds = file.settings.timeout
                    raise NotFetched(f"Google Drive sent nothing for {seconds} seconds")
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
    return child.returncode
