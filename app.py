"""Paint a hole in the browser and have it filled: ``python app.py --conf_path confs/demo.yml``.

It needs: pip install -r requirements-app.txt. A run is made as test.py makes it, and its YAML
repeats it. Behind a proxy that serves the page below a path: ``GRADIO_ROOT_PATH=/path``.

While it runs, programs can ask it too:

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    picture, mask = handle_file("photo.png"), handle_file("mask.png")  # black is replaced
    told, before_after, all_results, files = client.predict(picture, mask, api_name="/inpaint")
    print(files)
"""

import os
import secrets
import tempfile

if __name__ == "__main__":  # before the other imports, which take seconds
    from guided_diffusion import end_at_once_on_ctrl_c

    end_at_once_on_ctrl_c()
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch, as guided_diffusion/cli.py says
    # All files of the page, uploads included; Gradio reads this when it is imported, too.
    os.environ["GRADIO_TEMP_DIR"] = f"{tempfile.gettempdir()}/repaint-page-{secrets.token_hex(8)}"

import argparse
import base64
import contextlib
import errno
import html
import inspect
import io
import re
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from guided_diffusion import raise_on_ctrl_c
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import list_images
from guided_diffusion.io.images import origin_of, read_rgb, to_levels
from page.jobs import CHOICES, PAINTED, RANGES, UPLOADED, Job, Worker

try:
    import gradio as gr
except ImportError:
    gr = None

MAX_UPLOAD_MB = 200
PREVIEW_SIZE = 1600  # longest side in pixels of what the browser shows and paints on
# An open tab touches its files every minute. Files that nothing has touched for so long are
# deleted: those of closed tabs, answers to programs, and uploads, aborted ones too.
TOUCH_SECONDS, KEPT_SECONDS = 60.0, 1800.0  # a telephone in a pocket sleeps
FONTS = ["system-ui", "sans-serif"]  # none is fetched from elsewhere
NO_CROSS = "#files .label-clear-button {display: none}"  # it would take a file off the list
PARTS = {p.name: p.read_text("utf-8") for p in Path(__file__).parent.glob("page/*.[chjy]*")}
WORDS = yaml.safe_load(PARTS["words.yml"])


@dataclass
class Visitor:
    """A tab: what it works on, and what came of it."""

    picture: Path | None = None
    size: tuple[int, int] = (0, 0)  # of the picture: width and height as a person sees it
    job: Job | None = None  # the last
    shown: Job | None = None  # whose results can be seen


class Page:
    """What visitors and programs ask for."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.folder = worker, worker.folder
        self.examples: list[tuple[str, str]] = []  # paths and thumbnails
        with contextlib.suppress(UserError):  # a page for visitors' pictures needs none of its own
            for path in list_images(worker.conf.data.gt_path)[:6]:
                with contextlib.suppress(UserError):
                    self.examples.append((path, data_url(self.read(path), 128)))

    def read(self, path: str | Path) -> Image.Image:
        """Read a picture as RGB, and deep gray as bright as the network sees it."""
        is_made = Path(path).name.startswith(("result", "square"))
        return read_rgb(str(path), None if is_made else self.worker.conf.depth)

    def upload(self, value: Any, name: str = "picture") -> str:
        """Return the path of a file that was uploaded; raises UserError for anything else."""
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or self.folder not in Path(path).resolve().parents:
            raise UserError(key=name, expected="a file, such as handle_file(...)", got=repr(value))
        return path

    def touch(self, visitor: Visitor, mask: str | None) -> None:
        """Keep the files of a tab, which is still open."""
        shown = visitor.shown and visitor.shown.picture
        for path in map(Path, filter(None, (visitor.picture, shown, mask))):
            if self.folder in path.parents and path.exists():  # it is no example
                os.utime(path.parent)

    def sweep(self) -> None:
        """Delete what nothing has touched for a while."""
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # it is gone already
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    # ---- What the page asks for ----

    def choose(self, visitor: Visitor, value: dict, request: "gr.Request") -> tuple[dict, str]:
        """Take an upload, an example or a result as the picture to work on, and show it."""
        say = speaker(request)
        try:
            if "result" in value:
                path = visitor.shown.results[value["result"]]
            elif "example" in value:
                path = self.examples[value["example"]][0]
            else:
                path = self.upload(value)
            image = self.read(path)
            self.cancel(visitor, request)  # its result would cover the picture
            visitor.picture = Path(path)
            visitor.size = origin_of(image).size
            return {"picture": data_url(image)}, ""
        except Exception as error:
            return {"error": explain(error, say)}, ""

    def run(
        self, visitor: Visitor, value: dict | None, request: "gr.Request", *settings: Any
    ) -> Iterator[tuple]:
        """Do what the button asks for; yield the states of status, editor and downloads."""
        say = speaker(request)
        self.cancel(visitor, request)
        try:
            if not (visitor.picture and visitor.picture.exists()):  # as after a night
                raise UserError("no picture")
            strokes = (value or {}).get("strokes")
            for job in self.work(say, visitor.picture, settings, strokes, visitor.size):
                visitor.job = job
                if not job.work.done():  # "Done" comes with the results
                    yield status(job.told, job), gr.skip(), gr.skip()
        except Exception as error:
            is_error = not isinstance(error, CancelledError)
            yield status(explain(error, say), is_error=is_error), gr.skip(), gr.skip()
            return
        if visitor.shown and visitor.shown.folder != visitor.picture.parent:
            shutil.rmtree(visitor.shown.folder, ignore_errors=True)
        visitor.shown = job
        before, *results = (data_url(self.read(path)) for path in (job.original, *job.results))
        files = gr.update(value=[str(path) for path in job.downloads()], visible=True)
        yield status(job.told), {"before": before, "results": results}, files

    def cancel(self, visitor: Visitor, request: "gr.Request") -> str:
        """End a visitor's job at the next network call, and say so at once."""
        job, say = visitor.job, speaker(request)
        if not job or job.work.done():
            return status(say("nothing runs"))
        job.is_cancelled = True
        return status(say("cancelled", told=job.told))

    # ---- What programs ask for ----

    def inpaint(
        self,
        picture: dict,
        mask: dict | None = None,
        hole: str = UPLOADED,
        method: str = "fast",
        samples: int = 1,
        seed: int | None = None,
        full_size: bool = True,
        mask_grow: int = 0,
        mask_hole: str = "auto",
        request: "gr.Request" = None,
    ) -> tuple[str, list, list, list]:  # of what it yields, for Gradio's documentation
        """Inpaint a picture in the hole of a mask file, or of a mask that is drawn (hole="thick").

        Returns a message, the picture before and after, all results, and all files.
        """
        say = speaker(request)
        try:
            if hole not in CHOICES["hole"][1:]:  # nothing is painted here
                raise UserError(key="hole", expected=", ".join(CHOICES["hole"][1:]), got=repr(hole))
            path = self.upload(picture)
            self.read(path)
            file = mask and self.upload(mask, "mask")
            settings = (hole, file, mask_hole, method, samples, seed, full_size, mask_grow)
            for job in self.work(say, Path(path), settings):
                yield job.told, [], [], []
        except Exception as error:
            raise gr.Error(explain(error, say), print_exception=False) from error
        pictures = [[job.original, job.results[0]], job.results, job.downloads()]
        yield job.told, *([gr.FileData(path=str(p)) for p in paths] for paths in pictures)

    # ---- What both ask for ----

    def work(self, say: Callable[..., str], *request: Any) -> Iterator[Job]:
        """Yield a job, with what is to be told of it, until it is finished.

        Raises UserError for what cannot be done, and CancelledError.
        """
        job = self.worker.start(*request)
        try:
            while not (job.work.done() or job.is_cancelled):
                with contextlib.suppress(OSError):  # it failed, which left no files
                    os.utime(job.folder)
                count, seconds = self.worker.count_before(job), time.monotonic() - job.since
                left = seconds / max(1, job.calls) * (job.total - job.calls)
                phase = "starting" if job.phase == "running" and not job.calls else job.phase
                job.told = say("waiting" if count else phase, count=count, seconds=round(seconds),
                               calls=job.calls, total=job.total, left=round(left))  # fmt: skip
                yield job
                wait([job.work], 0.3)
            if job.is_cancelled:
                raise CancelledError(say("cancelled", told=job.told))
            job.work.result()
        finally:
            job.is_cancelled = True  # the visitor left, or the job is over anyway
        parts = [say("done", seconds=round(job.seconds), seed=job.settings["seed"])]
        if job.settings["full_size"] and job.results[0].suffix != job.picture.suffix:
            parts.append(say("as png", kind=job.picture.suffix[1:].upper()))
        job.told = " · ".join([*parts, *map(say, job.notes)])
        yield job


# ---- What is said --------------------------------------------------------------------------------


def speaker(request: "gr.Request") -> Callable[..., str]:
    """Return what says a message in the visitor's language, without this machine's folders."""
    is_chinese = (request.headers.get("accept-language") or "").lower().startswith("zh")

    def say(key: str, **values: object) -> str:
        if key in WORDS["messages"]:
            return WORDS["messages"][key]["zh" if is_chinese else "en"].format(**values)
        text = re.sub(r"(?<![\w.:/])(?:/[^\s/:]+)+/(?=[^\s/])", "", key)
        for pattern, chinese in WORDS["refusals"].items() if is_chinese else ():
            text = re.sub(pattern, chinese, text)
        return text

    return say


def explain(error: Exception, say: Callable[..., str]) -> str:
    """Say what went wrong; of a fault in the program only that there was one."""
    if isinstance(error, UserError | CancelledError):
        return say(str(error))
    traceback.print_exception(error)
    return say("fault")


def status(text: str, job: Job | None = None, *, is_error: bool = False) -> str:
    """Return a line as HTML, with the bar and the predicted picture of a job."""
    parts = [f'<p id="told" class="{"error" * is_error}" role="status">{html.escape(text)}</p>']
    if job and job.calls:
        parts.insert(0, f'<progress value="{job.calls}" max="{job.total}"></progress>')
        levels = np.concatenate(list(to_levels(job.predicted)), axis=1)
        url = data_url(Image.fromarray(levels.squeeze()))  # gray has one channel
        parts.append(f'<img id="preview" alt="" src="{url}">')
    return "".join(parts)


def data_url(image: Image.Image, size: int = PREVIEW_SIZE) -> str:
    """Return a picture of at most ``size`` pixels a side as a URL: JPEG, and PNG if it is small."""
    stream = io.BytesIO()
    image.thumbnail((size, size))
    kind = "PNG" if max(image.size) <= 512 else "JPEG"
    image.save(stream, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


# ---- The page ------------------------------------------------------------------------------------


def build_page(page: Page) -> tuple["gr.Blocks", "gr.I18n"]:
    """Return the page and its words."""
    conf = page.worker.conf
    file = Path(conf.model_path).name
    subject = next(both for part, both in WORDS["subjects"].items() if part in file.lower())
    english, chinese = (
        {key: both[language].format(file=file, subject=subject[language], size=conf.image_size)
         for key, both in WORDS["labels"].items()}
        for language in ("en", "zh")
    )  # fmt: skip
    words = gr.I18n(en=english, **dict.fromkeys(["zh", "zh-CN", "zh-HK", "zh-TW"], chinese))
    choices = {name: [(words(key), key) for key in keys] for name, keys in CHOICES.items()}

    with gr.Blocks(title="RePaint", analytics_enabled=False) as demo:
        visitor = gr.State(Visitor())
        gr.Markdown(words("title"))
        gr.Markdown(words("model"))
        with gr.Row():
            with gr.Column(scale=3):
                editor = gr.HTML(
                    html_template=PARTS["editor.html"], css_template=PARTS["editor.css"],
                    js_on_load=PARTS["editor.js"], apply_default_css=False, elem_id="editor",
                    examples=[thumbnail for _, thumbnail in page.examples],
                    most_mb=MAX_UPLOAD_MB, words=WORDS["editor"],
                )  # fmt: skip
            with gr.Column(scale=2):
                with gr.Row():
                    run = gr.Button(words("run"), variant="primary", elem_id="run", min_width=120)
                    cancel = gr.Button(words("cancel"), elem_id="cancel", min_width=120)
                state = gr.HTML(elem_id="status", css_template=PARTS["status.css"])
                with gr.Accordion(words("more"), elem_id="more"):
                    hole = gr.Dropdown(choices["hole"], value=PAINTED, label=words("hole"))
                    mask = gr.File(label=words("mask"), file_types=["image"], height=120,
                                   elem_id="mask")  # fmt: skip
                    mask_hole = gr.Dropdown(choices["mask_hole"], value="auto", visible="hidden",
                                            label=words("mask_hole"))  # fmt: skip
                    method = gr.Dropdown(choices["method"], value="fast", label=words("method"))
                    samples = gr.Slider(*RANGES["samples"], 1, step=1, label=words("samples"))
                    seed = gr.Number(conf.seed, label=words("seed"))
                    full_size = gr.Checkbox(True, label=words("full_size"))
                    mask_grow = gr.Slider(*RANGES["mask_grow"], min(conf.mask_grow, 64), step=1,
                                          label=words("mask_grow"))  # fmt: skip
                files = gr.Files(label=words("files"), elem_id="files", interactive=False,
                                 visible=False)  # fmt: skip
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        settings = [hole, mask, mask_hole, method, samples, seed, full_size, mask_grow]
        run.click(page.run, [visitor, editor, *settings], [state, editor, files],
                  concurrency_limit=None, trigger_mode="multiple", **quiet)  # fmt: skip
        cancel.click(page.cancel, visitor, state, queue=False, **quiet)
        editor.chosen(page.choose, [visitor, editor], [editor, state], concurrency_limit=2, **quiet)
        for event, key in (editor.painted, PAINTED), (mask.clear, PAINTED), (mask.upload, UPLOADED):
            event(None, None, hole, js=f"() => '{key}'", **quiet)
        hole.change(
            lambda hole: (gr.update(visible=hole in (PAINTED, UPLOADED) or "hidden"),
                          gr.update(visible=hole == UPLOADED or "hidden")),
            hole, [mask, mask_hole], **quiet,
        )  # fmt: skip
        # A choice that is folded away before it was drawn would forget what it is set to.
        demo.load(js="() => document.querySelector('#more button').click()")
        gr.Timer(TOUCH_SECONDS).tick(page.touch, [visitor, mask], None, queue=False, **quiet)
        gr.api(page.inpaint, api_name="inpaint", concurrency_limit=None)
        document_api(demo.fns[max(demo.fns)])
    return demo, words


def document_api(endpoint: Any) -> None:
    """Name what goes in and out of the endpoint for programs, which Gradio only numbers."""
    *inputs, _ = inspect.signature(endpoint.fn).parameters
    names = (*inputs, "message", "before and after", "all results", "files")
    for component, name in zip(endpoint.inputs + endpoint.outputs, names, strict=True):
        component.label = name
    for component in endpoint.inputs[:2]:
        component._api_info = gr.FileData.model_json_schema()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; raises UserError where the page cannot listen at the port."""
    parser = OptionParser(description="Paint a hole in the browser and have it filled.")
    parser.add_argument("--conf_path", required=True, metavar="YAML", help="as for test.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="any key, dotted, as in YAML; repeatable")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets "
                        "other machines in")  # fmt: skip
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    parser.add_argument("--share", action="store_true", help="a public address, through Gradio")
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65535:
        raise UserError(key="--port", expected="1 to 65535", got=args.port)
    try:
        socket.create_server((args.host, args.port)).close()
    except OSError as error:
        used = f"port {args.port} is in use: --port {args.port + 1}"
        raise UserError(used if error.errno == errno.EADDRINUSE else f"--host: {error}") from error
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Check the configuration, then serve the page until Ctrl-C."""
    if gr is None:
        raise UserError("gradio is not installed: pip install -r requirements-app.txt")
    args = parse_args(argv)
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    worker = Worker(folder, args.conf_path, args.overrides)
    raise_on_ctrl_c()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are deleted then too
    folder.mkdir(mode=0o700)
    try:
        page = Page(worker)
        demo, words = build_page(page)
        demo.launch(
            server_name=args.host, server_port=args.port, share=args.share, i18n=words, quiet=True,
            max_file_size=f"{MAX_UPLOAD_MB}mb", footer_links=["api"], show_error=True, css=NO_CROSS,
            theme=gr.themes.Default(font=FONTS, font_mono=FONTS), prevent_thread_lock=True,
        )  # fmt: skip
        print(f"http://{args.host}:{args.port}", demo.share_url or "", flush=True)
        while True:
            time.sleep(TOUCH_SECONDS / 4)
            page.sweep()
    finally:
        for job in worker.jobs:
            job.is_cancelled = True
        gr.close_all(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    command_line(main)
