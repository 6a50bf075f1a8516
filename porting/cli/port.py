"""`van-port port`, which is also what `van-port` does without a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from porting.cli.groups import (
    CHECK,
    FILE,
    CheckpointChoice,
    Command,
    Model,
    ReportChoice,
    checkpoint_options,
    model_options,
    report_options,
    result_paths,
    show_non_finite,
    show_written,
    thoroughness_options,
    titled,
)
from porting.cli.overwriting import PortCommand
from porting.wording import counted, listed

# Up to so many dropped tensors are named, unless all layers are shown.
_NAMED = 3

if TYPE_CHECKING:
    from porting.tasks.options import CheckOptions


def port_options(command: Command) -> Command:
    """Add the options of a port to a command."""
    for option in (
        report_options,
        thoroughness_options,
        titled("Parity check", CHECK),
        checkpoint_options,
        titled(
            "Files",
            click.option(
                "--out", type=FILE, help="File to write: .h5, .weights.h5 or .keras.  [default: FAMILY_VARIANT.h5]"
            ),
            click.option(
                "--keep-failed", type=FILE, help="Keep a file that fails the check here, instead of deleting it."
            ),
        ),
        model_options(required=False),
    ):
        command = option(command)
    return command


@cloup.command("port", cls=PortCommand, short_help="Port a checkpoint to Keras, with proof.")
@port_options
def port_command(**arguments: Any) -> None:
    """Port a PyTorch checkpoint to Keras, prove parity, and write the file.

    \b
      van-port port --variant b1 --out van_b1.h5
      van-port port --family resnet --variant resnet18 --checkpoint resnet18.pth --out resnet18.h5
    """
    run_port(**arguments)


def run_port(
    model: Model,
    out: Path | None,
    checkpoint: CheckpointChoice,
    check: bool,
    make_options: Callable[[], CheckOptions],
    reporting: ReportChoice,
    keep_failed: Path | None,
) -> None:
    """Port, print the report, and print what was written and how to load it."""
    from porting.cli.terminal import make_console, say
    from porting.tasks.port import port

    if model.variant is None:
        raise click.UsageError(f"--variant is required: one of {', '.join(model.family.variants)}")
    if out is None:
        if not model.family.has_published:
            raise click.UsageError("Missing option '--out': models of your own have no name for a file.")
        out = Path(f"{model.family.name}_{model.variant.rpartition('/')[2]}.h5")
    reporting.require_writable(
        {**result_paths(out), "--keep-failed": [keep_failed]}, {"--checkpoint": checkpoint.files}
    )
    options = make_options()
    with reporting.showing_refusal() as progress:
        result = port(
            model.family,
            model.variant,
            out,
            **checkpoint.arguments,
            check=check,
            options=options,
            keep_failed=keep_failed,
            progress=progress,
        )
    case, console = result.case, make_console()
    console.print(f"The checkpoint has {case.spec.described()}.")
    if case.checkpoint is not None:
        for line in case.checkpoint.remarks():
            console.print(line, soft_wrap=True)
    reporting.show(result.report, without="Not checked, as requested; the file's provenance records this.")
    if result.report is None:
        show_non_finite(result.provenance)
    tensors, dropped = len(result.conversion.weights), result.conversion.dropped
    # The counters of batch norms matter only to training in PyTorch.
    others = [name for name in dropped if not name.endswith("num_batches_tracked")]
    names = f" ({listed(others, len(others) if reporting.all_layers else _NAMED)})" if others else ""
    say(f"{counted(tensors, 'tensor')} ported, {len(dropped)} dropped by name{names}, none left over.")
    show_written(result.path, result.report_path)
    say(f"Load it into {result.provenance['build']}")
