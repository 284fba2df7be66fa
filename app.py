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
import errno
import inspect
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guided_diffusion import raise_on_ctrl_c
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.errors import UserError
from page.jobs import CHOICES, PAINTED, RANGES, UPLOADED, Worker
from page.words import EDITOR, LABELS, SUBJECTS


def without_gradio() -> None:
    """Say what is missing."""
    raise UserError("gradio is not installed: pip install -r requirements-app.txt")


try:
    import gradio as gr

    from page.visitors import Page
except ImportError:
    command_line(without_gradio)

MAX_UPLOAD_MB = 200
SWEEP_SECONDS = 15.0
FONTS = ["system-ui", "sans-serif"]  # none is fetched from elsewhere
STATUS_STYLE = """
    min-height: 2em;
    .error { color: #b91c1c; font-weight: 600 }
    progress { width: 100% }
    #preview { width: 100%; max-width: 256px; image-rendering: pixelated }
"""


def build_page(page: Page) -> tuple[gr.Blocks, gr.I18n]:
    """Return the page and its words."""
    conf = page.worker.conf
    file = Path(conf.model_path).name
    subject = next(both for part, both in SUBJECTS.items() if part in file.lower())
    english, chinese = (
        {key: both[place].format(file=file, subject=subject[place], size=conf.image_size)
         for key, both in LABELS.items()}
        for place in (0, 1)
    )  # fmt: skip
    words = gr.I18n(en=english, **{"zh-CN": chinese, "zh-TW": chinese})
    here = Path(__file__).parent / "page"

    choices = {name: [(words(key), key) for key in keys] for name, keys in CHOICES.items()}

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
                    words=[{key: both[place] for key, both in EDITOR.items()}
                           for place in (0, 1)],
                )  # fmt: skip
            with gr.Column(scale=2):
                with gr.Row():
                    run = gr.Button(words("run"), variant="primary", elem_id="run", min_width=120)
                    cancel = gr.Button(words("cancel"), elem_id="cancel", min_width=120)
                state = gr.HTML(elem_id="status", css_template=STATUS_STYLE)
                with gr.Accordion(words("more"), open=False, elem_id="more"):
                    hole = gr.Dropdown(choices["hole"], value=PAINTED, label=words("hole"))
                    mask = gr.File(label=words("mask"), file_types=["image"], height=120,
                                   elem_id="mask")  # fmt: skip
                    with gr.Column(visible=False) as rules:
                        mask_hole = gr.Radio(choices["mask_hole"], value="auto",
                                             label=words("mask_hole"))  # fmt: skip
                    method = gr.Radio(choices["method"], value="fast", label=words("method"))
                    samples = gr.Slider(*RANGES["samples"], 1, step=1, label=words("samples"))
                    seed = gr.Number(conf.seed, label=words("seed"))
                    full_size = gr.Checkbox(True, label=words("full_size"))
                    mask_grow = gr.Slider(*RANGES["mask_grow"], min(conf.mask_grow, 64), step=1,
                                          label=words("mask_grow"))  # fmt: skip
                files = gr.Files(label=words("files"), elem_id="files", interactive=False,
                                 visible=False)  # fmt: skip
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        settings = [hole, mask, mask_hole, method, samples, seed, full_size, mask_grow]
        run.click(page.run, [editor, *settings], [state, editor, files],
                  concurrency_limit=None, trigger_mode="multiple", **quiet)  # fmt: skip
        cancel.click(page.cancel, None, state, queue=False, **quiet)
        editor.chosen(page.choose, editor, [editor, state], concurrency_limit=2, **quiet)
        editor.painted(None, None, hole, js=f"() => '{PAINTED}'", **quiet)
        mask.upload(page.use_mask, mask, [mask, hole], **quiet)
        mask.clear(page.use_mask, mask, [mask, hole], **quiet)
        hole.change(
            lambda hole: (gr.update(visible=hole in (PAINTED, UPLOADED)),
                          gr.update(visible=hole == UPLOADED)),
            hole, [mask, rules], **quiet,
        )  # fmt: skip
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
    """Raise UserError where the page cannot listen at a port."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: --port {port + 1}") from error
        raise UserError(str(error), key="--host", got=host) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Check the configuration, then serve the page until Ctrl-C."""
    args = parse_args(argv)
    refuse_used_port(args.host, args.port)
    worker = Worker(args.conf_path, args.overrides)
    raise_on_ctrl_c()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are deleted then too
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    folder.mkdir(mode=0o700)
    try:
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
        while True:
            time.sleep(SWEEP_SECONDS)
            page.sweep()
    finally:
        gr.close_all(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    command_line(main)
