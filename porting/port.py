"""The one way through: checkpoint, state_dict, key map, Keras weights, file, read back, parity, final name."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting import weights_file
from porting.check import CheckOptions, check_models, open_checkpoint
from porting.checkpoint import Checkpoint
from porting.convert import Conversion, convert
from porting.errors import ParityError
from porting.family import Family
from porting.files import check_writable, move_into_place, output_errors, temporary_file, write_text
from porting.frameworks import start_tensorflow
from porting.layout import Array
from porting.parity import ParityReport
from porting.progress import SILENT, Progress
from porting.provenance import describe_source, versions
from porting.reports.document import to_json

if TYPE_CHECKING:
    import keras


class FailedParityError(ParityError):
    """A port that was refused its name, with the report that says why."""

    def __init__(self, message: str, report: ParityReport, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.report = report


@dataclass(frozen=True)
class PortResult:
    """What a port has made. `report` is None without a check; `report_path` is where its JSON lies."""

    path: Path
    provenance: dict[str, Any]
    checkpoint: Checkpoint
    conversion: Conversion
    report: ParityReport | None = None
    report_path: Path | None = None


def report_path_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parity.json")


def port(
    family: Family,
    variant: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    ema: bool = False,
    check: bool = True,
    options: CheckOptions | None = None,
    keep_failed: Path | None = None,
    progress: Progress = SILENT,
) -> PortResult:
    """Ports one checkpoint to the file `out`, whose suffix names the format.

    Without `checkpoint`, the variant's official one is fetched. With `check`, the file is written under a
    temporary name, read back through Keras and compared with PyTorch as `options` say; it gets its name only at
    parity, with the report beside it as `OUT.parity.json`.

    Raises SourceError, CheckpointError, KeyMapError, OutputError, or FailedParityError; then `out` is untouched,
    and the refused file is kept as `keep_failed` where that is given.
    """
    suffix = weights_file.suffix_of(out)
    check_writable(out)
    if keep_failed is not None:
        check_writable(keep_failed)
    source, loaded = open_checkpoint(family, variant, checkpoint, ema=ema, progress=progress)
    num_classes = family.num_classes(variant, loaded.state_dict)
    progress("starting TensorFlow")
    start_tensorflow()

    def build() -> keras.Model:
        return family.build_candidate(variant, num_classes)

    progress("converting")
    model: keras.Model | None = build()
    conversion = convert(
        loaded.state_dict,
        family.key_map(variant),
        weights_file.variable_shapes(model),
        hint=_variant_hint(family, variant, loaded),
    )
    provenance: dict[str, Any] = {
        "family": family.name,
        "variant": variant,
        "num_classes": num_classes,
        "source": {**describe_source(source, loaded), "dropped": len(conversion.dropped)},
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "parity": {"status": "not checked"},
    }
    report = None
    with temporary_file(out, suffix) as temporary:
        progress("writing")
        with output_errors(out):
            weights_file.write_weights(temporary, model, conversion.weights)
        model = None
        gc.collect()  # its layers refer to each other in circles, and a large model counts
        if check:
            progress("reading back")
            candidate = weights_file.load_model(temporary, build)
            _refuse_other_weights(candidate, conversion.weights)
            report = check_models(
                family, variant, num_classes, loaded.state_dict, candidate, options or CheckOptions(), progress
            )
            provenance["parity"] = _verdict(report)
            report = replace(report, context=provenance)
        with output_errors(out):
            weights_file.write_provenance(temporary, provenance)
        if report is not None and not report.passed:
            if keep_failed is not None:
                move_into_place(temporary, keep_failed)
            raise _refusal(out, report, keep_failed)
        move_into_place(temporary, out)
    if report is None:
        # A report of an earlier port must not vouch for this file.
        report_path_of(out).unlink(missing_ok=True)
        return PortResult(out, provenance, loaded, conversion)
    write_text(report_path_of(out), to_json(report))
    return PortResult(out, provenance, loaded, conversion, report, report_path_of(out))


def _variant_hint(family: Family, variant: str, loaded: Checkpoint) -> str:
    guess = family.guess_variant(loaded.state_dict)
    if guess is not None and guess != variant:
        return f"These tensors are those of {family.name} {guess}: use --variant {guess}."
    return f"Expected the weights of {family.name} {variant} under the official names; see `van-port inspect`."


def _refuse_other_weights(candidate: keras.Model, weights: Mapping[str, Array]) -> None:
    """What Keras read must be, bit for bit, what was meant to be written."""
    differing = [v.path for v in candidate.weights if not np.array_equal(np.asarray(v), weights[v.path])]
    if differing:
        raise ParityError(
            f"{len(differing)} weights read back from the file differ from those written, first {differing[0]}",
            hint="The disk or this version of Keras is at fault; please report it.",
        )


def _verdict(report: ParityReport) -> dict[str, Any]:
    worst, logits = report.worst, report.logits
    return {
        "status": "passed" if report.passed else "failed",
        "layers": len(report.layers),
        "worst_layer": worst.source,
        "worst_ratio": worst.ratio if math.isfinite(worst.ratio) else None,
        "max_ratio": report.limits.max_ratio,
        "samples": report.input_shapes[0][0],
        "top1_agreement": logits.top1_agreement if logits else None,
        "stress_runs": len(report.stress),
    }


def _refusal(out: Path, report: ParityReport, kept: Path | None) -> FailedParityError:
    first = report.first_divergence
    under_stress = next((run for run in report.stress if not run.passed), None)
    if first is not None:
        reason = f"not at parity; first divergence: {first}"
    elif report.audit is not None and report.audit.differences:
        reason = f"a setting differs: {report.audit.differences[0]}"
    elif under_stress is not None:
        reason = f"not at parity under stress, {under_stress.name}: {under_stress.first_divergence}"
    else:
        reason = "nothing could be compared"
    hint = f"The refused file is {kept}." if kept else "Keep the refused file with --keep-failed FILE."
    return FailedParityError(f"{out} was not written: {reason}", report, hint=hint)
