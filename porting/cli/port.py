"""What the bare command does: a port."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from porting.cli.groups import CheckpointChoice, Model, ReportChoice, show_non_finite, show_written

if TYPE_CHECKING:
    from porting.tasks.options import CheckOptions


def run_port(
    model: Model,
    out: Path | None,
    checkpoint: CheckpointChoice,
    check: bool,
    make_options: Callable[[], CheckOptions],
    reporting: ReportChoice,
    keep_failed: Path | None,
) -> None:
    """Ports, shows the report and says what was written and how to load it."""
    from porting.cli.terminal import make_console
    from porting.tasks.port import port

    assert model.variant is not None  # the command has seen to it
    reporting.require_writable()
    options = make_options()
    with reporting.showing_refusal() as progress:
        result = port(
            model.family,
            model.variant,
            out if out is not None else Path(f"{model.family.name}_{model.variant}.h5"),
            **checkpoint.arguments,
            check=check,
            options=options,
            keep_failed=keep_failed,
            progress=progress,
        )
    case, console = result.case, make_console()
    console.print(f"The checkpoint has {case.naming.described()}.", markup=False)
    if case.checkpoint is not None and case.checkpoint.has_ema and not case.checkpoint.is_ema:
        console.print("The checkpoint also has moving averages of its weights; --ema takes them.")
    reporting.show(result.report, without="Not checked, as asked; the file's provenance says so.")
    if result.report is None:
        show_non_finite(result.provenance)
    tensors, dropped = len(result.conversion.weights), len(result.conversion.dropped)
    click.echo(f"{tensors} tensors ported, {dropped} dropped by name, none left over.")
    show_written(result.path, result.report_path)
    click.echo(f"Load it into {result.provenance['build']}")
