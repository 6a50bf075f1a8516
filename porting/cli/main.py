"""`van-port`, its options and its subcommands.

Everything heavy is imported inside the commands: `van-port --help` must answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from porting.cli.options import (
    FILE,
    REPORT,
    Sha256,
    VariantCheckpoint,
    check_options,
    check_report_files,
    show_check,
    show_non_finite,
    show_report,
    show_written,
    showing_refusal,
)
from porting.errors import PortingError
from porting.families import family_names, get_family
from porting.sources.table import variants_of

if TYPE_CHECKING:
    from porting.tasks.check import CheckOptions

FAMILY = "van"
FAMILY_OPTION = click.option(
    "--family", type=click.Choice(family_names()), default=FAMILY, show_default=True, help="Model family."
)
CHECKPOINT_OPTION = click.option(
    "--checkpoint",
    metavar="FILE|URL",
    help="PyTorch checkpoint: a path, https://... or hf://owner/repo/file[@revision].  "
    "[default: the variant's official file]",
)
SHA256_OPTION = click.option("--sha256", type=Sha256(), help="What the checkpoint's hash must be.")
LAYOUT_OPTION = click.option(
    "--layout",
    type=click.Choice([layout.name for layout in get_family(FAMILY).layouts]),
    help="Whose names the checkpoint has.  [default: recognised]",
)
EMA_OPTION = click.option(
    "--ema/--no-ema", default=False, show_default=True, help="Take moving averages where there are both."
)

CHECK_OPTION = click.option(
    "--check/--no-check", default=True, show_default=True, help="Prove parity before the file gets its name."
)
# Of a file that there is.
VARIANT_OPTION = click.option(
    "--variant", type=click.Choice(variants_of(FAMILY)), required=True, help="Which model the file is of."
)
WEIGHTS_OPTION = click.option(
    "--weights", type=FILE, required=True, help="File of Keras weights: .h5, .weights.h5 or .keras."
)

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
@FAMILY_OPTION
@click.option("--variant", type=click.Choice(variants_of(FAMILY)), help="Which model; nano's weights are embedded.")
@click.option("--out", type=FILE, help="File to write: .h5, .weights.h5 or .keras.  [default: FAMILY_VARIANT.h5]")
@CHECKPOINT_OPTION
@SHA256_OPTION
@LAYOUT_OPTION
@EMA_OPTION
@CHECK_OPTION
@check_options
@REPORT
@click.option("--keep-failed", type=FILE, help="Where to keep a file that fails the check.  [default: nowhere]")
@click.pass_context
def cli(
    ctx: click.Context,
    family: str,
    variant: str | None,
    out: Path | None,
    checkpoint: str | None,
    sha256: str | None,
    layout: str | None,
    ema: bool,
    check: bool,
    make_options: Callable[[], CheckOptions],
    all_layers: bool,
    report_files: tuple[Path, ...],
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
        if variant is not None:
            raise click.UsageError(f"the options of a port go after {ctx.invoked_subcommand}, where it has them")
        return
    if variant is None:
        raise click.UsageError(f"--variant is needed: one of {', '.join(variants_of(FAMILY))}")
    from porting.cli.terminal import make_console
    from porting.tasks.port import port

    console = make_console()
    check_report_files(report_files)
    options = make_options()
    with showing_refusal(console, all_layers, report_files) as progress:
        result = port(
            get_family(family),
            variant,
            out if out is not None else Path(f"{family}_{variant}.h5"),
            checkpoint=checkpoint,
            sha256=sha256,
            layout=layout,
            ema=ema,
            check=check,
            options=options,
            keep_failed=keep_failed,
            progress=progress,
        )
    subject = result.subject
    console.print(f"The checkpoint has {subject.layout.described()}.")
    if subject.checkpoint.has_ema and not subject.checkpoint.is_ema:
        console.print("The checkpoint also has moving averages of its weights; --ema takes them.")
    show_check(
        result.report, console, all_layers, report_files, "Not checked, as asked; the file's provenance says so."
    )
    if result.report is None:
        show_non_finite(result.provenance, console)
    tensors, dropped = len(result.conversion.weights), len(result.conversion.dropped)
    console.print(f"{tensors} tensors ported, {dropped} dropped by name, none left over.")
    show_written(result.path, result.report_path, console)
    console.print(f"Load it into {result.provenance['build']}", soft_wrap=True, markup=False)


@cli.command()
@FAMILY_OPTION
@click.option("--variant", type=click.Choice(variants_of(FAMILY)), help="Which model the file is of.")
@click.option("--weights", type=FILE, help="File of Keras weights: .h5, .weights.h5 or .keras.")
@CHECKPOINT_OPTION
@SHA256_OPTION
@LAYOUT_OPTION
@EMA_OPTION
@click.option("--from", "from_report", type=FILE, help="Judge this JSON report again; no model is run.")
@click.option("--baseline", type=FILE, help="Earlier JSON report: fail where a layer has got worse.")
@click.option("--factor", default=2.0, show_default=True, help="By how much an error may grow over the baseline's.")
@check_options
@REPORT
def check(
    family: str,
    variant: str | None,
    weights: Path | None,
    checkpoint: str | None,
    sha256: str | None,
    layout: str | None,
    ema: bool,
    from_report: Path | None,
    baseline: Path | None,
    factor: float,
    make_options: Callable[[], CheckOptions],
    all_layers: bool,
    report_files: tuple[Path, ...],
) -> None:
    """Compare a file of Keras weights with the checkpoint it should hold: exit code 0 at parity, 1 if not.

    \b
      van-port check --variant b1 --weights van_b1.h5 --checkpoint van_small_811.pth.tar --report parity.html
      van-port check --from van_b1.h5.parity.json --max-ratio 4
    """
    from porting.cli.terminal import ProgressBar, make_console
    from porting.errors import ParityError
    from porting.parity.baseline import regressions
    from porting.reports.document import read_report
    from porting.reports.terminal import verdict

    check_report_files(report_files)
    options = make_options()
    limits = options.limits
    earlier = None if baseline is None else read_report(baseline)
    if from_report is not None:
        if weights is not None or variant is not None:
            raise click.UsageError("--from judges a report that there is; it goes with no --variant and no --weights")
        report = read_report(from_report)
        report = replace(report, limits=limits, stress=tuple(replace(run, limits=limits) for run in report.stress))
    else:
        if weights is None or variant is None:
            raise click.UsageError("--variant and --weights are needed, or --from with a JSON report")
        from porting.tasks.check import check_file

        with ProgressBar() as progress:
            report = check_file(
                get_family(family),
                variant,
                weights,
                checkpoint=checkpoint,
                sha256=sha256,
                layout=layout,
                ema=ema,
                options=options,
                progress=progress,
            )
    show_report(report, make_console(), all_layers, report_files)
    worse = [] if earlier is None else regressions(report, earlier, factor)
    for line in worse:
        click.echo(f"Worse than the baseline: {line}")
    if not report.passed:
        first = report.first_divergence
        raise ParityError(str(first) if first else verdict(report), hint="--report parity.html shows every layer.")
    if worse:
        raise ParityError(f"{len(worse)} comparisons are worse than {baseline} by more than {factor:g} times")


@cli.command()
@click.argument("file", type=FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "html", "markdown", "junit", "json"]),
    default="terminal",
    show_default=True,
)
@click.option("--out", type=FILE, help="File to write.  [default: standard output]")
@click.option("--all-layers", is_flag=True, help="On the terminal, print every layer.")
def report(file: Path, form: str, out: Path | None, all_layers: bool) -> None:
    """Render the JSON report FILE again, in any format. The exit code says only whether that worked."""
    from porting.cli.terminal import make_console
    from porting.files.atomic import check_writable, write_text
    from porting.reports import render
    from porting.reports.document import read_report
    from porting.reports.terminal import print_report

    parity = read_report(file)
    if form == "terminal":
        print_report(parity, make_console(), all_layers=all_layers)
        return
    text = render(parity, form)
    if out is None:
        click.echo(text, nl=False)
        return
    check_writable(out)
    write_text(out, text)
    click.echo(f"Wrote {out}")


@cli.command("port-all")
@FAMILY_OPTION
@click.option("--out-dir", type=FILE, required=True, help="Folder for the files, named FAMILY_VARIANT.")
@click.option(
    "--variant",
    "variants",
    type=click.Choice(variants_of(FAMILY)),
    multiple=True,
    help="A variant to port.  [default: all with an official file or a --checkpoint]",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=VariantCheckpoint(variants_of(FAMILY)),
    multiple=True,
    help="A variant's checkpoint: a path, https://... or hf://...  [default: its official file]",
)
@click.option(
    "--suffix", type=click.Choice([".h5", ".weights.h5", ".keras"]), default=".h5", show_default=True, help="Format."
)
@click.option("--check/--no-check", default=True, show_default=True, help="Prove parity before a file gets its name.")
@check_options
def port_all(
    family: str,
    out_dir: Path,
    variants: tuple[str, ...],
    checkpoints: tuple[tuple[str, str], ...],
    suffix: str,
    check: bool,
    make_options: Callable[[], CheckOptions],
) -> None:
    """Port several variants, on past one that fails. The exit code is 0, or that of the first failure.

    \b
      van-port port-all --out-dir weights --variant b0 --variant b1
      van-port port-all --out-dir weights --checkpoint b4=van_b4.pth --checkpoint b5=van_b5_22k.pth
    """
    from rich.table import Table

    from porting.cli.terminal import ProgressBar, make_console
    from porting.files.atomic import make_folder
    from porting.sources.table import find_source
    from porting.tasks.port_all import port_all as run_all

    given = dict(checkpoints)
    usual = [name for name in variants_of(family) if name in given or find_source(family, name).kind != "none"]
    chosen = {name: given.get(name) for name in (variants or usual)}
    if unused := sorted(given.keys() - chosen.keys()):
        raise click.UsageError(f"--checkpoint for {', '.join(unused)}, which --variant leaves out")
    make_folder(out_dir)
    options = make_options()
    console = make_console()
    table = Table("variant", "file", "verdict", "worst ratio", "seconds")
    failures = []
    with ProgressBar() as progress:
        for outcome in run_all(
            get_family(family), chosen, out_dir, suffix=suffix, check=check, options=options, progress=progress
        ):
            name, seconds = outcome.path.name, f"{outcome.seconds:.0f}"
            if outcome.error is not None:
                failures.append(outcome)
                table.add_row(outcome.variant, "-", f"failed ({outcome.error.exit_code})", "-", seconds, style="red")
            elif outcome.result is not None and outcome.result.report is not None:
                ratio = f"{outcome.result.report.worst.ratio:.2f}"
                table.add_row(outcome.variant, name, "at parity", ratio, seconds)
            else:
                table.add_row(outcome.variant, name, "not checked", "-", seconds)
    console.print(table)
    for outcome in failures:
        assert outcome.error is not None  # that is what makes it a failure
        click.secho(f"{outcome.variant}: {outcome.error.message}", fg="red", err=True)
        if outcome.error.hint:
            click.echo(outcome.error.hint, err=True)
    click.echo(f"{len(chosen) - len(failures)} of {len(chosen)} ported to {out_dir}")
    if failures:
        sys.exit(failures[0].error.exit_code if failures[0].error else 1)


@cli.command()
@FAMILY_OPTION
@VARIANT_OPTION
@WEIGHTS_OPTION
@click.option("--out", type=FILE, required=True, help="File to write: .pth, .pth.tar, .pt, .bin or .safetensors.")
@click.option(
    "--layout",
    type=click.Choice([layout.name for layout in get_family(FAMILY).layouts]),
    help="Whose names to write.  [default: those the file was ported from, else official]",
)
@click.option("--classes", type=click.IntRange(min=0), help="Of the head; 0 for none.  [default: as the file shows]")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True, help="Type."
)
@CHECK_OPTION
@check_options
@REPORT
def revert(
    family: str,
    variant: str,
    weights: Path,
    out: Path,
    layout: str | None,
    classes: int | None,
    dtype: str,
    check: bool,
    make_options: Callable[[], CheckOptions],
    all_layers: bool,
    report_files: tuple[Path, ...],
) -> None:
    """Port a file of Keras weights back to PyTorch, fine-tuned or not, and prove that nothing was lost.

    \b
      van-port revert --variant b1 --weights van_b1.h5 --out van_b1.pth
      van-port revert --variant b1 --weights tuned.keras --out model.safetensors --layout transformers
    """
    from porting.cli.terminal import make_console
    from porting.tasks.revert import revert as go_back

    console = make_console()
    check_report_files(report_files)
    options = make_options()
    with showing_refusal(console, all_layers, report_files) as progress:
        result = go_back(
            get_family(family),
            variant,
            weights,
            out,
            layout=layout,
            num_classes=classes,
            dtype=dtype,
            check=check,
            options=options,
            progress=progress,
        )
    show_check(result.report, console, all_layers, report_files)
    console.print(f"{len(result.state_dict)} tensors in {dtype}: {result.layout.described()}.")
    show_written(result.path, result.report_path, console)


@cli.command()
@FAMILY_OPTION
@VARIANT_OPTION
@WEIGHTS_OPTION
@click.option("--out", type=FILE, required=True, help="File to write, .tflite or .onnx; for a SavedModel a folder.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["saved_model", "litert", "onnx"]),
    help="What to write.  [default: as --out ends]",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="int8 takes its ranges from the images of the check.",
)
@click.option("--input-size", type=click.IntRange(min=32), help="Side of the images.  [default: the variant's]")
@click.option("--fused/--no-fused", default=True, show_default=True, help="Fold normalisations into convolutions.")
@click.option(
    "--split-kernels/--no-split-kernels",
    default=None,
    help="LiteRT: depthwise kernels of more than 25 taps as sums of smaller ones, quicker on a CPU.  "
    "[default: unless in int8]",
)
@CHECKPOINT_OPTION
@LAYOUT_OPTION
@CHECK_OPTION
@check_options
@REPORT
def export(
    family: str,
    variant: str,
    weights: Path,
    out: Path,
    form: str | None,
    precision: str,
    input_size: int | None,
    fused: bool,
    split_kernels: bool | None,
    checkpoint: str | None,
    layout: str | None,
    check: bool,
    make_options: Callable[[], CheckOptions],
    all_layers: bool,
    report_files: tuple[Path, ...],
) -> None:
    """Export a ported file to a SavedModel, LiteRT or ONNX, and compare it with PyTorch in its own runtime.

    \b
      van-port export --variant b1 --weights van_b1.h5 --out van_b1.tflite
      van-port export --variant b1 --weights van_b1.h5 --out van_b1.onnx --precision int8 --images photos
      van-port export --variant b1 --weights van_b1.h5 --out van_b1 --format saved_model

    With --no-check no checkpoint is read.
    """
    from porting.cli.terminal import make_console
    from porting.exporting.write import FORMATS
    from porting.tasks.export import export as write_export

    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    form = form or by_suffix.get(out.suffix)
    if form is None:
        raise click.UsageError("--format is needed, or an --out that ends in .tflite or .onnx")
    console = make_console()
    check_report_files(report_files)
    options = make_options()
    if options.stress or options.train or options.allow_non_finite:
        raise click.UsageError("an export knows no --stress, --train and --allow-non-finite: use `van-port check`")
    with showing_refusal(console, all_layers, report_files) as progress:
        result = write_export(
            get_family(family),
            variant,
            weights,
            out,
            form=form,
            precision=precision,
            checkpoint=checkpoint,
            layout=layout,
            input_size=input_size,
            fused=fused,
            split_kernels=split_kernels,
            check=check,
            options=options,
            progress=progress,
        )
    show_check(result.report, console, all_layers, report_files)
    operators = ", ".join(f"{count} {name}" for name, count in result.operators.most_common())
    console.print(f"{form} in {precision}, {result.size / 2**20:.1f} MiB: {operators}", soft_wrap=True)
    show_written(result.path, result.report_path, console)


@cli.command()
@click.argument("file", type=FILE)
@click.option("--ema/--no-ema", default=False, show_default=True, help="Of a checkpoint that has both, the averages.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, ema: bool, as_json: bool) -> None:
    """Print the provenance and the tensors of FILE, a checkpoint or a file of Keras weights."""
    from porting.cli.terminal import make_console
    from porting.files.inspection import inspect_file

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
