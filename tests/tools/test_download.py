import contextlib
import functools
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gdown
import pytest
import torch
from run_cases import ROOT

from guided_diffusion.config.reading import load_conf
from guided_diffusion.io.files import locked
from guided_diffusion.script_util import create_classifier, create_model
from guided_diffusion.tools import catalogue, download

CHECKPOINT = "256x256_diffusion.pt"
PICTURE = "datasets/gts/face/0.png"
WEIGHTS = "diffusion_pytorch_model"


def archive(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return buffer.getvalue()


@functools.cache
def checkpoint(seed=0):
    """A checkpoint of 3 MB, which arrives in six pieces."""
    buffer = io.BytesIO()
    torch.save({"input_blocks.0.0.weight": torch.full((750_000,), float(seed))}, buffer)
    return buffer.getvalue()


def data_zip(content=b"picture"):
    mask = "data/datasets/gt_keep_masks/face/0.png"
    return archive({f"data/{PICTURE}": content, mask: b"mask", "__MACOSX/._0.png": b"rubbish"})


# ---- a server ------------------------------------------------------------------------------------


@dataclass
class File:
    """How the server treats one file; ``failures`` is for how many requests."""

    content: bytes
    status: int = 200
    failures: int = 10**9  # how often to answer with status, or to break off
    break_at: int | None = None  # bytes of an answer after which the connection breaks
    end: int | None = None  # the place in the file where each connection breaks
    stall: bool = False  # hold the broken connection open
    ranges: bool = True
    length: int | None = None  # what is announced; -1: nothing
    repeat: int = 1  # how often the content is sent


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        file = self.server.files.get(self.path)
        if file is None:
            return self.send_error(404)
        failing, file.failures = file.failures > 0, file.failures - 1
        if failing and file.status != 200:
            return self.send_error(file.status, "\x1b[31mred")
        start = int(wanted[6:].split("-")[0]) if wanted and file.ranges else 0
        if start >= len(file.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(file.content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            last = len(file.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(file.content)}")
        length = len(file.content) - start if file.length is None else file.length
        if length >= 0:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        body = file.content[start : file.end]
        broken = failing and file.break_at is not None
        with contextlib.suppress(OSError):
            for _ in range(file.repeat):
                self.wfile.write(body[: file.break_at] if broken else body)
            self.wfile.flush()
            if broken and file.stall:
                self.server.released.wait(20)
        return None


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.files, made.requests, made.released = {}, [], threading.Event()
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.released.set()
    made.shutdown()
    made.server_close()


# ---- the program ---------------------------------------------------------------------------------


class House:
    """The program in this process, with a folder of its own; only this machine can be reached."""

    def __init__(self, root, monkeypatch, capsys):
        self.root, self._capsys, self._setenv = root, capsys, monkeypatch.setenv
        monkeypatch.setattr(download, "ROOT", root)
        monkeypatch.setattr(gdown, "download", self._from_here)
        monkeypatch.setenv("REPAINT_TIMEOUT", "1")
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        monkeypatch.delenv("REPAINT_MIRROR", raising=False)
        for folder in ("pretrained", "datasets"):
            (root / "data" / folder).mkdir(parents=True)

    @staticmethod
    def _from_here(*, url="", real=gdown.download, **options):
        if not url.startswith("http://127.0.0.1:"):
            raise OSError("no network")
        return real(url=url, **options)

    def run(self, *names, mirror=""):
        self._setenv("REPAINT_MIRROR", str(mirror))
        status = download.main(names)
        self.out, self.err = self._capsys.readouterr()
        return status

    def path(self, name):
        return self.root / "data/pretrained" / name

    def files(self):
        data = self.root / "data"
        return {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}


@pytest.fixture
def house(tmp_path, monkeypatch, capsys):
    return House(tmp_path / "re paint", monkeypatch, capsys)


def serve(server, **files):
    server.files = {f"/{name}": File(content) for name, content in files.items()}


# ---- transfers -----------------------------------------------------------------------------------


def test_everything_by_default_from_a_mirror(house, server):
    names = [name for name in catalogue.DEFAULT if name.endswith(".pt")]
    serve(server, **dict.fromkeys(names, checkpoint()), **{"data.zip": data_zip()})
    assert house.run(mirror=server.url + "/") == 0
    assert house.err == ""
    assert house.out.endswith("all is here\n")
    assert house.files() == {
        *(f"pretrained/{name}" for name in names),
        "datasets/data.zip",
        PICTURE,
        "datasets/gt_keep_masks/face/0.png",
    }
    assert house.path(CHECKPOINT).read_bytes() == checkpoint()
    asked = len(server.requests)
    assert house.run() == 0
    assert (house.err, len(server.requests), asked) == ("", 5, 5)


def test_connection_that_always_breaks_still_gets_through(house, server, monkeypatch):
    # More breaks than tries, but each brings bytes that were not here before.
    assert download.BAR["disable"] is None  # tqdm: off, unless standard error is a terminal
    monkeypatch.setattr(download, "BAR", {**download.BAR, "disable": False, "mininterval": 0})
    server.files[f"/{CHECKPOINT}"] = File(checkpoint(), break_at=600_000)
    assert house.run(CHECKPOINT, mirror=server.url) == 0
    assert house.path(CHECKPOINT).read_bytes() == checkpoint()
    starts = [wanted for _, wanted in server.requests if wanted]
    assert len(set(starts)) == len(starts) > download.TRIES
    assert re.search(r"256x256_diffusion\.pt: +\d+%.*/3\.00M \[\d\d:\d\d<", house.err)


def partial(house):
    """The file into which gdown has written what has arrived."""
    [path] = house.path("x").parent.glob(f"{CHECKPOINT}.part*.part")
    return path


def test_part_is_kept_where_no_new_byte_arrives_and_continued_by_the_next_run(house, server):
    file = server.files[f"/{CHECKPOINT}"] = File(checkpoint(), end=1_500_000)
    assert house.run(CHECKPOINT, mirror=server.url) == 1
    assert f"{CHECKPOINT}: {server.url}/{CHECKPOINT}: Download is incomplete" in house.err
    assert house.err.splitlines()[-1].startswith(f"missing: {CHECKPOINT}")
    arrived = partial(house).stat().st_size
    assert 0 < arrived <= 1_500_000
    file.end = None
    assert house.run(CHECKPOINT, mirror=server.url) == 0
    assert server.requests[-1] == (f"/{CHECKPOINT}", f"bytes={arrived}-")
    assert house.files() == {f"pretrained/{CHECKPOINT}"}


@pytest.mark.parametrize(
    ("name", "part", "ranges"),
    [
        (".partabcdefgh.part", checkpoint()[:5000], False),
        (".partabcdefgh.part", checkpoint() + b"more", True),
        (".partabcdefgh.part", checkpoint(7)[:2_000_000], True),
        (".part", checkpoint(), True),
        (".part", checkpoint()[:5000], True),
    ],
    ids=["server without ranges", "longer", "another file", "whole", "unfinished"],
)
def test_any_part_ends_in_the_whole_file(house, server, name, part, ranges):
    server.files[f"/{CHECKPOINT}"] = File(checkpoint(), ranges=ranges)
    house.path(f"{CHECKPOINT}{name}").write_bytes(part)
    assert house.run(CHECKPOINT, mirror=server.url) == 0
    assert house.path(CHECKPOINT).read_bytes() == checkpoint()
    assert house.files() == {f"pretrained/{CHECKPOINT}"}


def test_missing_file_is_asked_for_once_and_the_next_source_and_file_follow(house, server):
    serve(server, **{"256x256_classifier.pt": checkpoint()})
    assert house.run("64x64_diffusion", "256x256_classifier", mirror=server.url) == 1
    assert f"64x64_diffusion.pt: {server.url}/64x64_diffusion.pt: HTTP 404" in house.err
    assert "64x64_diffusion.pt: from https://openaipublic.blob.core.windows.net/" in house.out
    assert house.err.splitlines()[-1].startswith("missing: 64x64_diffusion.pt (")
    assert house.files() == {"pretrained/256x256_classifier.pt"}
    assert [path for path, _ in server.requests].count("/64x64_diffusion.pt") == 1


def test_busy_server_is_asked_again(house, server):
    server.files[f"/{CHECKPOINT}"] = File(checkpoint(), status=503, failures=2)
    assert house.run(CHECKPOINT, mirror=server.url) == 0
    server.files["/lsun_cat.pt"] = File(checkpoint(), status=503)
    assert house.run("lsun_cat", mirror=server.url) == 1
    assert "HTTP 503" in house.err
    assert server.requests.count(("/lsun_cat.pt", None)) == download.TRIES


def test_what_a_server_says_does_not_control_the_terminal(house, monkeypatch):
    def answer(**_):
        raise OSError("\x1b]0;title\x07\n\x9b2J")

    monkeypatch.setattr(gdown, "download", answer)
    assert house.run("lsun_cat") == 1
    assert "title" in house.err
    assert not {"\x1b", "\x07", "\x9b"} & set(house.err)


def test_broken_file_never_gets_the_name(house, server):
    good = checkpoint()
    middle = len(good) // 2
    broken = {
        "lsun_cat.pt": (b"\n<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        "lsun_horse.pt": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        "lsun_bedroom.pt": (good[:-30], "is damaged"),
        CHECKPOINT: (good[:middle] + b"!" + good[middle + 1 :], "is damaged"),
    }
    serve(server, **{name: content for name, (content, _) in broken.items()})
    assert house.run(*broken, mirror=server.url) == 1
    for name, (_, reason) in broken.items():
        assert re.search(rf"{name}: {server.url}/{name}: .*{reason}", house.err)
    assert f"missing: {' '.join(broken)} (" in house.err
    assert house.files() == set()


def test_broken_file_that_is_here_is_renamed(house, server):
    serve(server, **{CHECKPOINT: checkpoint()})
    house.path(CHECKPOINT).write_bytes(checkpoint()[:1000])
    assert house.run(CHECKPOINT, "256x256_diffusion", mirror=server.url) == 0
    assert house.out.count(f"{CHECKPOINT}: ok") == 1  # the same name once more
    assert f"renamed to {CHECKPOINT}.broken" in house.err
    assert house.path(CHECKPOINT).read_bytes() == checkpoint()
    assert house.path(CHECKPOINT + ".broken").stat().st_size == 1000


def test_folder_as_mirror_relative_to_the_caller(house, tmp_path, monkeypatch):
    mirror = tmp_path / "my mirror"
    mirror.mkdir()
    (mirror / "data.zip").write_bytes(data_zip())
    (mirror / CHECKPOINT).write_bytes(checkpoint())
    monkeypatch.chdir(tmp_path)
    assert house.run("data.zip", CHECKPOINT, mirror="my mirror") == 0
    assert house.path(CHECKPOINT).read_bytes() == checkpoint()
    assert (house.root / "data" / PICTURE).read_bytes() == b"picture"
    assert house.run("lsun_cat", mirror=f"file://{mirror}") == 1
    assert "No such file" in house.err


def test_one_run_at_a_time(house):
    with locked(house.root / "data/pretrained"), pytest.raises(download.UserError, match="at work"):
        house.run("lsun_cat")


# ---- the disk ------------------------------------------------------------------------------------


def free_disk(monkeypatch, size):
    usage = shutil._ntuple_diskusage(1, 1, size)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)


def test_margin_of_the_disk_stays_free(house, server, monkeypatch):
    free_disk(monkeypatch, download.MARGIN + 2_000_000)
    small = archive({f"data/{PICTURE}": b"picture"})
    serve(server, **{CHECKPOINT: checkpoint(), "data.zip": small})
    assert house.run(CHECKPOINT, "data.zip", mirror=server.url) == 1
    assert f"{CHECKPOINT}: {server.url}/{CHECKPOINT}: needs 19.3MB, and the disk has" in house.err
    assert partial(house).stat().st_size < 600_000
    assert "datasets/data.zip" in house.files()


@pytest.mark.parametrize("length", [-1, None])
def test_file_that_is_larger_than_published_is_not_fetched(house, server, monkeypatch, length):
    monkeypatch.setattr(catalogue.Published, "limit", 900_000)
    server.files["/data.zip"] = File(bytes(1_000_000), length=length, repeat=50)
    assert house.run("data.zip", mirror=server.url) == 1
    assert "expected at most 900kB" in house.err
    assert house.files() == set()
    server.files["/data.zip"] = File(data_zip())
    assert house.run("data.zip", mirror=server.url) == 0


# ---- data.zip ------------------------------------------------------------------------------------


def test_pictures_and_links_of_the_user_stay_and_lost_ones_come_back(house, server, tmp_path):
    names = [f"{PICTURE[:-5]}{number}.png" for number in range(3)]
    edited, linked, lost = (house.root / "data" / name for name in names)
    edited.parent.mkdir(parents=True)
    edited.write_bytes(b"mine")
    (tmp_path / "victim").write_bytes(b"mine")
    linked.symlink_to(tmp_path / "victim")
    serve(server, **{"data.zip": archive({f"data/{name}": b"theirs" for name in names})})
    assert house.run("data", mirror=server.url) == 0
    assert "1 files unpacked into data/, 2 were here and stay" in house.out
    for _ in range(2):
        found = [path.read_bytes() for path in (edited, linked, lost)]
        assert found == [b"mine", b"mine", b"theirs"] and linked.is_symlink()
        lost.unlink()
        assert house.run("data") == 0  # from the archive that is here


@pytest.mark.parametrize("name", ["{}/victim", "data/datasets/../../../victim", "..\\victim"])
def test_archive_cannot_write_elsewhere(house, server, tmp_path, name):
    (tmp_path / "victim").write_bytes(b"mine")
    (house.root / "data/pretrained/demo64.pt").write_bytes(b"mine")
    names = (f"data/{PICTURE}", name.format(tmp_path), "data/pretrained/demo64.pt", "test.py")
    serve(server, **{"data.zip": archive(dict.fromkeys(names, b"theirs"))})
    assert house.run("data", mirror=server.url) == 0
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    theirs = {path for path in written if path.read_bytes() == b"theirs"}
    assert theirs <= set((house.root / "data/datasets").rglob("*"))
    assert house.root / "data" / PICTURE in theirs


def special(kind):
    """An archive with an entry that is no file."""
    entry = zipfile.ZipInfo("data/datasets/special")
    entry.create_system, entry.external_attr = 3, kind << 16
    return archive({f"data/{PICTURE}": b"", entry: b"/etc"})


def damaged_inside():
    content = bytearray(archive(dict.fromkeys([f"data/{PICTURE}", f"data/{PICTURE}1"], b"picture")))
    content[content.rindex(b"picture")] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (special(0o120777), "holds a link or a device"),
        (special(0o020666), "holds a link or a device"),
        (
            archive({f"data/{PICTURE}": bytes(10**6)}, zipfile.ZIP_DEFLATED),
            "holds 1.00MB, expected ",
        ),
        (damaged_inside(), "is damaged: Bad CRC-32"),
        (data_zip()[:-30], "is damaged"),
        (archive({"test.py": b""}), "has no files below datasets/"),
    ],
    ids=["link", "device", "bomb", "checksum", "cut", "another archive"],
)
def test_archive_that_is_refused_brings_nothing(house, server, monkeypatch, content, problem):
    monkeypatch.setattr(catalogue.Published, "limit", 900_000)
    serve(server, **{"data.zip": content})
    assert house.run("data", mirror=server.url) == 1
    assert problem in house.err
    assert house.files() == set()


# ---- Google Drive --------------------------------------------------------------------------------


def test_drive(house, monkeypatch):
    def fetch(id, output, resume, timeout, progress, **_):
        assert (id, resume, timeout) == ("1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX", True, 1)
        progress(100, 2_211_000_000)
        Path(output).write_bytes(checkpoint())

    monkeypatch.setattr(gdown, "download", fetch)
    assert house.run("celeba256_250000") == 0
    assert (house.err, house.files()) == ("", {"pretrained/celeba256_250000.pt"})
    house.path("celeba256_250000.pt").unlink()
    free_disk(monkeypatch, 2 * 10**9)
    assert house.run("celeba256_250000") == 1
    assert "needs 2.23GB, and the disk has 2.00GB" in house.err


def test_quota_of_drive_and_the_file_saved_by_hand(house, monkeypatch):
    def refuse(**_):
        raise gdown.FileURLRetrievalError("Too many users have viewed this file")

    monkeypatch.setattr(gdown, "download", refuse)
    assert house.run("data.zip") == 1
    assert "try again in a day, or set REPAINT_MIRROR" in house.err
    place = house.root / "data/datasets/data.zip"
    address = "https://drive.google.com/file/d/1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv/view"
    assert f"by hand: open {address} in a browser, save the file as {place}" in house.err
    place.write_bytes(data_zip())
    assert house.run("data.zip") == 0
    assert (house.root / "data" / PICTURE).exists()


# ---- diffusers folders ---------------------------------------------------------------------------


def safetensors(length=300_000):
    table = json.dumps(
        {"conv.weight": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}
    )
    return len(table).to_bytes(8, "little") + table.encode() + bytes(length)


def hub_files(weights=f"{WEIGHTS}.safetensors"):
    content = checkpoint() if weights.endswith(".bin") else safetensors()
    return {"config.json": b"{}", "scheduler_config.json": b"{}", weights: content}


@pytest.mark.parametrize("weights", [f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin"])
def test_diffusers_folder_from_a_mirror(house, server, weights):
    files = hub_files(weights)
    serve(server, **{f"ddpm-cat-256/{name}": content for name, content in files.items()})
    assert house.run("google/ddpm-cat-256", mirror=server.url) == 0
    assert {path.name: path.read_bytes() for path in house.path("ddpm-cat-256").iterdir()} == files
    assert house.run("ddpm-cat-256") == 0
    house.run("--list")
    assert re.search(r"ddpm-cat-256 +455MB +yes +Apache-2\.0\n", house.out)


def test_diffusers_file_that_is_missing_or_broken_is_named(house, server):
    files = {f"ddpm-cat-256/{name}": content for name, content in hub_files().items()}
    serve(server, **files | {f"ddpm-cat-256/{WEIGHTS}.safetensors": safetensors()[:-5]})
    assert house.run("ddpm-cat-256", mirror=server.url) == 1
    assert f"ddpm-cat-256/{WEIGHTS}.safetensors: {server.url}" in house.err
    assert house.err.splitlines()[-1].startswith("missing: ddpm-cat-256 (")
    kept = {f"pretrained/ddpm-cat-256/{name}" for name in ("config.json", "scheduler_config.json")}
    assert house.files() == kept
    house.run("--list")
    assert re.search(r"ddpm-cat-256 +455MB +partly ", house.out)
    house.path("ddpm-cat-256/config.json").write_bytes(b"<html>")
    serve(server, **files)
    server.requests.clear()
    assert house.run("ddpm-cat-256", mirror=server.url) == 0
    assert "config.json.broken" in house.err
    assert "/ddpm-cat-256/scheduler_config.json" not in [path for path, _ in server.requests]


# ---- the command ---------------------------------------------------------------------------------


def test_list_tells_what_is_here(house):
    house.path("lsun_cat.pt").write_bytes(b"x")
    house.path("lsun_horse.pt.part").write_bytes(b"x")
    assert house.run("--list") == 0
    rows = {line.split()[0]: line.split(maxsplit=3)[1:] for line in house.out.splitlines()[1:]}
    assert len(rows) == 21
    code = "MIT (code); weights: see source"
    assert rows["lsun_cat.pt"] == ["2.21GB", "yes", code]
    assert rows["lsun_horse.pt"] == ["2.21GB", "partly", code]
    assert rows["celeba256_250000.pt"] == ["2.21GB", "-", "CC BY-NC-SA 4.0"]
    [[config], *_] = download.targets_of(catalogue.look_up("ddpm-cat-256"))
    address = "https://huggingface.co/google/ddpm-cat-256/resolve/main/config.json"
    assert config.addresses == (address,)


@pytest.mark.parametrize(
    ("name", "timeout", "mirror", "message"),
    [
        ("celeba", "1", "", "celeba is not a published file"),
        ("lsun_cat", "soon", "", "REPAINT_TIMEOUT: expected whole seconds, found soon"),
        ("lsun_cat", "1", "ftp://x", "REPAINT_MIRROR: expected .* found ftp://x"),
        ("lsun_cat", "1", "/no/where", "REPAINT_MIRROR: expected .* found /no/where"),
    ],
)
def test_wrong_command_is_a_user_error(house, monkeypatch, name, timeout, mirror, message):
    monkeypatch.setenv("REPAINT_TIMEOUT", timeout)
    with pytest.raises(download.UserError, match=message):
        house.run(name, mirror=mirror)


# ---- what is published ---------------------------------------------------------------------------


def test_every_checkpoint_has_its_configuration_and_size():
    """The network of each configuration has the published number of parameters."""
    found = {}
    for path in (ROOT / "confs").glob("*.yml"):
        if path.name.startswith("train"):
            continue
        conf = load_conf(path)
        made = [(conf.model_path, create_model), (conf.classifier_path, create_classifier)]
        for name, create in [(Path(path).name, create) for path, create in made if path]:
            if name not in found:
                with torch.device("meta"):
                    state = create(conf).state_dict()
                found[name] = sum(tensor.numel() for tensor in state.values()) * 4 / 1e9
    published = {entry.name: entry.size for entry in catalogue.CATALOGUE if ".pt" in entry.name}
    assert {name: found[name] for name in published} == pytest.approx(published, abs=0.0006)


# ---- download.sh ---------------------------------------------------------------------------------


SHELLS = [shell for shell in ("dash", "bash", "busybox", "zsh") if shutil.which(shell)]


class Script:
    """A copy of download.sh beside the package, with chosen programs named python."""

    def __init__(self, folder):
        self.root, self.bin = folder / "re paint", folder / "bin"
        self.root.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "download.sh", self.root)
        for name in ("guided_diffusion", "confs"):
            shutil.copytree(ROOT / name, self.root / name, ignore=lambda *_: ["__pycache__"])
        self.python("python3", f'exec "{sys.executable}" "$@"')

    def python(self, name, text):
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def start(self, *words, script=None, shell="sh", mirror="", cwd=None):
        command = [shutil.which(shell), *(["sh"] if shell == "busybox" else [])]
        command = [*command, str(script or self.root / "download.sh"), *words]
        home = str(self.root.parent)
        environment = {"PATH": str(self.bin), "HOME": home, "CDPATH": home,
                       "REPAINT_TIMEOUT": "30", "REPAINT_MIRROR": mirror}  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=cwd, **pipes)

    def run(self, *words, **options):
        process = self.start(*words, **options)
        process.out, process.err = process.communicate(timeout=60)
        return process


@pytest.fixture
def script(tmp_path):
    if not shutil.which("sh"):
        pytest.skip("needs a POSIX shell")
    return Script(tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_posix_shell_will_do(script, shell):
    done = script.run("--list", shell=shell)
    assert (done.returncode, done.err) == (0, "")
    assert len(done.out.splitlines()) == 22
    assert os.access(ROOT / "download.sh", os.X_OK)


def test_probes_tell_their_own_problems(script):
    script.python("python", "echo Traceback; echo 'libfoo.so is missing' >&2; exit 3")
    assert script.run("--list").returncode == 0  # the second will do
    script.python("python3", f'exec "{sys.executable}" -S "$@"')  # without packages
    done = script.run("--list")
    assert (done.returncode, done.out) == (2, "")
    assert re.fullmatch(
        r"error: .*python: libfoo.so is missing; python3: No module named .*"
        r"-m pip install -r requirements.txt.*\n",
        done.err,
    )
    for name in ("python", "python3"):
        (script.bin / name).unlink()
    assert "neither python nor python3 is installed" in script.run("--list").err


def test_link_to_the_script_fills_the_folder_of_the_script(script, tmp_path):
    (tmp_path / "other").mkdir()
    link = tmp_path / "other/download.sh"
    link.symlink_to(script.root / "download.sh")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / CHECKPOINT).write_bytes(checkpoint())
    (tmp_path / "other/tqdm.py").write_text("raise SystemExit('ran')")
    other = tmp_path / "other"
    done = script.run(CHECKPOINT, script=link, cwd=other, mirror="../mirror")
    assert (done.returncode, done.err) == (0, "")
    assert (script.root / "data/pretrained" / CHECKPOINT).read_bytes() == checkpoint()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_keeps_its_part_and_continues(script, server, how):
    file = server.files[f"/{CHECKPOINT}"] = File(checkpoint(), break_at=2_000_000, stall=True)
    process = script.start(CHECKPOINT, mirror=server.url)
    folder = script.root / "data/pretrained"
    deadline = time.monotonic() + 30
    while sum(path.stat().st_size for path in folder.glob("*.part")) < 10**6:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    if how == signal.SIGINT:
        assert (process.returncode, err) == (130, "interrupted\n")
    [part] = folder.glob(f"{CHECKPOINT}.part*")
    arrived = part.stat().st_size
    assert part.read_bytes() == checkpoint()[:arrived]
    file.break_at = None
    done = script.run(CHECKPOINT, mirror=server.url)
    assert (done.returncode, done.err) == (0, "")
    assert server.requests[-1] == (f"/{CHECKPOINT}", f"bytes={arrived}-")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", str(ROOT / "download.sh")], capture_output=True, text=True)
    assert done.stdout == ""
