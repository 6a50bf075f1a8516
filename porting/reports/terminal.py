"""The report on a terminal of any width, or in a pipe."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from porting.parity.report import EXACT, FLOAT32, REPRODUCED, Culprit, LayerComparison, ParityReport
from porting.wording import counted, listed

# Precisions whose rounding is judged in units of what they cost PyTorch.
_LOWER = frozenset({"float16", "bfloat16", "int8"})

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WORST = 10
# Models with at most this many layers are shown whole.
_FEW = 40


def print_report(report: ParityReport, console: Console, *, all_layers: bool = False) -> None:
    """Print a table of layers, what differs and why, and the verdict.

    The table of a large model contains its top-level layers and the first `WORST` that failed; `all_layers` prints all.
    """
    if report.layers:
        rows = report.layers if all_layers or len(report.layers) <= _FEW else _prominent(report)
        console.print(_layer_table(rows, report))
        if hidden := [layer for layer in report.layers if layer not in rows]:
            failed = sum(map(report.failed, hidden))
            also = f", {failed} of which failed" if failed else ""
            console.print(f"{counted(len(hidden), 'more layer')} hidden{also}; --all-layers shows them.", style="dim")
    for line in remarks(report):
        console.print(line, style="dim", markup=False)
    for line in findings(report):
        console.print(line, style="red", markup=False)
    for run in report.stress:
        style = None if run.passed else "red"
        console.print(f"stress, {run.name}: {verdict(run)}", style=style, markup=False)
    console.print(verdict(report), style="bold green" if report.passed else "bold red", markup=False)


def title(report: ParityReport) -> str:
    """The title, with the name of the model if the context has it."""
    model = model_named_in(report.context)
    return f"Parity of {model}" if model else "Parity"


def model_named_in(context: Mapping[str, Any]) -> str:
    """The family and variant that a context states; empty if it states neither."""
    return " ".join(str(context[key]) for key in ("family", "variant") if key in context)


def remarks(report: ParityReport) -> list[str]:
    """Remarks that are not errors: how tensors were compared, and what has no partner."""
    lines = list(report.axes)
    if report.exact_model:
        lines.append(f"During the exact view, the Keras model was {report.exact_model}; it is unchanged.")
    if report.float32_inside:
        lines.append(f"Compute in float32 internally, and were judged as such: {listed(report.float32_inside)}")
    rewritten = Counter(layer.rewritten for layer in report.layers if layer.rewritten)
    for how, count in rewritten.items():
        those = [layer.source for layer in report.layers if layer.rewritten == how]
        lines.append(f"Implemented differently ({count}), {how}: {listed(those)}")
    if report.notes:
        lines.append(f"Implemented differently ({len(report.notes)}): {listed(report.notes, separator='; ')}")
    for side, names in (("PyTorch only", report.unpaired_source), ("Keras only", report.unpaired_target)):
        if names:
            lines.append(f"{side}, not compared separately: {listed(names)}")
    if report.verified is not None:
        lines.append(_verified(report))
    if report.audit is not None:
        noted = [difference for difference in report.audit.differences if not difference.counts]
        lines += [f"Note: {line}" for line in grouped([str(difference) for difference in noted])]
    return lines


def _verified(report: ParityReport) -> str:
    verified = report.verified
    assert verified is not None  # the caller has checked
    share = 100 * verified.verified / verified.weights if verified.weights else 100.0
    # Where the outputs differ, only tensors that agree say anything of the weights before them.
    agreed = not any(divergence.view == EXACT for divergence in report.divergences)
    what = "Weights observed in use" if agreed else "Weights confirmed by tensors that agree"
    percent = f"{share:.2f}".rstrip("0").rstrip(".")
    line = f"{what}: {percent} % of {verified.weights:,}"
    if verified.compared_bits:
        line += f"; {counted(verified.compared_bits, 'tensor')} compared bit by bit"
    if not verified.through_layers:
        line += "; the verdict is based only on the outputs"
    if verified.unverified:
        why = "not confirmed" if not agreed else "without effect" if verified.unproven else "never used"
        line += f"; {why}: {listed(verified.unverified)}"
    return line


def findings(report: ParityReport) -> list[str]:
    """The findings against parity as sentences: each culprit with its cause, settings that differ, and the rest."""
    lines = []
    alike: dict[str, list[Culprit]] = {}
    for culprit in report.culprits:
        if culprit.diagnosis and not culprit.diagnosis.pattern and not culprit.is_input:
            alike.setdefault(culprit.diagnosis.cause, []).append(culprit)
    number = 0
    for culprit in report.culprits:
        same = alike.get(culprit.diagnosis.cause, []) if culprit.diagnosis and not culprit.is_input else []
        if any(culprit is other for other in same[1:]):
            continue
        number += 1
        lines.append(f"{'First divergence' if number == 1 else f'Divergence {number}'}: {culprit}")
        if cause := culprit.diagnosis:
            if cause.pattern:
                lines.append(f"Looks like: {cause.cause} ({cause.unexplained:.2g} of the difference is unexplained)")
            else:
                visible = cause.unexplained > REPRODUCED
                left = f" ({cause.unexplained:.2g} of the difference is unexplained)" if visible else ""
                lines.append(f"Cause, {cause.confidence}: {cause.cause}{left}")
                if others := [each.layer for each in same[1:]]:
                    lines.append(f"The same in {counted(len(others), 'more layer')}: {listed(others)}")
    if not report.culprits and (first := report.first_divergence):
        lines.append(f"First divergence: {first}")
    if report.loud is not None and not report.loud.passed:
        finite = math.isfinite(report.loud.relative)
        how = f"differ by {report.loud.relative:.2g} of their size" if finite else "are not finite"
        lines.append(f"On {report.loud.what}, the outputs {how}")
    if report.verified is not None and report.verified.differing:
        found = report.verified.details or report.verified.differing
        lines.append(f"Weights that differ from the checkpoint ({len(found)}): {listed(found, 5, '; ')}")
    at_work = report.verified is None or not report.verified.weights or report.verified.verified
    if not at_work and not report.divergences:
        lines.append("No weight of the Keras model was observed in use")
    if report.audit:
        lines += [f"Setting: {line}" for line in grouped([str(each) for each in report.audit.failures])]
    lines += [f"Note: {line}" for line in report.caveats]
    for run in report.stress:
        lines += [f"Under stress, {run.name}: {line}" for line in findings(run)]
    return lines


def grouped(lines: list[str]) -> list[str]:
    """Merge lines that differ only before the first colon, the layer, into one line with a count."""
    found: dict[str, list[str]] = {}
    for line in lines:
        layer, _, rest = line.partition(": ")
        found.setdefault(rest, []).append(layer)
    return [
        f"{layers[0]}: {rest}" if len(layers) == 1 else f"{len(layers)} layers ({listed(layers)}): {rest}"
        for rest, layers in found.items()
    ]


def verdict(report: ParityReport) -> str:
    """The verdict in one line: at parity or not, over how many layers, and by how much."""
    agreement = ""
    if logits := report.logits:
        agreement = f"; top-1 agrees on {logits.top1_agreement} of {logits.samples} samples"
    if report.problem or not report.layers:
        return f"NOT AT PARITY: {report.problem or 'nothing could be compared'}"
    if report.divergences:
        failed = [layer for layer in report.layers if report.failed(layer)]
        results = sum(layer.is_output for layer in failed)
        inside = len(failed) - results
        if not failed:
            return f"NOT AT PARITY: {report.divergences[0]}{agreement}"
        what = " and ".join(counted(count, noun) for count, noun in ((results, "output"), (inside, "layer")) if count)
        return f"NOT AT PARITY: {what} of {counted(len(report.layers), 'tensor')} compared{agreement}"
    if report.objections and not any(not run.passed for run in report.stress):
        return f"NOT AT PARITY: {report.objections[0]}; the numbers of this run agree{agreement}"
    if not report.passed:
        return f"NOT AT PARITY under stress; as ported, all agree{agreement}"
    exact, worst = report.worst_exact, report.worst
    said = [counted(len(report.layers), "tensor")]
    if exact is not None:
        said.append(f"outputs exact to {exact.relative_error:.1e} in float64")
    if FLOAT32 in worst.views:
        ratio = worst.views[FLOAT32].ratio
        unit = report.precision if report.precision in _LOWER else FLOAT32
        said.append(f"worst ratio in {unit} {ratio:.2f} ({worst.source}), limit {report.limits.of(worst.source):g}")
    return f"AT PARITY: {', '.join(said)}{agreement}"


def _prominent(report: ParityReport) -> tuple[LayerComparison, ...]:
    failed = [layer for layer in report.layers if report.failed(layer)][:WORST]
    worst = report.worst
    # Names in Keras may be flat, as in keras.applications, and those in PyTorch may number the blocks of a stage.
    return tuple(
        layer
        for layer in report.layers
        if layer in failed
        or layer is worst
        or layer.is_output
        or (("/" not in layer.target or layer.source.count(".") <= 1) and not layer.source.startswith("input of "))
    )


def _layer_table(rows: tuple[LayerComparison, ...], report: ParityReport) -> Table:
    from rich import box
    from rich.table import Table

    exact = any(EXACT in row.views for row in rows)
    caption = "exact: RMS distance to PyTorch in float64, relative to the result; " if exact else ""
    caption += f"ratio: {report.runtime}'s error in units of PyTorch's own, both against PyTorch in float64"
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", overflow="fold", ratio=1, min_width=12)
    table.add_column("shape", overflow="fold")
    for heading in (*(("exact",) if exact else ()), "PyTorch error", f"{report.runtime} error", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("parity")
    for row in rows:
        view = row.views.get(FLOAT32)
        failed = report.failed(row)
        table.add_row(
            row.source,
            "x".join(map(str, row.shape)),
            *((exact_text(row),) if exact else ()),
            f"{view.expected_error.rms:.1e}" if view else "-",
            (view.problem or f"{view.actual_error.rms:.1e}") if view else "-",
            ratio_text(row, FLOAT32),
            "NO" if failed else ("equivalent" if row.rewritten else "yes"),
            style="red" if failed else None,
        )
    return table


def exact_text(layer: LayerComparison) -> str:
    """The relative error in the exact view, or the reason why there is none."""
    view = layer.views.get(EXACT)
    if view is None:
        return "-"
    return view.problem or f"{view.relative_error:.1e}"


def ratio_text(layer: LayerComparison, name: str) -> str:
    """The ratio of a view as short text."""
    view = layer.views.get(name)
    if view is None or not math.isfinite(view.ratio):
        return "-"
    return f"{view.ratio:.2f}" if view.ratio < 1000 else f"{view.ratio:.0e}"
