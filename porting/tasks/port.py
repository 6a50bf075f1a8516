"""Port a checkpoint: state_dict, key map, Keras weights, file, read back, parity check, final name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from porting.errors import FailedParityError, ParityError, failed_parity
from porting.families.base import Family
from porting.files import weights_file
from porting.files.atomic import move_into_place, output_errors
from porting.files.result import PendingResult, pending_result, refuse_result_clashes
from porting.kinds.transforms import Array
from porting.mapping.convert import Conversion, convert
from porting.models.frameworks import return_free_memory, start_tensorflow, without_random_weights
from porting.models.traverse import named_variables
from porting.parity.report import FLOAT32, ParityReport, refusal
from porting.progress import SILENT, Progress
from porting.reports.document import to_json
from porting.run import describe_run
from porting.tasks.case import Case, Reading, files_of, open_case
from porting.tasks.check import compare_models
from porting.tasks.options import CheckOptions
from porting.wording import counted

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class PortResult:
    """The result of a port. `report` is None without a check; `report_path` is its JSON file."""

    path: Path
    provenance: dict[str, Any]
    case: Case
    conversion: Conversion
    report: ParityReport | None = None
    report_path: Path | None = None


def port(
    family: Family,
    variant: str,
    out: Path,
    *,
    checkpoint: str | Path | None = None,
    check: bool = True,
    options: CheckOptions | None = None,
    keep_failed: Path | None = None,
    progress: Progress = SILENT,
    **reading: Unpack[Reading],
) -> PortResult:
    """Port one checkpoint to the file `out`, whose suffix determines the format.

    `checkpoint` is a path or an address; the default is the variant's official file. `reading` says how to read it, by
    the names in `porting.tasks.case.Reading`: by default, its publisher is recognised from the tensor names. With
    `check`, the file is written under a temporary name, read back through Keras and compared with PyTorch according to
    `options`. It gets its name only at parity, with the report beside it as `OUT.parity.json`.

    Raises SourceError, CheckpointError, KeyMapError, OutputError, or FailedParityError. `out` is then unchanged. A
    file that fails the check is moved to `keep_failed`, if given.
    """
    suffix = weights_file.suffix_of(out)
    options = options or CheckOptions()
    inputs = {"--checkpoint": files_of(checkpoint)}
    outputs = {} if keep_failed is None else {"--keep-failed": [keep_failed]}
    with pending_result(out, suffix, inputs=inputs, outputs=outputs) as pending:
        case = open_case(family, variant, checkpoint, progress, **reading)
        if case.checkpoint is not None:  # a download's file is known only now
            refuse_result_clashes(out, {"the checkpoint": case.checkpoint.files}, outputs)
        return _port(case, pending, check=check, options=options, keep_failed=keep_failed, progress=progress)


def _port(
    case: Case,
    pending: PendingResult,
    *,
    check: bool,
    options: CheckOptions,
    keep_failed: Path | None,
    progress: Progress,
) -> PortResult:
    out, temporary = pending.out, pending.path
    progress("converting")
    case.refuse_other_tensors()
    conversion = convert(
        case.state_dict,
        case.key_map,
        case.shapes,
        where=case.where,
        hint=case.variant_hint,
        allow_non_finite=options.allow_non_finite,
    )
    provenance: dict[str, Any] = {
        **case.describe(),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "non_finite": list(conversion.non_finite),
        "parity": {"status": "not checked"},
    }
    provenance["source"]["dropped"] = len(conversion.dropped)
    report = None
    _write(temporary, out, case, conversion, progress)
    if check:
        progress("starting TensorFlow")
        start_tensorflow()
        progress("reading back")
        candidate = weights_file.load_model(temporary, case.build_candidate)
        _refuse_other_weights(candidate, conversion.weights)
        return_free_memory()
        report = compare_models(case, candidate, options, progress, built_here=True)
        provenance["parity"] = _verdict(report)
    with output_errors(out):
        weights_file.write_provenance(temporary, provenance)
    if report is None:
        pending.commit(None)
        return PortResult(out, provenance, case, conversion)
    report = replace(report, context={**describe_run(), **provenance, "file": pending.identity()})
    if not report.passed:
        if keep_failed is not None:
            move_into_place(temporary, keep_failed)
        raise _refusal(out, report, keep_failed)
    return PortResult(out, provenance, case, conversion, report, pending.commit(to_json(report)))


def _write(temporary: Path, out: Path, case: Case, conversion: Conversion, progress: Progress) -> None:
    """Write the weights. Only .keras and .weights.h5 need Keras for this."""
    if weights_file.suffix_of(out) == ".h5":
        progress("writing")
        with output_errors(out):
            layers = case.layers
            weights_file.write_h5(temporary, layers, conversion.weights)
        return
    progress("starting TensorFlow")
    start_tensorflow()
    progress("writing")
    with output_errors(out), without_random_weights():
        weights_file.write_weights(temporary, case.build_candidate(), conversion.weights)
    return_free_memory()  # a model's layers form reference cycles, and a large model takes much memory


def _refuse_other_weights(candidate: keras.Model, weights: Mapping[str, Array]) -> None:
    """Raise ParityError unless the weights that Keras read match the converted weights bit for bit."""
    found = named_variables(candidate)
    differing = [name for name, variable in found.items() if not _same(np.asarray(variable), weights[name])]
    if differing:
        raise ParityError(
            f"read back from the file, {counted(len(differing), 'weight')} not as written; the first is {differing[0]}",
            hint="The cause is the disk or this version of Keras. Please report it.",
        )


def _same(one: Array, other: Array) -> bool:
    return np.array_equal(one, other) or np.array_equal(one, other, equal_nan=True)


def _verdict(report: ParityReport) -> dict[str, Any]:
    worst, logits, exact = report.worst if report.layers else None, report.logits, report.worst_exact
    ratio = worst.views[FLOAT32].ratio if worst is not None and FLOAT32 in worst.views else None
    return {
        "status": "passed" if report.passed else "failed",
        "layers": len(report.layers),
        "exact_error": exact.relative_error if exact is not None and math.isfinite(exact.relative_error) else None,
        "worst_layer": worst.source if worst is not None else None,
        "worst_ratio": ratio if ratio is not None and math.isfinite(ratio) else None,
        "max_ratio": report.limits.max_ratio,
        "samples": report.input_shapes[0][0] if report.input_shapes else 0,
        "top1_agreement": logits.top1_agreement if logits else None,
        "stress_runs": len(report.stress),
    }


def _refusal(out: Path, report: ParityReport, kept: Path | None) -> FailedParityError:
    hint = f"The failed file is {kept}." if kept else "--keep-failed FILE keeps a file that fails."
    return failed_parity(f"{out} was not written: {refusal(report)}", report, hint=hint)
