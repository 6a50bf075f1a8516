"""Write and read the report as a versioned JSON document.

schema_version   3; readers refuse other versions
passed           the verdict with the limits below; objections lists every reason against parity
name             "as ported", or the name of a stress run
problem          why nothing could be compared, else ""
layers           in order of data flow: {source, target, kind, shape, expected_dtype, actual_dtype, views, difference,
                 rewritten, is_output}
  views          exact, float32: {scale, expected_error, actual_error, problem, usual_rounding, roundoff, ratio}, the
                 first three as {max, rms}; ratio is derived, and ignored by readers
  difference     Keras in float32 against PyTorch in float64: see porting.parity.report.Difference
  rewritten      how a layer is implemented differently, else ""
  is_output      whether this is a result of the model; versions before 0.2.0 left it out, and readers look at the name
culprits         in order of data flow: {layer, target, reason, relative, is_input, culprit, diagnosis,
                 feeder}
  diagnosis      {layer, cause, confidence, unexplained, checked, pattern, basis}, or null
audit            {layers, settings, differences: [{layer, setting, expected, actual, advice, training, counts}]}, or
                 null
verified         {weights, verified, unverified, differing, through_layers, compared_bits, details}, or
                 null
loud             {what, relative, limit}, or null
exact_model      how the Keras model became float64; float32_inside names layers that still compute in float32
axes, notes      sentences on orders of axes, and on what is implemented differently
caveats          sentences on what was not compared, or differs without effect
precision        the precision in which the Keras model computes
limits           {max_ratio, atol, rtol, per_layer, max_exact_ratio}
input_shapes     one shape per input, with the number of samples first
logits           {samples, top1_agreement, top5_agreement, max_probability_change}, or null
unpaired_source  PyTorch modules that ran and have no Keras tensor; unpaired_target is the reverse
stress           reports of the same form
context          provenance: family, variant, source, versions, time

Non-finite numbers are the strings "NaN", "Infinity" and "-Infinity", so that the document is strict JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from porting.errors import ReportError, SourceError
from porting.files.atomic import REPORT_SUFFIX, open_regular, sha256_of
from porting.parity.report import OUTPUT, LayerComparison, ParityReport

SCHEMA_VERSION = 3
_MAX_BYTES = 256 << 20


def to_json(report: ParityReport) -> str:
    """Convert the whole report to JSON. `from_json` restores it."""
    return json.dumps(encoded(to_document(report)), indent=1, allow_nan=False) + "\n"


def to_document(report: ParityReport) -> dict[str, Any]:
    """Convert the report to plain values, including infinities."""
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
    """Convert one entry of `layers` to plain values, including infinities."""
    document = asdict(layer)
    for name, view in layer.views.items():
        document["views"][name]["ratio"] = view.ratio
    return document


def encoded(value: Any) -> Any:
    """Replace non-finite numbers with strings."""
    if isinstance(value, Mapping):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def decoded(value: Any) -> Any:
    """Restore the numbers that `encoded` replaced."""
    if isinstance(value, dict):
        return {decoded(key): decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if isinstance(value, str):
        # A lone surrogate could not be written again.
        return _NOT_FINITE.get(value, value.encode("utf-8", "backslashreplace").decode())
    return value


def read_report(path: Path) -> ParityReport:
    """Read a report from a JSON file.

    Raises SourceError if there is no such file, and ReportError if it is not a report or has another schema version.
    """
    with report_text(path, "A port or a check writes it as OUT.parity.json.") as text:
        return from_json(text)


@contextlib.contextmanager
def report_text(path: Path, origin: str) -> Iterator[str]:
    """Read a report's JSON text; a ReportError of the block names the file. `origin` says what writes such a file.

    Raises SourceError if there is no such file, and ReportError if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ReportError(f"larger than {_MAX_BYTES >> 20} MiB, which no report is", hint=origin)
        try:
            decoded_text = text.decode("utf-8")
        except UnicodeDecodeError:
            raise ReportError("not a report: it is no text", hint=origin) from None
        yield decoded_text
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file", hint=origin) from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ReportError as error:
        raise ReportError(f"{path}: {error.message}", hint=error.hint) from None


def from_json(text: str) -> ParityReport:
    """Restore a report that `to_json` wrote; raises ReportError for anything else."""
    hint = "Create it again with this version: van-port check."
    try:
        document = decoded(json.loads(text))
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise ReportError(f"a report of schema {version}; this version reads schema {SCHEMA_VERSION}", hint=hint)
        _mark_outputs(document)
        report = msgspec.convert(document, ParityReport)
        _refuse_unsound(report)
        return report
    except json.JSONDecodeError as error:
        raise ReportError(f"not a parity report: it is no JSON: {error}", hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ReportError(f"not a parity report: {what}", hint=hint) from None


def _mark_outputs(document: Mapping[str, Any]) -> None:
    """Mark the results of the model in a report of a version that knew them by their names."""
    layers, runs = (document.get(name) for name in ("layers", "stress"))
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict):
            layer.setdefault("is_output", str(layer.get("source")).partition("[")[0] == OUTPUT)
    for run in runs if isinstance(runs, list) else ():
        if isinstance(run, dict):
            _mark_outputs(run)


def _refuse_unsound(report: ParityReport) -> None:
    """Raise ValueError for impossible numbers that would pass a comparison with a limit."""
    limits = report.limits
    if not all(number > 0 for number in (limits.max_ratio, limits.max_exact_ratio, *limits.per_layer.values())):
        raise ValueError("a limit is not a positive number")
    for layer in report.layers:
        for name, view in layer.views.items():
            distances = (view.scale, view.expected_error, view.actual_error)
            numbers = [number for each in distances for number in (each.max, each.rms)]
            if not view.problem and not all(number >= 0 for number in (*numbers, view.usual_rounding, view.roundoff)):
                raise ValueError(f"the view {name} of {layer.source} has an invalid distance")
    for run in report.stress:
        _refuse_unsound(run)


def file_beside(report: ParityReport, path: Path) -> str:
    """A remark if the report at `path` cannot be tied to the file beside it; "" if it belongs to that file.

    Raises ReportError if the file beside it is not the file that the report describes.
    """
    identity = report.context.get("file")
    if not isinstance(identity, Mapping) or not isinstance(identity.get("name"), str):
        return "This report does not name its file."
    name, expected = str(identity["name"]), str(identity.get("sha256"))
    beside = path.with_name(name) if Path(name).name == name and name not in {"", ".", ".."} else None
    own = path.name.removesuffix(REPORT_SUFFIX)
    if own.encode("utf-8", "backslashreplace").decode() == name:  # a name with invalid text
        beside = path.with_name(own)
    if beside is None or not beside.exists():
        return f"The file of this report, {name}, is not beside it."
    try:
        found = sha256_of(beside)
    except OSError as error:
        return f"The file of this report, {name}, cannot be read: {error.strerror or error}"
    if found != expected:
        raise ReportError(
            f"{path}: this report belongs to a file other than {beside}, whose sha256 is {found[:12]} and not "
            f"{expected[:12]}: it proves nothing about it",
            hint="Check the file again: van-port check --weights FILE.",
        )
    return ""
