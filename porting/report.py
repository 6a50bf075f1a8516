"""A parity report for people: the terminal's tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from porting.parity import OUTPUT, ParityReport, TensorComparison

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_report(report: ParityReport, console: Console, *, all_layers: bool = False) -> None:
    """Prints a table of layers and the verdict.

    The table has the top-level layers, the output and every layer that failed; `all_layers` prints them all.
    """
    rows = report.comparisons if all_layers else tuple(filter(_is_prominent, report.comparisons))
    console.print(_layer_table(rows, report.max_ratio))
    left_out = len(report.comparisons) - len(rows)
    if left_out:
        console.print(f"{left_out} inner layers at parity are not shown; --all-layers shows them.", style="dim")
    for title, names in (("PyTorch only", report.unpaired_source), ("Keras only", report.unpaired_target)):
        if names:
            console.print(f"{title}, not compared: {', '.join(names)}", style="dim")
    console.print(_verdict_line(report), style="bold green" if report.passed else "bold red")


def _is_prominent(comparison: TensorComparison) -> bool:
    # A module in a list, block1.0, is as much at the top as patch_embed1: its Keras path has no slash.
    return not comparison.passed or comparison.source == OUTPUT or "/" not in comparison.target


def _layer_table(rows: tuple[TensorComparison, ...], max_ratio: float) -> Table:
    from rich.table import Table

    table = Table(caption=f"error: RMS distance to PyTorch in float64; ratio: at most {max_ratio:g} times its noise")
    table.add_column("layer", overflow="fold")
    table.add_column("shape")
    for heading in ("scale", "PyTorch error", "Keras error", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("parity")
    for row in rows:
        table.add_row(
            row.source,
            "x".join(map(str, row.shape)),
            f"{row.scale.rms:.2e}",
            f"{row.expected_error.rms:.1e}",
            f"{row.actual_error.rms:.1e}" if not row.problem else row.problem,
            f"{row.ratio:.2f}" if math.isfinite(row.ratio) else "-",
            "yes" if row.passed else "NO",
            style=None if row.passed else "red",
        )
    return table


def _verdict_line(report: ParityReport) -> str:
    logits = report.logits
    agreement = f"top-1 agrees on {logits.top1_agreement} of {logits.samples} images"
    first = report.first_divergence
    if first is not None:
        failed = sum(not comparison.passed for comparison in report.comparisons)
        return f"NOT AT PARITY from {first.source} on: {failed} of {len(report.comparisons)} layers; {agreement}"
    worst = report.worst
    return (
        f"AT PARITY: {len(report.comparisons)} layers, worst ratio {worst.ratio:.2f} ({worst.source}), "
        f"limit {report.max_ratio:g}; {agreement}"
    )
