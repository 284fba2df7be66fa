"""The page, in a real browser, and as programs call it.

``python -m pytest -m slow tests/test_app.py`` needs requirements-app.txt, playwright and Chromium.
With ``--basetemp DIR`` the pictures of the page stay there: data/app.png is the upper part of the
desk's.
"""

import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import ENVIRONMENT, ROOT, run_apart

import app
from guided_diffusion.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STEPS = ("timestep_respacing='60'", "schedule_jump_params={t_T: 60, jump_n_sample: 1}", "seed=4")
PHONE = {"width": 390, "height": 844}
PHOTO = sorted((ROOT / "data/datasets/gts/demo").iterdir())[0]
MASK = sorted((ROOT / "data/datasets/gt_keep_masks/demo").iterdir())[0]


# ---- Without a browser ---------------------------------------------------------------------------


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(app, "gr", None)
    with pytest.raises(UserError, match=r"^gradio is not installed: pip install -r requirements-"):
        app.main(["--conf_path", "c.yml"])


def tab(language=""):
    return SimpleNamespace(headers={"accept-language": language})


def test_no_folder_of_this_machine_is_told():
    told = "/tmp/repaint-page-x/job-1/picture.png: mask: expected 3/4 of ./a/b, see http://x/y"
    expected = "picture.png: mask: expected 3/4 of ./a/b, see http://x/y"
    assert app.explain(UserError(told), app.speaker(tab())) == expected


def test_ctrl_c_while_it_starts_ends_it_in_one_line_and_torch_finds_its_settings(tmp_path):
    stand_in = "import os, signal; print(os.environ.get('GOMP_SPINCOUNT'), flush=True); "
    (tmp_path / "torch.py").write_text(stand_in + "os.kill(os.getpid(), signal.SIGINT)")
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "GOMP_SPINCOUNT"}
    ended = subprocess.run(
        [sys.executable, str(ROOT / "app.py")], capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "2000\n", "interrupted\n")


def test_an_address_that_cannot_be_is_told():
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        for options, message in (
            (["--port", "0"], "--port: expected 1 to 65535, found 0"),
            (["--port", "65536"], "--port: expected 1 to 65535, found 65536"),
            (["--port", str(port)], f"port {port} is in use: --port {port + 1}"),
            (["--host", "192.0.2.1"], "--host: "),
        ):
            with pytest.raises(UserError) as refused:
                app.parse_args(["--conf_path", "c.yml", *options])
            assert str(refused.value).startswith(message)
    assert app.parse_args(["--conf_path", "c.yml", "--port", str(port)]).port == port


@pytest.fixture
def page(tmp_path):
    pictures, served = tmp_path / "gt", tmp_path / "served"
    for folder in (pictures / "a", pictures / "b", served):
        folder.mkdir(parents=True)
    for number, place in enumerate(("a/1.png", "b/1.png")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(pictures / place)
    (pictures / "b/2.png").symlink_to("nowhere")
    conf = SimpleNamespace(data=SimpleNamespace(gt_path=str(pictures)), depth=None)
    return app.Page(SimpleNamespace(conf=conf, folder=served))


def test_examples_are_what_can_be_read_each_by_its_own_name(page):
    shown = [
        as_pixels(base64.b64decode(url.partition(",")[2]))[0, 0, 0] for _, url in page.examples
    ]
    assert shown == [0, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"path": "/etc/hostname"}, "picture: expected a file"),
        ({"path": 3}, "picture: expected a file"),
        ({}, "picture: expected a file"),
        ({"path": "text.png"}, "text.png：不是可识别的图片"),
        ({"path": "phone.heic"}, "phone.heic：请先将 HEIC 转换为"),
        ({"result": 0}, "程序出错，详情见终端"),
    ],
)
def test_what_is_no_picture_cannot_be_chosen(page, monkeypatch, value, message):
    monkeypatch.chdir(page.folder)
    Path("text.png").write_text("no picture")
    Path("phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    visitor = app.Visitor()
    answer, _ = page.choose(visitor, value, tab("zh-CN"))
    assert message in answer["error"]
    assert visitor.picture is None


def test_what_is_told_of_a_job_until_its_tab_is_closed(page):
    job = SimpleNamespace(
        work=Future(), folder=page.folder, phase="running", since=time.monotonic() - 10, calls=5,
        total=15, predicted=torch.zeros(2, 1, 8, 8), is_cancelled=False,
    )  # fmt: skip
    page.worker.start, page.worker.count_before = lambda *_: job, lambda _: 0
    states = page.work(app.speaker(tab("zh-TW")))
    assert next(states).told == "第 5/15 步，剩 20 秒"
    shown = app.status("a < b", job)
    assert '<progress value="5" max="15">' in shown
    assert ">a &lt; b<" in shown
    url = re.search(r"base64,([^\"]*)", shown)[1]
    assert as_pixels(base64.b64decode(url)).shape == (8, 16, 3)
    page.worker.count_before = lambda _: 2
    assert next(states).told == "前面还有 2 个任务"
    states.close()
    assert job.is_cancelled


def test_the_sweep_deletes_what_no_open_tab_uses(page):
    for name in ("sha1", "sha2", "sha3", "job-1"):
        (page.folder / name).mkdir()
    for name in ("aborted", "sha1/a.png", "sha2/b.png", "sha3/unused.png", "job-1/picture.png"):
        Image.new("L", (8, 8)).save(page.folder / name, "PNG")
    visitor = app.Visitor(shown=SimpleNamespace(picture=page.folder / "job-1/picture.png"))
    page.choose(visitor, {"path": str(page.folder / "sha1/a.png")}, tab())
    page.sweep()
    assert len(list(page.folder.iterdir())) == 5
    for path in page.folder.iterdir():
        os.utime(path, (0, 0))
    page.touch(visitor, str(page.folder / "sha2/b.png"))
    page.sweep()
    assert {path.name for path in page.folder.iterdir()} == {"sha1", "sha2", "job-1"}
    shutil.rmtree(page.folder / "sha1")
    page.touch(visitor, None)  # of a tab that comes back after a night


# ---- With one ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_server(tmp_path_factory):
    """Serve the demo's page in few steps; yield its address and the folder of its files."""
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = tmp_path_factory.mktemp("server")
    options = ["--conf_path", "confs/demo.yml", "--port", str(port)]
    options += [word for option in STEPS for word in ("--set", option)]
    with (files / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py", *options],
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
def open_page(page_server):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )

        def open_(**options):
            page = chromium.new_page(**{"viewport": {"width": 1280, "height": 1000}} | options)
            page.set_default_timeout(90_000)
            page.goto(page_server[0])
            page.wait_for_selector("#run")
            return page

        yield open_
        chromium.close()


def take_example(page, number=0):
    page.locator("#editor .examples img").nth(number).click()
    told(page, "Paint over", "#editor .message")


def paint(page):
    """Draw a stroke through the middle of the picture with the mouse."""
    box = page.locator("#editor .view").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=20)
    page.mouse.up()


def painted(page):
    """Return the pixels of the editor's canvas that are painted, as a share."""
    return page.evaluate("""() => {
        const canvas = document.querySelector("#editor canvas");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((level, i) => i % 4 == 3 && level > 127).length / (data.length / 4);
    }""")


def set_method(page, label):
    if not page.get_by_label("Method").is_visible():
        page.click("#more button")
    assert page.get_by_label("Method").input_value()
    page.get_by_label("Method").click()
    page.get_by_role("option", name=label).click()


def downloads(page):
    """Wait for results; return the content of the downloads by name."""
    page.wait_for_selector("#files a[href*=repeat]")
    links = page.locator("#files a").evaluate_all("links => links.map(link => link.href)")
    return {link.rpartition("/")[2]: page.request.get(link).body() for link in links}


def as_pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def told(page, text, place="#status"):
    page.wait_for_function(
        "([text, place]) => document.querySelector(place).innerText.includes(text)",
        arg=[text, place],
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["desk", "phone"])
def test_paint_run_compare_go_on_and_repeat(open_page, page_server, tmp_path, kind):
    page = open_page(**({"viewport": PHONE} if kind == "phone" else {}))
    take_example(page)
    paint(page)
    set_method(page, "RePaint")
    page.get_by_label("number input for Results").fill("2")
    page.click("#run")
    first = downloads(page)
    page.screenshot(path=tmp_path / "app.png", full_page=True)
    assert first.keys() == {"result1.png", "result2.png", "picture.png", "mask.png", "repeat.yml"}
    assert np.array_equal(as_pixels(first["picture.png"]), as_pixels(PHOTO.read_bytes()))
    assert 0.005 < (as_pixels(first["mask.png"]) == 0).mean() < 0.6
    assert page_server[1].as_posix() not in page.locator("body").inner_text()

    thumbnails, after = page.locator("#editor .samples img"), page.locator("#editor .after")
    for number in (0, 1):
        assert after.get_attribute("src") == thumbnails.nth(number).get_attribute("src")
        thumbnails.nth(1).click()
    hold = page.get_by_role("button", name="Hold").bounding_box()
    page.mouse.move(hold["x"] + 5, hold["y"] + 5)
    page.mouse.down()
    assert not after.is_visible()
    page.mouse.up()
    assert after.is_visible()
    page.get_by_role("button", name="Go on").click()
    told(page, "Paint over", "#editor .message")
    paint(page)
    page.click("#run")
    page.wait_for_selector("#files a[href*=repeat-2]")
    second = downloads(page)
    assert second.keys() == first.keys() | {
        "result1-2.png", "result2-2.png", "mask-2.png", "repeat-2.yml"
    }  # fmt: skip
    assert "gt_path: result2.png" in second["repeat-2.yml"].decode()

    for name in ("picture.png", "mask.png", "repeat.yml"):
        (tmp_path / name).write_bytes(first[name])
    (tmp_path / "data").symlink_to(ROOT / "data")
    again = run_apart(tmp_path, "--conf_path", "repeat.yml")
    assert again.status == 0, again.err
    made = sorted((tmp_path / "log/page/inpainted").iterdir())
    assert [path.read_bytes() for path in made] == [first["result1.png"], first["result2.png"]]


@pytest.mark.slow
def test_two_visitors_wait_for_one_another_until_one_cancels_or_leaves(open_page):
    first, second = open_page(), open_page()
    for page in (first, second):
        take_example(page, 1)
        paint(page)
    set_method(first, "RePaint")  # takes longer than all that the second does meanwhile
    first.get_by_label("number input for Results").fill("4")
    for end in (lambda: first.click("#cancel"), first.close):
        first.click("#run")
        first.wait_for_selector("#status progress")
        second.click("#run")
        second.wait_for_selector("#told:text-is('1 before you')")
        second.click("#cancel")
        told(second, "Cancelled (1 before you)")
        second.click("#run")
        second.wait_for_selector("#told:text-is('1 before you')")
        end()
        told(second, "Done")
        if not first.is_closed():
            assert first.locator("#told").inner_text().startswith("Cancelled (Step")
            assert first.locator("#files a").count() == 0
    assert "result.png" in downloads(second)


@pytest.mark.slow
def test_a_large_photo_after_mistakes_on_a_telephone_in_china(open_page, tmp_path):
    rng = np.random.default_rng(0)
    grain = rng.integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(grain).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:200_000])
    page = open_page(viewport=PHONE, locale="zh-CN")
    assert page.locator("#run").inner_text() == "运行"
    page.set_input_files("#editor input[type=file]", tmp_path / "cut.jpg")
    told(page, "cut.jpg：无法读取", "#editor .message")
    page.click("#run")
    told(page, "请先选择图片")
    page.set_input_files("#editor input[type=file]", tmp_path / "photo.jpg")
    told(page, "涂抹", "#editor .message")
    page.click("#run")
    told(page, "请先涂抹")
    paint(page)
    page.click("#run")
    made = downloads(page)
    assert made["picture.jpg"] == (tmp_path / "photo.jpg").read_bytes()
    assert as_pixels(made["result.jpg"]).shape == (4000, 3000, 3)
    hole = as_pixels(made["mask.png"])[:, :, 0] == 0
    assert hole.shape == (4000, 3000)
    rows, columns = (np.flatnonzero(hole.any(axis=axis)) for axis in (1, 0))
    assert 80 < len(rows) < 120  # a brush of a thirtieth of 3,000 pixels
    assert abs(rows.mean() - 2000) < 20
    assert abs(columns.mean() - 1500) < 20
    bottom = page.locator("#told").bounding_box()["y"] + page.evaluate("scrollY")
    assert bottom < 1.5 * 844


@pytest.mark.slow
def test_the_editor(open_page):
    page = open_page()
    take_example(page)
    paint(page)
    once = painted(page)
    assert 0.001 < once < 0.1
    page.locator("#editor .paint input").fill("100")  # a quarter of the picture
    paint(page)
    assert painted(page) > 0.05
    page.keyboard.press("Control+z")
    assert painted(page) == once
    page.keyboard.press("Control+Shift+z")
    assert painted(page) > 0.05
    page.get_by_role("button", name="Eraser").click()
    paint(page)
    assert painted(page) < 0.002
    page.get_by_role("button", name="Clear").click()
    assert painted(page) == 0
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert painted(page) > 0.05
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Brush").click()
    page.locator("#editor .view").click()
    assert painted(page) > 0.01  # a dot
    sheet = page.locator("#editor .sheet")
    width = sheet.bounding_box()["width"]
    page.locator("#editor .view").hover()
    page.mouse.wheel(0, -500)
    page.wait_for_timeout(200)
    assert sheet.bounding_box()["width"] > 1.5 * width
    page.mouse.wheel(0, 5000)
    page.wait_for_timeout(200)
    assert abs(sheet.bounding_box()["width"] - width) < 1


@pytest.mark.slow
def test_a_mask_that_is_chosen_is_used(open_page):
    page = open_page()
    take_example(page)
    page.click("#more button")
    page.set_input_files("#mask input[type=file]", MASK)
    told(page, "In the mask file, the hole is", "#more")
    hole = page.get_by_label("What is replaced")
    assert hole.input_value() == "the hole of a mask file"
    set_method(page, "RePaint")
    page.click("#run")
    made = downloads(page)
    assert made["mask.png"] == MASK.read_bytes()
    page.get_by_role("button", name="Back").click()
    paint(page)
    page.wait_for_timeout(1000)
    assert hole.input_value() == "what I paint"


@pytest.mark.slow
def test_the_example_of_gradio_client(page_server, tmp_path, monkeypatch):
    pytest.importorskip("gradio_client")
    monkeypatch.chdir(tmp_path)
    shutil.copy(PHOTO, "photo.png")
    shutil.copy(MASK, "mask.png")
    example = textwrap.dedent(app.__doc__[app.__doc__.index("    from gradio_client") :])
    names = {}
    exec(example.replace("http://127.0.0.1:7860", page_server[0]), names)
    files = {Path(path).name: Path(path) for path in names["files"]}
    assert files.keys() == {"result.png", "picture.png", "mask.png", "repeat.yml"}
    assert files["picture.png"].read_bytes() == PHOTO.read_bytes()
    assert names["told"].startswith("Done in")


@pytest.mark.slow
def test_programs_learn_in_one_sentence_what_is_wrong(page_server):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(page_server[0], verbose=False)
    endpoint = client.view_api(return_format="dict")["named_endpoints"]["/inpaint"]
    labels = [each["label"] for each in endpoint["parameters"] + endpoint["returns"]]
    assert ", ".join(labels) == (
        "picture, mask, hole, method, samples, seed, full_size, mask_grow, mask_hole, "
        "message, before and after, all results, files"
    )
    for wrong, message in (
        ({"seed": 1.7}, "seed: expected a whole number from 0 to 2147483647, found 1.7"),
        ({"hole": "painted"}, "hole: expected uploaded, thin, thick"),
        ({"picture": "photo.png"}, "picture: expected a file"),
        ({"mask": 3}, "mask: expected a file"),
        ({}, "Choose a mask file first"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError) as caught:
            picture = gradio_client.handle_file(str(PHOTO))
            client.predict(**{"picture": picture} | wrong, api_name="/inpaint")
        assert message in str(caught.value)


@pytest.mark.slow
def test_nothing_else_of_the_machine_is_served(page_server):
    address = page_server[0]
    for path in ("/etc/hostname", f"{ROOT}/app.py", f"{ROOT}/confs/demo.yml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)
    config = urllib.request.urlopen(f"{address}/config", timeout=10).read().decode()
    assert str(ROOT) not in config
