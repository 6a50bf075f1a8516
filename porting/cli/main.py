"""`van-port`: the group of commands, each in a file of its own.

Everything heavy is imported inside the commands: `van-port --help` must answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from porting.cli.check import check
from porting.cli.export import export
from porting.cli.families import families
from porting.cli.groups import (
    CHECK,
    FILE,
    CheckpointChoice,
    Model,
    ReportChoice,
    checkpoint_options,
    model_options,
    report_options,
    thoroughness_options,
)
from porting.cli.inspect import inspect
from porting.cli.port import run_port
from porting.cli.port_all import port_all
from porting.cli.report import report
from porting.cli.revert import revert
from porting.errors import PortingError

if TYPE_CHECKING:
    from porting.tasks.options import CheckOptions

EPILOG = """\b
Exit codes: 0 done and at parity; 1 not at parity; 2 wrong usage; 3 bad checkpoint;
4 tensors do not fit the model; 5 file not found; 6 cannot write; 7 bad weights file;
8 bad report; 9 cannot export; 130 interrupted.
"""


class PortGroup(click.Group):
    """A group that ends every error of the user's in its message, its hint and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PortingError as error:
            click.secho(f"Error: {error.message}", fg="red", err=True)
            if error.hint:
                click.echo(error.hint, err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted; nothing was written.", err=True)
            sys.exit(130)


@click.group(cls=PortGroup, invoke_without_command=True, no_args_is_help=True, epilog=EPILOG)
@click.version_option(package_name="van-port", prog_name="van-port")
@model_options(required=False)
@click.option("--out", type=FILE, help="File to write: .h5, .weights.h5 or .keras.  [default: FAMILY_VARIANT.h5]")
@checkpoint_options
@CHECK
@thoroughness_options
@report_options
@click.option("--keep-failed", type=FILE, help="Where to keep a file that fails the check.  [default: nowhere]")
@click.pass_context
def cli(
    ctx: click.Context,
    model: Model,
    out: Path | None,
    checkpoint: CheckpointChoice,
    check: bool,
    make_options: Callable[[], CheckOptions],
    reporting: ReportChoice,
    keep_failed: Path | None,
) -> None:
    """Port trained weights from PyTorch to Keras, and prove that nothing was lost.

    \b
      van-port --variant nano                              # the embedded checkpoint
      van-port --variant b1 --out van_b1.h5                # official weights, from the hub
      van-port --variant b1 --checkpoint my.pth.tar        # your own
      van-port check --variant b1 --weights van_b1.h5      # a file made earlier or elsewhere
      van-port inspect van_b1.h5                           # where a file comes from
    """
    if ctx.invoked_subcommand is not None:
        if model.variant is not None:
            raise click.UsageError(f"the options of a port go after {ctx.invoked_subcommand}, where it has them")
        return
    if model.variant is None:
        raise click.UsageError(f"--variant is needed: one of {', '.join(model.family.variants)}")
    run_port(model, out, checkpoint, check, make_options, reporting, keep_failed)


for command in (check, export, families, inspect, port_all, report, revert):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="van-port")


if __name__ == "__main__":
    main()
