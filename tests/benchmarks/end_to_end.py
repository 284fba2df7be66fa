"""How long a picture takes from noise to result: the published schedule, ``--fast``, a plain port.

    python tests/benchmarks/end_to_end.py --network demo --batch_size 8
    python tests/benchmarks/end_to_end.py --network 256 --at_most 300 --precision bfloat16

Every way walks its whole schedule with the same network, as test.py does between reading and
writing. The plain port walks the published schedule, with networks that predict noise or v and
learn the variance. A way that takes longer than ``--at_most`` seconds is stopped there: its time is
what a call took times the calls of its schedule, and the table says how many calls were measured.
The ways take five turns, so that other programs on the machine slow all of them alike. Building,
loading and the first call, which compares fast and plain networks, are not counted.
Weights are random unless ``--conf_path`` names a checkpoint that is there.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch, as guided_diffusion/cli.py says

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import plain
from sampler import (
    NETWORKS,
    configuration,
    machine,
    return_freed_memory,
    synchronise,
    with_checkpoints,
)

from guided_diffusion.accel.accelerate import prepare
from guided_diffusion.accel.memory import keep_freed_memory
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.keys import FAST, InpaintConf
from guided_diffusion.dist_util import get_device
from guided_diffusion.gaussian_diffusion import Step, noise_source
from guided_diffusion.run.inpainter import Inpainter
from guided_diffusion.scheduler import count_steps
from guided_diffusion.script_util import create_gaussian_diffusion, create_schedule, load_model

TURNS = 5


@dataclass
class Way:
    """One way from noise to a picture."""

    name: str
    times: list[int]
    walk: Callable[[], Iterator[object]]  # yields after every transition
    prepare_heap: Callable[[], None] = keep_freed_memory  # as test.py does on a CPU
    seconds: float = 0.0
    calls: int = 0  # that were made in these seconds

    def start(self) -> None:
        """Begin the walk that is measured, after two transitions of warming up."""
        for _ in itertools.islice(self.walk(), 2):
            pass
        self.transitions = zip(itertools.pairwise(self.times), self.walk(), strict=True)

    def go_on(self, device: torch.device, until: float) -> None:
        """Walk on to the end, or until all turns together have taken ``until`` seconds."""
        if self.seconds > until:
            return
        if device.type == "cpu":
            self.prepare_heap()
        synchronise(device)
        started = time.perf_counter() - self.seconds
        for (t, t_next), _ in self.transitions:
            self.calls += t_next < t
            if time.perf_counter() - started > until:
                break
        synchronise(device)
        self.seconds = time.perf_counter() - started

    @property
    def all_calls(self) -> int:
        """Network calls of the whole schedule."""
        return count_steps(self.times)[0]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises UserError."""
    text = argparse.RawDescriptionHelpFormatter
    parser = OptionParser(description=__doc__, formatter_class=text)
    parser.add_argument("--network", choices=NETWORKS, default="256")
    parser.add_argument("--conf_path", metavar="YAML", help="its network instead")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures at once")
    parser.add_argument("--at_most", type=float, default=600, help="seconds a way (default: 600)")
    parser.add_argument("--precision", help="one more way: --fast with this precision")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    return parser.parse_args(argv)


def ways_of(
    conf: InpaintConf, batch: int, device: torch.device, precision: str | None
) -> list[Way]:
    """Return the ways, with their networks loaded."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, conf.image_size, conf.image_size)
    gt = torch.randn(shape, generator=generator).clamp(-1, 1).to(device)
    mask = torch.ones_like(gt)
    mask[..., conf.image_size // 2 :] = 0

    def with_keys(keys: dict[str, Any]) -> tuple[InpaintConf, list[int]]:
        jumps = dataclasses.replace(conf.schedule_jump_params, **keys["schedule_jump_params"])
        changed = dataclasses.replace(conf, **{**keys, "schedule_jump_params": jumps})
        return changed, create_schedule(changed, create_gaussian_diffusion(changed))

    jumps = {"t_T": 250, "jump_length": 10, "jump_n_sample": 10}
    paper = {"sampler": "repaint", "timestep_respacing": "250", "schedule_jump_params": jumps}
    published, fast = with_keys({**FAST, **paper}), with_keys(FAST)
    inpainter = Inpainter(*published)

    y = torch.arange(batch, device=device) % conf.num_classes  # without class_cond it is not used
    network = partial(plain.unet, load_model(conf, device), y=y)

    def port() -> Iterator[Tensor]:
        generators = [torch.Generator(device).manual_seed(seed) for seed in range(batch)]
        draw = noise_source(generators, gt)
        return plain.repaint(inpainter.diffusion, network, gt, mask, inpainter.times, draw)

    def ours(walker: Inpainter) -> Callable[[], Iterator[Step]]:
        return partial(walker.steps, gt, mask, range(batch))

    ways = [
        Way("plain port, published schedule", inpainter.times, port, return_freed_memory),
        Way("published schedule", inpainter.times, ours(inpainter)),
        Way("`--fast`", fast[1], ours(inpainter.with_walk(*fast))),
    ]
    if precision:
        reduced = Inpainter(dataclasses.replace(fast[0], precision=precision), fast[1])
        ways.append(Way(f"`--fast`, {precision}", fast[1], ours(reduced)))
    return ways


@torch.inference_mode()
def measure(ways: Sequence[Way], device: torch.device, at_most: float) -> None:
    """Walk all ways in turns, each to its end or until it has taken ``at_most`` seconds."""
    for way in ways:
        way.start()
    for turn, way in tqdm(list(itertools.product(range(TURNS), ways)), unit="turn", leave=False):
        way.go_on(device, at_most * (turn + 1) / TURNS)


def table(ways: Sequence[Way], batch: int) -> str:
    """Return the figures in Markdown."""
    lines = ["| way | calls | calls measured | s a picture | plain port's time over this |",
             "| --- " * 5 + "|"]  # fmt: skip
    seconds = {way.name: way.seconds / way.calls * way.all_calls / batch for way in ways}
    for way in ways:
        ratio = seconds[ways[0].name] / seconds[way.name]
        cells = [way.name, f"{way.all_calls:,}", f"{way.calls:,}", f"{seconds[way.name]:,.4g}",
                 f"{ratio:.3g}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Walk every way and print the table."""
    args = parse_args(argv)
    device = get_device(args.device)
    prepare(device)
    args.classifier = False
    with tempfile.TemporaryDirectory() as folder:
        conf = with_checkpoints(configuration(args, device), folder)
        ways = ways_of(conf, args.batch_size, device, args.precision)
        measure(ways, device, args.at_most)
    print(f"{machine(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{conf.image_size} pixels, batch size {args.batch_size}\n")  # fmt: skip
    print(table(ways, args.batch_size))


if __name__ == "__main__":
    command_line(main)
