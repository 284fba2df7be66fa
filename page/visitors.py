"""Who uses the page: tabs and programs, their files, what they ask for and what they are told."""

import base64
import contextlib
import html
import io
import re
import secrets
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import list_images
from page.jobs import CHOICES, PAINTED, UPLOADED, Cancelled, Chosen, Job, Request, Worker, read
from page.words import MESSAGES

PREVIEW_SIZE = 1600  # longest side in pixels of what the browser shows and paints on
MAX_EXAMPLES = 6
# The settings of the page, in the order of its controls.
SETTINGS = (*("hole", "mask", "mask_hole", "method", "samples", "seed", "full_size", "mask_grow"),)
# After so long files are deleted: of visitors who leave (a telephone that sleeps leaves, too), of
# those who neither ask nor leave, and uploads, which are copied when they are used.
LEFT_SECONDS, SILENT_SECONDS, UPLOAD_SECONDS = 60.0, 24 * 3600.0, 300.0


@dataclass
class Visitor:
    """A tab or a program, with the folder of its files and the time at which they are deleted."""

    folder: Path
    end: float
    chosen: Chosen | None = None
    jobs: list[Job] = field(default_factory=list)

    def keep(self, path: str, stem: str) -> Path:
        """Copy an upload into the visitor's folder, in the place of an earlier one."""
        folder = self.folder / stem
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return Path(shutil.copyfile(path, folder / f"{stem}{Path(path).suffix.lower()}"))

    def cancel(self) -> list[Job]:
        """Cancel and return the jobs that are not finished."""
        jobs = [job for job in self.jobs if not job.finished]
        for job in jobs:
            job.is_cancelled = True
        return jobs

    def forget_before(self, job: Job) -> None:
        """Delete the files of results that did not lead to this one, which takes their place."""
        kept = {job.folder, *job.request.picture.earlier}
        for folder in set(self.folder.glob("job-*")) - kept:
            shutil.rmtree(folder, ignore_errors=True)
        self.jobs[:] = [job]


class Page:
    """What visitors and programs ask for. All files lie in ``folder``, uploads included."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker, self.folder = worker, folder
        self.visitors: dict[str, Visitor] = {}
        self.examples: list[tuple[str, str]] = []  # paths and thumbnails
        with contextlib.suppress(UserError):  # a page for visitors' pictures needs none of its own
            for path in list_images(worker.conf.data.gt_path)[:MAX_EXAMPLES]:
                with contextlib.suppress(UserError):
                    self.examples.append((path, data_url(read(path), 128)))

    def visitor(self, request: gr.Request) -> Visitor:
        """Return who asks."""
        session = request.session_hash or secrets.token_hex(8)
        if session not in self.visitors:
            folder = Path(tempfile.mkdtemp(prefix="visitor-", dir=self.folder))
            self.visitors[session] = Visitor(folder, 0.0)
        visitor = self.visitors[session]
        visitor.end = time.monotonic() + SILENT_SECONDS
        return visitor

    def leave(self, request: gr.Request) -> None:
        """Cancel the jobs of who leaves; their files are deleted a little later."""
        if visitor := self.visitors.get(request.session_hash):
            visitor.cancel()
            visitor.end = time.monotonic() + LEFT_SECONDS

    def sweep(self) -> None:
        """Delete the files of visitors who left, and uploads, aborted ones too."""
        for session, visitor in list(self.visitors.items()):
            if visitor.end < time.monotonic():
                del self.visitors[session]
                shutil.rmtree(visitor.folder, ignore_errors=True)
        kept = {visitor.folder for visitor in self.visitors.values()}
        for path in set(self.folder.iterdir()) - kept:
            with contextlib.suppress(OSError):  # it is gone already
                if time.time() - path.stat().st_mtime > UPLOAD_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def upload(self, value: Any, name: str = "picture") -> str:
        """Return the path of a file that was uploaded; raises UserError for anything else."""
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or self.folder not in Path(path).resolve().parents:
            raise UserError(key=name, expected="a file, such as handle_file(...)", got=repr(value))
        return path

    # ---- What the page asks for ----

    def choose(self, value: dict, request: gr.Request) -> tuple[dict, str]:
        """Take an upload, an example or a result as the picture to work on, and show it."""
        visitor, say = self.visitor(request), speaker(request)
        try:
            if "result" in value:
                job = [job for job in visitor.jobs if job.results][-1]
                earlier = (*job.request.picture.earlier, job.folder)
                path = job.results[value["result"]]
                image = read(path)
                visitor.chosen = Chosen(path, image.size, earlier)
            else:
                is_example = "example" in value
                path = self.examples[value["example"]][0] if is_example else self.upload(value)
                image = read(path)
                visitor.chosen = Chosen(visitor.keep(path, "picture"), image.size)
        except UserError as error:
            return {"error": explain(error, say)}, ""
        except (LookupError, OSError, TypeError):  # what is no longer there, or never was
            return {"error": say("no picture")}, ""
        return {"picture": data_url(image)}, ""

    def use_mask(self, path: str | None, request: gr.Request) -> tuple[str | None, str]:
        """Keep a mask file, and have it used from now on."""
        kept = self.visitor(request).keep(path, "mask") if path else None
        return kept and str(kept), UPLOADED if path else PAINTED

    def run(self, value: dict | None, request: gr.Request, *settings: Any) -> Iterator[tuple]:
        """Do what the button asks for; yield the states of status, editor and downloads."""
        visitor, say = self.visitor(request), speaker(request)
        visitor.cancel()
        try:
            strokes = (value or {}).get("strokes")
            job = self.start(visitor, picture=visitor.chosen, strokes=strokes,
                             **dict(zip(SETTINGS, settings, strict=True)))  # fmt: skip
            for state in self.follow(job, visitor, say):
                yield status(state, job), gr.skip(), gr.skip()
        except Cancelled:
            yield status(cancelled(job, say)), gr.skip(), gr.skip()
        except Exception as error:
            yield status(explain(error, say), is_error=True), gr.skip(), gr.skip()
        else:
            visitor.forget_before(job)
            before, *results = (data_url(read(path)) for path in (job.original, *job.results))
            files = gr.update(value=[str(path) for path in job.downloads()], visible=True)
            yield status(done(job, say)), {"before": before, "results": results}, files

    def cancel(self, request: gr.Request) -> str:
        """End a visitor's job at the next network call, and say so at once."""
        jobs, say = self.visitor(request).cancel(), speaker(request)
        return status(cancelled(jobs[-1], say) if jobs else say("nothing runs"))

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
        request: gr.Request = None,
    ) -> tuple[str, list, list, list]:  # of what it yields, for Gradio's documentation
        """Inpaint a picture in the hole of a mask file, or of a mask that is drawn (hole="thick").

        Returns a message, the picture before and after, all results, and all files.
        """
        visitor, say = self.visitor(request), speaker(request)
        try:
            if hole == PAINTED:
                raise UserError(key="hole", expected=", ".join(CHOICES["hole"][1:]), got=hole)
            path = Path(self.upload(picture))
            job = self.start(
                visitor, picture=Chosen(path, read(path).size), strokes=None, hole=hole,
                mask=mask and self.upload(mask, "mask"), mask_hole=mask_hole, method=method,
                samples=samples, seed=seed, full_size=full_size, mask_grow=mask_grow,
            )  # fmt: skip
            for state in self.follow(job, visitor, say):
                yield state, [], [], []
        except Exception as error:
            raise gr.Error(explain(error, say), print_exception=False) from error
        pictures = [[job.original, job.results[0]], job.results, job.downloads()]
        yield done(job, say), *([gr.FileData(path=str(p)) for p in paths] for paths in pictures)

    # ---- Jobs ----

    def start(self, visitor: Visitor, **values: Any) -> Job:
        """Put a job into the queue; raises UserError for what cannot be done."""
        if values["picture"] is None:
            raise UserError("no picture")
        job = Job(Request(**values), Path(tempfile.mkdtemp(prefix="job-", dir=visitor.folder)))
        self.worker.submit(job)
        visitor.jobs.append(job)
        return job

    def follow(self, job: Job, visitor: Visitor, say: Callable) -> Iterator[str]:
        """Yield how far a job is until it is finished; raises what ended it."""
        try:
            while not (job.finished or job.is_cancelled):
                job.asked = time.monotonic()
                visitor.end = job.asked + SILENT_SECONDS
                count, seconds = self.worker.count_before(job), round(job.asked - job.since)
                phase = "starting" if job.phase == "waiting" and not count else job.phase
                yield say(phase, count=count, seconds=seconds, calls=job.calls, total=job.total,
                          left=job.seconds_left())  # fmt: skip
                time.sleep(0.3)
            if job.is_cancelled:
                raise Cancelled
        finally:
            job.is_cancelled = True  # the visitor left, or the job is over anyway
        if job.error:
            raise job.error


# ---- What is said --------------------------------------------------------------------------------


def speaker(request: gr.Request) -> Callable:
    """Return what finds and fills messages in the visitor's language."""
    place = (request.headers.get("accept-language") or "").lower().startswith("zh")
    return lambda key, **values: MESSAGES[key][place].format(**values) if key in MESSAGES else key


def explain(error: Exception, say: Callable) -> str:
    """Say what went wrong; of a fault in the program only that there was one."""
    if isinstance(error, UserError):
        return without_folders(say(str(error)))
    if isinstance(error, Cancelled):
        return say("cancelled early")
    traceback.print_exception(error)
    return say("fault")


def without_folders(text: str) -> str:
    """Return a message without the folders of this machine, which are nobody's business."""
    return re.sub(r"(?<![\w.:/])(?:/[^\s/:]+)+/(?=[^\s/])", "", text)


def done(job: Job, say: Callable) -> str:
    """Say that a job is done, with its warnings."""
    seconds = round(job.finished - job.started)
    message = say("done", seconds=seconds, seed=job.request.seed)
    return without_folders(" · ".join([message, *job.notes]))


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
        image = Image.fromarray(job.preview.squeeze())  # gray has one channel
        parts.append(f'<img id="preview" alt="" src="{data_url(image)}">')
    return "".join(parts)


def data_url(image: Image.Image, size: int = PREVIEW_SIZE) -> str:
    """Return a picture of at most ``size`` pixels a side as a URL: JPEG, and PNG if it is small."""
    stream = io.BytesIO()
    image.thumbnail((size, size))
    kind = "PNG" if max(image.size) <= 512 else "JPEG"
    image.save(stream, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
