"""Train on the pictures that a YAML names: ``python train.py --conf_path confs/train_demo.yml``.

On several GPUs: ``torchrun --nproc_per_node 4 train.py --conf_path …``; on several machines with
torchrun's own options. The result runs at once: ``python test.py --conf_path <out_dir>/test.yml``.
"""

if __name__ == "__main__":  # before the other imports, which take a second
    from guided_diffusion import end_at_once_on_ctrl_c

    end_at_once_on_ctrl_c()

import argparse
import contextlib
import os

from guided_diffusion import raise_on_ctrl_c
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.docs import help_text
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.train_keys import TrainConf


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``--help`` explains every YAML key too."""
    parser = OptionParser(
        description="Train a network on a folder of pictures, for inpainting with test.py.",
        epilog="keys of the YAML file:\n" + help_text(TrainConf).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--conf_path", required=True, metavar="YAML", help="the configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="any key, as in YAML; repeatable")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, "
                        "or start where there is none")  # fmt: skip
    parser.add_argument("--export", metavar="FILE", help="do not train: write the newest averaged "
                        "weights in half precision to FILE")  # fmt: skip
    args = parser.parse_args(argv)
    args.export = args.export and os.path.expanduser(args.export)  # noqa: PTH111 - as it was given
    return args


def main(argv: list[str] | None = None) -> int:
    """Parse, check, build, train; return the exit status."""
    args = parse_args(argv)
    conf = load_conf(args.conf_path, TrainConf, args.overrides)
    # Only a configuration without mistakes is worth the seconds that torch takes to import.
    from guided_diffusion.dist_util import get_device, is_main, use_device
    from guided_diffusion.io.files import locked
    from guided_diffusion.training import checkpoints, loop

    raise_on_ctrl_c()
    if args.export is not None:
        if is_main():
            print(checkpoints.export(conf, args.export))
        return 0
    device = get_device(conf.device)
    use_device(device)
    with locked(conf.out_dir) if is_main() else contextlib.nullcontext():
        start = checkpoints.check(conf, device, resume=args.resume)
        if start >= conf.iterations:
            print(f"{conf.out_dir}: {start} steps are done; to go on raise iterations")
        else:
            loop.build_and_train(conf, device, start)
    return 0


if __name__ == "__main__":
    command_line(main)
