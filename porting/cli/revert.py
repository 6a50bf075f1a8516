"""`van-port revert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup

from porting.cli.groups import (
    CHECK,
    FILE,
    LAYOUT,
    WEIGHTS_HELP,
    Model,
    ReportChoice,
    model_options,
    report_options,
    result_paths,
    show_written,
    thoroughness_options,
    titled,
)
from porting.cli.overwriting import PortCommand
from porting.wording import counted

if TYPE_CHECKING:
    from porting.tasks.options import CheckOptions


@cloup.command(cls=PortCommand, short_help="Port Keras weights back to PyTorch, with proof.")
@model_options(required=False)
@titled(
    "Files",
    click.option("--weights", type=FILE, required=True, help=WEIGHTS_HELP),
    click.option("--out", type=FILE, required=True, help="File to write: .pth, .pth.tar, .pt, .bin or .safetensors."),
    click.option(
        "--layout",
        type=LAYOUT,
        help="Publisher whose tensor names to write.  [default: as in the ported checkpoint, else the family's first]",
    ),
    click.option(
        "--classes",
        type=click.IntRange(min=0),
        help="Number of classes of the head; 0 means no head.  [default: read from the file]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Data type.",
    ),
)
@titled("Parity check", CHECK)
@thoroughness_options
@report_options
def revert(
    model: Model,
    weights: Path,
    out: Path,
    layout: str | None,
    classes: int | None,
    dtype: str,
    check: bool,
    make_options: Callable[[], CheckOptions],
    reporting: ReportChoice,
) -> None:
    """Port a file of Keras weights, fine-tuned or not, back to PyTorch, and prove that nothing was lost.

    \b
      van-port revert --variant b1 --weights van_b1.h5 --out van_b1.pth
      van-port revert --variant b1 --weights tuned.keras --out model.safetensors --layout transformers
    """
    family, variant = model.of_file(weights)
    from porting.cli.terminal import say
    from porting.tasks.revert import revert as go_back

    reporting.require_writable(result_paths(out), {"--weights": [weights]})
    options = make_options()
    with reporting.showing_refusal() as progress:
        result = go_back(
            family,
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
    reporting.show(result.report)
    head = f", {result.spec.num_classes} classes" if result.spec.num_classes else ", without a head"
    say(
        f"{counted(len(result.state_dict), 'tensor')} in {dtype}: {result.spec.naming.name} names"
        f"{head if result.spec.naming.has_head else ''}."
    )
    for note in result.notes:
        say(note, colour="yellow")
    show_written(result.path, result.report_path)
