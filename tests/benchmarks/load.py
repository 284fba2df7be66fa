"""How long a checkpoint takes to its first network call, and how much memory at most.

    python tests/benchmarks/load.py

makes a float32 checkpoint of the published 256×256 network (2.2 GB of random weights) in a
temporary folder, then starts a fresh process for every measurement, ours and ``plain`` in turns:
``plain`` reads the file into memory, initialises a network and copies the weights into it. Prints
medians and spread as a Markdown table; ``--json`` writes them to a file too. The file is in the
page cache, because it was just written or read.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.time()
HERE = Path(__file__).resolve()
sys.path[0:1] = [str(HERE.parent.parent.parent), str(HERE.parent)]


def configuration(path: str, small: bool):
    from guided_diffusion.config.keys import DataConf, InpaintConf

    sizes = {"image_size": 64, "num_channels": 64, "num_head_channels": 64} if small else {}
    data = DataConf(name="set", gt_path="gt", mask_path="mask")
    return InpaintConf(name="load", model_path=path, device="cpu", data=data, **sizes)


def make_checkpoint(path: str, small: bool) -> float:
    """Save random weights; return the file's size in GB."""
    import torch

    from guided_diffusion.script_util import create_model

    torch.manual_seed(0)
    with torch.device("meta"):
        empty = create_model(configuration(path, small)).state_dict()
    torch.save({name: torch.randn(tensor.shape) * 0.02 for name, tensor in empty.items()}, path)
    return Path(path).stat().st_size / 1e9


def child(mode: str, path: str, started: float, small: bool) -> None:
    """Load, call once, and print what that took as JSON; runs in a process of its own."""
    import plain
    import torch

    from guided_diffusion.accel.accelerate import prepare
    from guided_diffusion.run.inpainter import Inpainter
    from guided_diffusion.script_util import create_model

    conf = configuration(path, small)
    imported = time.time()
    if mode == "plain":
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = create_model(conf)
        model.load_state_dict(state)
        model.eval()

        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return plain.unet(model, x, t)
    else:
        prepare(torch.device("cpu"))
        call = Inpainter(conf, []).network
    loaded = time.time()
    with torch.inference_mode():
        torch.manual_seed(0)
        size = conf.image_size
        output = call(torch.randn(1, 3, size, size), torch.tensor([500]))
    called = time.time()
    result = {
        "start to call, s": loaded - started,
        "imports to call, s": loaded - imported,
        "one call, s": called - loaded,
        "peak memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "mean of output": output.double().abs().mean().item(),
    }
    print(json.dumps(result))


def measure(mode: str, path: str, small: bool) -> dict[str, float]:
    """Run ``child`` in a fresh process."""
    command = [sys.executable, str(HERE), "--child", mode, path, repr(time.time())]
    run = subprocess.run([*command, *["--small"] * small], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    parser.add_argument("--small", action="store_true", help="a small 64×64 network, to try it")
    parser.add_argument("--folder", help="where to put the checkpoint for a while")
    parser.add_argument("--json", metavar="FILE", help="write all measurements there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        mode, path, started = args.child
        child(mode, path, float(started), args.small)
        return
    results: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = f"{folder}/model.pt"
        size = make_checkpoint(path, args.small)
        print(f"checkpoint of {size:.2f} GB, {len(os.sched_getaffinity(0))} cores", flush=True)
        for _ in range(args.repeats):
            for mode in results:
                results[mode].append(measure(mode, path, args.small))
                print(mode, results[mode][-1], file=sys.stderr, flush=True)
    keys = list(results["ours"][0])
    print("| | " + " | ".join(keys) + " |")
    print("| --- " * (len(keys) + 1) + "|")
    for mode, runs in results.items():
        cells = [[run[key] for run in runs] for key in keys]
        text = [f"{statistics.median(c):.3g} ({min(c):.3g} to {max(c):.3g})" for c in cells]
        print(f"| {mode} | " + " | ".join(text) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps({"checkpoint_gb": size, **results}, indent=1))


if __name__ == "__main__":
    main()
