"""Train on the pictures that a YAML names: ``python train.py --conf_path confs/train_demo.yml``.

On several GPUs: ``torchrun --nproc_per_node 4 train.py --conf_path …``; on several machines with
torchrun's own options. The result runs at once: ``python test.py --conf_path <out_dir>/test.yml``.
"""

import argparse
import sys

from guided_diffusion import OptionParser, command_line
from guided_diffusion.conf import TrainConf, help_text, load_conf


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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, check, build, train; return the exit status: 0, or 1 where training had to stop."""
    args = parse_args(argv)
    conf = load_conf(args.conf_path, TrainConf, args.overrides)
    # Only a configuration without mistakes is worth the seconds that torch takes to import.
    from guided_diffusion import dist_util, train_files, train_util
    from guided_diffusion.script_util import create_gaussian_diffusion, create_model

    if args.export is not None:
        print(train_files.export(conf, args.export))
        return 0
    device = dist_util.get_device(conf.device)
    start = train_files.check(conf, device, resume=args.resume)
    if start >= conf.iterations:
        print(f"{conf.out_dir}: {start} steps are done; to go on raise iterations")
        return 0
    diffusion = create_gaussian_diffusion(conf)
    sample_diffusion = create_gaussian_diffusion(conf, "sample_respacing")
    with train_util.seeded(conf.seed):
        model = create_model(conf)
    if conf.init_from and not start:
        train_files.load_initial(model, conf.init_from)
    train_files.check_disk(conf, sum(p.numel() for p in model.parameters()))
    images = train_util.load_images(conf)
    with train_util.process_group(device):
        trainer = train_util.Trainer(conf, model, diffusion, images, device)
        if start:
            trainer.load(start)
        try:
            train_util.train(trainer, sample_diffusion)
        except train_util.TrainingStoppedError as error:
            if dist_util.is_main():
                print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            raise KeyboardInterrupt(train_files.last_saved(conf)) from None
    return 0


if __name__ == "__main__":
    command_line(main)
