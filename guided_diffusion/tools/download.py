"""Fetch the published checkpoints and data into data/: ``bash download.sh``."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
from guided_diffusion.tools.catalogue import CATALOGUE, DEFAULT, HUB_FILES, Published, look_up
from guided_diffusion.tools.transfers import (
    File,
    Missing,
    NotFetched,
    Settings,
    bytes_of,
    file_of,
    get_drive,
    get_folder,
    get_http,
    get_hub,
    human,
    largest,
)

# A link to this file is followed, and a link to a folder above it is not: data/ lies beside that.
ROOT = Path(sys.path[0]) if __name__ == "__main__" else Path(__file__).resolve().parents[2]
KEPT = "what has arrived is kept, and the same command goes on from there"
HUB = "https://huggingface.co"


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
            changed = check_unpacked(file.settings.root / "data", file.record)
            if changed:
                say(
                    f"{file.name}: {len(changed)} changed here and left alone, such as "
                    f"data/{changed[0]}: removed, it is fetched again"
                )
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
        try:
            transport(file, address)
            return finish(file, file.part)
        except NotFetched:
            raise
        except Refused as reason:
            file.part.unlink(missing_ok=True)
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
        yield address, (get_hub, f"{address}/resolve/main/{inner}")


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
        for file, (words, source) in zip(files, places, strict=True):
            problem = _attempt(file, source)
            if problem is None:
                say(f"{file.name}: from {words}")
                return True
            if not isinstance(problem, Missing):
                names = file.name
                break
        else:
            names = " or ".join(file.name for file in files)
        if is_needed:
            complain(f"{names}: {problem}")
    return False


def _attempt(file: File, source: tuple[Callable[[File, str], None], str]) -> NotFetched | None:
    try:
        get(file, source)
    except NotFetched as problem:
        return problem
    return None


def fetch(entry: Published, settings: Settings) -> bool:
    """Bring a file or a folder into its place; return whether it is there."""
    if entry.source == "hub":
        is_there = fetch_folder(entry, settings)
    else:
        is_there = fetch_file(file_of(entry, settings))
    if is_there:
        say(f"{entry.name}: ok")
    return is_there


def list_all(settings: Settings) -> None:
    """Print every published file: its size where known, what is here, and its licence."""
    say(f"{'FILE':<28} {'SIZE':<7} {'HERE':<17} LICENCE")
    for entry in CATALOGUE:
        file, here = file_of(entry, settings), "-"
        arrived = largest([file.part, *file.from_drive()])
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


@contextlib.contextmanager
def held(root: Path) -> Iterator[int | None]:
    """Make the folders and lock them for this process, and for a gdown that outlives it.

    Yields the descriptor, or None where the system has no such locks. Raises UserError.
    """
    data = root / "data"
    try:
        for folder in ("pretrained", "datasets"):
            (data / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {data}: {error.strerror}") from error
    if fcntl is None:
        yield None
        return
    handle = os.open(data / "pretrained", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another download into {data} is running") from None
        yield handle
    finally:
        os.close(handle)


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
complete is left alone, pictures that were changed here too. Each file is checked before it gets its
name. Files on Google Drive need gdown (pip install gdown).""",
        epilog="""\
environment:
  REPAINT_MIRROR   an http(s) address or a folder with the files, asked before their own source
  REPAINT_TIMEOUT  seconds without data after which a transfer counts as stalled (60)
  REPAINT_TRIES    fruitless tries in a row after which a file is given up (5)

exit status: 0 all is here, 1 something is missing, 2 the command is wrong""",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="files or models of the list, with or without .pt or .zip",
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
    options = _parse(argv)
    entries = list(dict.fromkeys(look_up(word) for word in options.names or DEFAULT))
    if options.list:
        list_all(Settings(ROOT, "", 1, 1))
        return 0
    settings = read_settings()
    with held(ROOT) as lock:
        settings = replace(settings, lock=lock)
        missing = [entry.name for entry in entries if not fetch(entry, settings)]
    if missing:
        complain(f"missing: {' '.join(missing)} (the same command goes on with them)")
        return 1
    say("all is here")
    return 0


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
        if _number and signal.getsignal(_number) is not signal.SIG_IGN:  # nohup stays in force
            signal.signal(_number, _stop)
    command_line(main)
