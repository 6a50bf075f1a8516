"""The report on a terminal, of any width, and in a pipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from porting.parity.report import ACCUMULATED, INPUT, ISOLATED, OUTPUT, LayerComparison, ParityReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WORST = 10


def print_report(report: ParityReport, console: Console, *, all_layers: bool = False) -> None:
    """Prints a table of layers, what differs and why, and the verdict.

    The table has the top-level layers and every one that failed, at most the first `WORST`; `all_layers` prints all.
    """
    rows = report.layers if all_layers else _prominent(report)
    console.print(_layer_table(rows, report))
    left_out = len(report.layers) - len(rows)
    if left_out:
        console.print(f"{left_out} more layers are not shown; --all-layers shows them.", style="dim")
    for side, names in (("PyTorch only", report.unpaired_source), ("Keras only", report.unpaired_target)):
        if names:
            console.print(f"{side}, not compared: {', '.join(names)}", style="dim", markup=False)
    for line in findings(report):
        console.print(line, style="red", markup=False)
    for run in report.stress:
        style = None if run.passed else "red"
        console.print(f"stress, {run.name}: {verdict(run)}", style=style, markup=False)
    console.print(verdict(report), style="bold green" if report.passed else "bold red", markup=False)


def title(report: ParityReport) -> str:
    """What the report is about: the family and variant where its context has them."""
    model = " ".join(str(report.context[key]) for key in ("family", "variant") if key in report.context)
    return f"Parity of {model}" if model else "Parity"


def findings(report: ParityReport) -> list[str]:
    """What is wrong, in sentences: the first divergence, its cause where one fits, and settings that differ."""
    lines = []
    if first := report.first_divergence:
        lines.append(f"First divergence: {first} (seen in the {first.view} view)")
    if cause := report.diagnosis:
        lines.append(f"Cause, {cause.confidence}: {cause.cause} ({cause.unexplained:.2g} of the difference left over)")
    if report.audit:
        lines += [f"Setting: {difference}" for difference in report.audit.differences]
    for run in report.stress:
        lines += [f"Under stress, {run.name}: {line}" for line in findings(run)]
    return lines


def verdict(report: ParityReport) -> str:
    """One line: at parity or not, over how many layers, and by how much."""
    agreement = ""
    if logits := report.logits:
        agreement = f"; top-1 agrees on {logits.top1_agreement} of {logits.samples} samples"
    if not report.layers:
        return "NOT AT PARITY: nothing could be compared"
    failed = sum(report.failed(layer) for layer in report.layers)
    if failed:
        return f"NOT AT PARITY: {failed} of {len(report.layers)} layers{agreement}"
    if report.audit and report.audit.differences:
        return f"NOT AT PARITY: {len(report.audit.differences)} settings differ; all numbers agree{agreement}"
    if not report.passed:
        return f"NOT AT PARITY under stress; as ported, all layers agree{agreement}"
    worst = report.worst
    return (
        f"AT PARITY: {len(report.layers)} layers, worst ratio {worst.ratio:.2f} ({worst.source}), "
        f"limit {report.limits.of(worst.source):g}{agreement}"
    )


def _prominent(report: ParityReport) -> tuple[LayerComparison, ...]:
    failed = [layer for layer in report.layers if report.failed(layer)][:WORST]
    # A module in a list, block1.0, is as much at the top as patch_embed1: its Keras path has no slash.
    return tuple(
        layer for layer in report.layers if layer in failed or layer.source == OUTPUT or "/" not in layer.target
    )


def _layer_table(rows: tuple[LayerComparison, ...], report: ParityReport) -> Table:
    from rich.table import Table

    caption = "error: RMS distance to PyTorch in float64; ratios: Keras's error in units of PyTorch's own"
    table = Table(caption=caption)
    table.add_column("layer", overflow="fold", ratio=1, min_width=12)
    table.add_column("shape", overflow="fold")
    for heading in ("PyTorch error", "Keras error", "accum.", "isol.", "input"):
        table.add_column(heading, justify="right")
    table.add_column("parity")
    for row in rows:
        view = row.views.get(ACCUMULATED)
        failed = report.failed(row)
        table.add_row(
            row.source,
            "x".join(map(str, row.shape)),
            f"{view.expected_error.rms:.1e}" if view else "-",
            (view.problem or f"{view.actual_error.rms:.1e}") if view else "-",
            *(_ratio(row, name) for name in (ACCUMULATED, ISOLATED, INPUT)),
            "NO" if failed else "yes",
            style="red" if failed else None,
        )
    return table


def _ratio(layer: LayerComparison, name: str) -> str:
    view = layer.views.get(name)
    if view is None or not math.isfinite(view.ratio):
        return "-"
    return f"{view.ratio:.2f}" if view.ratio < 1000 else f"{view.ratio:.0e}"
