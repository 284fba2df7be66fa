"""How fast the sampler is beside a plain port, interleaved in one process.

    python tests/benchmarks/sampler.py                          the published 256×256 network
    python tests/benchmarks/sampler.py --network demo --batch_sizes 1,4
    python tests/benchmarks/sampler.py --conf_path confs/demo.yml

A mode is ``plain`` (plain.py) or ``ours``, then optionally a ``precision``, then optionally
``compiled`` or ``eager``: ``plain-float16``, ``ours-bfloat16-compiled``. Every round times every
mode once, so that what else the machine does falls on all of them alike. Prints a Markdown table;
``--json`` writes all figures to a file. Weights are random unless ``--conf_path`` names a
checkpoint that is there: the speed is the same.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve()
sys.path[0:1] = [str(HERE.parent.parent.parent), str(HERE.parent)]

import plain  # noqa: E402

from guided_diffusion.conf import DataConf, InpaintConf, load_conf  # noqa: E402
from guided_diffusion.dist_util import get_device  # noqa: E402
from guided_diffusion.fast import keep_freed_memory  # noqa: E402
from guided_diffusion.scheduler import count_steps  # noqa: E402
from guided_diffusion.script_util import (  # noqa: E402
    Inpainter,
    create_gaussian_diffusion,
    create_model,
    create_schedule,
    load_model,
)

NETWORKS = {
    "256": {},
    "demo": {
        "image_size": 64, "num_channels": 32, "channel_mult": "1,2,4,5", "num_res_blocks": 1,
        "attention_resolutions": "16,8", "num_head_channels": 32,
    },
}  # fmt: skip
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FEW_CALLS = 50  # below this the table says that it extrapolates from less


@dataclass
class Mode:
    """One way to run the network, and what was measured of it."""

    name: str
    network: Callable[..., Tensor]
    synchronises: bool  # after every call, as plain does
    tf32: tuple[bool, bool]  # of matrix products and convolutions: global switches of torch
    weights: int  # bytes
    cold_start: float  # s, from nothing to the end of the first call
    error: float = 0.0  # largest, over the largest output, against float64
    peak: int = 0  # bytes of the GPU's memory
    rate: float = 0.0  # FLOP/s of a large product of matrices in this arithmetic
    ms: list[float] = field(default_factory=list)  # a call, a value for each round


def parse_args() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--network", choices=NETWORKS, default="256")
    parser.add_argument("--conf_path", metavar="YAML", help="its network and schedule instead")
    parser.add_argument("--batch_sizes", default="1", help="such as 1,4,8")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--modes", help="with commas; default: those that the device is good for")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=5, help="network calls a mode in each round")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--cpu_time", action="store_true", help="count the process's CPU seconds "
                        "and not the clock's: for a CPU that others use too")  # fmt: skip
    parser.add_argument("--keep_cache", action="store_true", help="find and leave compiled code in "
                        "the user's folder: a second run starts warm")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    return parser.parse_args()


def configuration(args: argparse.Namespace, device: torch.device) -> InpaintConf:
    if args.conf_path:
        conf = load_conf(args.conf_path, InpaintConf)
        return dataclasses.replace(conf, device=str(device), precision=None, use_fp16=False)
    data = DataConf(name="set", gt_path="gt", mask_path="mask")
    keys = {"name": "speed", "model_path": "absent.pt", "data": data, "device": str(device)}
    return InpaintConf(**{**keys, **NETWORKS[args.network]})


def with_checkpoint(conf: InpaintConf, folder: str) -> InpaintConf:
    """Return the configuration with a checkpoint that exists: its own, or random weights."""
    if conf.model_path and Path(conf.model_path).exists():
        return conf
    torch.manual_seed(0)
    model = create_model(conf)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    path = f"{folder}/model.pt"
    torch.save(model.state_dict(), path)
    return dataclasses.replace(conf, model_path=path)


class Benchmark:
    """All modes on one device with one batch size."""

    def __init__(
        self, conf: InpaintConf, device: torch.device, batch: int, clock: Callable
    ) -> None:
        self.conf, self.device, self.batch, self.clock = conf, device, batch, clock
        self.diffusion = create_gaussian_diffusion(conf)
        self.times = create_schedule(conf, self.diffusion)
        generator = torch.Generator().manual_seed(1)
        shape = (batch, 3, conf.image_size, conf.image_size)
        self.x = torch.randn(shape, generator=generator).to(device)
        self.levels = self.diffusion.network_times(device)[:, None].expand(-1, batch)
        self.y = [torch.arange(batch, device=device)] if conf.class_cond else []

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def call(self, mode: Mode, count: int) -> Tensor:
        """Call the network ``count`` times at changing levels; returns the last output."""
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = mode.tf32
        if self.device.type == "cpu":
            return_freed_memory() if mode.synchronises else keep_freed_memory()
        for i in range(count):
            output = mode.network(self.x, self.level(i), *self.y)
            if mode.synchronises:
                output.flatten()[0].item()
        self.synchronise()
        return output

    def level(self, call: int) -> Tensor:
        """Return the network's times (N,) of one of many calls: all over the chain."""
        return self.levels[(37 * call + 100) % len(self.levels)]

    def build(self, name: str) -> Mode:
        """Load the weights and call the network once; that is its cold start."""
        kind, *options = name.split("-")
        if kind not in ("plain", "ours"):
            raise SystemExit(f"unknown mode {name}")
        # auto would judge by the walk's length; what is measured is a long one.
        compile = True if self.device.type == "cuda" else "auto"
        compile = {"eager": False, "compiled": True}.get(options[-1] if options else "", compile)
        precision = next((o for o in options if o not in ("compiled", "eager")), None)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        self.synchronise()
        started = self.clock()
        if kind == "plain":
            model = load_model(self.conf, self.device)
            model.convert_trunk(TYPES.get(precision, torch.float32))

            def network(x: Tensor, t: Tensor, *y: Tensor) -> Tensor:
                return plain.unet(model, x, t, *y)
        else:
            changed = dataclasses.replace(
                self.conf, precision=precision, compile=compile, classifier_path=None
            )
            inpainter = Inpainter(changed, self.times)
            model, network = inpainter.model, inpainter.network
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        weights = sum(parameter.nbytes for parameter in model.parameters())
        mode = Mode(name, network, kind == "plain", tf32, weights, 0.0)
        self._reset_peak()
        before = self._allocated()
        self.call(mode, 1)  # where it is recorded, later calls allocate nothing
        mode.peak = weights + self._peak() - before
        mode.cold_start = self.clock() - started
        dtype = TYPES.get(precision, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = tf32[1]  # as the convolutions do
        mode.rate = matrix_rate(self.device, dtype, self.clock)
        return mode

    def exact(self) -> Tensor:
        """Return the output of one call in float64."""
        model = load_model(self.conf, self.device).double()
        model.dtype = torch.float64
        return plain.unet(model, self.x.double(), self.level(0), *self.y)

    def measure(self, modes: list[Mode], rounds: int, calls: int) -> None:
        """Time all modes in turns, and take their errors."""
        reference = self.exact()
        for mode in modes:
            difference = (self.call(mode, 1) - reference).abs().max()
            mode.error = (difference / reference.abs().max()).item()
        del reference
        for _ in range(rounds):
            for mode in modes:
                started = self.clock()
                self.call(mode, calls)
                mode.ms.append((self.clock() - started) / calls * 1000)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def overhead(self, transitions: int = 300, rounds: int = 9) -> dict[str, float]:
        """Return µs a transition of each loop around a network that returns zeros.

        With the same random numbers, which each draws its own way; ``… noise`` is that part alone.
        """
        inpainter = Inpainter(dataclasses.replace(self.conf, classifier_path=None), self.times)
        channels = 6 if self.conf.learn_sigma else 3
        zeros = self.x.new_zeros(self.batch, channels, *self.x.shape[2:])
        mask = (self.x > 0).float()
        times = self.times[: transitions + 1]
        generators = [torch.Generator(self.device).manual_seed(k) for k in range(self.batch)]

        def draw_plainly() -> Tensor:
            noise = torch.empty_like(self.x)
            for own, generator in zip(noise.unbind(), generators, strict=True):
                own.normal_(generator=generator)
            return noise

        draw = inpainter.noise_source(generators, self.x.shape)

        def network(x: Tensor, timesteps: Tensor) -> Tensor:
            return zeros

        def draw_only(draw_noise: Callable[[], Tensor]) -> Iterable[Tensor]:
            for t, t_next in pairwise(times):
                draw_noise()
                yield draw_noise() if t_next < t else self.x

        inputs = (network, self.x.clamp(-1, 1), mask, times)
        loops: dict[str, Callable[[], Iterable]] = {
            "plain": lambda: plain.repaint(self.diffusion, *inputs, draw_plainly),
            "ours": lambda: inpainter.diffusion.repaint(*inputs, draw),
            "plain noise": lambda: draw_only(draw_plainly),
            "our noise": lambda: draw_only(draw),
        }
        spent: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(rounds + 1):  # the first is warming up
            for name, loop in loops.items():
                self.synchronise()
                started = self.clock()
                for _ in islice(loop(), transitions):
                    pass
                self.synchronise()
                spent[name].append((self.clock() - started) / (len(times) - 1) * 1e6)
        return {name: statistics.median(values[1:]) for name, values in spent.items()}


def return_freed_memory() -> None:
    """Undo ``keep_freed_memory``: the values to which glibc's own tend with large blocks."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        mmap_max, mmap_threshold, trim_threshold = -4, -3, -1  # names of malloc.h
        library.mallopt(mmap_threshold, 32 * 2**20)
        library.mallopt(trim_threshold, 64 * 2**20)
        library.mallopt(mmap_max, 65536)
        library.malloc_trim(0)  # what was kept before would go on serving


def forget_compiled() -> None:
    """Free what the modes of one batch size compiled and recorded."""
    gc.collect()  # compiled modules refer to themselves
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wake_up(device: torch.device) -> None:
    """Let the GPU's libraries load before anything is timed."""
    a = torch.ones(8, 8, 8, 8, device=device)
    torch.conv2d(a, a[:, :, :3, :3])
    a[0, 0] @ a[0, 0]


def matrix_rate(device: torch.device, dtype: torch.dtype, clock: Callable) -> float:
    """Return the FLOP/s of a large product of matrices with the switches as they are."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).type(dtype) for _ in range(2))
    spent = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = clock()
        for _ in range(3):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append((clock() - started) / 3)
    return 2 * side**3 / min(spent[1:])


def count_flops(conf: InpaintConf) -> int:
    """Return the floating-point operations of one call for one image; a multiply-add is two."""
    with torch.device("meta"):
        model = create_model(conf).eval()
        size = conf.image_size
        y = [torch.zeros(1, dtype=torch.long)] if conf.class_cond else []
        inputs = (torch.zeros(1, 3, size, size), torch.zeros(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain.unet(model, *inputs, *y)
    return counter.get_total_flops()


def report(bench: Benchmark, modes: list[Mode], overhead: dict[str, float]) -> list[dict]:
    """Print the table of one batch size; return its rows with every figure."""
    flops = count_flops(bench.conf) * bench.batch
    calls, undos = count_steps(bench.times)
    print(f"\nbatch size {bench.batch}; {flops / bench.batch / 1e9:.4g} GFLOP an image and call; "
          f"{calls} calls and {undos} undos an image\n")  # fmt: skip
    print("| mode | ms a call and image | spread | against plain | s an image | error | "
          "TFLOP/s | share of matrix rate | peak GB | cold start s |")  # fmt: skip
    print("| --- " * 10 + "|")
    rows = []
    for mode in modes:
        ms, low, high = statistics.median(mode.ms), min(mode.ms), max(mode.ms)
        beside = overhead["plain" if mode.synchronises else "ours"] / 1e6
        ratios = [a / b for a, b in zip(modes[0].ms, mode.ms, strict=True)]
        row = {
            "mode": mode.name,
            "batch_size": bench.batch,
            "ms_a_call_and_image": ms / bench.batch,
            "spread_ms": [low / bench.batch, high / bench.batch],
            "speed_against_first_mode": statistics.median(ratios),
            "seconds_an_image": (calls * ms / 1000 + (calls + undos) * beside) / bench.batch,
            "forward_error": mode.error,
            "tflops": flops / ms / 1e9,
            "share_of_matrix_rate": flops / (ms / 1000) / mode.rate,
            "peak_gb": mode.peak / 1e9 if bench.device.type == "cuda" else None,
            "cold_start_s": mode.cold_start,
        }
        rows.append(row)
        peak = f"{row['peak_gb']:.2f}" if row["peak_gb"] else "-"
        print(f"| {mode.name} | {row['ms_a_call_and_image']:.4g} | {row['spread_ms'][0]:.4g} to "
              f"{row['spread_ms'][1]:.4g} | {row['speed_against_first_mode']:.2f}× | "
              f"{row['seconds_an_image']:.4g} | {mode.error:.1e} | {row['tflops']:.3g} | "
              f"{row['share_of_matrix_rate']:.0%} | {peak} | {mode.cold_start:.1f} |")  # fmt: skip
    return rows


def default_modes(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["plain", "plain-float16", "ours-eager", "ours", "ours-float32", "ours-tf32",
                "ours-float16", "ours-bfloat16", "ours-bfloat16-eager"]  # fmt: skip
    return ["plain", "ours-eager", "ours"]


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = get_device(args.device)
    clock = time.process_time if args.cpu_time else time.perf_counter
    names = args.modes.split(",") if args.modes else default_modes(device)
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else processor()
    settings = {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "clock": clock.__name__,
        "calls_a_mode": args.rounds * args.calls,
        "command": " ".join(sys.argv[1:]),
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items() if value))
    if args.rounds * args.calls < FEW_CALLS:
        print(f"s an image is extrapolated from {args.rounds * args.calls} calls only")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        if not args.keep_cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # of the kernels, too
        wake_up(device)
        conf = with_checkpoint(configuration(args, device), folder)
        for batch in map(int, args.batch_sizes.split(",")):
            bench = Benchmark(conf, device, batch, clock)
            modes = [bench.build(name) for name in names]
            bench.measure(modes, args.rounds, args.calls)
            overhead = bench.overhead()
            results += report(bench, modes, overhead)
            text = ", ".join(f"{name} {value:.0f}" for name, value in overhead.items())
            print(f"\nµs a transition around a network that returns zeros: {text}")
            results.append({"batch_size": batch, "overhead_us_a_transition": overhead})
            del modes, bench
            forget_compiled()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"peak of the whole process, all modes together: {peak:.2f} GB")
    if args.json:
        Path(args.json).write_text(json.dumps({**settings, "results": results}, indent=1))


def processor() -> str:
    """Return the CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
