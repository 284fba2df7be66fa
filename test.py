"""Inpaint the pictures that a YAML names: ``python test.py --conf_path confs/x.yml``."""

import argparse
import json

from guided_diffusion import command_line
from guided_diffusion.conf import InpaintConf, help_text, load_conf

RESULT_FOLDERS = {
    "srs": "inpainted",
    "lrs": "gt_masked",
    "gts": "gt",
    "gt_keep_masks": "gt_keep_mask",
}


def parse_args() -> argparse.Namespace:
    """Read the command line; ``--help`` explains every YAML key too."""
    parser = argparse.ArgumentParser(
        description="Inpaint pictures by RePaint. In a mask white is known, black is generated.",
        epilog="keys of the YAML file:\n" + help_text(InpaintConf).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--conf_path", required=True, metavar="YAML", help="the configuration")
    parser.add_argument("--gt", metavar="PATH", help="pictures: a folder or file, for gt_path")
    parser.add_argument("--mask", metavar="PATH", help="masks: a folder, file or family of masks, "
                        "for mask_path")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder of results, for the data set's paths")
    parser.add_argument("--invert_mask", action="store_true", help="white is to be generated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="any key, dotted, as in YAML; repeatable")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="skip results that are finished")
    return parser.parse_args()


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Translate the short options into ``KEY=VALUE`` with quoted values; ``--set`` comes last."""
    values = {"data.gt_path": args.gt, "data.mask_path": args.mask}
    if args.out:
        values |= {
            f"data.paths.{key}": f"{args.out}/{name}" for key, name in RESULT_FOLDERS.items()
        }
    quoted = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    return [*quoted, *["invert_mask=true"] * args.invert_mask, *args.overrides]


def main() -> int:
    """Parse, check, build, run; return the exit status: 0, or 1 where a result failed."""
    args = parse_args()
    conf = load_conf(args.conf_path, InpaintConf, overrides_of(args))
    # Only a configuration without mistakes is worth the seconds that torch takes to import.
    from guided_diffusion import dist_util, inpaint_util
    from guided_diffusion.script_util import Inpainter

    with dist_util.process_group():
        plan = inpaint_util.plan_run(conf, resume=args.resume)
        summary = inpaint_util.Summary()
        if plan.todo:
            summary = inpaint_util.run(plan, Inpainter(plan.conf, plan.times))
    if dist_util.is_main():
        print(inpaint_util.describe(plan, summary))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    command_line(main)
