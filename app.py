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

if __name__ == "__main__":  # before the other imports, which take seconds
    from guided_diffusion import end_at_once_on_ctrl_c

    end_at_once_on_ctrl_c()
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch, as guided_diffusion/cli.py says

import argparse
import base64
import contextlib
import dataclasses
import html
import inspect
import io
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from guided_diffusion import raise_on_ctrl_c
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import list_images
from page.jobs import (
    HOLES,
    MASK_HOLES,
    MAX_MASK_GROW,
    MAX_SAMPLES,
    METHODS,
    PAINTED,
    UPLOADED,
    Cancelled,
    Chosen,
    Job,
    Request,
    Worker,
    choose,
)
from page.words import EDITOR_WORDS, LABELS, MESSAGES, SUBJECTS, language


def without_gradio() -> None:
    """Say what is missing."""
    raise UserError("gradio is not installed: pip install -r requirements-app.txt")


try:
    import gradio as gr
except ImportError:
    command_line(without_gradio)

MAX_UPLOAD_MB = 200
PREVIEW_SIZE = 1600  # longest side in pixels of what the browser shows and paints on
KEPT_SECONDS = 3600.0  # files of programs
UNUSED_SECONDS = 600.0  # uploads that were not used, whole or aborted
LEFT_SECONDS = 60.0  # files of a tab that was closed, or of a telephone that sleeps
SWEEP_SECONDS = 15.0
FONTS = ["system-ui", "sans-serif"]  # none is fetched from elsewhere
STATUS_STYLE = """
    min-height: 2em;
    .error { color: #b91c1c; font-weight: 600 }
    progress { width: 100% }
    #preview { width: 100%; max-width: 256px; image-rendering: pixelated }
"""


def without_folders(text: str) -> str:
    """Return a message without the folders of this machine, which are nobody's business."""
    return re.sub(r"(?<![\w.:/])(?:/[^\s/:]+)+/(?=[^\s/])", "", text)


@dataclass
class Visitor:
    """A tab or a program, with the folder of its files."""

    folder: Path
    is_tab: bool = False  # says when it leaves
    expires: float = 0.0
    chosen: Chosen | None = None
    mask: Path | None = None
    jobs: list[Job] = field(default_factory=list)

    def touch(self) -> None:
        """Note that the visitor is there."""
        self.expires = float("inf") if self.is_tab else time.monotonic() + KEPT_SECONDS

    def keep(self, path: str, stem: str) -> Path:
        """Copy an upload into the visitor's folder."""
        copy = Path(tempfile.mkdtemp(dir=self.folder)) / f"{stem}{Path(path).suffix.lower()}"
        shutil.copyfile(path, copy)
        return copy

    def cancel(self) -> list[Job]:
        """Cancel and return the jobs that are not finished."""
        jobs = [job for job in self.jobs if not job.finished]
        for job in jobs:
            job.is_cancelled = True
        return jobs

    def tidy(self) -> None:
        """Delete files that nothing on the page leads to any more."""
        last = next((job for job in reversed(self.jobs) if job.results), None)
        for job in [job for job in self.jobs if job.finished and job is not last]:
            self.jobs.remove(job)
        pictures = [self.chosen, *(job.request.picture for job in self.jobs)]
        used = {job.folder for job in self.jobs} | {self.mask.parent if self.mask else None}
        for picture in filter(None, pictures):
            used |= {picture.path.parent, *picture.earlier}
        delete_old(set(self.folder.iterdir()) - used, LEFT_SECONDS)


def delete_old(paths: set[Path], seconds: float) -> None:
    """Delete files and folders that have not changed for so long."""
    for path in paths:
        with contextlib.suppress(OSError):  # somebody else deletes it, too
            if time.time() - path.stat().st_mtime > seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class Page:
    """What visitors and programs ask for. All files lie in ``folder``, uploads included."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker, self.folder = worker, folder
        self.visitors: dict[str, Visitor] = {}
        self.examples: list[tuple[str, str]] = []  # paths and thumbnails
        with contextlib.suppress(UserError):  # a page for visitors' pictures needs none of its own
            for path in list_images(worker.conf.data.gt_path)[:8]:
                with contextlib.suppress(UserError):
                    self.examples.append((path, data_url(choose(Path(path))[1], 128)))

    def visitor(self, request: gr.Request) -> Visitor:
        """Return who asks."""
        session = request.session_hash or secrets.token_hex(8)
        if session not in self.visitors:
            folder = tempfile.mkdtemp(prefix="visitor-", dir=self.folder)
            self.visitors[session] = Visitor(Path(folder))
        self.visitors[session].touch()
        return self.visitors[session]

    def enter(self, request: gr.Request) -> None:
        """Know a tab, whose files are kept until it leaves."""
        visitor = self.visitor(request)
        visitor.is_tab, visitor.expires = True, float("inf")

    def leave(self, request: gr.Request) -> None:
        """Cancel the jobs of a tab that was closed; its files are deleted a little later."""
        if visitor := self.visitors.get(request.session_hash):
            visitor.cancel()
            visitor.is_tab, visitor.expires = False, time.monotonic() + LEFT_SECONDS

    def sweep(self) -> None:
        """Delete the files of visitors who left, and uploads that nobody used, aborted or whole."""
        for session, visitor in list(self.visitors.items()):
            if visitor.expires < time.monotonic():
                del self.visitors[session]
                shutil.rmtree(visitor.folder, ignore_errors=True)
            else:
                visitor.tidy()
        used = {visitor.folder for visitor in self.visitors.values()}
        delete_old(set(self.folder.iterdir()) - used, UNUSED_SECONDS)

    def choose(self, value: dict, request: gr.Request) -> tuple[dict, str]:
        """Take an upload, an example or a result as the picture to work on, and show it."""
        visitor, say = self.visitor(request), speaker(request)
        try:
            if "result" in value:
                job = next(job for job in reversed(visitor.jobs) if job.results)
                before, earlier = job.request.picture, (*job.request.picture.earlier, job.folder)
                chosen, image = choose(job.results[value["result"]])
                visitor.chosen = dataclasses.replace(chosen, photo=before.photo, earlier=earlier)
            else:
                path = self.examples[value["example"]][0] if "example" in value else value["path"]
                if "path" in value and self.folder not in Path(path).resolve().parents:
                    raise UserError("no picture")
                chosen, image = choose(Path(path))
                kept = visitor.keep(path, "picture")
                visitor.chosen = dataclasses.replace(chosen, path=kept, photo=kept)
        except UserError as error:
            return {"error": explain(error, say)}, ""
        except (LookupError, OSError, StopIteration, TypeError):  # files that are no longer there
            return {"error": say("no picture")}, ""
        return {"picture": data_url(image, PREVIEW_SIZE)}, ""

    def use_mask(self, path: str | None, request: gr.Request) -> tuple[str | None, str]:
        """Keep a mask file, and have it used from now on."""
        visitor = self.visitor(request)
        visitor.mask = visitor.keep(path, "mask") if path else None
        return visitor.mask and str(visitor.mask), UPLOADED if path else PAINTED

    def run(self, value: dict | None, request: gr.Request, *settings: Any) -> Iterator[tuple]:
        """Do what the button asks for; yield the states of status, editor and downloads."""
        visitor, say = self.visitor(request), speaker(request)
        visitor.cancel()
        try:
            job = self.start(visitor, visitor.chosen, (value or {}).get("strokes"), *settings)
            for state in self.follow(job, visitor, say):
                yield status(state, job), gr.skip(), gr.skip()
        except Cancelled:
            yield status(cancelled(job, say)), gr.skip(), gr.skip()
        except Exception as error:
            yield status(explain(error, say), is_error=True), gr.skip(), gr.skip()
        else:
            shown = [data_url(choose(path)[1], PREVIEW_SIZE) for path in job.results]
            before = data_url(choose(job.original)[1], PREVIEW_SIZE)
            files = gr.update(value=[str(path) for path in job.downloads()], visible=True)
            yield status(done(job, say)), {"before": before, "results": shown}, files

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
        mask_hole: str = "black",
        request: gr.Request = None,
    ) -> tuple[str, list, list, list]:  # Gradio documents what is yielded
        """Inpaint a picture in the hole of a mask: black in a file, or hole names a mask to draw.

        Returns a message, the picture before and after, all results, and all files.
        """
        visitor, say = self.visitor(request), speaker(request)
        try:
            if hole not in HOLES[1:]:
                raise UserError(key="hole", expected=", ".join(HOLES[1:]), got=repr(hole))
            paths = [uploaded("picture", picture), mask and uploaded("mask", mask)]
            chosen, _ = choose(Path(paths[0]))
            kept = visitor.keep(paths[0], "picture")
            chosen = dataclasses.replace(chosen, path=kept, photo=kept)
            settings = hole, paths[1], mask_hole, method, samples, seed, full_size, mask_grow
            job = self.start(visitor, chosen, None, *settings)
            for state in self.follow(job, visitor, say):
                yield state, [], [], []
        except Exception as error:
            raise gr.Error(explain(error, say), print_exception=False) from error
        pictures = [[job.original, job.results[0]], job.results, job.downloads()]
        yield done(job, say), *([gr.FileData(path=str(p)) for p in paths] for paths in pictures)

    def start(
        self, visitor: Visitor, chosen: Chosen | None, strokes: str | None, *settings: Any
    ) -> Job:
        """Put a job into the queue; raises UserError, and TypeError for wrong settings."""
        if chosen is None:
            raise UserError("no picture")
        wish = Request(chosen, strokes, *settings)
        job = Job(wish, Path(tempfile.mkdtemp(dir=visitor.folder)))
        self.worker.submit(job)
        visitor.jobs.append(job)
        return job

    def follow(self, job: Job, visitor: Visitor, say: Callable) -> Iterator[str]:
        """Yield how far a job is until it is finished; raises what ended it."""
        try:
            while not (job.finished or job.is_cancelled):
                job.asked = time.monotonic()
                visitor.touch()
                seconds = round(time.monotonic() - job.since)
                count = self.worker.count_before(job)
                yield say(job.phase if job.phase != "waiting" or count else "starting", count=count,
                          seconds=seconds, calls=job.calls, total=job.total,
                          left=job.seconds_left())  # fmt: skip
                time.sleep(0.3)
            if job.is_cancelled:
                raise Cancelled
        finally:
            job.is_cancelled = True  # the visitor left, or the job is over anyway
        if job.error:
            raise job.error

    def cancel(self, request: gr.Request) -> str:
        """End a visitor's job at the next network call."""
        jobs, say = self.visitor(request).cancel(), speaker(request)
        return status(cancelled(jobs[-1], say) if jobs else say("nothing runs"))


# ---- What is said --------------------------------------------------------------------------------


def speaker(request: gr.Request) -> Callable:
    """Return what finds and fills words in the visitor's language."""
    place = language(request.headers.get("accept-language"))
    return lambda key, **values: MESSAGES[key][place].format(**values) if key in MESSAGES else key


def explain(error: Exception, say: Callable) -> str:
    """Say what went wrong; of a fault in the program only that there was one."""
    if isinstance(error, UserError):
        return without_folders(say(str(error)))
    if isinstance(error, Cancelled):
        return say("cancelled early")
    traceback.print_exception(error)
    return say("fault")


def done(job: Job, say: Callable) -> str:
    """Say that a job is done, with its warnings."""
    seconds = round(job.finished - job.started)
    parts = [say("done", seconds=seconds, seed=job.request.seed), *job.notes]
    return without_folders(" · ".join(parts))


def cancelled(job: Job, say: Callable) -> str:
    """Say what was cancelled."""
    key = "cancelled" if job.total else "cancelled early"
    return say(key, calls=job.calls, total=job.total)


def status(text: str, job: Job | None = None, *, is_error: bool = False) -> str:
    """Return a line as HTML, with the bar and the predicted picture of a job."""
    parts = [f'<p id="told" class="{"error" * is_error}" role="status">{html.escape(text)}</p>']
    if job and job.total:
        parts.insert(0, f'<progress value="{job.calls}" max="{job.total}"></progress>')
    if job and job.preview is not None:
        parts.append(f'<img id="preview" alt="" src="{data_url(Image.fromarray(job.preview))}">')
    return "".join(parts)


def data_url(image: Image.Image, size: int = 512) -> str:
    """Return a picture of at most ``size`` pixels a side as a URL: JPEG, and PNG if it is small."""
    profile, stream = image.info.get("icc_profile"), io.BytesIO()
    image.thumbnail((size, size))
    kind = "PNG" if max(image.size) <= 512 else "JPEG"
    known = {"icc_profile": profile} if profile and profile[16:20] == b"RGB " else {}
    image.save(stream, kind, quality=90, **known)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def uploaded(name: str, value: Any) -> str:
    """Return the path of a file that a program sent; Gradio has checked that it was uploaded."""
    if not (isinstance(value, dict) and (value.get("meta") or {}).get("_type")):
        raise UserError(key=name, expected="a file, such as handle_file(...)", got=repr(value))
    return value["path"]


# ---- What is shown -------------------------------------------------------------------------------


def build_page(page: Page) -> tuple[gr.Blocks, gr.I18n]:
    """Return the page and its words."""
    conf, steps = page.worker.conf, page.worker.steps
    file = Path(conf.model_path).name
    subjects = next(both for part, both in SUBJECTS.items() if part in file.lower())
    values = [{"file": file, "subject": subject, "size": conf.image_size, **steps}
              for subject in subjects]  # fmt: skip
    english, chinese = (
        {key: both[place].format(**values[place]) for key, both in LABELS.items()}
        for place in (0, 1)
    )
    words = gr.I18n(en=english, **{"zh-CN": chinese, "zh-TW": chinese})
    here = Path(__file__).parent / "page"

    def choices(keys: Sequence[str]) -> list[tuple]:
        return [(words(key), key) for key in keys]

    with gr.Blocks(title="RePaint", analytics_enabled=False) as demo:
        gr.Markdown(words("title"))
        gr.Markdown(words("model"))
        with gr.Row():
            with gr.Column(scale=3):
                editor = gr.HTML(
                    html_template=(here / "editor.html").read_text(encoding="utf-8"),
                    css_template=(here / "editor.css").read_text(encoding="utf-8"),
                    js_on_load=(here / "editor.js").read_text(encoding="utf-8"),
                    apply_default_css=False, elem_id="editor", most_mb=MAX_UPLOAD_MB,
                    examples=[thumbnail for _, thumbnail in page.examples],
                    words=[{key: both[place] for key, both in EDITOR_WORDS.items()}
                           for place in (0, 1)],
                )  # fmt: skip
            with gr.Column(scale=2):
                with gr.Row():
                    run = gr.Button(words("run"), variant="primary", elem_id="run", min_width=120)
                    cancel = gr.Button(words("cancel"), elem_id="cancel", min_width=120)
                state = gr.HTML(elem_id="status", css_template=STATUS_STYLE)
                with gr.Accordion(words("more"), open=False, elem_id="more"):
                    hole = gr.Dropdown(choices(HOLES), value=PAINTED, label=words("hole"))
                    mask = gr.File(label=words("mask"), file_types=["image"], height=120,
                                   elem_id="mask")  # fmt: skip
                    mask_hole = gr.Radio(choices(MASK_HOLES), value="black", visible=False,
                                         label=words("mask_hole"))  # fmt: skip
                    method = gr.Radio(choices(METHODS), value="fast", label=words("method"))
                    samples = gr.Slider(1, MAX_SAMPLES, 1, step=1, label=words("samples"))
                    seed = gr.Number(conf.seed, label=words("seed"))
                    full_size = gr.Checkbox(True, label=words("full_size"))
                    mask_grow = gr.Slider(0, MAX_MASK_GROW, min(conf.mask_grow, MAX_MASK_GROW),
                                          step=1, label=words("mask_grow"))  # fmt: skip
                files = gr.Files(label=words("files"), elem_id="files", interactive=False,
                                 visible=False)  # fmt: skip
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        settings = [hole, mask, mask_hole, method, samples, seed, full_size, mask_grow]
        run.click(page.run, [editor, *settings], [state, editor, files],
                  concurrency_limit=None, trigger_mode="multiple", **quiet)  # fmt: skip
        cancel.click(page.cancel, None, state, queue=False, **quiet)
        editor.chosen(page.choose, editor, [editor, state], concurrency_limit=2, **quiet)
        mask.upload(page.use_mask, mask, [mask, hole], **quiet)
        mask.clear(page.use_mask, mask, [mask, hole], **quiet)
        hole.change(
            lambda hole: (gr.update(visible=hole in (PAINTED, UPLOADED)),
                          gr.update(visible=hole == UPLOADED)),
            hole, [mask, mask_hole], **quiet,
        )  # fmt: skip
        demo.load(page.enter, **quiet)
        demo.unload(page.leave)
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


def refuse_used_port(host: str, port: int) -> None:
    """Raise UserError where another program listens at a port; name a free one."""
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
            probe.bind((host, candidate))
            if candidate == port:
                return
            raise UserError(f"port {port} is in use: --port {candidate}")


def main(argv: Sequence[str] | None = None) -> None:
    """Check the configuration, then serve the page until Ctrl-C."""
    args = parse_args(argv)
    refuse_used_port(args.host, args.port)
    worker = Worker(args.conf_path, args.overrides)
    raise_on_ctrl_c()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are deleted then too
    with tempfile.TemporaryDirectory(prefix="repaint-page-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # uploads too, and nothing else may be read
        page = Page(worker, folder)
        demo, words = build_page(page)
        demo.queue(max_size=None)
        demo.launch(
            server_name=args.host, server_port=args.port, share=args.share, i18n=words,
            max_file_size=f"{MAX_UPLOAD_MB}mb", footer_links=["api"], quiet=True, show_error=True,
            theme=gr.themes.Default(font=FONTS, font_mono=FONTS), prevent_thread_lock=True,
        )  # fmt: skip
        addresses = f"http://{args.host}:{args.port}", demo.share_url  # None: there is no such
        print(" and ".join(filter(None, addresses)), flush=True)
        try:
            while True:
                time.sleep(SWEEP_SECONDS)
                page.sweep()
        finally:
            demo.close(verbose=False)


if __name__ == "__main__":
    command_line(main)
