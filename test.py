"""Inpaint the pictures that a YAML names: ``python test.py --conf_path confs/x.yml``."""

if __name__ == "__main__":  # before the other imports, which take a second
    from guided_diffusion import end_at_once_on_ctrl_c

    end_at_once_on_ctrl_c()

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence

from guided_diffusion import raise_on_ctrl_c
from guided_diffusion.cli import OptionParser, command_line
from guided_diffusion.config.docs import help_text
from guided_diffusion.config.keys import FAST, RESULT_FOLDERS, InpaintConf
from guided_diffusion.config.reading import as_overrides, load_conf
from guided_diffusion.errors import UserError
from guided_diffusion.models.hub import fetch_configuration


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``--help`` explains every YAML key too."""
    parser = OptionParser(
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
    parser.add_argument("--full_size", action="store_true", help="give each photo back at its own "
                        "size; only the hole and feather pixels around it change")  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="25 network calls a picture: sampler: "
                        "ddnm, 25 steps, no resampling")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="any key, dotted, as in YAML; repeatable")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="skip results that are finished")
    args = parser.parse_args(argv)
    if args.out == "":
        raise UserError("the path is empty", key="--out")
    return args


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Translate the short options into ``KEY=VALUE`` with quoted values; ``--set`` comes last."""
    values = {"data.gt_path": args.gt, "data.mask_path": args.mask}
    if args.gt is not None:  # the YAML's choice among its own pictures means nothing here
        values |= {"data.offset": 0, "data.max_len": ""}
    if args.out:
        values |= {
            f"data.paths.{key}": f"{args.out}/{name}" for key, name in RESULT_FOLDERS.items()
        }
    quoted = as_overrides({key: value for key, value in values.items() if value is not None})
    flags = [f"{key}=true" for key in ("invert_mask", "full_size") if getattr(args, key)]
    return [*quoted, *flags, *args.overrides]


def cost_of_fast(
    conf_path: str, overrides: Sequence[str], made: InpaintConf, times: list[int]
) -> str:
    """Say what ``--fast``, which walks ``times``, has replaced of a YAML, and what that costs."""
    from guided_diffusion.scheduler import count_steps, get_schedule_jump

    replaced = "the YAML's way"
    with contextlib.suppress(UserError, ValueError):  # what cannot be walked is replaced, too
        conf = load_conf(conf_path, InpaintConf, overrides)
        calls = count_steps(get_schedule_jump(**vars(conf.schedule_jump_params)))[0]
        replaced = f"{conf.sampler} with {calls:,}"
    fast = f"{made.sampler} with {count_steps(times)[0]:,} network calls a picture"
    return f"--fast: {fast} in place of {replaced}; docs/quality.md says what it costs"


def resume_command(processes: int) -> str:
    """Return the command that goes on with this run."""
    if processes > 1:
        return "the same torchrun command with --resume"
    return shlex.join([arg for arg in sys.orig_argv if arg != "--resume"] + ["--resume"])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, build, run; return the exit status: 0, or 1 where a result failed."""
    args = parse_args(argv)
    overrides = overrides_of(args)
    options = [*as_overrides(FAST if args.fast else {}), *overrides]
    conf = load_conf(args.conf_path, InpaintConf, options)
    if fetch_configuration(conf.model_path):
        conf = load_conf(args.conf_path, InpaintConf, options)
    # Only a configuration without mistakes is worth the seconds that torch takes to import.
    from guided_diffusion import RePaint
    from guided_diffusion.accel.accelerate import prepare
    from guided_diffusion.dist_util import Team, get_device
    from guided_diffusion.io.files import locked
    from guided_diffusion.run import inpaint
    from guided_diffusion.run.checks import result_folders
    from guided_diffusion.run.plan import plan_run
    from guided_diffusion.run.record import Summary

    raise_on_ctrl_c()
    team = Team()
    plan = plan_run(conf, team, resume=args.resume)
    if args.fast and team.is_main:
        print(cost_of_fast(args.conf_path, overrides, plan.conf, plan.times))
    prepare(get_device(conf.device))
    summary, inpainter = Summary(), RePaint(plan.conf).inpainter if plan.todo else None
    folders = (conf.log_dir, *result_folders(conf).values())
    with locked(*folders) if team.is_main else contextlib.nullcontext():
        if inpainter:
            summary = inpaint.run(plan, inpainter, team, resume_command(team.size))
        if team.is_main:
            print(inpaint.conclude(plan, summary))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    command_line(main)
