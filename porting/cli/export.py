"""`van-port export`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from porting.cli.groups import (
    CHECK,
    FILE,
    WEIGHTS_HELP,
    CheckpointChoice,
    Model,
    ReportChoice,
    checkpoint_options,
    model_options,
    report_options,
    result_paths,
    show_written,
    thoroughness_options,
    titled,
)
from porting.cli.overwriting import PortCommand

if TYPE_CHECKING:
    from porting.tasks.options import CheckOptions


class PerChannel(click.ParamType):  # type: ignore[type-arg]
    """Numbers with commas between them, for values from 0 to 1."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(each) for each in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is no list of numbers, such as 0.485,0.456,0.406", param, ctx)
        if max(map(abs, numbers)) > 1:
            self.fail(
                f"{value!r} is for values from 0 to 255: divide by 255, as in --mean 0.485,0.456,0.406 and "
                "--std 0.229,0.224,0.225",
                param,
                ctx,
            )
        return numbers


@cloup.command(cls=PortCommand, short_help="Export to SavedModel, LiteRT or ONNX, with proof.")
@model_options(required=False)
@titled(
    "Files",
    click.option("--weights", type=FILE, required=True, help=WEIGHTS_HELP),
    click.option(
        "--out", type=FILE, required=True, help="File to write: .tflite or .onnx; or a folder for a SavedModel."
    ),
    click.option(
        "--format",
        "form",
        type=click.Choice(["saved_model", "litert", "onnx"]),
        help="Format to write.  [default: from the suffix of --out]",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "float16", "int8"]),
        default="float32",
        show_default=True,
        help="Precision to write; int8 calibrates on the images of the check.",
    ),
    click.option(
        "--input-size",
        type=click.IntRange(min=1),
        help="Image size, or number of tokens in LiteRT.  [default: the variant's, or the check's]",
    ),
    click.option("--fused/--no-fused", default=True, show_default=True, help="Fold normalisations into convolutions."),
    click.option(
        "--split-kernels/--no-split-kernels",
        default=None,
        help="LiteRT: split depthwise kernels of more than 25 taps into smaller ones, which is faster on a CPU.  "
        "[default: on, except in int8]",
    ),
    click.option(
        "--with-preprocessing",
        is_flag=True,
        help="Put the normalisation into the graph: it takes RGB from 0 to 255.",
    ),
    click.option(
        "--mean",
        type=PerChannel(),
        help="Mean of each channel that the model was trained with, of values from 0 to 1.  [default: the family's]",
    ),
    click.option(
        "--std",
        type=PerChannel(),
        help="Standard deviation of each channel, of values from 0 to 1.",
    ),
    click.option("--with-softmax", is_flag=True, help="Put a softmax behind the logits."),
    click.option(
        "--labels",
        type=FILE,
        metavar="PATH|imagenet",
        help="Names of the classes for the metadata, one per line.  [default: those of a published checkpoint]",
    ),
)
@checkpoint_options
@titled("Parity check", CHECK)
@thoroughness_options
@report_options
def export(
    model: Model,
    weights: Path,
    out: Path,
    form: str | None,
    precision: str,
    input_size: int | None,
    fused: bool,
    split_kernels: bool | None,
    with_preprocessing: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    with_softmax: bool,
    labels: Path | None,
    checkpoint: CheckpointChoice,
    check: bool,
    make_options: Callable[[], CheckOptions],
    reporting: ReportChoice,
) -> None:
    """Export a ported file to SavedModel, LiteRT or ONNX, run it in its own runtime, and compare it with PyTorch.

    \b
      van-port export --variant b1 --weights van_b1.h5 --out van_b1.tflite
      van-port export --variant b1 --weights van_b1.h5 --out van_b1.onnx --precision int8 --images photos
      van-port export --variant b1 --weights van_b1.h5 --out van_b1 --format saved_model

    With --no-check, no checkpoint is read.
    """
    from porting.cli.terminal import say
    from porting.errors import OutputError
    from porting.exporting import FORMATS
    from porting.tasks.export import export as write_export

    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    form = form or by_suffix.get(out.suffix)
    if form is None:
        raise OutputError(
            f"{out}: the suffix does not name a format to write",
            hint="Use .tflite or .onnx, or --format saved_model for a folder.",
        )
    if (mean is None) != (std is None):
        raise click.UsageError("give both --mean and --std")
    reporting.require_writable(result_paths(out), {"--weights": [weights], "--checkpoint": checkpoint.files})
    family, variant = model.of_file(weights)
    options = make_options()
    if options.stress or options.train or options.allow_non_finite:
        raise click.UsageError("export does not support --stress, --train or --allow-non-finite: use `van-port check`")
    with reporting.showing_refusal() as progress:
        result = write_export(
            family,
            variant,
            weights,
            out,
            form=form,
            precision=precision,
            input_size=input_size,
            fused=fused,
            split_kernels=split_kernels,
            with_preprocessing=with_preprocessing,
            normalization=None if mean is None or std is None else (mean, std),
            with_softmax=with_softmax,
            labels=labels,
            **checkpoint.arguments,
            check=check,
            options=options,
            progress=progress,
        )
    reporting.show(result.report)
    operators = ", ".join(f"{count} {name}" for name, count in result.operators.most_common())
    say(f"{form} in {precision}, {result.size / 2**20:.1f} MiB: {operators}")
    for line in result.usage.lines():
        say(line)
    show_written(result.path, result.report_path)
