import contextlib
import fcntl
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from guided_diffusion.tools import catalogue, download

ROOT = Path(__file__).resolve().parents[2]
# What the stubs of gdown below call; the program itself needs bash and Python.
TOOLS = ("bash", "cp", "ls", "rm", "sleep")
PROGRAM = ("__init__", "cli", "errors", "tools/__init__", "tools/archives")
PROGRAM += ("tools/catalogue", "tools/download", "tools/transfers")
CHECKPOINT = "256x256_diffusion.pt"
DEFAULT = (
    "celeba256_250000.pt",
    "places256_300000.pt",
    "data.zip",
    "256x256_diffusion.pt",
    "256x256_classifier.pt",
)
QUOTA_GDOWN = """#!/bin/sh
echo 'Failed to retrieve file url: Too many users have viewed or downloaded this file' >&2
exit 1
"""

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason="needs bash and the usual small tools"
)


def archive(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return buffer.getvalue()


@functools.cache
def checkpoint(seed=0):
    """A file whose table is in order; without torch nothing more of a checkpoint is looked at."""
    return archive({"model/data.pkl": bytes([seed]), "model/data/0": bytes([seed]) * 300_000})


def data_zip(prefix="data/"):
    return archive(
        {
            f"{prefix}datasets/gts/face/0.png": b"picture",
            f"{prefix}datasets/gt_keep_masks/face/0.png": b"mask",
            "__MACOSX/data/._0.png": b"rubbish",
        }
    )


@dataclass
class File:
    """How the server treats one file; a count of n means for the first n GET requests."""

    content: bytes
    status: int = 200
    failures: int = 10**9  # how often to answer with status, or to break off
    break_at: int | None = None  # bytes of an answer after which the line breaks
    stall: bool = False  # hold the broken line open
    ranges: bool = True
    head: bool = True


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        file = self.server.files.get(self.path.rpartition("/")[2])
        if file is None or not file.head:
            self.send_error(404 if file is None else 405)
        elif file.status != 200:
            self.send_error(file.status)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(file.content)))
            self.end_headers()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        wanted = self.headers.get("Range")
        self.server.requests.append((name, wanted))
        file = self.server.files.get(self.path, self.server.files.get(name))
        if file is None:
            return self.send_error(404)
        failing, file.failures = file.failures > 0, file.failures - 1
        if failing and file.status != 200:
            return self.send_error(file.status)
        start = int(wanted[6:].split("-")[0]) if wanted and file.ranges else 0
        if start >= len(file.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            last = len(file.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(file.content)}")
        self.send_header("Content-Length", str(len(file.content) - start))
        self.end_headers()
        body = file.content[start:]
        broken = failing and file.break_at is not None
        with contextlib.suppress(OSError):
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
    made.url = f"http://127.0.0.1:{made.server_port}/some/where"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.released.set()
    made.shutdown()
    made.server_close()


class Checkout:
    """A copy of the program in a folder of its own, with every program it may call in sight."""

    def __init__(self, folder, torch=False):
        self.root = folder / "re paint"
        (self.root / "guided_diffusion/tools").mkdir(parents=True)
        shutil.copy(ROOT / "download.sh", self.root)
        if torch:
            (self.root / "guided_diffusion/tools").rmdir()
            (self.root / "guided_diffusion").rmdir()
            for name in ("guided_diffusion", "confs"):
                (self.root / name).symlink_to(ROOT / name)
        else:
            for name in PROGRAM:
                name = f"guided_diffusion/{name}.py"
                shutil.copy(ROOT / name, self.root / name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.stub("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        self.stub("gdown", QUOTA_GDOWN)
        (folder / "without").mkdir()
        (folder / "without/torch.py").write_text("raise ImportError('left out')\n")
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "REPAINT_TIMEOUT": "1",
            "REPAINT_TRIES": "2",
            # No test leaves this machine: every https source refuses at once.
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1",
        }
        if not torch:
            self.environment["PYTHONPATH"] = str(folder / "without")

    def free_disk(self, kibibytes):
        """Let the program see a disk with so much room."""
        (self.root.parent / "without/sitecustomize.py").write_text(
            "import shutil\n"
            f"shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, {kibibytes} * 1024)\n"
        )

    def stub(self, name, text):
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *words, cwd=None, **environment):
        return subprocess.Popen(
            [shutil.which("bash"), str(self.root / "download.sh"), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or self.root.parent,
            env=self.environment | {key: str(value) for key, value in environment.items()},
        )

    def run(self, *words, **options):
        process = self.start(*words, **options)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def path(self, name):
        return self.root / "data/pretrained" / name

    def files(self):
        data = self.root / "data"
        return {str(p.relative_to(data)) for p in data.rglob("*") if p.is_file()}


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_everything_by_default_from_a_mirror(checkout, server):
    server.files = {name: File(checkpoint()) for name in DEFAULT} | {"data.zip": File(data_zip())}
    done = checkout.run(REPAINT_MIRROR=server.url + "/")
    assert (done.returncode, done.err) == (0, "")
    assert done.out.endswith("all is here\n")
    assert "torch is not installed: the file's table is checked, not its keys" in done.out
    assert checkout.files() == {
        *(f"pretrained/{name}" for name in DEFAULT if name.endswith(".pt")),
        "datasets/data.zip.contents",
        "datasets/gts/face/0.png",
        "datasets/gt_keep_masks/face/0.png",
    }
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()
    # A second run asks nobody for anything.
    asked = len(server.requests)
    again = checkout.run(REPAINT_MIRROR=server.url)
    assert (again.returncode, again.err) == (0, "")
    assert again.out.count(": is here") == 5
    assert len(server.requests) == asked == 5


def test_lost_picture_is_fetched_again(checkout, server):
    server.files["data.zip"] = File(data_zip(prefix=""))
    assert checkout.run("data", REPAINT_MIRROR=server.url).returncode == 0
    picture = checkout.root / "data/datasets/gts/face/0.png"
    picture.unlink()
    done = checkout.run("data", REPAINT_MIRROR=server.url)
    assert done.returncode == 0
    assert "fetched again: data/datasets/gts/face/0.png is gone" in done.out
    assert picture.read_bytes() == b"picture"


def test_changed_picture_is_told_and_left_alone(checkout, server):
    server.files["data.zip"] = File(data_zip(prefix=""))
    assert checkout.run("data", REPAINT_MIRROR=server.url).returncode == 0
    picture = checkout.root / "data/datasets/gts/face/0.png"
    picture.write_bytes(b"my own")
    asked = len(server.requests)
    done = checkout.run("data", REPAINT_MIRROR=server.url)
    assert (done.returncode, len(server.requests)) == (0, asked)
    name = "data/datasets/gts/face/0.png"
    assert f"1 changed here and left alone, such as {name}: removed, it is fetched" in done.out
    assert picture.read_bytes() == b"my own"


def test_stalled_line_is_left_and_resumed(checkout, server):
    server.files[CHECKPOINT] = File(checkpoint(), break_at=120_000, failures=1, stall=True)
    started = time.monotonic()
    done = checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url)
    assert done.returncode == 0
    assert time.monotonic() - started < 20
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()
    (_, first), (_, second) = server.requests
    assert first is None
    assert re.fullmatch(r"bytes=[1-9]\d*-", second)


def test_line_that_always_breaks_still_gets_through(checkout, server):
    # More breaks than REPAINT_TRIES, but each brings bytes that were not here before.
    server.files[CHECKPOINT] = File(checkpoint(), break_at=90_000)
    done = checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url)
    assert done.returncode == 0
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()
    assert len(server.requests) == 4


def test_truncating_server_leaves_a_part_and_the_next_run_resumes(checkout, server):
    # Always breaks at the same byte of the file: nothing new arrives any more.
    file = server.files[CHECKPOINT] = File(checkpoint(), break_at=100_000, ranges=False)
    done = checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert f"missing: {CHECKPOINT}" in done.err
    assert not checkout.path(CHECKPOINT).exists()
    file.ranges, file.failures = True, 0
    checkout.path(CHECKPOINT + ".part").write_bytes(checkpoint()[:5000])
    assert checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url).returncode == 0
    assert server.requests[-1] == (CHECKPOINT, "bytes=5000-")
    assert checkout.files() == {f"pretrained/{CHECKPOINT}"}


def test_server_without_ranges_starts_over(checkout, server):
    server.files[CHECKPOINT] = File(checkpoint(), ranges=False)
    checkout.path("x").parent.mkdir(parents=True)
    checkout.path(CHECKPOINT + ".part").write_bytes(checkpoint()[:5000])
    assert checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url).returncode == 0
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()


def test_part_that_is_complete_is_not_fetched_again(checkout, server):
    server.files[CHECKPOINT] = File(checkpoint())
    checkout.path("x").parent.mkdir(parents=True)
    checkout.path(CHECKPOINT + ".part").write_bytes(checkpoint())
    assert checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url).returncode == 0
    assert server.requests == []
    assert checkout.files() == {f"pretrained/{CHECKPOINT}"}


@pytest.mark.parametrize("head", [True, False])
def test_part_of_another_file_is_thrown_away(checkout, server, head):
    server.files[CHECKPOINT] = File(checkpoint(), head=head)
    checkout.path("x").parent.mkdir(parents=True)
    checkout.path(CHECKPOINT + ".part").write_bytes(checkpoint(7)[:200_000])
    done = checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url)
    assert done.returncode == 0
    assert "is damaged" in done.err
    assert "once more from the start" in done.out
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()


@pytest.mark.parametrize("head", [True, False])
def test_part_longer_than_the_file(checkout, server, head):
    server.files[CHECKPOINT] = File(checkpoint(), head=head)
    checkout.path("x").parent.mkdir(parents=True)
    checkout.path(CHECKPOINT + ".part").write_bytes(checkpoint() + b"more")
    assert checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url).returncode == 0
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()


def test_missing_on_the_mirror_goes_on_to_the_source_and_the_other_files(checkout, server):
    server.files["256x256_classifier.pt"] = File(checkpoint())
    done = checkout.run("64x64_diffusion", "256x256_classifier", REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert f"64x64_diffusion.pt: {server.url}/64x64_diffusion.pt: HTTP 404" in done.err
    assert "64x64_diffusion.pt: from https://openaipublic.blob.core.windows.net/" in done.out
    assert done.err.splitlines()[-1].startswith("missing: 64x64_diffusion.pt (")
    assert checkout.files() == {"pretrained/256x256_classifier.pt"}
    assert server.requests.count(("64x64_diffusion.pt", None)) == 1  # 404 is not asked twice


def test_busy_server_is_asked_again(checkout, server):
    server.files[CHECKPOINT] = File(checkpoint(), status=503, failures=1)
    assert checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url).returncode == 0
    assert checkout.files() == {f"pretrained/{CHECKPOINT}"}
    server.files["lsun_cat.pt"] = File(checkpoint(), status=503)
    done = checkout.run("lsun_cat", REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert "lsun_cat.pt: given up after 2 tries (HTTP 503)" in done.err.replace(
        f"{server.url}/lsun_cat.pt: ", ""
    )


def test_broken_file_never_gets_the_name(checkout, server):
    good = checkpoint()
    broken = {
        "lsun_cat.pt": (
            b"\n<!DOCTYPE html><title>Sign in</title>",
            "is a web page and not the file",
        ),
        "lsun_horse.pt": (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a Git LFS pointer",
        ),
        "lsun_bedroom.pt": (good[:-30], "is cut off or damaged"),
        CHECKPOINT: (good[:1000] + b"!" + good[1001:], "is damaged (checksum of model/data/0)"),
    }
    server.files = {name: File(content) for name, (content, _) in broken.items()}
    done = checkout.run(*broken, REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    for name, (_, reason) in broken.items():
        assert f"{name}: what came from {server.url}/{name} {reason}" in done.err
    assert f"missing: {' '.join(broken)} (" in done.err
    assert checkout.files() == set()


def test_name_given_twice_is_fetched_once(checkout, server):
    server.files[CHECKPOINT] = File(checkpoint())
    done = checkout.run(CHECKPOINT, "256x256_diffusion", REPAINT_MIRROR=server.url)
    assert (done.returncode, done.err) == (0, "")
    assert done.out.count(f"{CHECKPOINT}: ok") == 1


def test_file_that_could_not_be_checked_is_kept_as_a_part(checkout, server, tmp_path):
    (tmp_path / "without/torch.py").write_text("")  # there, but the package beside it is not
    server.files[CHECKPOINT] = File(checkpoint())
    done = checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert (
        "could not be checked: ModuleNotFoundError: No module named 'guided_diffusion" in done.err
    )
    assert checkout.files() == {f"pretrained/{CHECKPOINT}.part"}
    assert checkout.path(CHECKPOINT + ".part").read_bytes() == checkpoint()


def test_broken_file_that_is_here_is_moved_aside(checkout, server):
    server.files[CHECKPOINT] = File(checkpoint())
    checkout.path("x").parent.mkdir(parents=True)
    checkout.path(CHECKPOINT).write_bytes(checkpoint()[:1000])
    done = checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url)
    assert done.returncode == 0
    assert (
        f"is cut off or damaged (File is not a zip file); moved to data/pretrained/{CHECKPOINT}"
        in (done.err)
    )
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()
    assert checkout.path(CHECKPOINT + ".broken").stat().st_size == 1000


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_keeps_its_part_and_resumes(checkout, server, how):
    file = server.files[CHECKPOINT] = File(checkpoint(), break_at=200_000, stall=True)
    process = checkout.start(CHECKPOINT, REPAINT_MIRROR=server.url, REPAINT_TIMEOUT=30)
    part = checkout.path(CHECKPOINT + ".part")
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= 150_000):  # it is written in blocks
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if how == signal.SIGKILL:
        blocked = checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url)
        assert blocked.returncode == 2
        assert "another download into" in blocked.err
    process.send_signal(how)
    if how == signal.SIGKILL:
        process.communicate(timeout=10)
    else:
        _, err = process.communicate(timeout=10)
        assert process.returncode == 130
        assert err == (
            "interrupted: what has arrived is kept, and the same command goes on from there\n"
        )
    assert checkout.files() == {f"pretrained/{CHECKPOINT}.part"}
    arrived = part.stat().st_size
    assert part.read_bytes() == checkpoint()[:arrived]
    file.break_at = None
    assert checkout.run(CHECKPOINT, REPAINT_MIRROR=server.url).returncode == 0
    assert server.requests[-1] == (CHECKPOINT, f"bytes={arrived}-")
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()


def test_disk_is_looked_at_before_the_first_byte(checkout, server):
    checkout.free_disk(16500)
    server.files[CHECKPOINT] = File(checkpoint())
    server.files["lsun_cat.pt"] = File(archive({"a": b""}))
    done = checkout.run(CHECKPOINT, "lsun_cat", REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert f"{CHECKPOINT}: needs 300.2 kB and 16.9 MB are free on the disk of" in done.err
    # What fits, with the margin of 16 MiB, is still fetched.
    assert checkout.files() == {"pretrained/lsun_cat.pt"}
    assert [name for name, _ in server.requests] == ["lsun_cat.pt"]


def test_folder_as_mirror_relative_to_the_caller(checkout, tmp_path):
    mirror = tmp_path / "my mirror"
    mirror.mkdir()
    (mirror / "data.zip").write_bytes(data_zip())
    (mirror / CHECKPOINT).write_bytes(checkpoint())
    done = checkout.run("data.zip", CHECKPOINT, cwd=tmp_path, REPAINT_MIRROR="my mirror")
    assert (done.returncode, done.err) == (0, "")
    assert checkout.path(CHECKPOINT).read_bytes() == checkpoint()
    assert (checkout.root / "data/datasets/gts/face/0.png").read_bytes() == b"picture"
    assert (mirror / "data.zip").exists()
    done = checkout.run("lsun_cat", REPAINT_MIRROR=f"file://{mirror}")
    assert done.returncode == 1
    assert "no such file" in done.err


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "/tmp/evil.png", "data/../../evil.png", "a\\..\\evil.png", "C:/evil.png"],
)
def test_unsafe_archive_is_refused_whole(checkout, server, name):
    server.files["data.zip"] = File(archive({"data/datasets/fine.png": b"", name: b""}))
    done = checkout.run("data.zip", REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert "holds an unsafe entry" in done.err
    assert checkout.files() == set()
    assert not list(checkout.root.parent.rglob("evil*"))


def test_link_in_an_archive_is_refused(checkout, server):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        link = zipfile.ZipInfo("data/datasets/link")
        link.external_attr = 0o120777 << 16
        made.writestr(link, "/etc")
    server.files["data.zip"] = File(buffer.getvalue())
    assert "unsafe entry" in checkout.run("data.zip", REPAINT_MIRROR=server.url).err
    assert checkout.files() == set()


def drive_gdown(store):
    """A gdown that serves one file, and like the real one resumes its own partial file."""
    return f"""#!/bin/bash
[ "$1 $2" = "--continue -O" ] || exit 9
echo "$4" >> "{store}/asked"
partial=$(ls "$3"????????.part 2>/dev/null)
[ -n "$partial" ] && echo resumed >> "{store}/asked"
cp "{store}/file" "$3"
rm -f "$partial"
"""


def test_drive(checkout, tmp_path):
    (tmp_path / "file").write_bytes(checkpoint())
    checkout.stub("gdown", drive_gdown(tmp_path))
    checkout.free_disk(9_000_000)
    checkout.path("x").parent.mkdir(parents=True)
    for suffix, size in (("abcdefgh.part", 100), ("12345678.part", 10)):
        checkout.path(f"celeba256_250000.pt.part.drive{suffix}").write_bytes(bytes(size))
    done = checkout.run("celeba256_250000")
    assert (done.returncode, done.err) == (0, "")
    asked = (tmp_path / "asked").read_text().split()
    assert asked == ["1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX", "resumed"]
    assert checkout.files() == {"pretrained/celeba256_250000.pt"}


def test_drive_needs_room_for_a_checkpoint(checkout):
    checkout.free_disk(2_000_000)
    done = checkout.run("celeba256_250000")
    assert done.returncode == 1
    assert "needs 2.2 GB and 2.0 GB are free" in done.err
    assert "quota" not in done.err


@pytest.mark.parametrize("page", [True, False])
def test_quota_page_of_drive(checkout, tmp_path, page):
    if page:
        (tmp_path / "file").write_text(
            "<!DOCTYPE html><title>Google Drive - Quota exceeded</title>"
        )
        checkout.stub("gdown", drive_gdown(tmp_path))
    done = checkout.run("data.zip")
    assert done.returncode == 1
    assert "data.zip: Google Drive sent a page in place of the file" in done.err
    assert "try again in a day, or set REPAINT_MIRROR" in done.err
    where = checkout.root / "data/datasets/data.zip"
    assert (
        "by hand: open https://drive.google.com/file/d/1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv/view "
        f"in a browser, save the file as {where}"
    ) in done.err
    assert checkout.files() == set()
    # Done as told, the file is taken.
    where.write_bytes(data_zip())
    done = checkout.run("data.zip")
    assert (done.returncode, done.err) == (0, "")
    assert (checkout.root / "data/datasets/gts/face/0.png").exists()


def test_stalled_gdown_is_ended(checkout):
    checkout.stub("gdown", '#!/bin/bash\necho some > "$3"abcdefgh.part\nexec sleep 30\n')
    started = time.monotonic()
    done = checkout.run("data.zip")
    assert time.monotonic() - started < 20
    assert done.returncode == 1
    assert done.err.count("Google Drive sent nothing for 1 seconds") == 1
    assert checkout.files() == {"datasets/data.zip.part.driveabcdefgh.part"}


def test_gdown_is_asked_for(checkout):
    (checkout.bin / "gdown").unlink()
    assert "gdown is not installed (pip install gdown)" in checkout.run("data.zip").err


def test_gdown_that_outlives_a_killed_run_still_holds_the_folder(checkout, tmp_path):
    checkout.stub("gdown", f'#!/bin/bash\necho $$ > "{tmp_path}/pid"\nexec sleep 30\n')
    process = checkout.start("data.zip", REPAINT_TIMEOUT=30)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=10)
    blocked = checkout.run("lsun_cat")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert blocked.returncode == 2
    assert "another download into" in blocked.err


def test_growth_beside_a_larger_part_is_seen(checkout, server):
    """The part of a mirror that broke off must not hide what Google Drive sends."""
    checkout.stub(
        "gdown",
        '#!/bin/bash\nfor i in 1 2 3 4 5 6; do printf x >> "$3"abcdefgh.part; sleep 0.4; done\n'
        'echo "Too many users" >&2\nexit 1\n',
    )
    (checkout.root / "data/datasets").mkdir(parents=True)
    (checkout.root / "data/datasets/data.zip.part").write_bytes(bytes(1000))
    err = checkout.run("data.zip").err
    assert "sent nothing" not in err
    assert "quota" in err


WEIGHTS = "diffusion_pytorch_model"


def safetensors(seed=0, length=300_000):
    table = json.dumps({"a": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}})
    return len(table).to_bytes(8, "little") + table.encode() + bytes([seed]) * length


def hub_files(weights=f"{WEIGHTS}.safetensors", content=None):
    content = content or (checkpoint() if weights.endswith(".bin") else safetensors())
    return {
        "model_index.json": b'{"_class_name": "DDPMPipeline"}',
        "config.json": b'{"_class_name": "UNet2DModel"}',
        "scheduler_config.json": b'{"_class_name": "DDPMScheduler"}',
        weights: content,
    }


@pytest.mark.parametrize("weights", [f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin"])
def test_diffusers_folder_from_an_address(checkout, server, weights):
    server.files = {name: File(content) for name, content in hub_files(weights).items()}
    done = checkout.run("google/ddpm-cat-256", REPAINT_MIRROR=server.url)
    assert (done.returncode, done.err) == (0, "")
    assert checkout.files() == {f"pretrained/ddpm-cat-256/{name}" for name in hub_files(weights)}
    again = checkout.run("ddpm-cat-256", REPAINT_MIRROR="")
    assert (again.returncode, again.out, again.err) == (
        0, "ddpm-cat-256: ok\nall is here\n", ""
    )  # fmt: skip
    row = next(line for line in checkout.run("--list").out.splitlines() if "cat-256" in line)
    assert re.search(r"ddpm-cat-256 +- +300\.\d kB +Apache-2\.0$", row)


def test_diffusers_folder_from_a_folder_keeps_its_form(checkout, tmp_path):
    """A pipeline has its network and scheduler in folders of their own."""
    mirror = tmp_path / "mirror/ddpm-church-256"
    names = {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        f"unet/{WEIGHTS}.safetensors": safetensors(),
        "scheduler/scheduler_config.json": b"{}",
    }
    for name, content in names.items():
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror / name).write_bytes(content)
    done = checkout.run("ddpm-church-256", REPAINT_MIRROR=mirror.parent)
    assert (done.returncode, done.err) == (0, "")
    assert checkout.files() == {f"pretrained/ddpm-church-256/{name}" for name in names}


def test_diffusers_file_that_is_missing_or_broken_is_named(checkout, server):
    files = hub_files(content=safetensors()[:-5])
    server.files = {name: File(content) for name, content in files.items()}
    del server.files["model_index.json"]  # the network does without
    where = f"{server.url}/ddpm-cat-256"
    done = checkout.run("ddpm-cat-256", REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert (
        f"ddpm-cat-256/{WEIGHTS}.safetensors: what came from {where}/{WEIGHTS}.safetensors is cut "
        "off or damaged (300"
    ) in done.err
    assert done.err.splitlines()[-1].startswith("missing: ddpm-cat-256 (")
    kept = {f"pretrained/ddpm-cat-256/{name}" for name in ("config.json", "scheduler_config.json")}
    assert checkout.files() == kept
    assert "partly: 0.1 kB" in checkout.run("--list").out
    # What is here is not fetched again.
    server.requests.clear()
    server.files[f"{WEIGHTS}.safetensors"] = File(safetensors())
    assert checkout.run("ddpm-cat-256", REPAINT_MIRROR=server.url).returncode == 0
    assert ("config.json", None) not in server.requests
    assert checkout.files() == kept | {f"pretrained/ddpm-cat-256/{WEIGHTS}.safetensors"}
    del server.files["config.json"]
    checkout.path("ddpm-cat-256/config.json").write_bytes(b"<html>")
    done = checkout.run("ddpm-cat-256", REPAINT_MIRROR=server.url)
    assert "config.json is a web page and not the file; moved to data/pretrained/" in done.err
    assert "ddpm-cat-256/config.json or ddpm-cat-256/unet/config.json: " in done.err


def pointer(content):
    """What huggingface.co tells of a large file."""
    digest = hashlib.sha256(content).hexdigest()
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
    ).encode()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The program in this process; huggingface.co is the server, which knows one model."""
    monkeypatch.setattr(download, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(download, "ROOT", tmp_path)
    monkeypatch.setenv("REPAINT_TIMEOUT", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("REPAINT_MIRROR", raising=False)
    folder = "/google/ddpm-cat-256"
    server.files = {
        f"{folder}/resolve/main/{name}": File(content) for name, content in hub_files().items()
    }
    server.files[f"{folder}/raw/main/{WEIGHTS}.safetensors"] = File(pointer(safetensors()))
    return tmp_path / "data/pretrained/ddpm-cat-256"


def test_hub(hub, server, capsys):
    assert download.main(["ddpm-cat-256"]) == 0
    assert {path.name: path.read_bytes() for path in hub.iterdir()} == hub_files()
    out, err = capsys.readouterr()
    assert f"ddpm-cat-256/config.json: from {download.HUB}/google/ddpm-cat-256\n" in out
    assert err == ""


def test_hub_part_of_another_version_is_thrown_away(hub, capsys):
    """A safetensors file has no checksum of its own; that of Git LFS tells."""
    hub.mkdir(parents=True)
    (hub / f"{WEIGHTS}.safetensors.part").write_bytes(safetensors(7)[:200_000])
    assert download.main(["ddpm-cat-256"]) == 0
    assert (hub / f"{WEIGHTS}.safetensors").read_bytes() == safetensors()
    out, err = capsys.readouterr()
    assert "is damaged (its SHA-256 is not the one" in err
    assert "once more from the start" in out


def test_hub_without_checksums_will_do(hub, server):
    del server.files[f"/google/ddpm-cat-256/raw/main/{WEIGHTS}.safetensors"]
    assert download.main(["ddpm-cat-256"]) == 0


def test_apache_models_are_named_with_licence():
    names = ("celebahq", "ema-celebahq", "church", "cat", "bedroom")
    for name in names:
        entry = catalogue.look_up(f"google/ddpm-{name}-256")
        assert (entry.name, entry.licence) == (f"ddpm-{name}-256", "Apache-2.0")


def test_terminal_sees_bytes_and_the_time_to_come(checkout, server):
    server.files[CHECKPOINT] = File(checkpoint(), break_at=150_000, failures=1, stall=True)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [shutil.which("bash"), str(checkout.root / "download.sh"), CHECKPOINT]
    environment = checkout.environment | {"REPAINT_MIRROR": server.url}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(ours, 1 << 16):
            shown += block
    os.close(ours)
    assert process.wait(20) == 0
    assert re.search(rb"256x256_diffusion\.pt: +\d+%.*/300k \[\d\d:\d\d<.*B/s\]", shown), shown


def namesake(folder):
    """A folder that looks like ours, and is somebody else's."""
    (folder / "data/pretrained").mkdir(parents=True)
    (folder / "data/datasets").mkdir()
    return folder


def test_link_to_the_script_fills_the_folder_of_the_script(checkout, server, tmp_path):
    server.files[CHECKPOINT] = File(checkpoint())
    other = namesake(tmp_path / "other")
    (other / "download.sh").symlink_to(checkout.root / "download.sh")
    link = [shutil.which("bash"), str(other / "download.sh"), CHECKPOINT]
    environment = checkout.environment | {"REPAINT_MIRROR": server.url}
    done = subprocess.run(link, cwd=other, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.files() == {f"pretrained/{CHECKPOINT}"}
    assert not [path for path in (other / "data").rglob("*") if path.is_file()]


def test_link_to_the_python_program_fills_its_folder(checkout, tmp_path):
    other = namesake(tmp_path / "a/b/other").parent
    (other / "get.py").symlink_to(checkout.root / "guided_diffusion/tools/download.py")
    done = subprocess.run(
        [sys.executable, str(other / "get.py"), "lsun_cat"],
        env=checkout.environment | {"REPAINT_TRIES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (checkout.root / "data/pretrained").is_dir()


def test_cdpath_with_a_namesake_fills_no_other_folder(checkout, server, tmp_path):
    server.files[CHECKPOINT] = File(checkpoint())
    (tmp_path / "elsewhere").mkdir()
    other = namesake(tmp_path / "elsewhere" / checkout.root.name)
    done = subprocess.run(
        [shutil.which("bash"), f"{checkout.root.name}/download.sh", CHECKPOINT],
        cwd=tmp_path,
        env=checkout.environment
        | {"REPAINT_MIRROR": server.url, "CDPATH": str(tmp_path / "elsewhere")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.files() == {f"pretrained/{CHECKPOINT}"}
    assert not [path for path in other.rglob("*") if path.is_file()]


def test_python_is_asked_for(checkout):
    (checkout.bin / "python3").unlink()
    done = checkout.run("--list")
    assert (done.returncode, done.out) == (2, "")
    assert done.err == "error: Python 3.10 or newer is needed, and is not installed\n"
    checkout.stub("python", "#!/bin/sh\nexit 3\n")  # what the question for 3.10 ends with
    assert checkout.run("--list").err == done.err


def test_tqdm_is_asked_for(checkout, tmp_path):
    (tmp_path / "without/tqdm.py").write_text("raise ImportError('left out')\n")
    done = checkout.run("--list")
    assert done.returncode == 2
    assert done.err == (
        "error: python3 lacks the package tqdm: python3 -m pip install -r requirements.txt\n"
    )


def test_the_second_python_will_do(checkout):
    checkout.stub("python", "#!/bin/sh\nexit 4\n")
    assert checkout.run("--list").returncode == 0


def test_modules_of_the_callers_folder_are_not_imported(checkout, tmp_path):
    (tmp_path / "tqdm.py").write_text("raise SystemExit('ran')\n")
    assert checkout.run("--list", cwd=tmp_path).returncode == 0


def test_shipped_model_is_not_replaced(checkout, server):
    shipped = checkout.path("demo64.pt")
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes(b"shipped")
    content = {"data/pretrained/demo64.pt": b"evil", "data/datasets/gts/face/0.png": b"picture"}
    server.files["data.zip"] = File(archive(content))
    done = checkout.run("data.zip", REPAINT_MIRROR=server.url)
    assert done.returncode == 0
    assert "1 files unpacked into data/; 1 other entries left out" in done.out
    assert shipped.read_bytes() == b"shipped"


def test_list_tells_what_is_here(checkout):
    checkout.path("x").parent.mkdir(parents=True)
    checkout.path("lsun_cat.pt").write_bytes(bytes(1_500_000))
    checkout.path("lsun_horse.pt.part").write_bytes(bytes(2000))
    done = checkout.run("--list")
    assert (done.returncode, done.err) == (0, "")
    rows = {line.split()[0]: line for line in done.out.splitlines()[1:]}
    assert len(rows) == 21
    assert "1.5 MB" in rows["lsun_cat.pt"]
    assert "partly: 2.0 kB" in rows["lsun_horse.pt"]
    assert re.search(r"2\.2 GB +- +CC BY-NC-SA 4\.0$", rows["celeba256_250000.pt"])
    assert "see source" in rows["256x256_diffusion.pt"]


def test_help(checkout):
    done = checkout.run("--help")
    assert done.returncode == 0
    assert "REPAINT_MIRROR" in done.out
    assert checkout.files() == set()


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["celeba"], {}, "celeba is not a published file"),
        (["lsun_cat"], {"REPAINT_TIMEOUT": "soon"}, "REPAINT_TIMEOUT: expected whole seconds"),
        (["lsun_cat"], {"REPAINT_TRIES": "0"}, "REPAINT_TRIES: expected a whole number, found 0"),
        (
            ["lsun_cat"],
            {"REPAINT_MIRROR": "ftp://x"},
            "REPAINT_MIRROR: expected an http(s) address",
        ),
        (
            ["lsun_cat"],
            {"REPAINT_MIRROR": "/no/where"},
            "REPAINT_MIRROR: no such folder: /no/where",
        ),
    ],
)
def test_wrong_command_is_one_line_and_status_2(checkout, words, environment, message):
    done = checkout.run(*words, **environment)
    assert done.returncode == 2
    assert done.err.startswith(f"error: {message}")
    assert done.err.count("\n") == 1
    assert checkout.files() == set()


def light_checkpoint(golden):
    """All keys and shapes of a published network in a few kilobytes: one number for each tensor."""
    import torch

    shapes = json.loads((ROOT / "tests/golden" / golden).read_text())
    buffer = io.BytesIO()
    torch.save({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, buffer)
    return buffer.getvalue()


def test_keys_are_those_of_the_architecture(tmp_path, server):
    checkout = Checkout(tmp_path, torch=True)
    listed = {
        "256x256_classifier.pt": "classifier256_keys.json",
        "places256_300000.pt": "inet256_keys.json",  # another network
    }
    server.files = {name: File(light_checkpoint(golden)) for name, golden in listed.items()}
    done = checkout.run(*listed, REPAINT_MIRROR=server.url)
    assert done.returncode == 1
    assert "torch is not installed" not in done.out
    assert (
        f"places256_300000.pt: what came from {server.url}/places256_300000.pt is another network: "
        "1 keys differ, such as label_emb.weight (expected None, found (1000, 1024))"
    ) in done.err
    assert checkout.files() == {"pretrained/256x256_classifier.pt"}


@pytest.mark.parametrize(
    ("name", "width", "deepest", "labels"),
    [
        ("places256_300000", 256, 1024, None),
        ("256x256_diffusion", 256, 1024, 1000),
        ("256x256_classifier", 128, 512, None),
        ("256x256_diffusion_uncond", 256, 1024, None),
        ("lsun_bedroom", 256, 1024, None),
        ("lsun_cat", 256, 1024, None),
        ("lsun_horse", 256, 1024, None),
        ("lsun_horse_nodropout", 256, 1024, None),
        ("512x512_diffusion", 128, 1024, 1000),
        ("512x512_classifier", 64, 512, None),
        ("64x64_diffusion", 192, 768, 1000),
        ("64x64_classifier", 128, 512, None),
        ("128x128_diffusion", 256, 1024, 1000),
        ("128x128_classifier", 128, 512, None),
    ],
)
def test_every_checkpoint_has_its_architecture(name, width, deepest, labels):
    """The network that a file is compared with can be built, and is of the published widths."""
    import torch

    from guided_diffusion import script_util
    from guided_diffusion.config import keys

    entry = catalogue.look_up(f"{name}.pt")
    network, yml = entry.network, entry.conf
    loaded = keys.load_conf(ROOT / "confs" / f"{yml}.yml")
    used_there = {"model": loaded.model_path, "classifier": loaded.classifier_path}[network]
    assert used_there == f"./data/pretrained/{name}.pt"
    create = {"model": script_util.create_model, "classifier": script_util.create_classifier}
    with torch.device("meta"):
        built = create[network](loaded)
    shapes = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    assert network == ("classifier" if name.endswith("classifier") else "model")
    assert shapes["input_blocks.0.0.weight"][0] == width
    assert shapes["middle_block.0.in_layers.2.weight"][0] == deepest
    assert shapes.get("label_emb.weight", (None,))[0] == labels
    # 64x64: three blocks a level, or four in the classifier; everywhere else two.
    blocks = {"64x64_diffusion": 3, "64x64_classifier": 4}.get(name, 2)
    levels = {"512": 7, "256": 6, "128": 5, "64x": 4}.get(name[:3], 6)
    last = max(int(key.split(".")[1]) for key in shapes if key.startswith("input_blocks."))
    assert last == levels * (blocks + 1) - 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", str(ROOT / "download.sh")], capture_output=True, text=True)
    assert done.stdout == ""
