"""The page, in a real browser, and as programs call it.

``python -m pytest -m slow tests/test_app.py`` needs requirements-app.txt, playwright and Chromium.
With ``--basetemp DIR`` the pictures of the page stay there: data/app.png is the upper part of the
desk's.
"""

import ast
import base64
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

import app
from guided_diffusion.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
FEW_STEPS = ("timestep_respacing='8'", "schedule_jump_params={t_T: 8, jump_n_sample: 1}", "seed=4")
EXAMPLE = "#editor .examples img"


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


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_cannot_be_is_told(port):
    with pytest.raises(UserError, match=f"--port: expected 1 to 65535, found {port}$"):
        app.parse_args(["--conf_path", "c.yml", "--port", port])


def test_a_port_in_use_is_told_with_the_next():
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} is in use: --port {port + 1}$"):
            app.refuse_used_port("127.0.0.1", port)
    app.refuse_used_port("127.0.0.1", port)


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
        ({"example": 9}, "The program failed"),
        ({"result": 0}, "The program failed"),
    ],
)
def test_what_is_not_there_cannot_be_chosen(page, value, message):
    visitor = app.Visitor()
    answer, _ = page.choose(visitor, value, tab())
    assert message in answer["error"]
    assert visitor.picture is None


def test_a_broken_picture_is_told_when_it_is_chosen(page):
    (page.folder / "text.png").write_text("no picture")
    answer, _ = page.choose(app.Visitor(), {"path": str(page.folder / "text.png")}, tab("zh-CN"))
    assert answer["error"].startswith("text.png: not a picture")


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
    for path in page.folder.iterdir():
        os.utime(path, (0, 0))
    page.sweep()
    page.touch(visitor, None)
    assert not list(page.folder.iterdir())


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


def choose_method(page, label):
    if not page.get_by_label(label).is_visible():
        page.click("#more button")
    page.get_by_label(label).check()


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
def test_paint_run_and_repeat(open_page, page_server, tmp_path, kind):
    phone = {"viewport": {"width": 390, "height": 844}}
    page = open_page(**(phone if kind == "phone" else {}))
    take_example(page)
    paint(page)
    choose_method(page, "RePaint")
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
    assert 0.005 < hole.mean() < 0.6
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
    choose_method(page, "DDNM")
    page.click("#run")
    told(page, "Step 1")
    page.click("#cancel")
    told(page, "Cancelled (Step")
    page.wait_for_timeout(2000)
    assert page.locator("#files a").count() == 0
    assert page.locator("#told").inner_text().startswith("Cancelled (Step")
    choose_method(page, "RePaint")
    page.click("#run")
    assert "result.png" in downloads(page)


@pytest.mark.slow
def test_mistakes_are_told_in_the_visitors_language(open_page):
    page = open_page(locale="zh-CN")
    assert page.locator("#run").inner_text() == "运行"
    page.click("#run")
    told(page, "请先选择图片")
    page.locator(EXAMPLE).first.click()
    told(page, "涂抹", "#editor .message")
    page.click("#run")
    told(page, "请先涂抹")


@pytest.mark.slow
def test_two_visitors_wait_for_one_another_and_a_closed_tab_ends_its_job(open_page):
    first, second = open_page(), open_page()
    for page in (first, second):
        take_example(page)
        paint(page)
    choose_method(first, "DDNM")
    first.get_by_label("number input for Results").fill("4")
    choose_method(second, "RePaint")
    first.click("#run")
    told(first, "Step")
    second.click("#run")
    told(second, "1 before you")
    second.click("#cancel")
    told(second, "Cancelled (1 before you)")
    second.click("#run")
    told(second, "1 before you")
    first.close()
    assert "result.png" in downloads(second)


@pytest.mark.slow
def test_a_large_photo_and_what_follows_a_broken_one(open_page, tmp_path):
    rng = np.random.default_rng(0)
    grain = rng.integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(grain).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:200_000])
    page = open_page(viewport={"width": 390, "height": 844})
    page.set_input_files("#editor input[type=file]", tmp_path / "cut.jpg")
    told(page, "cut.jpg: cannot be read", "#editor .message")
    page.click("#run")
    told(page, "Choose a picture first")
    page.set_input_files("#editor input[type=file]", tmp_path / "photo.jpg")
    told(page, "Paint over", "#editor .message")
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
def test_compare_choose_and_go_on_with_a_result(open_page):
    page = open_page()
    take_example(page)
    paint(page)
    choose_method(page, "RePaint")
    page.get_by_label("number input for Results").fill("2")
    page.click("#run")
    first = downloads(page)
    thumbnails, after = page.locator("#editor .samples img"), page.locator("#editor .after")
    assert thumbnails.count() == 2
    assert after.get_attribute("src") == thumbnails.nth(0).get_attribute("src")
    thumbnails.nth(1).click()
    assert after.get_attribute("src") == thumbnails.nth(1).get_attribute("src")
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
    new = {"result1-2.png", "result2-2.png", "mask-2.png", "repeat-2.yml"}
    assert second.keys() == first.keys() | new
    assert (
        yaml.safe_load(second["repeat-2.yml"])["data"]["eval"]["demo"]["gt_path"] == "result2.png"
    )


@pytest.mark.slow
def test_a_mask_that_is_chosen_is_used(open_page):
    page = open_page()
    take_example(page)
    page.click("#more button")
    masks = sorted((ROOT / "data/datasets/gt_keep_masks/demo").iterdir())
    page.set_input_files("#mask input[type=file]", masks[0])
    told(page, "In the mask file, the hole is", "#more")
    hole = page.get_by_label("What is replaced")
    assert hole.input_value() == "the hole of a mask file"
    choose_method(page, "RePaint")
    page.click("#run")
    made = downloads(page)
    assert made["mask.png"] == masks[0].read_bytes()
    page.get_by_role("button", name="Back").click()
    paint(page)
    page.wait_for_timeout(1000)
    assert hole.input_value() == "what I paint"


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
def test_programs_learn_in_one_sentence_what_is_wrong(page_server):
    gradio_client = pytest.importorskip("gradio_client")
    picture = gradio_client.handle_file(str(sorted((ROOT / "data/datasets/gts/demo").iterdir())[0]))
    client = gradio_client.Client(page_server[0], verbose=False)
    endpoint = client.view_api(return_format="dict")["named_endpoints"]["/inpaint"]
    labels = [each["label"] for each in endpoint["parameters"] + endpoint["returns"]]
    assert labels == [
        "picture", "mask", "hole", "method", "samples", "seed", "full_size", "mask_grow",
        "mask_hole", "message", "before and after", "all results", "files",
    ]  # fmt: skip
    for wrong, message in (
        ({"seed": 1.7}, "seed: expected a whole number from 0 to 2147483647, found 1.7"),
        ({"full_size": "no"}, "full_size: expected true or false, found 'no'"),
        ({"hole": "painted"}, "hole: expected uploaded, thin, thick"),
        ({"hole": {"a": 1}}, "hole: expected painted, uploaded, thin"),
        ({"picture": "photo.png"}, "picture: expected a file"),
        ({"mask": 3}, "mask: expected a file"),
        ({}, "Choose a mask file first"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError) as caught:
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
