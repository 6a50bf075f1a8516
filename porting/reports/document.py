"""The report as a versioned JSON document, out and in again.

schema_version   3; a reader refuses any other
passed           the verdict with the limits below; objections lists every reason why it is not parity
name             "as ported", or the name of a stress run
problem          why nothing could be compared, else ""
layers           in data flow: {source, target, kind, shape, expected_dtype, actual_dtype, views, difference,
                 rewritten}
  views          exact, float32: {scale, expected_error, actual_error, problem, usual_rounding, roundoff, ratio}, the
                 first three as {max, rms}; ratio is derived, and read by nobody
  difference     Keras in float32 against PyTorch in float64: see porting.parity.report.Difference
  rewritten      how a layer was written in another way, else ""
culprits         in data flow: {layer, target, reason, relative, is_input, culprit, diagnosis}
  diagnosis      {layer, cause, confidence, unexplained, checked, pattern}, or null
audit            {layers, settings, differences: [{layer, setting, expected, actual, advice, training, counts}]}, or
                 null
verified         {weights, verified, unverified, differing, through_layers, compared_bits}, or null
loud             {what, relative, limit}, or null
exact_model      how the Keras model became float64; float32_inside names layers that compute in float32 all the same
axes, notes      sentences on orders of axes, and on what was written in another way
precision        what the Keras model computes in
limits           {max_ratio, atol, rtol, per_layer, max_exact_ratio}
input_shapes     one shape an input, with the number of samples first
logits           {samples, top1_agreement, top5_agreement, max_probability_change}, or null
unpaired_source  PyTorch modules that ran and have no Keras tensor; unpaired_target the other way round
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

import msgspec

from porting.errors import ReportError
from porting.files.atomic import REPORT_SUFFIX, open_regular, sha256_of
from porting.parity.report import LayerComparison, ParityReport

SCHEMA_VERSION = 3
_MAX_BYTES = 64 << 20


def to_json(report: ParityReport) -> str:
    """The whole report; `from_json` gives it back."""
    return json.dumps(encoded(to_document(report)), indent=1, allow_nan=False) + "\n"


def to_document(report: ParityReport) -> dict[str, Any]:
    """The report as plain values, infinities and all."""
    own = asdict(report)
    own["limits"]["per_layer"] = dict(report.limits.per_layer)
    own["layers"] = [layer_document(layer) for layer in report.layers]
    own["stress"] = [to_document(each) for each in report.stress]
    for culprit, found in zip(own["culprits"], report.culprits, strict=True):
        culprit["culprit"] = found.culprit
        if found.diagnosis is not None:
            culprit["diagnosis"]["confidence"] = found.diagnosis.confidence
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": report.passed,
        "objections": report.objections,
        **own,
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


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def decoded(value: Any) -> Any:
    """What `encoded` gave, with the numbers as they were."""
    if isinstance(value, dict):
        return {decoded(key): decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if isinstance(value, str):
        # A lone half of a pair of surrogates is no text that could be written again.
        return _NOT_FINITE.get(value, value.encode("utf-8", "backslashreplace").decode())
    return value


def read_report(path: Path) -> ParityReport:
    """The report in a JSON file; raises ReportError when it is none, or of another schema."""
    try:
        with open_regular(path) as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ReportError(
                f"larger than {_MAX_BYTES >> 20} MiB, which no report is",
                hint="Give the JSON report that a port or a check wrote.",
            )
        return from_json(text.decode("utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file", hint="A port and a check write one: OUT.parity.json.") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ReportError as error:
        raise ReportError(f"{path}: {error.message}", hint=error.hint) from None


def from_json(text: str) -> ParityReport:
    """The report that `to_json` wrote; raises ReportError for anything else."""
    hint = "Make it again with this version: van-port check."
    try:
        document = decoded(json.loads(text))
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise ReportError(f"a report of schema {version}, this version reads {SCHEMA_VERSION}", hint=hint)
        report = msgspec.convert(document, ParityReport)
        _refuse_unsound(report)
        return report
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReportError(f"not a parity report: {type(error).__name__}: {error}", hint=hint) from None


def _refuse_unsound(report: ParityReport) -> None:
    """Raises ValueError for numbers that no check gives, and that a comparison with a limit would let pass."""
    limits = report.limits
    if not all(number > 0 for number in (limits.max_ratio, limits.max_exact_ratio, *limits.per_layer.values())):
        raise ValueError("a limit is not a positive number")
    for layer in report.layers:
        for name, view in layer.views.items():
            distances = (view.scale, view.expected_error, view.actual_error)
            numbers = [number for each in distances for number in (each.max, each.rms)]
            if not view.problem and not all(number >= 0 for number in (*numbers, view.usual_rounding, view.roundoff)):
                raise ValueError(f"the view {name} of {layer.source} has a distance that is no distance")
    for run in report.stress:
        _refuse_unsound(run)


def file_beside(report: ParityReport, path: Path) -> str:
    """What the report at `path` says of the file that lies beside it: "" where it is of that one, or says nothing.

    Raises ReportError where that is another file than the report is of.
    """
    identity = report.context.get("file")
    if not isinstance(identity, Mapping) or not isinstance(identity.get("name"), str):
        return "This report does not say which file it is of."
    name, expected = str(identity["name"]), str(identity.get("sha256"))
    beside = path.with_name(name) if Path(name).name == name and name not in {"", ".", ".."} else None
    own = path.name.removesuffix(REPORT_SUFFIX)
    if own.encode("utf-8", "backslashreplace").decode() == name:  # a name that is no text
        beside = path.with_name(own)
    if beside is None or not beside.exists():
        return f"The file that this report is of, {name}, is not beside it."
    try:
        found = sha256_of(beside)
    except OSError as error:
        return f"The file that this report is of, {name}, cannot be read: {error.strerror or error}"
    if found != expected:
        raise ReportError(
            f"{path}: this report is of another file than {beside}, whose sha256 is {found[:12]} and not "
            f"{expected[:12]}: it proves nothing of it",
            hint="Check the file as it is: van-port check --weights FILE.",
        )
    return ""
