"""The report as a versioned JSON document, out and in again.

schema_version   2; a reader refuses any other
passed           the verdict with the limits below
name             "as ported", or the name of a stress run
first_divergence {layer, culprit, view, reason}, or null
diagnosis        {layer, cause, confidence, unexplained, checked}, or null
limits           {max_ratio, atol, rtol, per_layer}
input_shapes     one shape an input, with the number of samples first
logits           {samples, top1_agreement, top5_agreement, max_probability_change}, or null
audit            {layers, settings, differences: [{layer, setting, expected, actual}]}, or null
unpaired_source  PyTorch modules that ran and have no Keras layer; unpaired_target the other way round
layers           in data flow: {source, target, kind, shape, expected_dtype, actual_dtype, views, difference}
  views          accumulated, isolated, input: {scale, expected_error, actual_error, problem, ratio}, each of the
                 first three as {max, rms}; ratio is derived, and read by nobody; usual_rounding is absent in
                 reports of versions before 0.2 and then 0
  difference     Keras against PyTorch in float32, accumulated: see porting.statistics.Difference
stress           reports of the same form
context          provenance: family, variant, source, versions, time

Numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity", so that the document is strict JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from porting.errors import ReportError
from porting.parity.report import (
    Audit,
    Diagnosis,
    Difference,
    Distance,
    LayerComparison,
    Limits,
    LogitsComparison,
    ParityReport,
    SettingDifference,
    View,
)

SCHEMA_VERSION = 2


def to_json(report: ParityReport) -> str:
    """The whole report; `from_json` gives it back."""
    return json.dumps(encoded(to_document(report)), indent=1, allow_nan=False) + "\n"


def to_document(report: ParityReport) -> dict[str, Any]:
    """The report as plain values, infinities and all."""
    first, cause = report.first_divergence, report.diagnosis
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": report.passed,
        "name": report.name,
        "first_divergence": None if first is None else {**asdict(first), "culprit": first.culprit},
        "diagnosis": None if cause is None else {**asdict(cause), "confidence": cause.confidence},
        "limits": {**asdict(report.limits), "per_layer": dict(report.limits.per_layer)},
        "input_shapes": report.input_shapes,
        "logits": None if report.logits is None else asdict(report.logits),
        "audit": None if report.audit is None else asdict(report.audit),
        "unpaired_source": report.unpaired_source,
        "unpaired_target": report.unpaired_target,
        "context": report.context,
        "layers": [layer_document(layer) for layer in report.layers],
        "stress": [to_document(each) for each in report.stress],
    }


def layer_document(layer: LayerComparison) -> dict[str, Any]:
    """One entry of `layers`, infinities and all."""
    document = asdict(layer)
    for name, view in layer.views.items():
        document["views"][name]["ratio"] = view.ratio
    return document


def encoded(value: Any) -> Any:
    """The same values with those that are not finite as strings."""
    if isinstance(value, Mapping):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return (
        {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value, value)
        if isinstance(value, str)
        else value
    )


def read_report(path: Path) -> ParityReport:
    """The report in a JSON file; raises ReportError when it is none, or of another schema."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file", hint="A port and a check write one: OUT.parity.json.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from None
    except ReportError as error:
        raise ReportError(f"{path}: {error.message}", hint=error.hint) from None


def from_json(text: str) -> ParityReport:
    """The report that `to_json` wrote; raises ReportError for anything else."""
    hint = "Make it again with this version: van-port check."
    try:
        document = _decoded(json.loads(text))
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise ReportError(f"a report of schema {version}, this version reads {SCHEMA_VERSION}", hint=hint)
        return _report(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReportError(f"not a parity report: {type(error).__name__}: {error}", hint=hint) from None


def _report(document: dict[str, Any]) -> ParityReport:
    logits, audit, cause = document["logits"], document["audit"], document["diagnosis"]
    if cause is not None:
        cause = Diagnosis(cause["layer"], cause["cause"], cause["unexplained"], tuple(cause["checked"]))
    return ParityReport(
        layers=tuple(_layer(layer) for layer in document["layers"]),
        unpaired_source=tuple(document["unpaired_source"]),
        unpaired_target=tuple(document["unpaired_target"]),
        logits=None if logits is None else LogitsComparison(**logits),
        input_shapes=tuple(tuple(shape) for shape in document["input_shapes"]),
        limits=Limits(**document["limits"]),
        name=document["name"],
        audit=None if audit is None else _audit(audit),
        diagnosis=cause,
        stress=tuple(_report(each) for each in document["stress"]),
        context=document["context"],
    )


def _audit(document: dict[str, Any]) -> Audit:
    differences = tuple(SettingDifference(**each) for each in document["differences"])
    return Audit(document["layers"], document["settings"], differences)


def _layer(document: dict[str, Any]) -> LayerComparison:
    views = {}
    for name, view in document["views"].items():
        scale, expected, actual = (Distance(**view[key]) for key in ("scale", "expected_error", "actual_error"))
        views[name] = View(scale, expected, actual, view["problem"], view.get("usual_rounding", 0.0))
    difference = {**document["difference"], "worst_index": tuple(document["difference"]["worst_index"])}
    difference["ulp_histogram"] = tuple(difference["ulp_histogram"])
    return LayerComparison(
        **{key: document[key] for key in ("source", "target", "kind", "expected_dtype", "actual_dtype")},
        shape=tuple(document["shape"]),
        views=views,
        difference=Difference(**difference),
    )
