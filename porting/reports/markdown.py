"""The report for the summary page of a CI run."""

from __future__ import annotations

from porting.parity.report import VIEWS, LayerComparison, ParityReport
from porting.reports.terminal import findings, title, verdict

WORST = 10


def to_markdown(report: ParityReport) -> str:
    """A heading with the verdict, what is wrong, and a table of the worst layers."""
    lines = [f"## {'✅' if report.passed else '❌'} {title(report)}", "", verdict(report), ""]
    lines += [f"- {_escaped(line)}" for line in findings(report)]
    if report.stress:
        lines += ["", "| stress | verdict |", "|---|---|"]
        lines += [f"| {_escaped(run.name)} | {_escaped(verdict(run))} |" for run in report.stress]
    lines += [
        "",
        f"The {min(WORST, len(report.layers))} worst of {len(report.layers)} layers, by Keras's error in units of "
        "PyTorch's own rounding:",
        "",
        "| layer | shape | accumulated | isolated | input | parity |",
        "|---|---|---:|---:|---:|---|",
    ]
    for layer in sorted(report.layers, key=lambda each: -each.ratio)[:WORST]:
        ratios = " | ".join(_ratio(layer, view) for view in VIEWS)
        shape = "x".join(map(str, layer.shape))
        lines.append(f"| `{layer.source}` | {shape} | {ratios} | {'**no**' if report.failed(layer) else 'yes'} |")
    for side, names in (("PyTorch only", report.unpaired_source), ("Keras only", report.unpaired_target)):
        if names:
            lines += ["", f"{side}, not compared: {', '.join(f'`{name}`' for name in names)}"]
    return "\n".join(lines) + "\n"


def _ratio(layer: LayerComparison, name: str) -> str:
    view = layer.views.get(name)
    return "-" if view is None else f"{view.ratio:.3g}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
