"""The report as Markdown, for the summary page of a CI run."""

from __future__ import annotations

import re

from porting.parity.report import FLOAT32, ParityReport
from porting.reports.terminal import exact_text, findings, ratio_text, remarks, title, verdict

WORST = 10


def to_markdown(report: ParityReport) -> str:
    """Render a heading with the verdict, the findings, and a table of the worst layers."""
    lines = [f"## {'✅' if report.passed else '❌'} {_escaped(title(report))}", "", _escaped(verdict(report)), ""]
    lines += [f"- {_escaped(line)}" for line in findings(report)]
    if report.stress:
        lines += ["", "| stress | verdict |", "|---|---|"]
        lines += [f"| {_escaped(run.name)} | {_escaped(verdict(run))} |" for run in report.stress]
    worst = sorted(report.layers, key=lambda layer: (not report.failed(layer), -layer.ratio))[:WORST]
    lines += [
        "",
        f"The {len(worst)} worst of {len(report.layers)} tensors. exact: {report.runtime}'s distance from PyTorch in "
        f"float64. float32: {report.runtime}'s error in units of PyTorch's own rounding error.",
        "",
        "| layer | shape | exact | float32 | parity |",
        "|---|---|---:|---:|---|",
    ]
    for layer in worst:
        shape = "x".join(map(str, layer.shape))
        parity = "**no**" if report.failed(layer) else ("equivalent" if layer.rewritten else "yes")
        source = f"<code>{_escaped(layer.source)}</code>"
        cells = (source, shape, _escaped(exact_text(layer)), _escaped(ratio_text(layer, FLOAT32)), parity)
        lines.append(f"| {' | '.join(cells)} |")
    if notes := remarks(report):
        lines += ["", *(f"- {_escaped(line)}" for line in notes)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Escape text from files, so that none of it is read as Markdown or HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A reader's browser would load links and images, and emphasis would hide characters of a name.
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text).replace("\n", " ")
