"""The page, in a real browser, and as programs call it.

``python -m pytest -m slow tests/test_app.py`` needs requirements-app.txt, playwright and Chromium.
With ``--basetemp DIR`` the pictures of the page stay there: data/app.png is the upper part of the
desk's.
"""

import ast
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from run_cases import ENVIRONMENT, ROOT, run_apart

from guided_diffusion.errors import UserError
from guided_diffusion.run.orders import Cancelled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
FEW_STEPS = ("timestep_respacing='8'", "schedule_jump_params={t_T: 8, jump_n_sample: 1}", "seed=4")
EXAMPLE = ".gallery-item"


# ---- Without a browser ---------------------------------------------------------------------------


@pytest.fixture
def app():
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    import app

    return app


def test_without_gradio_it_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    code = "import runpy, sys; sys.path[:0] = sys.argv[1:]; sys.argv[1:] = []; " \
           "runpy.run_path(sys.path[1] + '/app.py', run_name='__main__')"  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: gradio is not installed: pip install -r requirements-app.txt\n"


def test_no_folder_of_this_machine_is_told(app):
    told = "/tmp/repaint-page-x/session-1/tmp2/picture.png: mask: expected 3/4 of ./a/b, see http://x/y"
    expected = "picture.png: mask: expected 3/4 of ./a/b, see http://x/y"
    assert app.without_folders(told) == expected


def test_ctrl_c_while_it_starts_ends_it_in_one_line_and_torch_finds_its_settings(tmp_path):
    stand_in = "import os, signal; print(os.environ.get('GOMP_SPINCOUNT'), flush=True); "
    (tmp_path / "torch.py").write_text(stand_in + "os.kill(os.getpid(), signal.SIGINT)")
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "GOMP_SPINCOUNT"}
    ended = subprocess.run(
        [sys.executable, str(ROOT / "app.py")], capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "2000\n", "interrupted\n")


@pytest.mark.parametrize("port", ["0", "-1", "65536", "70000"])
def test_a_port_that_cannot_be_is_told(app, port):
    with pytest.raises(UserError, match=f"--port: expected 1 to 65535, found {port}$"):
        app.parse_args(["--conf_path", "c.yml", "--port", port])


@pytest.mark.parametrize("public", [None, "https://x.gradio.live"])
def test_only_addresses_that_are_there_are_told(app, monkeypatch, capsys, public):
    def nothing(*_, **__):
        pass

    def interrupted():
        raise KeyboardInterrupt

    demo = SimpleNamespace(share_url=public, queue=nothing, launch=nothing, close=nothing)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "x")  # main sets it, and it goes with the test
    monkeypatch.setattr(app, "Studio", nothing)
    monkeypatch.setattr(app, "build_page", lambda _: (demo, None))
    monkeypatch.setattr(app.signal, "signal", nothing)
    monkeypatch.setattr(app.signal, "pause", interrupted)
    with pytest.raises(KeyboardInterrupt):
        app.main(["--conf_path", "c.yml", "--share"])
    expected = "http://127.0.0.1:7860" + (f" and {public}" if public else "")
    assert capsys.readouterr().out == f"{expected}\n"


def test_examples_are_what_can_be_read_each_by_its_own_name(app, tmp_path):
    pictures, served = tmp_path / "gt", tmp_path / "served"
    for folder in (pictures / "a", pictures / "b", served):
        folder.mkdir(parents=True)
    (pictures / "a/1.png").write_bytes(b"one")
    (pictures / "b/1.png").write_bytes(b"two")
    (pictures / "b/2.png").symlink_to("nowhere")
    studio = SimpleNamespace(conf=SimpleNamespace(data=SimpleNamespace(gt_path=str(pictures))))
    shown = [Path(path).read_bytes() for path in app.Page(studio, served).examples()]
    assert shown == [b"one", b"two"]


def test_files_of_whom_nobody_hears_go_after_a_day(app, tmp_path):
    def work(job):
        job.error = Cancelled()

    page = app.Page(SimpleNamespace(work=work), tmp_path)
    tab, program = (SimpleNamespace(session_hash=name, headers={}) for name in ("tab", "program"))
    page.enter(tab)
    for name in ("tab", "program", "unused"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.png").touch()
    for request in (tab, program):
        list(page.inpaint(str(tmp_path / request.session_hash / "photo.png"), request=request))
    names = {path.name for path in tmp_path.iterdir()}
    page._sweep()
    assert {path.name for path in tmp_path.iterdir()} == names
    for job in page._jobs.values():
        job.asked -= 25 * 3600
    for path in tmp_path.iterdir():
        os.utime(path, (0, time.time() - 25 * 3600))
    page._sweep()
    assert {path.name for path in tmp_path.iterdir()} == {"tab", "session-tab"}
    page.leave(tab)
    assert not list(tmp_path.iterdir())


# ---- With one ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_server(tmp_path_factory):
    """Serve the demo's page in few steps; yield its address and the folder of its files."""
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = tmp_path_factory.mktemp("server")
    options = ["--conf_path", "confs/demo.yml", "--port", port]
    for option in FEW_STEPS:
        options += ["--set", option]
    with (files / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py", *map(str, options)],
            cwd=ROOT, env=ENVIRONMENT | {"TMPDIR": str(files)}, stdout=log, stderr=log,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            assert server.poll() is None, (files / "log").read_text()
            time.sleep(0.3)
    yield address, files
    server.send_signal(signal.SIGTERM)
    server.wait(60)
    assert not list(files.glob("repaint-page-*"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, page_server):
    pages = []

    def open_(**options):
        pages.append(browser.new_page(**{"viewport": {"width": 1280, "height": 1000}} | options))
        pages[-1].set_default_timeout(90_000)
        pages[-1].goto(page_server[0])
        pages[-1].wait_for_selector("#run")
        return pages[-1]

    yield open_
    for page in pages:
        page.close()


def take_example(page, number=0):
    page.locator(EXAMPLE).nth(number).click()
    page.wait_for_timeout(2000)


def paint(page):
    """Draw a stroke through the middle of the picture with the mouse."""
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=20)
    page.wait_for_timeout(1000)  # the editor draws with some delay
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.mouse.up()  # one that comes while the editor still draws is lost
    page.wait_for_timeout(1000)


def downloads(page):
    """Wait for results; return the content of the downloads by name."""
    page.wait_for_selector("#files a[href*=repeat]")
    links = page.locator("#files a").evaluate_all("links => links.map(link => link.href)")
    return {link.rpartition("/")[2]: page.request.get(link).body() for link in links}


def as_pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def told(page, text):
    page.wait_for_function(
        "text => document.querySelector('#status').innerText.includes(text)", arg=text
    )


def session_files(files):
    return [path for path in files.glob("repaint-page-*/session-*/**/*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["desk", "phone"])
def test_paint_run_and_repeat(open_page, page_server, tmp_path, kind):
    phone = {"viewport": {"width": 390, "height": 844}}
    page = open_page(**(phone if kind == "phone" else {}))
    take_example(page)
    paint(page)
    page.get_by_label("RePaint").check()
    page.click("#run")
    made = downloads(page)
    page.screenshot(path=tmp_path / "app.png", full_page=True)
    assert made.keys() == {"result.png", "picture.png", "mask.png", "repeat.yml"}
    example = sorted((ROOT / "data/datasets/gts/demo").iterdir())[0]
    before, after = as_pixels(made["picture.png"]), as_pixels(made["result.png"])
    assert np.array_equal(before, as_pixels(example.read_bytes()))
    hole = as_pixels(made["mask.png"])[:, :, 0] == 0
    changed = (before != after).any(axis=2)
    feather = yaml.safe_load(made["repeat.yml"])["feather"]
    rows = np.flatnonzero(hole.any(axis=1))
    assert 0.01 < hole.mean() < 0.6
    assert changed[hole].mean() > 0.9
    assert not changed[: max(0, rows[0] - feather)].any()
    assert not changed[rows[-1] + 1 + feather :].any()
    assert page_server[1].as_posix() not in page.locator("body").inner_text()

    for name, content in made.items():
        if name != "result.png":
            (tmp_path / name).write_bytes(content)
    (tmp_path / "data").symlink_to(ROOT / "data")
    again = run_apart(tmp_path, "--conf_path", "repeat.yml")
    assert again.status == 0, again.err
    assert (tmp_path / "log/page/inpainted/picture.png").read_bytes() == made["result.png"]


@pytest.mark.slow
def test_cancel_and_run_again(open_page, page_server):
    page = open_page()
    take_example(page, 1)
    paint(page)
    page.get_by_label("DDNM").check()
    page.click("#run")
    told(page, "network calls, ")
    page.click("#cancel")
    told(page, "Cancelled")
    page.wait_for_timeout(3000)
    assert page.locator("#files a").count() == 0
    assert page.locator("#told").inner_text().strip() == "Cancelled"
    page.get_by_label("RePaint").check()
    page.click("#run")
    assert "result.png" in downloads(page)


@pytest.mark.slow
def test_mistakes_are_told_in_the_visitors_language(open_page):
    page = open_page(locale="zh-CN")
    assert page.locator("#run").inner_text() == "运行"
    page.click("#run")
    told(page, "请先上传图片")
    take_example(page)
    page.click("#run")
    told(page, "尚未涂抹")


@pytest.mark.slow
def test_two_visitors_wait_for_one_another_and_a_closed_tab_ends_its_job(open_page, page_server):
    first, second = open_page(), open_page()
    for page in (first, second):
        take_example(page)
        paint(page)
    first.get_by_label("DDNM").check()
    second.get_by_label("RePaint").check()
    first.click("#run")
    told(first, "network calls")
    second.click("#run")
    told(second, "queue: 1/1")
    first.close()
    assert "result.png" in downloads(second)
    second.close()
    for _ in range(100):
        if not session_files(page_server[1]):
            break
        time.sleep(0.2)
    assert not session_files(page_server[1])


@pytest.mark.slow
def test_the_example_of_gradio_client(page_server, tmp_path):
    pytest.importorskip("gradio_client")
    doc = ast.get_docstring(ast.parse((ROOT / "app.py").read_text(encoding="utf-8")))
    example = textwrap.dedent(doc[doc.index("    from gradio_client") :])
    assert len(example.splitlines()) == 5
    shutil.copy(sorted((ROOT / "data/datasets/gts/demo").iterdir())[0], tmp_path / "photo.png")
    masks = sorted((ROOT / "data/datasets/gt_keep_masks/demo").iterdir())
    shutil.copy(masks[0], tmp_path / "mask.png")
    code = example.replace("http://127.0.0.1:7860", page_server[0])
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "got")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    files = [Path(path) for path in ast.literal_eval(ended.stdout.splitlines()[-1])]
    assert {path.name for path in files} == {"result.png", "picture.png", "mask.png", "repeat.yml"}
    given = next(path for path in files if path.name == "picture.png")
    assert given.read_bytes() == (tmp_path / "photo.png").read_bytes()


@pytest.mark.slow
def test_nothing_else_of_the_machine_is_served(page_server):
    address = page_server[0]
    for path in ("/etc/hostname", f"{ROOT}/app.py", f"{ROOT}/confs/demo.yml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)
    config = urllib.request.urlopen(f"{address}/config", timeout=10).read().decode()
    assert str(ROOT) not in config
