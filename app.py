"""Paint a hole in the browser and have it filled: ``python app.py --conf_path confs/demo.yml``.

The page makes nothing of its own: it writes picture and mask into a folder, and has them inpainted
as test.py does. It needs: pip install -r requirements-app.txt

While it runs, programs can ask it too:

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    picture, mask = handle_file("photo.png"), handle_file("mask.png")  # black is replaced
    told, before_after, all_results, files = client.predict(picture, mask, api_name="/inpaint")
    print(files)
"""

import os

if __name__ == "__main__":  # before the other imports, which take seconds
    from guided_diffusion import end_at_once_on_ctrl_c

    end_at_once_on_ctrl_c()
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch, as guided_diffusion/cli.py says

import argparse
import base64
import contextlib
import html
import io
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from guided_diffusion import raise_on_ctrl_c
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import list_images
from guided_diffusion.masks import FAMILIES
from guided_diffusion.run.orders import (
    MAX_MASK_GROW,
    MAX_SAMPLES,
    NO_MASK,
    NO_PICTURE,
    NOTHING_PAINTED,
    PAINTED,
    UPLOADED,
    Cancelled,
    Job,
    Order,
    Studio,
)


def without_gradio() -> None:
    """Say what is missing."""
    raise UserError("gradio is not installed: pip install -r requirements-app.txt")


try:
    import gradio as gr
except ImportError:
    command_line(without_gradio)

MAX_UPLOAD = "32mb"
LONGEST_QUEUE = 16
SWEEP_SECONDS = 90.0
KEPT_SECONDS = 24 * 3600.0  # files of whom nobody knows whether they are still there
FONTS = ["system-ui", "sans-serif"]  # none is fetched from elsewhere
# English and Chinese, by key; the browser's language decides.
WORDS = {
    "rule": (
        "Drop or paste a picture, and paint over what is to go. **The painted part is replaced.** "
        "In mask files it is the other way round: black is replaced, white stays.",
        "拖入或粘贴图片，涂抹要去掉的部分。 **涂抹的部分会被替换**。 "
        "掩码文件则相反：黑色被替换，白色保留。",
    ),
    "picture": ("Picture", "图片"),
    "examples": ("Examples", "示例"),
    "hole": ("What is replaced", "替换的部分"),
    PAINTED: ("what is painted", "涂抹的部分"),
    UPLOADED: ("what is black in the mask below", "下方掩码的黑色部分"),
    "mask": ("Mask: black is replaced, white stays", "掩码：黑色被替换，白色保留"),
    "method": ("Method", "方法"),
    "fast": ("fast (DDNM, 100 network calls)", "快速（DDNM，100 次网络调用）"),
    "repaint": ("RePaint, with its resampling", "RePaint（含重采样）"),
    "samples": ("Results", "结果数量"),
    "seed": ("Seed (empty: another one each time)", "随机种子（留空则每次不同）"),
    "full_size": ("Full size: the photo keeps its own size", "原尺寸：照片保持原有大小"),
    "mask_grow": ("Enlarge the hole by so many pixels", "将区域向外扩大（像素）"),
    "run": ("Run", "运行"),
    "cancel": ("Cancel", "取消"),
    "compare": ("Before and after", "修复前后对比"),
    "all": ("All results", "全部结果"),
    "files": (
        "Downloads: results, picture, mask, and the YAML that repeats this with test.py",
        "下载：结果、图片、掩码，以及可用 test.py 重现本结果的 YAML",
    ),
    "loading": ("loading the network", "正在加载网络"),
    "calls": ("network calls", "次网络调用"),
    "left": ("s left", "秒剩余"),
    "done": ("Done", "完成"),
    "cancelled": ("Cancelled", "已取消"),
    NO_PICTURE: (NO_PICTURE, "请先上传图片"),
    NOTHING_PAINTED: (NOTHING_PAINTED, "尚未涂抹：请涂抹要替换的部分"),
    NO_MASK: (NO_MASK, "请先上传掩码"),
    "fault": (
        "the program failed; its terminal says more",
        "程序出错，详情见终端",
    ),
}


def without_folders(text: str) -> str:
    """Return a message without the folders of this machine, which are nobody's business."""
    return re.sub(r"(?<![\w.:/])(?:/[^\s/:]+)+/(?=[^\s/])", "", text)


# ---- The page ------------------------------------------------------------------------------------


class Page:
    """What visitors see, and their sessions: each has a folder, and uploads that go with it."""

    def __init__(self, studio: Studio, folder: Path) -> None:
        self.studio, self.folder = studio, folder
        self._examples = folder / "examples"
        self._present: set[str] = set()  # visitors who will say that they leave
        self._jobs: dict[str, Job] = {}
        self._uploads: dict[str, set[Path]] = {}

    def painted(
        self,
        editor: dict | None,
        mask: str | None,
        hole: str,
        method: str,
        samples: float,
        seed: float | None,
        full_size: bool,
        mask_grow: float,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Do what the page's button asks for."""
        editor = editor or {"background": None, "layers": [], "composite": None}
        order = Order(
            editor["background"], editor["layers"], mask, hole, method, samples, seed, full_size,
            mask_grow,
        )  # fmt: skip
        yield from self._tell(order, request, editor["composite"])

    def inpaint(
        self,
        picture: str,
        mask: str | None = None,
        hole: str = PAINTED,
        method: str = "fast",
        samples: float = 1,
        seed: float | None = None,
        full_size: bool = True,
        mask_grow: float = 0,
        request: gr.Request = None,
    ) -> Iterator[tuple]:
        """Inpaint a picture where a mask is black: for programs, which have no editor."""
        hole = UPLOADED if hole == PAINTED else hole  # as the page's control stands at first
        order = Order(picture, [], mask, hole, method, samples, seed, full_size, mask_grow)
        yield from self._tell(order, request)

    def _tell(self, order: Order, request: gr.Request, *uploads: str | None) -> Iterator[tuple]:
        say = speaker(request)
        self._sweep()
        session = request.session_hash or secrets.token_hex(8)
        self._folder(session).mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._folder(session)))
        earlier = self._jobs.get(session)
        job = self._jobs[session] = Job(order, folder)
        paths = (order.picture, order.mask, *order.strokes, *uploads)
        self._uploads.setdefault(session, set()).update(Path(path).parent for path in paths if path)
        thread = threading.Thread(target=self.studio.work, args=(job,), daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                job.asked = time.monotonic()
                yield progress(job, say), gr.skip(), gr.skip(), gr.skip()
                thread.join(0.5)
        finally:
            job.is_cancelled = True  # the visitor left, or the job is over anyway
        if isinstance(job.error, Cancelled):
            yield line(say("cancelled")), gr.skip(), gr.skip(), gr.skip()
            return
        if job.error:
            is_mistake = isinstance(job.error, UserError)
            text = without_folders(say(str(job.error))) if is_mistake else say("fault")
            yield line(text, is_error=True), None, None, None
            raise gr.Error(text, print_exception=False)
        yield self._results(job, say)
        if earlier:  # its downloads are no more on the page
            shutil.rmtree(earlier.folder, ignore_errors=True)

    def _results(self, job: Job, say: Any) -> tuple:
        results = [str(path) for path in job.results]
        inputs = sorted(str(path) for path in job.folder.iterdir() if path.is_file())
        told = " · ".join([say("done"), f"seed {job.order.seed}", *job.notes])
        return (
            line(without_folders(told)),
            (str(job.original), results[0]),
            gr.update(value=results, visible=len(results) > 1),
            [*results, *(path for path in inputs if path not in results)],
        )

    def enter(self, request: gr.Request) -> None:
        """Know a visitor, whose uploads are to be kept."""
        self._present.add(request.session_hash)

    def cancel(self, request: gr.Request) -> str:
        """End a visitor's job at the next network call; one that waits is Gradio's to end."""
        job = self._jobs.get(request.session_hash)
        if job and not job.results:
            job.is_cancelled = True
        return line(speaker(request)("cancelled"))

    def leave(self, request: gr.Request) -> None:
        """End a visitor's job, and delete the visitor's files."""
        self._present.discard(request.session_hash)
        self._forget(request.session_hash)
        timer = threading.Timer(SWEEP_SECONDS, self._sweep)
        timer.daemon = True
        timer.start()

    def _forget(self, session: str) -> None:
        if job := self._jobs.pop(session, None):
            job.is_cancelled = True
        folders = self._uploads.pop(session, set())
        folders = folders.difference(*self._uploads.values())  # equal files are one file
        self._delete({*folders, self._folder(session)})

    def _sweep(self) -> None:
        """Delete what was uploaded but never used, and what belongs to programs that are gone.

        A program may leave without a word, so it counts as gone a day after its last job.
        """
        for session, job in list(self._jobs.items()):
            if session not in self._present and time.monotonic() - job.asked > KEPT_SECONDS:
                self._forget(session)
        sessions = {*self._present, *self._uploads}
        owned = {self._folder(session) for session in sessions}.union(*self._uploads.values())
        oldest = time.time() - (KEPT_SECONDS if sessions else 60)
        for folder in set(self.folder.glob("*")) - owned:
            with contextlib.suppress(FileNotFoundError):  # somebody else deletes it, too
                if folder.stat().st_mtime < oldest:
                    self._delete({folder})

    def _delete(self, folders: set[Path]) -> None:
        for folder in folders - {self._examples}:
            if folder.parent == self.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, session: str) -> Path:
        return self.folder / f"session-{re.sub('[^0-9a-zA-Z]', '', session)}"

    def examples(self) -> list[str]:
        """Copy some of the configuration's pictures to where the page may show them."""
        try:
            found = list_images(self.studio.conf.data.gt_path)[:4]
        except UserError:  # a page for visitors' pictures needs none of its own
            return []
        self._examples.mkdir()
        copies = []
        for number, path in enumerate(found):
            copy = self._examples / f"{number}_{Path(path).name}"  # names may be equal
            with contextlib.suppress(OSError):  # not to be read, or no file
                copies.append(shutil.copy(path, str(copy)))
        return copies


def speaker(request: gr.Request) -> Any:
    """Return what finds words in the visitor's language."""
    chinese = (request.headers.get("accept-language") or "").lower().startswith("zh")
    return lambda key: WORDS[key][chinese] if key in WORDS else key


def line(text: str, *, is_error: bool = False) -> str:
    """Return a line of status as HTML."""
    style = ' style="color: #b91c1c; font-weight: 600"' if is_error else ""
    return f'<p id="told"{style} role="status">{html.escape(text)}</p>'


def progress(job: Job, say: Any) -> str:
    """Return how far a job is, as HTML: a bar, calls, the time left and the predicted picture."""
    if not job.total:
        return line(f"{say('loading')} …")
    text = f"{job.calls} / {job.total} {say('calls')}"
    if job.calls:
        text += f", {job.seconds_left()} {say('left')}"
    bar = f'<progress style="width: 100%" value="{job.calls}" max="{job.total}"></progress>'
    picture = ""
    if job.preview is not None:
        stream = io.BytesIO()
        Image.fromarray(job.preview).save(stream, "PNG")
        data = base64.b64encode(stream.getvalue()).decode()
        picture = f'<img id="preview" alt="" src="data:image/png;base64,{data}" style="width: ' \
              f'100%; max-width: 512px; image-rendering: pixelated">'  # fmt: skip
    return bar + line(text) + picture


def build_page(page: Page) -> tuple[gr.Blocks, gr.I18n]:
    """Return the page and its words."""
    conf = page.studio.conf
    words = gr.I18n(
        en={key: both[0] for key, both in WORDS.items()},
        **{code: {key: both[1] for key, both in WORDS.items()} for code in ("zh-CN", "zh-TW")},
    )
    choices = [
        *((words(key), key) for key in (PAINTED, UPLOADED)),
        *((name, name) for name in FAMILIES),
    ]
    size = "auto" if conf.image_size >= 256 else conf.image_size // 16  # a radius, in pixels
    methods = [(words(key), key) for key in ("fast", "repaint")]
    with gr.Blocks(title="RePaint", analytics_enabled=False) as demo:
        gr.Markdown(words("rule"))
        with gr.Row():
            with gr.Column():
                editor = gr.ImageEditor(
                    label=words("picture"), type="filepath", format="png", image_mode="RGBA",
                    sources=("upload", "clipboard"), transforms=(), layers=False, height=480,
                    brush=gr.Brush(size, colors=["#ff2d55"], color_mode="fixed"), elem_id="editor",
                )  # fmt: skip
                if examples := page.examples():
                    gr.Examples([[path] for path in examples], editor, label=words("examples"))
                hole = gr.Dropdown(choices, value=PAINTED, label=words("hole"))
                mask = gr.File(label=words("mask"), file_types=["image"], height=140)
                method = gr.Radio(methods, value="fast", label=words("method"))
                with gr.Row():
                    samples = gr.Slider(1, MAX_SAMPLES, 1, step=1, label=words("samples"))
                    seed = gr.Number(conf.seed, precision=0, minimum=0, maximum=2**31 - 1,
                                     label=words("seed"))  # fmt: skip
                with gr.Row():
                    full_size = gr.Checkbox(True, label=words("full_size"))
                    mask_grow = gr.Slider(0, MAX_MASK_GROW, min(conf.mask_grow, MAX_MASK_GROW),
                                          step=1, label=words("mask_grow"))  # fmt: skip
            with gr.Column():
                with gr.Row():
                    run = gr.Button(words("run"), variant="primary", elem_id="run")
                    cancel = gr.Button(words("cancel"), elem_id="cancel")
                status = gr.HTML(elem_id="status")
                compare = gr.ImageSlider(label=words("compare"), type="filepath", height=480)
                gallery = gr.Gallery(label=words("all"), columns=4, visible=False, height=200)
                files = gr.Files(label=words("files"), elem_id="files", interactive=False)
        # A program gives files: the editor is for hands, and would write JPEGs anew.
        picture = gr.File(label="picture", visible=False)
        start = gr.Button(visible=False)
        wishes = [mask, hole, method, samples, seed, full_size, mask_grow]
        shown = [status, compare, gallery, files]
        common = {
            "concurrency_limit": 1, "concurrency_id": "network",
            "show_progress": "minimal", "show_progress_on": status,
        }  # fmt: skip
        running = run.click(
            page.painted, [editor, *wishes], shown, api_visibility="private", **common
        )
        start.click(page.inpaint, [picture, *wishes], shown, api_name="inpaint", **common)
        cancel.click(page.cancel, None, status, cancels=running, queue=False,
                     api_visibility="private")  # fmt: skip
        demo.load(page.enter, api_visibility="private")
        demo.unload(page.leave)
    return demo, words


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OptionParser(description="Paint a hole in the browser and have it filled.")
    parser.add_argument("--conf_path", required=True, metavar="YAML", help="as for test.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="any key, dotted, as in YAML; repeatable")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets "
                        "other machines in")  # fmt: skip
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    parser.add_argument("--share", action="store_true", help="a public address, through Gradio's "
                        "servers")  # fmt: skip
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65535:
        raise UserError(key="--port", expected="1 to 65535", got=args.port)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Check the configuration, then serve the page until Ctrl-C."""
    args = parse_args(argv)
    studio = Studio(args.conf_path, args.overrides)
    raise_on_ctrl_c()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are deleted then too
    with tempfile.TemporaryDirectory(prefix="repaint-page-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # uploads too, and nothing else may be read
        demo, words = build_page(Page(studio, folder))
        demo.queue(max_size=LONGEST_QUEUE)
        try:
            demo.launch(
                server_name=args.host, server_port=args.port, share=args.share, i18n=words,
                max_file_size=MAX_UPLOAD, theme=gr.themes.Default(font=FONTS, font_mono=FONTS),
                footer_links=["api"], quiet=True, show_error=False, prevent_thread_lock=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(str(error), key="--port", got=args.port) from error
        addresses = f"http://{args.host}:{args.port}", demo.share_url  # None: there is no such
        print(" and ".join(filter(None, addresses)), flush=True)
        try:
            signal.pause()
        finally:
            demo.close(verbose=False)


if __name__ == "__main__":
    command_line(main)
