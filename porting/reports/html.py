"""The report as one HTML file that opens from disk: plot, searchable table, and a close look at any layer."""

from __future__ import annotations

import io
import json
import math
from importlib import resources
from typing import Any

from porting.parity.report import ACCUMULATED, FLOAT32_ROUNDOFF, INPUT, ISOLATED, VIEWS, LayerComparison, ParityReport
from porting.reports.document import encoded, layer_document
from porting.reports.terminal import findings, title, verdict


def to_html(report: ParityReport) -> str:
    """Renders porting/reports/report.html with the report's numbers; nothing in it is fetched from anywhere."""
    import jinja2

    template = resources.files("porting.reports").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    layers = [encoded(layer_document(layer)) for layer in report.layers]
    return environment.from_string(template).render(
        report=report,
        title=title(report),
        verdict=verdict(report),
        findings=findings(report),
        runs=[(run.name, run.passed, verdict(run)) for run in report.stress],
        rows=[_row(report, layer) for layer in report.layers],
        plot=_plot(report),
        facts=_facts(report.context),
        # A layer's name could hold "</script>", and would end the element.
        data=json.dumps(layers).replace("<", "\\u003c"),
    )


def _row(report: ParityReport, layer: LayerComparison) -> dict[str, Any]:
    failed = {view: bool(report.limits.objection(layer, view)) for view in layer.views}
    return {
        "layer": layer,
        "shape": " x ".join(map(str, layer.shape)),
        "failed": any(failed.values()),
        "ratios": [_cell(layer, view, failed.get(view, False)) for view in VIEWS],
    }


def _cell(layer: LayerComparison, name: str, failed: bool) -> dict[str, Any]:
    view = layer.views.get(name)
    if view is None:
        return {"sort": -1.0, "text": "-", "failed": False}
    if not math.isfinite(view.ratio):
        return {"sort": 1e308, "text": view.problem or "∞", "failed": failed}
    text = f"{view.ratio:.2f}" if view.ratio < 1000 else f"{view.ratio:.1e}"
    return {"sort": view.ratio, "text": text, "failed": failed}


def _facts(context: dict[str, Any]) -> list[tuple[str, str]]:
    """The provenance as rows, nested names joined."""
    rows: list[tuple[str, str]] = []
    for key, value in context.items():
        if isinstance(value, dict):
            rows += [(f"{key}: {name}", text) for name, text in _facts(value)]
        else:
            rows.append((key, str(value)))
    return rows


def _plot(report: ParityReport) -> str:
    """Relative error along depth as SVG text, in colours that are readable on light and dark ground."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    grey = "#808890"
    curves = ((ACCUMULATED, "#3b82f6", "o"), (ISOLATED, "#e08a00", "s"), (INPUT, "#10a37f", "^"))
    for name, colour, marker in curves:
        points = [(i, y) for i, layer in enumerate(report.layers) if (y := _relative(layer, name, "actual_error"))]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, label=f"Keras, {name}", alpha=0.8)
    floor = [_relative(layer, ACCUMULATED, "expected_error") or math.nan for layer in report.layers]
    axes.plot(range(len(floor)), floor, "-", color=grey, linewidth=1, label="PyTorch in float32")
    axes.axhline(FLOAT32_ROUNDOFF, color=grey, linestyle=":", linewidth=1, label="one float32 rounding")
    axes.set_yscale("log")
    axes.set_xlabel("layer, in data flow", color=grey)
    axes.set_ylabel("RMS error / RMS of the truth", color=grey)
    axes.tick_params(colors=grey, which="both")
    axes.grid(visible=True, color=grey, alpha=0.2)
    for spine in axes.spines.values():
        spine.set_color(grey)
    figure.legend(frameon=False, labelcolor=grey, fontsize=9, ncols=5, loc="outside upper center")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _relative(layer: LayerComparison, name: str, side: str) -> float | None:
    view = layer.views.get(name)
    if view is None or not view.scale.rms:
        return None
    value = getattr(view, side).rms / view.scale.rms
    return value if value > 0 and math.isfinite(value) else None
