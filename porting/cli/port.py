"""What the bare command does: a port."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from porting.cli.groups import CheckpointChoice, Model, ReportChoice, result_paths, show_non_finite, show_written

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
    from porting.cli.terminal import make_console, say
    from porting.tasks.port import port

    assert model.variant is not None  # the command has seen to it
    out = out if out is not None else Path(f"{model.family.name}_{model.variant.rpartition('/')[2]}.h5")
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
    reporting.show(result.report, without="Not checked, as asked; the file's provenance says so.")
    if result.report is None:
        show_non_finite(result.provenance)
    tensors, dropped = len(result.conversion.weights), len(result.conversion.dropped)
    say(f"{tensors} tensors ported, {dropped} dropped by name, none left over.")
    show_written(result.path, result.report_path)
    say(f"Load it into {result.provenance['build']}")
