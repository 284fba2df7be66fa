"""Fetch the published checkpoints and data into data/: ``bash download.sh``."""

import argparse
import contextlib
import functools
import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # as a script its own folder comes first on the path
    _SELF = Path(__file__)
    sys.path[0] = str((_SELF.resolve() if _SELF.is_symlink() else _SELF.absolute()).parents[2])
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.errors import UserError
from guided_diffusion.tools.archives import (
    Refused,
    check_json,
    check_safetensors,
    check_unpacked,
    check_zip,
    put_in_place,
    unpack,
)

BLOCK = 1 << 18  # bytes
# A link to this file is followed, and a link to a folder above it is not: data/ lies beside that.
ROOT = Path(sys.path[0]) if __name__ == "__main__" else Path(__file__).resolve().parents[2]
MARGIN = 16 << 20  # bytes that stay free on the disk
TRY_AGAIN = (408, 416, 425, 429)  # those HTTP statuses from 400 to 499 that may pass
KEPT = "what has arrived is kept, and the same command goes on from there"
OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
HUB = "https://huggingface.co"


# ---- what there is -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A file or a folder that somebody published."""

    name: str
    source: str  # drive (Google Drive), http, or hub (a folder on huggingface.co)
    address: str
    licence: str
    network: str = ""  # "model" or "classifier"
    conf: str = ""  # the configuration that describes the network
    size: str = "-"


# "see source": the code's licence is known, the terms of the weights or pictures are not.
_CODE, _REPAINT = "MIT (code); weights: see source", "CC BY-NC-SA 4.0"
CATALOGUE = (
    *(
        Published(f"{name}.pt", "drive", address, _REPAINT, "model", conf, "2.2 GB")
        for name, address, conf in (
            ("celeba256_250000", "1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX", "test_c256_thick"),
            ("places256_300000", "1QEl-btGbzQz6IwkXiFGd49uQNTUtTHsk", "test_p256_thick"),
        )
    ),
    Published(
        "data.zip",
        "drive",
        "1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv",
        f"{_REPAINT}; pictures: see source",
    ),
    *(
        Published(f"{name}.pt", "http", OPENAI, _CODE, network, conf)
        for name, network, conf in (
            ("256x256_diffusion", "model", "test_inet256_thick"),
            ("256x256_classifier", "classifier", "test_inet256_thick"),
            ("256x256_diffusion_uncond", "model", "inet256_uncond"),
            ("lsun_bedroom", "model", "lsun_bedroom"),
            ("lsun_cat", "model", "lsun_cat"),
            ("lsun_horse", "model", "lsun_horse"),
            ("lsun_horse_nodropout", "model", "lsun_horse_nodropout"),
            ("512x512_diffusion", "model", "inet512"),
            ("512x512_classifier", "classifier", "inet512"),
            ("64x64_diffusion", "model", "inet64"),
            ("64x64_classifier", "classifier", "inet64"),
            ("128x128_diffusion", "model", "inet128"),
            ("128x128_classifier", "classifier", "inet128"),
        )
    ),
    *(
        Published(name, "hub", f"google/{name}", "Apache-2.0")
        for name in (
            "ddpm-celebahq-256",
            "ddpm-ema-celebahq-256",
            "ddpm-church-256",
            "ddpm-cat-256",
            "ddpm-bedroom-256",
        )
    ),
)
DEFAULT = [entry.name for entry in CATALOGUE[:5]]
# A folder of diffusers is a pipeline with folders in it, or the bare network. Of each row the
# first file that there is will do; without the rows marked True the model is of no use.
HUB_FILES = (
    (True, ("config.json", "unet/config.json")),
    (True, ("scheduler_config.json", "scheduler/scheduler_config.json")),
    (
        True,
        (
            "diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.bin",
        ),
    ),
    (False, ("model_index.json",)),
)


def look_up(word: str) -> Published:
    """Return what is called ``word``, with or without .pt, .zip or owner; raises UserError."""
    for entry in CATALOGUE:
        stem = entry.name.removesuffix(".pt").removesuffix(".zip")
        if word in (entry.name, stem, f"google/{entry.name}"):
            return entry
    raise UserError(f"{word} is not a published file; bash download.sh --list names them all")


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

    def partial(self) -> list[Path]:
        """Return what has arrived so far, the largest first; gdown picks names of its own."""
        paths = [self.part, *self.final.parent.glob(f"{self.part.name}.drive*")]
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
    partial = [path for path in file.partial() if path != file.part]
    for smaller in partial[1:]:
        smaller.unlink()
    total = None
    if file.entry.size.endswith(" GB"):
        total = round(float(file.entry.size.removesuffix(" GB")) * 1e9)
        check_room(file, max(0, total - sum(bytes_of(path) for path in partial[:1])))
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
    before = sum(bytes_of(path) for path in file.partial()[:1])
    last_growth = time.monotonic()
    try:
        with progress(file, total, before) as bar:
            while child.poll() is None:
                time.sleep(0.1)
                now = sum(bytes_of(path) for path in file.partial()[:1])
                if now != before:
                    bar.update(max(0, now - before))
                    before, last_growth = now, time.monotonic()
                if time.monotonic() - last_growth >= file.settings.timeout:
                    seconds = file.settings.timeout
                    raise NotFetched(f"Google Drive sent nothing for {seconds} seconds")
    finally:
        if child.poll() is None:
            child.terminate()
        child.wait()
    return child.returncode


# ---- checks ------------------------------------------------------------------------------------


def check(file: File, path: Path, *, every_byte: bool) -> None:
    """Raise Refused unless ``path`` holds what ``file`` should; other exceptions say nothing."""
    suffix = file.final.suffix
    if suffix == ".json":
        check_json(path)
    elif suffix == ".safetensors":
        check_safetensors(path)
    else:
        check_zip(path, every_byte=every_byte, old_torch=suffix != ".zip")
        if file.entry.network:
            check_keys(path, file.entry, file.settings.root)


def check_keys(path: Path, entry: Published, root: Path) -> None:
    """Refuse a checkpoint whose names or shapes are not those of the network of its YAML."""
    try:
        import torch
    except ImportError:
        say("  torch is not installed: the file's table is checked, not its keys")
        return
    from guided_diffusion.config.keys import load_conf
    from guided_diffusion.io.checkpoints import state_dict_shapes
    from guided_diffusion.script_util import create_classifier, create_model

    create = {"model": create_model, "classifier": create_classifier}[entry.network]
    with torch.device("meta"):
        built = create(load_conf(str(root / "confs" / f"{entry.conf}.yml")))
    expected = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    try:
        found = {key: tuple(shape) for key, shape in state_dict_shapes(path).items()}
    except UserError as error:
        raise Refused(f"cannot be read: {error}") from None
    wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if wrong:
        raise Refused(
            f"is another network: {len(wrong)} keys differ, such as {wrong[0]} "
            f"(expected {expected.get(wrong[0])}, found {found.get(wrong[0])})"
        )


def finish(file: File, path: Path) -> None:
    """Check all of ``path`` and give it its name, or unpack it; raises as ``check``."""
    if file.entry.name == "data.zip":
        say(f"  {unpack(path, file.settings.root / 'data', file.record)}")
        file.part.unlink(missing_ok=True)
    else:
        check(file, path, every_byte=True)
        put_in_place(path, file.final)


def is_here(file: File) -> bool:
    """Whether the file is here and whole; a broken one is moved out of the way."""
    if file.record.is_file():
        try:
            check_unpacked(file.settings.root / "data", file.record)
            return True
        except Refused as reason:
            say(f"{file.name}: fetched again: {reason}")
    if not file.final.is_file():
        return False
    try:
        if file.entry.name == "data.zip":
            finish(file, file.final)
        else:
            check(file, file.final, every_byte=False)
    except Refused as reason:
        broken = file.final.with_name(f"{file.final.name}.broken")
        here, there = (path.relative_to(file.settings.root) for path in (file.final, broken))
        complain(f"{file.name}: {here} {reason}; moved to {there}")
        file.final.replace(broken)
        return False
    except Exception as error:
        raise NotFetched(f"is here and could not be checked: {_told(error)}") from error
    return True


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---- from start to end -------------------------------------------------------------------------


def say(text: str) -> None:
    """Print to standard output at once, in order with what goes to standard error."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr, flush=True)


def get(file: File, source: tuple[Callable[[File, str], None], str]) -> None:
    """Fetch and finish a file from one source: how, and where; raises NotFetched."""
    transport, address = source
    while True:
        resumed = bytes_of(file.part) > 0
        transport(file, address)
        try:
            return finish(file, file.part)
        except Refused as reason:
            file.part.unlink()
            problem = f"what came from {address} {reason}"
            if not resumed:
                raise NotFetched(problem) from reason
            # The earlier part may have come from elsewhere: the whole file gets one more chance.
            complain(f"{file.name}: {problem}")
            say(f"{file.name}: once more from the start")
        except Exception as error:
            raise NotFetched(f"could not be checked: {_told(error)}") from error


def sources(file: File) -> Iterator[tuple[str, tuple[Callable[[File, str], None], str]]]:
    """Yield where a file may be had, first the mirror: in words, how, and the address."""
    mirror, entry = file.settings.mirror, file.entry
    if mirror:
        transport = get_http if mirror.startswith("http") else get_folder
        yield mirror, (transport, f"{mirror}/{file.name}")
    if entry.source == "drive":
        yield "Google Drive", (get_drive, entry.address)
    elif entry.source == "http":
        yield entry.address, (get_http, f"{entry.address}/{file.name}")
    else:
        inner = file.name.removeprefix(f"{entry.name}/")
        address = f"{HUB}/{entry.address}"
        yield address, (get_http, f"{address}/resolve/main/{inner}")


def fetch_file(file: File) -> bool:
    """Bring one file into its place; return whether it is there. All trouble is told."""
    try:
        if is_here(file):
            say(f"{file.name}: is here")
            return True
        for words, source in sources(file):
            say(f"{file.name}: from {words}")
            try:
                get(file, source)
                return True
            except NotFetched as problem:
                complain(f"{file.name}: {problem}")
    except NotFetched as problem:
        complain(f"{file.name}: {problem}")
        return False
    if file.entry.source == "drive":
        complain(
            f"  by hand: open https://drive.google.com/file/d/{file.entry.address}/view in a "
            f"browser, save the file as {file.final} and give the same command again: the file is "
            "then checked"
        )
    return False


def fetch_folder(entry: Published, settings: Settings) -> bool:
    """Bring the files of a diffusers folder into theirs; return whether all needed are there."""
    for is_needed, names in HUB_FILES:
        files = [file_of(entry, settings, name) for name in names]
        try:
            found = any(is_here(file) for file in files) or _fetch_first(files, is_needed)
        except NotFetched as problem:
            complain(f"{entry.name}: {problem}")
            found = False
        if is_needed and not found:
            return False
    return True


def _fetch_first(files: Sequence[File], is_needed: bool) -> bool:
    """Bring the first of ``files`` that a source has; return whether there was one."""
    for places in zip(*(sources(file) for file in files), strict=True):
        missing = []
        for file, (words, source) in zip(files, places, strict=True):
            try:
                get(file, source)
                say(f"{file.name}: from {words}")
                return True
            except Missing as problem:
                missing.append(problem)
            except NotFetched as problem:
                if is_needed:
                    complain(f"{file.name}: {problem}")
                break
        if is_needed and len(missing) == len(files):
            complain(f"{files[0].name}: {missing[0]}")
    return False


def fetch(entry: Published, settings: Settings) -> bool:
    """Bring a file or a folder into its place; return whether it is there."""
    if entry.source == "hub":
        return fetch_folder(entry, settings)
    return fetch_file(file_of(entry, settings))


def list_all(settings: Settings) -> None:
    """Print every published file: its size where known, what is here, and its licence."""
    say(f"{'FILE':<28} {'SIZE':<7} {'HERE':<17} LICENCE")
    for entry in CATALOGUE:
        file, here = file_of(entry, settings), "-"
        arrived = sum(bytes_of(path) for path in file.partial()[:1])
        if file.record.exists():
            here = "unpacked"
        elif file.final.is_dir():
            here, arrived = _of_folder(entry, settings)
        elif file.final.exists():
            here, arrived = human(bytes_of(file.final)), 0
        if arrived and here == "-":
            here = f"partly: {human(arrived)}"
        say(f"{entry.name:<28} {entry.size:<7} {here:<17} {entry.licence}")


def _of_folder(entry: Published, settings: Settings) -> tuple[str, int]:
    """Return the size of a folder in words if all that is needed is in it, and its bytes."""
    total, is_whole = 0, True
    for is_needed, names in HUB_FILES:
        files = [file_of(entry, settings, name) for name in names]
        present = [file for file in files if file.final.is_file()]
        is_whole = is_whole and (bool(present) or not is_needed)
        total += sum(bytes_of(file.final) or bytes_of(file.part) for file in files)
    return (human(total) if is_whole else "-"), total


def read_settings() -> Settings:
    """Return the settings of the environment; raises UserError."""
    numbers = {}
    for key, default, expected in (
        ("REPAINT_TIMEOUT", "60", "whole seconds"),
        ("REPAINT_TRIES", "5", "a whole number"),
    ):
        word = os.environ.get(key) or default
        if not (word.isascii() and word.isdigit() and 0 < int(word) < 10**6):
            raise UserError(key=key, expected=expected, got=word)
        numbers[key] = int(word)
    mirror = os.environ.get("REPAINT_MIRROR", "").removeprefix("file://").rstrip("/")
    if mirror and not mirror.startswith(("http://", "https://")):
        if "://" in mirror:
            raise UserError(
                key="REPAINT_MIRROR", expected="an http(s) address or a folder", got=mirror
            )
        mirror = str(Path(mirror).absolute())
        if not Path(mirror).is_dir():
            raise UserError(f"no such folder: {mirror}", key="REPAINT_MIRROR")
    return Settings(ROOT, mirror, numbers["REPAINT_TIMEOUT"], numbers["REPAINT_TRIES"])


def hold(root: Path) -> int | None:
    """Make the folders and lock them for this process, and for a gdown that outlives it.

    Returns the descriptor, or None where the system has no such locks. Raises UserError.
    """
    data = root / "data"
    try:
        for folder in ("pretrained", "datasets"):
            (data / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {data}: {error.strerror}") from error
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(data / "pretrained", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another download into {data} is running") from None
    except OSError:  # a file system without locks
        return None
    return handle


def _stop(*_: object) -> None:
    raise KeyboardInterrupt(KEPT)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(
        prog="bash download.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Fetch models and data into data/. Without a NAME: {", ".join(DEFAULT[:2])},
data.zip (the face example and the masks), {DEFAULT[3]} and {DEFAULT[4]}.

A transfer that broke off goes on where it stopped when the same command is given again. What is
complete is left alone. Each file is checked before it gets its name. Files on Google Drive need
gdown (pip install gdown).""",
        epilog="""\
environment:
  REPAINT_MIRROR   an http(s) address or a folder with the files, asked before their own source
  REPAINT_TIMEOUT  seconds without data after which a transfer counts as stalled (60)
  REPAINT_TRIES    fruitless tries in a row after which a file is given up (5)

exit status: 0 all is here, 1 something is missing, 2 the command is wrong""",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="files of the list, with or without .pt or .zip"
    )
    parser.add_argument(
        "-l",
        "--list",
        action="store_true",
        help="all there is: size, licence, what is here",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is asked for; return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    options = _parse(argv)
    entries = list(dict.fromkeys(look_up(word) for word in options.names or DEFAULT))
    if options.list:
        list_all(Settings(ROOT, "", 1, 1))
        return 0
    settings = read_settings()
    settings = replace(settings, lock=hold(ROOT))
    missing = []
    for entry in entries:
        if fetch(entry, settings):
            say(f"{entry.name}: ok")
        else:
            missing.append(entry.name)
    if missing:
        complain(f"missing: {' '.join(missing)} (the same command goes on with them)")
        return 1
    say("all is here")
    return 0


if __name__ == "__main__":
    command_line(main)
