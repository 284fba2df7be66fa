"""How long a network call takes beside a plain port and other programs, in turns in one process.

    python tests/benchmarks/sampler.py                          the published 256×256 network
    python tests/benchmarks/sampler.py --network demo --batch_sizes 1,4
    python tests/benchmarks/sampler.py --conf_path confs/inet64.yml --classifier
    python tests/benchmarks/sampler.py --modes plain,torch-compile,openvino,openvino-bfloat16,ours

A mode is ``plain`` (plain.py), ``torch-compile`` (that of our network as it is loaded),
``openvino`` (pip install openvino) or ``ours``, then optionally a ``precision``, and of ours
optionally ``compiled`` (``compile: true``) or ``eager`` (``compile: false``; else it is ``auto``):
``plain-float16``, ``ours-bfloat16-compiled``. Every round times every mode once, so that other
programs on the machine slow all of them alike. ``--classifier`` times the gradient of the noisy
classifier in place of the network. Weights are random unless ``--conf_path`` names a checkpoint
that exists: the speed is the same.

Prints Markdown tables; ``--markdown`` writes what is printed to a file, ``--json`` all figures. An
error is the largest beside plain.py in float64, over the largest output. FLOPs are plain.py's
products and convolutions, counted. Building, loading, compiling and first calls are not timed.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch, as guided_diffusion/cli.py says

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import plain

from guided_diffusion.accel.memory import keep_freed_memory
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import DataConf, InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.dist_util import get_device
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import write_text_atomic
from guided_diffusion.io.paths import check_folder
from guided_diffusion.run.inpainter import Inpainter, classifier_gradient
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import (
    create_classifier,
    create_gaussian_diffusion,
    create_model,
    create_schedule,
    load_classifier,
    load_model,
)

NETWORKS = {
    "256": {},
    "demo": {
        "image_size": 64, "num_channels": 64, "channel_mult": "0.5,1,1.5,2", "num_res_blocks": 2,
        "attention_resolutions": "16,8", "num_head_channels": 32, "norm_groups": 8,
    },
}  # fmt: skip
# What Inpainter builds beside a classifier, and nobody calls.
SMALLEST = {
    "num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "attention_resolutions": "",
    "num_head_channels": 32, "class_cond": False, "model_path": "absent.pt",
}  # fmt: skip
MODE = re.compile(
    "(?P<kind>plain|torch-compile|openvino|ours)"
    "(-(?P<precision>float32|tf32|float16|bfloat16))?(-(?P<way>compiled|eager))?"
)
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Network = Callable[..., Tensor]  # of x, timesteps and maybe y


@dataclass
class Mode:
    """One way to run the network, and what was measured of it."""

    name: str
    network: Network
    is_plain: bool  # synchronises after every call, and frees memory as usual
    tf32: tuple[bool, bool]  # of matrix products and convolutions: global switches of torch
    error: float = 0.0  # largest, over the largest output, against float64
    ms: list[float] = field(default_factory=list)  # a call, a value for each round


# ---- What to run ---------------------------------------------------------------------------------


def batch_sizes(text: str) -> list[int]:
    """Parse ``--batch_sizes``."""
    return [int(part) for part in text.split(",")]


def mode_names(text: str) -> list[str]:
    """Parse ``--modes``."""
    for name in text.split(","):
        match = MODE.fullmatch(name)
        if not match or (match["kind"] != "ours" and match["way"]):
            raise argparse.ArgumentTypeError(f"no such mode: {name!r}")
    return text.split(",")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises UserError."""
    text = argparse.RawDescriptionHelpFormatter
    parser = OptionParser(description=__doc__, formatter_class=text)
    parser.add_argument("--network", choices=NETWORKS, default="256")
    parser.add_argument("--conf_path", metavar="YAML", help="its network and schedule instead")
    parser.add_argument("--classifier", action="store_true", help="time the gradient of the noisy "
                        "classifier that the configuration's keys make")  # fmt: skip
    parser.add_argument("--batch_sizes", type=batch_sizes, default=[1], help="such as 1,4,8")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--modes", type=mode_names, help="with commas; default: those that the "
                        "device is good for")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=5, help="of each mode in every round")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", metavar="FILE", help="write there what is printed")
    args = parser.parse_args(argv)
    for path in filter(None, (args.json, args.markdown)):
        check_folder(Path(path).parent)
    return args


def default_modes(device: torch.device) -> list[str]:
    """Return what is worth comparing on a device."""
    if device.type == "cuda":
        return ["plain", "plain-float16", "ours", "ours-compiled", "ours-eager", "ours-tf32",
                "ours-float16", "ours-bfloat16", "ours-bfloat16-compiled",
                "ours-bfloat16-eager"]  # fmt: skip
    return ["plain", "ours-eager", "ours"]


def configuration(args: argparse.Namespace, device: torch.device) -> InpaintConf:
    """Return the configuration of what is timed, ``guided`` if that is the classifier."""
    if args.conf_path:
        conf = load_conf(args.conf_path, InpaintConf)
    else:
        data = DataConf(name="set", gt_path="gt", mask_path="mask")
        keys = {"name": "speed", "model_path": "absent.pt", "data": data}
        conf = InpaintConf(**keys, **NETWORKS[args.network])
    changes = {"precision": None, "use_fp16": False, "classifier_use_fp16": False}
    if args.classifier:
        path, scale = conf.classifier_path or "absent.pt", conf.classifier_scale or 1.0
        changes |= {**SMALLEST, "classifier_path": path, "classifier_scale": scale}
    else:
        changes["classifier_path"] = None
    return dataclasses.replace(conf, device=str(device), **changes)


def with_checkpoints(conf: InpaintConf, folder: str) -> InpaintConf:
    """Return the configuration with checkpoints that exist: its own, or random weights."""
    torch.manual_seed(0)
    networks = {"model_path": create_model}
    if conf.guided:
        networks["classifier_path"] = create_classifier
    for key, create in networks.items():
        if Path(getattr(conf, key)).exists():
            continue
        network, path = create(conf), f"{folder}/{key}.pt"
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        torch.save(network.state_dict(), path)
        conf = dataclasses.replace(conf, **{key: path})
    return conf


# ---- Measuring -----------------------------------------------------------------------------------


class Benchmark:
    """All modes on one device with one batch size."""

    def __init__(self, conf: InpaintConf, device: torch.device, batch: int) -> None:
        self.conf, self.device, self.batch = conf, device, batch
        self.diffusion = create_gaussian_diffusion(conf)
        self.times = create_schedule(conf, self.diffusion)
        generator = torch.Generator().manual_seed(1)
        shape = (batch, 3, conf.image_size, conf.image_size)
        self.x = torch.randn(shape, generator=generator).to(device)
        self.levels = self.diffusion.network_times(device)[:, None].expand(-1, batch)
        y = torch.arange(batch, device=device) % conf.num_classes
        self.y = [y] if conf.guided or conf.class_cond else []

    def prepare(self, is_plain: bool, tf32: tuple[bool, bool]) -> None:
        """Set the process's switches as a mode has them."""
        torch.backends.cudnn.benchmark = True  # as Inpainter does: all calls have the same shapes
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        if self.device.type == "cpu":
            return_freed_memory() if is_plain else keep_freed_memory()
        synchronise(self.device)

    @torch.inference_mode()
    def call(self, mode: Mode, count: int = 1) -> Tensor:
        """Call the network ``count`` times at changing levels; returns the last output."""
        for i in range(count):
            output = mode.network(self.x, self.level(i), *self.y)
            if mode.is_plain:
                output.flatten()[0].item()
        synchronise(self.device)
        return output

    def level(self, call: int) -> Tensor:
        """Return the network's times (N,) of one of many calls: all over the chain."""
        return self.levels[(37 * call + 100) % len(self.levels)]

    def build(self, name: str) -> Mode:
        """Load the weights and call the network once, which may compile it."""
        kind, precision, way = MODE.fullmatch(name).group("kind", "precision", "way")
        # Without a precision they are torch's own.
        self.prepare(kind == "plain", (precision == "tf32", precision != "float32"))
        dtype = TYPES.get(precision, torch.float32)
        if kind == "plain":
            network = self._plain(dtype)
        elif kind == "ours":
            network = self._ours(precision, way)
        else:
            network = self._other(kind, dtype)
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        mode = Mode(name, network, kind == "plain", tf32)
        self.call(mode)
        return mode

    def _other(self, kind: str, dtype: torch.dtype) -> Network:
        """Return what another program makes of our network in its usual layout."""
        if self.conf.guided:
            raise UserError("other programs are compared for the network alone", key="--modes")
        model = load_model(self.conf, self.device)
        if kind == "torch-compile":
            model.convert_trunk(dtype)
            return torch.compile(model, dynamic=False)
        return openvino_network(model, (self.x, self.level(0).contiguous(), *self.y), dtype)

    def _plain(self, dtype: torch.dtype) -> Network:
        load = load_classifier if self.conf.guided else load_model
        model = load(self.conf, self.device)
        if dtype == torch.float64:
            model.double()
        model.convert_trunk(dtype)
        if self.conf.guided:
            classifier = partial(plain.classifier, model)
            return partial(classifier_gradient, classifier, scale=self.conf.classifier_scale)
        return partial(plain.unet, model)

    def _ours(self, precision: str | None, way: str | None) -> Network:
        compile = {"compiled": True, "eager": False, None: "auto"}[way]
        is_half = precision == "float16"
        changes = {"precision": precision, "compile": compile, "classifier_use_fp16": is_half}
        inpainter = Inpainter(dataclasses.replace(self.conf, **changes), self.times)
        return inpainter.gradient if self.conf.guided else inpainter.network

    def exact(self) -> Tensor:
        """Return the output of one call in float64, made image by image to fit a GPU."""
        torch.backends.cudnn.benchmark = False  # its trials take memory, too
        network, inputs = self._plain(torch.float64), (self.x.double(), self.level(0), *self.y)
        images = [[tensor[i : i + 1] for tensor in inputs] for i in range(self.batch)]
        with torch.inference_mode():
            return torch.cat([network(*image) for image in images])

    def measure(self, modes: list[Mode], reference: Tensor, rounds: int, calls: int) -> None:
        """Time all modes in turns, and take their errors."""
        for mode in modes:
            self.prepare(mode.is_plain, mode.tf32)
            difference = (self.call(mode) - reference).abs().max()
            mode.error = (difference / reference.abs().max()).item()
        for _ in range(rounds):
            for mode in modes:
                self.prepare(mode.is_plain, mode.tf32)
                self.call(mode)  # the first finds caches and heap as another mode left them
                started = time.perf_counter()
                self.call(mode, calls)
                mode.ms.append((time.perf_counter() - started) / calls * 1000)


def synchronise(device: torch.device) -> None:
    """Wait for all that a GPU has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def return_freed_memory() -> None:
    """Undo ``keep_freed_memory``: the values to which glibc's own tend with large blocks."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        mmap_max, mmap_threshold, trim_threshold = -4, -3, -1  # names of malloc.h
        library.mallopt(mmap_threshold, 32 * 2**20)
        library.mallopt(trim_threshold, 64 * 2**20)
        library.mallopt(mmap_max, 65536)
        library.malloc_trim(0)  # what was kept before would go on serving


def openvino_network(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> Network:
    """Return OpenVINO's compiled form of ``model`` for inputs of these shapes, on the CPU."""
    import openvino

    hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "SNIPPETS_MODE": "DISABLE",  # with it 2026.4 crashes; with dynamic shapes it is 7 % slower
    }
    shapes = [list(tensor.shape) for tensor in inputs]
    with torch.enable_grad():  # else the network works in place, which converters do not like
        traced = torch.jit.trace(model, tuple(inputs), check_trace=False)
    converted = openvino.convert_model(traced, input=shapes)
    compiled = openvino.Core().compile_model(converted, "CPU", settings)

    def network(*inputs: Tensor) -> Tensor:
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        return torch.from_numpy(compiled(arrays)[0])

    return network


def forget_compiled() -> None:
    """Free what is no longer used, and what was compiled in this process."""
    gc.collect()  # compiled modules refer to themselves
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_flops(conf: InpaintConf) -> int:
    """Return the floating-point operations of one call for one image; a multiply-add is two."""
    with torch.device("meta"):
        model = (create_classifier if conf.guided else create_model)(conf)
        inputs = (torch.zeros(1, 3, conf.image_size, conf.image_size), torch.zeros(1))
        y = [torch.zeros(1, dtype=torch.long)] if conf.guided or conf.class_cond else []
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        if conf.guided:
            classifier_gradient(partial(plain.classifier, model), *inputs, *y, scale=1.0)
        else:
            plain.unet(model, *inputs, *y)
    return counter.get_total_flops()


# ---- Reporting -----------------------------------------------------------------------------------


def figures(bench: Benchmark, modes: list[Mode], flops: int) -> list[dict]:
    """Return every figure of one batch size, a dictionary for each mode; ``flops`` an image."""
    calls, _ = count_steps(bench.times)
    rows = []
    for mode in modes:
        ms, low, high = statistics.median(mode.ms), min(mode.ms), max(mode.ms)
        ratios = [a / b for a, b in zip(modes[0].ms, mode.ms, strict=True)]
        row = {
            "mode": mode.name,
            "batch_size": bench.batch,
            "ms_a_call_and_image": ms / bench.batch,
            "spread_ms": [low / bench.batch, high / bench.batch],
            "speed_against_first_mode": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
            "seconds_an_image": calls * ms / 1000 / bench.batch,
            "forward_error": mode.error,
            "tflops": flops * bench.batch / ms / 1e9,
        }
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows in Markdown."""
    first = rows[0]["mode"]
    lines = [f"| mode | ms a call and image | spread | against {first} | spread | s an image | "
             "error | TFLOP/s |",
             "| --- " * 8 + "|"]  # fmt: skip
    for row in rows:
        (low, high), (least, most) = row["spread_ms"], row["ratios"]
        cells = [row["mode"], f"{row['ms_a_call_and_image']:.4g}", f"{low:.4g} to {high:.4g}",
                 f"{row['speed_against_first_mode']:.2f}×", f"{least:.2f} to {most:.2f}",
                 f"{row['seconds_an_image']:.4g}", f"{row['forward_error']:.1e}",
                 f"{row['tflops']:.3g}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, list[dict]]]:
    """Yield the table and the figures of each batch size in turn."""
    names = args.modes or default_modes(device)
    with tempfile.TemporaryDirectory() as folder:
        conf = with_checkpoints(configuration(args, device), folder)
        for batch in args.batch_sizes:
            forget_compiled()  # of the last batch size
            bench = Benchmark(conf, device, batch)
            reference, modes = bench.exact(), [bench.build(name) for name in names]
            bench.measure(modes, reference, args.rounds, args.calls)
            flops = count_flops(conf)
            rows = figures(bench, modes, flops)
            what = "the classifier's gradient" if conf.guided else "the network"
            calls, _ = count_steps(bench.times)
            title = (f"{what}, batch size {batch}; {flops / 1e9:.4g} GFLOP an image and call; "
                     f"s an image is {calls} calls")  # fmt: skip
            yield f"\n{title}\n\n{table(rows)}", rows
            del modes, bench, reference


def main() -> None:
    """Print and write what the command line asks for."""
    args = parse_args()
    device, results = get_device(args.device), []
    settings = {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "calls_a_mode": args.rounds * args.calls,
        "command": " ".join(sys.argv[1:]),
    }
    lines = [", ".join(f"{key} {value}" for key, value in settings.items() if value)]
    print(lines[0], flush=True)
    for text, rows in run(args, device):
        print(text, flush=True)
        lines.append(text)
        results += rows
        if args.json:
            write_text_atomic(args.json, json.dumps({**settings, "results": results}, indent=1))
        if args.markdown:
            write_text_atomic(args.markdown, "\n".join([*lines, ""]))


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    warnings.simplefilter("default")
    command_line(main)
