"""`van-port`, its options and its subcommands.

Everything heavy is imported inside the commands: `van-port --help` must answer at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from porting.errors import PortingError
from porting.families import family_names, get_family
from porting.sources import variants_of

FAMILY = "van"
_FILE = click.Path(path_type=Path)

EPILOG = """\b
Exit codes: 0 done and at parity; 1 not at parity; 2 wrong usage; 3 bad checkpoint;
4 tensors do not fit the model; 5 checkpoint not found; 6 cannot write; 7 bad weights file.
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
@click.option("--family", type=click.Choice(family_names()), default=FAMILY, show_default=True, help="Model family.")
@click.option("--variant", type=click.Choice(variants_of(FAMILY)), help="Which model; nano's weights are embedded.")
@click.option("--out", type=_FILE, help="File to write: .h5, .weights.h5 or .keras.  [default: FAMILY_VARIANT.h5]")
@click.option("--checkpoint", type=_FILE, help="PyTorch checkpoint.  [default: the variant's official file]")
@click.option("--ema/--no-ema", default=False, show_default=True, help="Take moving averages where there are both.")
@click.option("--check/--no-check", default=True, show_default=True, help="Prove parity before the file gets its name.")
@click.option("--images", type=_FILE, help="Folder of images for the check.  [default: embedded ones]")
@click.option("--samples", type=click.IntRange(min=1), help="Images to use.  [default: 4; all up to 64 pixels]")
@click.option("--max-ratio", type=click.FloatRange(min=0, min_open=True), help="Limit of parity.  [default: 8]")
@click.option("--keep-failed", type=_FILE, help="Where to keep a file that fails the check.  [default: nowhere]")
@click.option("--all-layers", is_flag=True, help="Print every layer, not only the top level and failures.")
@click.pass_context
def cli(
    ctx: click.Context,
    family: str,
    variant: str | None,
    out: Path | None,
    checkpoint: Path | None,
    ema: bool,
    check: bool,
    images: Path | None,
    samples: int | None,
    max_ratio: float | None,
    keep_failed: Path | None,
    all_layers: bool,
) -> None:
    """Port trained weights from PyTorch to Keras, and prove that nothing was lost.

    \b
      van-port --variant nano                              # the embedded checkpoint
      van-port --variant b1 --out van_b1.h5                # official weights, from the hub
      van-port --variant b1 --checkpoint my.pth.tar        # your own
      van-port inspect van_b1.h5                           # where a file comes from
    """
    if ctx.invoked_subcommand is not None:
        if variant is not None:
            raise click.UsageError(f"--variant and the other options of a port do not go with {ctx.invoked_subcommand}")
        return
    if variant is None:
        raise click.UsageError(f"--variant is needed: one of {', '.join(variants_of(FAMILY))}")
    from porting.cli.terminal import ProgressBar, make_console
    from porting.parity import DEFAULT_MAX_RATIO
    from porting.port import FailedParityError, port
    from porting.report import print_report

    console = make_console()
    try:
        with ProgressBar() as progress:
            result = port(
                get_family(family),
                variant,
                out if out is not None else Path(f"{family}_{variant}.h5"),
                checkpoint=checkpoint,
                ema=ema,
                check=check,
                images=images,
                samples=samples,
                max_ratio=DEFAULT_MAX_RATIO if max_ratio is None else max_ratio,
                keep_failed=keep_failed,
                progress=progress,
            )
    except FailedParityError as error:
        print_report(error.report, console, all_layers=all_layers)
        raise
    if result.checkpoint.has_ema and not result.checkpoint.is_ema:
        console.print("The checkpoint also has moving averages of its weights; --ema takes them.")
    if result.report is not None:
        print_report(result.report, console, all_layers=all_layers)
    else:
        console.print("Not checked, as asked; the file's provenance says so.", style="yellow")
    tensors, dropped = len(result.conversion.weights), len(result.conversion.dropped)
    console.print(f"{tensors} tensors ported, {dropped} dropped by name, none left over.")
    written = [result.path] if result.report_path is None else [result.path, result.report_path]
    console.print("Wrote " + " and ".join(map(str, written)), soft_wrap=True)


@cli.command()
@click.argument("file", type=_FILE)
@click.option("--ema/--no-ema", default=False, show_default=True, help="Of a checkpoint that has both, the averages.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, ema: bool, as_json: bool) -> None:
    """Print the provenance and the tensors of FILE, a checkpoint or a file of Keras weights."""
    from porting.cli.terminal import make_console
    from porting.inspection import inspect_file

    inspection = inspect_file(file, ema=ema)
    if as_json:
        tensors = [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in inspection.tensors]
        facts = {**inspection.facts, "provenance": inspection.provenance, "tensors": tensors}
        click.echo(json.dumps(facts, indent=1))
        return
    from rich.table import Table

    console = make_console()
    for name, value in inspection.facts.items():
        console.print(f"{name}: {value}", soft_wrap=True, markup=False)
    if inspection.provenance is not None:
        console.print("provenance:")
        click.echo(json.dumps(inspection.provenance, indent=2))
    elif inspection.facts["format"] == "Keras weights":
        console.print("provenance: none; this file was not written by van-port")
    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("type")
    for name, shape, dtype in inspection.tensors:
        table.add_row(name, "x".join(map(str, shape)) or "scalar", dtype)
    console.print(table)
    console.print(f"{len(inspection.tensors)} tensors, {inspection.parameters:,} values")


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="van-port")


if __name__ == "__main__":
    main()
