"""`van-port port-all`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from porting.cli.groups import (
    CHECK,
    FILE,
    VARIANT,
    family_of,
    family_option,
    output_options,
    thoroughness_options,
    titled,
)
from porting.cli.overwriting import PortCommand

if TYPE_CHECKING:
    from porting.families.base import Family
    from porting.tasks.options import CheckOptions


class VariantCheckpoint(click.ParamType):  # type: ignore[type-arg]
    """A variant and its checkpoint, as `variant=location`."""

    name = "VARIANT=FILE|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        variant, _, location = str(value).partition("=")
        if variant not in family_of(ctx).variants or not location:
            self.fail(f"{value!r} is not of the form VARIANT=CHECKPOINT, such as b1=my.pth", param, ctx)
        return variant, location


@cloup.command("port-all", cls=PortCommand, short_help="Port several variants.")
@family_option
@click.option("--out-dir", type=FILE, required=True, help="Folder for the files, which are named FAMILY_VARIANT.")
@click.option(
    "--variant",
    "variants",
    type=VARIANT,
    multiple=True,
    help="A variant to port.  [default: all with an official file or a --checkpoint]",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=VariantCheckpoint(),
    multiple=True,
    help="A variant's checkpoint: a path, https://... or hf://...  [default: its official file]",
)
@click.option(
    "--suffix",
    type=click.Choice([".h5", ".weights.h5", ".keras"]),
    default=".h5",
    show_default=True,
    help="File format.",
)
@titled("Parity check", CHECK)
@thoroughness_options
@output_options()
def port_all(
    family: Family,
    out_dir: Path,
    variants: tuple[str, ...],
    checkpoints: tuple[tuple[str, str], ...],
    suffix: str,
    check: bool,
    make_options: Callable[[], CheckOptions],
) -> None:
    """Port several variants; if one fails, continue with the next. The exit code is 0, or that of the first failure.

    \b
      van-port port-all --out-dir weights --variant b0 --variant b1
      van-port port-all --out-dir weights --checkpoint b4=van_b4.pth --checkpoint b5=van_b5_22k.pth
    """
    from rich.table import Table

    from porting.cli.terminal import ProgressBar, make_console, say
    from porting.files.atomic import make_folder
    from porting.tasks.port_all import port_all as run_all

    given = dict(checkpoints)
    usual = [name for name in family.variants if name in given or family.source_of(name).kind != "none"]
    chosen = {name: given.get(name) for name in (variants or usual)}
    if unused := sorted(given.keys() - chosen.keys()):
        raise click.UsageError(f"--checkpoint names {', '.join(unused)}, which --variant does not select")
    make_folder(out_dir)
    options = make_options()
    table = Table("variant", "file", "verdict", "worst ratio", "seconds")
    failures = []
    with ProgressBar() as progress:
        for outcome in run_all(family, chosen, out_dir, suffix=suffix, check=check, options=options, progress=progress):
            name, seconds = outcome.path.name, f"{outcome.seconds:.0f}"
            if outcome.error is not None:
                failures.append(outcome)
                table.add_row(outcome.variant, "-", f"failed ({outcome.error.exit_code})", "-", seconds, style="red")
            elif outcome.result is not None and outcome.result.report is not None:
                ratio = f"{outcome.result.report.worst.ratio:.2f}"
                table.add_row(outcome.variant, name, "at parity", ratio, seconds)
            else:
                table.add_row(outcome.variant, name, "not checked", "-", seconds)
    make_console().print(table)
    for outcome in failures:
        assert outcome.error is not None  # true of every failure
        say(f"{outcome.variant}: {outcome.error.message}", err=True, colour="red")
        if outcome.error.hint:
            say(outcome.error.hint, err=True)
    say(f"{len(chosen) - len(failures)} of {len(chosen)} ported to {out_dir}")
    if failures:
        sys.exit(failures[0].error.exit_code if failures[0].error else 1)
