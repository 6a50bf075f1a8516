"""The report as one self-contained HTML file: plot, searchable table, and details of each layer."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

from porting.parity.report import (
    EXACT,
    FLOAT32,
    FLOAT32_ROUNDOFF,
    FLOAT64_ROUNDOFF,
    VIEWS,
    LayerComparison,
    ParityReport,
)
from porting.reports.document import encoded, layer_document
from porting.reports.plot import GREY, WIDTH, Series, log_plot
from porting.reports.terminal import findings, remarks, title, verdict

# The width of the plot on a phone, in the units of its labels.
_NARROW = 480


def to_html(report: ParityReport) -> str:
    """Render porting/reports/report.html with the report's numbers. The page loads nothing from the network."""
    import jinja2

    template = resources.files("porting.reports").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    layers = [encoded(layer_document(layer)) for layer in report.layers]
    return environment.from_string(template).render(
        report=report,
        title=title(report),
        verdict=verdict(report),
        findings=findings(report),
        remarks=remarks(report),
        runs=[(run.name, run.passed, verdict(run)) for run in report.stress],
        rows=[_row(report, layer) for layer in report.layers],
        plot=_plot(report, WIDTH),
        narrow_plot=_plot(report, _NARROW),
        made=_made(report.context),
        facts=_facts(report.context),
        # A layer's name could contain "</script>", which would end the element.
        data=json.dumps(layers).replace("<", "\\u003c"),
    )


def _row(report: ParityReport, layer: LayerComparison) -> dict[str, Any]:
    off = report.failed(layer)
    failed = {view: off and bool(report.limits.objection(layer, view)) for view in layer.views}
    return {
        "layer": layer,
        "shape": " x ".join(map(str, layer.shape)),
        "failed": off,
        "culprit": any(culprit.layer == layer.source for culprit in report.culprits),
        "ratios": [_cell(layer, view, failed.get(view, False)) for view in VIEWS],
        "rewritten": layer.rewritten,
    }


def _cell(layer: LayerComparison, name: str, failed: bool) -> dict[str, Any]:
    view = layer.views.get(name)
    if view is None:
        return {"sort": -1.0, "text": "-", "failed": False}
    if not math.isfinite(view.ratio):
        return {"sort": 1e308, "text": view.problem or "∞", "failed": failed}
    if name == EXACT:
        return {"sort": view.relative_error, "text": f"{view.relative_error:.1e}", "failed": failed}
    text = f"{view.ratio:.2f}" if view.ratio < 1000 else f"{view.ratio:.1e}"
    return {"sort": view.ratio, "text": text, "failed": failed}


def _facts(context: dict[str, Any]) -> list[tuple[str, str]]:
    """The provenance as rows, with nested names joined."""
    rows: list[tuple[str, str]] = []
    for key, value in context.items():
        if isinstance(value, dict):
            rows += [(f"{key}: {name}", text) for name, text in _facts(value)]
        else:
            rows.append((key, str(value)))
    return rows


def _made(context: dict[str, Any]) -> str:
    """When the comparison was made, with which version, and by which command, as far as the report says."""
    version = context.get("versions", {}).get("van-port", "")
    date = str(context.get("created_utc", "")).replace("T", " ").replace("+00:00", " UTC")
    parts = [date, f"van-port {version}" if version else "", str(context.get("command", ""))]
    return " - ".join(part for part in parts if part)


def _plot(report: ParityReport, width: int) -> str:
    """Plot the relative error along depth, in both views."""
    series = [
        Series(f"{report.runtime} in float64", "#3b82f6", "dot", _points(report, EXACT, "actual_error")),
        Series(f"{report.runtime} in float32", "#e08a00", "square", _points(report, FLOAT32, "actual_error")),
        Series("PyTorch in float32", GREY, "line", _points(report, FLOAT32, "expected_error")),
        Series("limit in float32", "#dc2626", "line", _limits(report), dashed=True),
    ]
    marks = [
        (index, culprit.relative)
        for culprit in report.culprits
        for index, layer in enumerate(report.layers)
        if layer.source == culprit.layer and 0 < culprit.relative < math.inf
    ]
    series.append(Series("culprit", "#dc2626", "triangle", marks))
    return log_plot(
        series,
        names=[layer.source for layer in report.layers],
        width=width,
        lines=[("one float32 rounding", FLOAT32_ROUNDOFF), ("one float64 rounding", FLOAT64_ROUNDOFF)],
        x="tensor, in data flow",
        y="RMS error / RMS of the reference",
    )


def _limits(report: ParityReport) -> list[tuple[float, float]]:
    """The RMS error, relative to the reference, from which a tensor fails in float32."""
    found = []
    for index, layer in enumerate(report.layers):
        view = layer.views.get(FLOAT32)
        if view is not None and view.scale.rms and view.ratio and math.isfinite(view.ratio):
            found.append((float(index), report.limits.of(layer.source) * view.noise.rms / view.scale.rms))
    return found


def _points(report: ParityReport, name: str, side: str) -> list[tuple[float, float]]:
    found = ((index, _relative(layer, name, side)) for index, layer in enumerate(report.layers))
    return [(index, value) for index, value in found if value is not None]


def _relative(layer: LayerComparison, name: str, side: str) -> float | None:
    view = layer.views.get(name)
    if view is None or not view.scale.rms:
        return None
    value = getattr(view, side).rms / view.scale.rms
    return value if value > 0 and math.isfinite(value) else None
