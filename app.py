"""Paint a hole in the browser and have it filled: ``python app.py --conf_path confs/demo.yml``.

The page makes nothing of its own: it writes picture and mask into a folder, and has them inpainted
as test.py does. It needs: pip install -r requirements-app.txt
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import FAST, RESULT_FOLDERS, InpaintConf, load_conf
from guided_diffusion.config.schema import conf_to_dict
from guided_diffusion.errors import UserError
from guided_diffusion.masks import FAMILIES


def without_gradio() -> None:
    """Say what is missing."""
    raise UserError("gradio is not installed: pip install -r requirements-app.txt")


try:
    import gradio as gr
except ImportError:
    command_line(without_gradio)

MAX_UPLOAD = "32mb"
MAX_SAMPLES = 4
LONGEST_QUEUE = 16
PREVIEW_SECONDS = 2.0
SILENT_SECONDS = 30.0  # a job that nobody has asked after for so long is nobody's
PAINTED, UPLOADED = "painted", "uploaded"
FONTS = ["system-ui", "sans-serif"]  # none is fetched from elsewhere
# English and Chinese, by key; the browser's language decides.
WORDS = {
    "title": ("Paint the hole", "涂抹要修复的区域"),
    "rule": (
        "Drop or paste a picture, and paint over what is to go. **The painted part is replaced.** "
        "In mask files it is the other way round: black is replaced, white stays.",
        "拖入或粘贴图片，涂抹要去掉的部分。**涂抹的部分会被替换。**"
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
    "nothing": ("upload a picture first", "请先上传图片"),
    "unpainted": (
        "nothing is painted: paint over what is to be replaced",
        "尚未涂抹：请涂抹要替换的部分",
    ),
    "maskless": ("upload a mask first", "请先上传掩码"),
    "fault": (
        "the program failed; its terminal says more",
        "程序出错，详情见终端",
    ),
}


class Cancelled(Exception):
    """The visitor wants no result any more, or is gone."""


@dataclass(frozen=True)
class Order:
    """What a visitor asks for; pictures are files that the page keeps."""

    picture: str | None
    strokes: Sequence[str]  # layers of the editor, opaque where painted
    mask: str | None
    hole: str  # PAINTED, UPLOADED or a family of masks
    method: str  # fast or repaint
    samples: int
    seed: int | None  # None is replaced by a drawn one
    full_size: bool
    mask_grow: int

    def __post_init__(self) -> None:
        """Take numbers as whole ones; programs may ask for what the controls do not offer."""
        seed = secrets.randbelow(2**31) if self.seed is None else int(self.seed)
        for name, value in (
            ("seed", seed),
            ("samples", min(max(int(self.samples), 1), MAX_SAMPLES)),
            ("mask_grow", int(self.mask_grow or 0)),
            ("full_size", bool(self.full_size)),
        ):
            object.__setattr__(self, name, value)


@dataclass
class Job:
    """One order under way, as the thread that works and the one that tells see it."""

    order: Order
    folder: Path
    calls: int = 0
    total: int = 0  # 0 until the networks are loaded
    started: float = 0.0
    preview: str = ""
    shown: float = 0.0
    asked: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    notes: list[str] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    error: BaseException | None = None

    def see(self, _call: int, pred_xstart: Any) -> None:
        """Note a network call, and end the run if nobody waits for it; an ``Observer``."""
        now = time.monotonic()
        if self.is_cancelled or now - self.asked > SILENT_SECONDS:
            raise Cancelled
        self.calls += 1
        if now - self.shown > PREVIEW_SECONDS:
            from guided_diffusion.io.images import to_uint8

            stream = io.BytesIO()
            Image.fromarray(np.concatenate(list(to_uint8(pred_xstart)), axis=1)).save(stream, "PNG")
            self.preview, self.shown = base64.b64encode(stream.getvalue()).decode(), now

    def seconds_left(self) -> int:
        """Estimate from the calls so far."""
        spent = time.monotonic() - self.started
        return round(spent / self.calls * max(0, self.total - self.calls)) if self.calls else 0


# ---- Work ----------------------------------------------------------------------------------------


class Studio:
    """The networks of one configuration, loaded at the first job and kept, and one job at a time.

    ``overrides`` are KEY=VALUE as test.py's ``--set`` takes them.
    """

    def __init__(self, conf_path: str, overrides: Sequence[str] = ()) -> None:
        self.conf_path, self.overrides = conf_path, list(overrides)
        self.conf = load_conf(conf_path, InpaintConf, self.overrides)
        self._inpainter, self._lock = None, threading.Lock()

    def work(self, job: Job) -> None:
        """Do a job, in a thread of its own; what goes wrong is kept in it."""
        try:
            with self._lock, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                if job.is_cancelled:
                    raise Cancelled
                self._make(job)
            job.notes = [str(warning.message) for warning in caught]
        except (UserError, Cancelled) as error:
            job.error = error
        except Exception as error:
            traceback.print_exc()
            job.error = error

    def _make(self, job: Job) -> None:
        from guided_diffusion.dist_util import Team
        from guided_diffusion.run import inpaint
        from guided_diffusion.run.plan import plan_run, settings_of_results

        picture, mask = write_inputs(job.order, job.folder)
        options = [*self.overrides, *options_of(job.order)]
        here = [*inputs_of(job.folder, picture, mask), *outputs_of(job.folder)]
        plan = plan_run(load_conf(self.conf_path, InpaintConf, [*options, *here]), Team())
        # The download names its pictures from where it lies; results are marked as its own are.
        there = [*inputs_of(Path(), picture, mask), "data.paths={}"]
        repeat = load_conf(self.conf_path, InpaintConf, [*options, *there])
        marks = settings_of_results(repeat, plan.checkpoints, plan.settings["device"])
        plan = dataclasses.replace(plan, settings=marks)
        if self._inpainter is None:
            self._inpainter = inpaint.build(plan)
        inpainter = self._inpainter.walking(plan.conf, plan.times)
        job.total = network_calls(plan)
        job.started = time.monotonic()
        summary = inpaint.run(plan, inpainter, Team(), job.see)
        if summary.failures:
            raise UserError("; ".join(summary.failures.values()))
        write_repeat(repeat, job.folder / "repeat.yml")
        job.results = [job.folder / "out" / "inpainted" / each.name for each in plan.jobs]


def write_inputs(order: Order, folder: Path) -> tuple[str, str]:
    """Write picture and mask into ``folder``; return their names, or the family of the mask.

    Raises UserError where one is missing or cannot be read.
    """
    from guided_diffusion.io.images import read_rgb

    if not order.picture:
        raise UserError(WORDS["nothing"][0])
    picture = f"picture{Path(order.picture).suffix.lower()}"
    shutil.copyfile(order.picture, folder / picture)
    if order.hole in FAMILIES:
        return picture, order.hole
    if order.hole == UPLOADED:
        if not order.mask:
            raise UserError(WORDS["maskless"][0])
        mask = f"mask{Path(order.mask).suffix.lower()}"
        shutil.copyfile(order.mask, folder / mask)
        return picture, mask
    width, height = read_rgb(str(folder / picture)).size
    known = np.full((height, width), 255, np.uint8)
    for path in order.strokes:
        with Image.open(path) as layer:
            painted = np.asarray(layer.convert("RGBA").resize((width, height)))[:, :, 3] > 0
        known[painted] = 0
    if known.all():
        raise UserError(WORDS["unpainted"][0])
    Image.fromarray(known).save(folder / "mask.png")
    return picture, "mask.png"


def options_of(order: Order) -> list[str]:
    """Translate an order into KEY=VALUE."""
    options = [
        *("name=page", "overview=false", "save_process=0", "show_progress=false"),
        *("paste_known=true", "mask_hard=true", "invert_mask=false", "mask_hole=black"),
        *("data.offset=0", "data.max_len=", "data.random_flip=false", "data.drop_last=false"),
        f"samples_per_image={order.samples}",
        f"seed={order.seed}",
        f"full_size={json.dumps(order.full_size)}",
        f"mask_grow={order.mask_grow}",
    ]
    return [*(FAST if order.method == "fast" else ()), *options]


def inputs_of(folder: Path, picture: str, mask: str) -> list[str]:
    """Return the options that name picture and mask in ``folder``, or a family of masks."""
    mask = mask if mask in FAMILIES else str(folder / mask)
    named = {"data.gt_path": str(folder / picture), "data.mask_path": mask}
    return [f"{key}={json.dumps(value)}" for key, value in named.items()]


def outputs_of(folder: Path) -> list[str]:
    """Return the options that send all results below ``folder``."""
    paths = {key: str(folder / "out" / name) for key, name in RESULT_FOLDERS.items()}
    return [f"data.paths={json.dumps(paths)}"]


def network_calls(plan: Any) -> int:
    """Return how many steps call the network, over all batches of a plan."""
    from guided_diffusion.run.inpaint import load_job
    from guided_diffusion.scheduler import count_steps

    conf = plan.conf
    batches = 0
    for start in range(0, len(plan.jobs), conf.data.batch_size):
        jobs = plan.jobs[start : start + conf.data.batch_size]
        inputs = sum(len(load_job(conf, job)) for job in jobs)
        batches += inputs if conf.windows else -(-inputs // conf.data.batch_size)
    return batches * count_steps(plan.times)[0]


def write_repeat(conf: InpaintConf, path: Path) -> None:
    """Write the YAML that repeats a result; of a path of this machine it keeps the last part."""
    tree = conf_to_dict(conf) | {"show_progress": True}
    for key in ("model_path", "classifier_path"):
        if Path(tree.get(key) or "").is_absolute():
            tree[key] = Path(tree[key]).name
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)
    note = (
        "# Put this file, the picture and the mask into the folder of test.py, and run there\n"
        f"# python test.py --conf_path {path.name}\n"
    )
    path.write_text(note + text, encoding="utf-8")


def without_folders(text: str) -> str:
    """Return a message without the folders of this machine, which are nobody's business."""
    return re.sub(r"(?<![\w.:/])(?:/[^\s/:]+)+/(?=[^\s/])", "", text)


# ---- The page ------------------------------------------------------------------------------------


class Page:
    """What visitors see, and their sessions: each has a folder, and uploads that go with it."""

    def __init__(self, studio: Studio, folder: Path) -> None:
        self.studio, self.folder = studio, folder
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
        editor = editor or {"background": None, "layers": []}
        order = Order(
            editor["background"], editor["layers"], mask, hole, method, samples, seed, full_size,
            mask_grow,
        )  # fmt: skip
        yield from self._tell(order, request)

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

    def _tell(self, order: Order, request: gr.Request) -> Iterator[tuple]:
        say = speaker(request)
        session = request.session_hash or secrets.token_hex(8)
        uploads = self._uploads.setdefault(session, set())
        files = (order.picture, order.mask, *order.strokes)
        uploads |= {Path(path).parent for path in files if path}
        folder = Path(tempfile.mkdtemp(dir=self._folder(session)))
        job = self._jobs[session] = Job(order, folder)
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
            text = without_folders(translated(str(job.error), say)) if is_mistake else say("fault")
            yield line(text, is_error=True), None, None, None
            raise gr.Error(text, print_exception=False)
        yield self._results(job, say)

    def _results(self, job: Job, say: Any) -> tuple:
        results = [str(path) for path in job.results]
        original = next((job.folder / "out" / "gt").iterdir())
        mask = next((job.folder / "out" / "gt_keep_mask").iterdir())
        inputs = [path for path in job.folder.iterdir() if path.is_file()]
        if not any(path.stem == "mask" for path in inputs):
            inputs.append(Path(shutil.copyfile(mask, job.folder / "mask.png")))
        told = " · ".join([say("done"), f"seed {job.order.seed}", *job.notes])
        return (
            line(without_folders(told)),
            (str(original), results[0]),
            gr.update(value=results, visible=len(results) > 1),
            [*results, *map(str, sorted(inputs))],
        )

    def cancel(self, request: gr.Request) -> None:
        """End a visitor's job at the next network call."""
        if job := self._jobs.get(request.session_hash):
            job.is_cancelled = True

    def leave(self, request: gr.Request) -> None:
        """End a visitor's job, and delete the visitor's files."""
        self.cancel(request)
        self._jobs.pop(request.session_hash, None)
        uploads = self._uploads.pop(request.session_hash, set())
        shutil.rmtree(self._folder(request.session_hash), ignore_errors=True)
        for folder in uploads.difference(*self._uploads.values()):  # equal files are one file
            if folder.resolve().parent == self.folder.resolve():
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, session: str) -> Path:
        folder = self.folder / f"session-{re.sub('[^0-9a-zA-Z]', '', session)}"
        folder.mkdir(exist_ok=True)
        return folder

    def examples(self) -> list[str]:
        """Copy some of the configuration's pictures to where the page may show them."""
        from guided_diffusion.image_datasets import list_images

        try:
            found = list_images(self.studio.conf.data.gt_path)[:4]
        except UserError:  # a page for visitors' pictures needs none of its own
            return []
        (self.folder / "examples").mkdir()
        return [shutil.copy(path, str(self.folder / "examples")) for path in found]


def speaker(request: gr.Request) -> Any:
    """Return what finds words in the visitor's language."""
    chinese = (request.headers.get("accept-language") or "").lower().startswith("zh")
    return lambda key: WORDS[key][chinese]


def translated(text: str, say: Any) -> str:
    """Return the page's own complaints in the visitor's language, others as they are."""
    own = {WORDS[key][0]: key for key in ("nothing", "unpainted", "maskless")}
    return say(own[text]) if text in own else text


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
    picture = f'<img id="preview" alt="" src="data:image/png;base64,{job.preview}" style="width: ' \
              f'100%; max-width: 512px; image-rendering: pixelated">'  # fmt: skip
    return bar + line(text) + (picture if job.preview else "")


def build_page(page: Page) -> tuple[gr.Blocks, gr.I18n]:
    """Return the page and its words."""
    conf = page.studio.conf
    words = gr.I18n(
        en={key: both[0] for key, both in WORDS.items()},
        **{code: {key: both[1] for key, both in WORDS.items()} for code in ("zh-CN", "zh-TW")},
    )
    choices = [
        *((" / ".join(WORDS[key]), key) for key in (PAINTED, UPLOADED)),
        *((name, name) for name in FAMILIES),
    ]
    methods = [(" / ".join(WORDS[key]), key) for key in ("fast", "repaint")]
    with gr.Blocks(title="RePaint", analytics_enabled=False, delete_cache=(600, 4 * 3600)) as demo:
        gr.Markdown(words("rule"))
        with gr.Row():
            with gr.Column():
                editor = gr.ImageEditor(
                    label=words("picture"), type="filepath", format="png", image_mode="RGBA",
                    sources=("upload", "clipboard"), transforms=(), layers=False, height=480,
                    brush=gr.Brush(colors=["#ff2d55"], color_mode="fixed"), elem_id="editor",
                )  # fmt: skip
                if examples := page.examples():
                    gr.Examples([[path] for path in examples], editor, label=words("examples"))
                hole = gr.Dropdown(choices, value=PAINTED, label=words("hole"))
                mask = gr.File(label=words("mask"), file_types=["image"], height=100)
                method = gr.Radio(methods, value="fast", label=words("method"))
                with gr.Row():
                    samples = gr.Slider(1, MAX_SAMPLES, 1, step=1, label=words("samples"))
                    seed = gr.Number(conf.seed, precision=0, minimum=0, maximum=2**31 - 1,
                                     label=words("seed"))  # fmt: skip
                with gr.Row():
                    full_size = gr.Checkbox(True, label=words("full_size"))
                    mask_grow = gr.Slider(0, 64, conf.mask_grow, step=1, label=words("mask_grow"))
            with gr.Column():
                with gr.Row():
                    run = gr.Button(words("run"), variant="primary", elem_id="run")
                    cancel = gr.Button(words("cancel"), elem_id="cancel")
                status = gr.HTML(elem_id="status")
                compare = gr.ImageSlider(label=words("compare"), type="filepath", height=480)
                gallery = gr.Gallery(label=words("all"), columns=4, visible=False, height=200)
                files = gr.Files(label=words("files"), elem_id="files")
        # A program gives files: the editor is for hands, and would write JPEGs anew.
        picture = gr.File(label="picture", visible=False)
        start = gr.Button(visible=False)
        wishes = [mask, hole, method, samples, seed, full_size, mask_grow]
        shown = [status, compare, gallery, files]
        common = {
            "concurrency_limit": 1, "concurrency_id": "network",
            "show_progress": "minimal", "show_progress_on": status,
        }  # fmt: skip
        run.click(page.painted, [editor, *wishes], shown, api_visibility="private", **common)
        start.click(page.inpaint, [picture, *wishes], shown, api_name="inpaint", **common)
        cancel.click(page.cancel, queue=False, api_visibility="private")
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
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the configuration, then serve the page until Ctrl-C."""
    args = parse_args(argv)
    studio = Studio(args.conf_path, args.overrides)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are deleted then too
    with tempfile.TemporaryDirectory(prefix="repaint-page-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads too, and nothing else may be read
        demo, words = build_page(Page(studio, Path(folder)))
        demo.queue(max_size=LONGEST_QUEUE)
        try:
            demo.launch(
                server_name=args.host, server_port=args.port, share=args.share, i18n=words,
                max_file_size=MAX_UPLOAD, theme=gr.themes.Default(font=FONTS, font_mono=FONTS),
                footer_links=["api"], quiet=True, show_error=False, prevent_thread_lock=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(str(error), key="--port", got=args.port) from error
        print(f"http://{args.host}:{args.port}" + f" and {demo.share_url}" * args.share, flush=True)
        try:
            signal.pause()
        finally:
            demo.close(verbose=False)


if __name__ == "__main__":
    command_line(main)
