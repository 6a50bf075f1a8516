"""The one way through: checkpoint, state_dict, key map, Keras weights, file, read back, parity, final name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting import weights_file
from porting.checkpoint import Checkpoint, read_checkpoint
from porting.convert import Conversion, convert, to_float32
from porting.data import weights_folder
from porting.errors import ParityError
from porting.family import Family
from porting.files import check_writable, move_into_place, output_errors, temporary_file, write_text
from porting.frameworks import start_tensorflow
from porting.images import find_images, load_images
from porting.layout import Array
from porting.parity import DEFAULT_MAX_RATIO, ParityReport, check_parity
from porting.progress import SILENT, Progress
from porting.sources import Source, fetch, find_source

if TYPE_CHECKING:
    import keras
    from torch import nn

# Parity inputs of 64x64 pixels that run at once; larger images run one by one.
_PIXELS_AT_ONCE = 8 * 64 * 64
_VERSIONED = ("van-port", "torch", "tensorflow", "tensorflow-cpu", "keras", "numpy", "h5py")


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
    images: Path | None = None,
    samples: int | None = None,
    max_ratio: float = DEFAULT_MAX_RATIO,
    keep_failed: Path | None = None,
    progress: Progress = SILENT,
) -> PortResult:
    """Ports one checkpoint to the file `out`, whose suffix names the format.

    Without `checkpoint`, the variant's official one is fetched. With `check`, the file is written under a
    temporary name, read back through Keras and compared with PyTorch on `samples` images of the folder `images`
    (by default the embedded ones: all for a small input, four for a large one); it gets its name only at parity,
    with the report beside it as `OUT.parity.json`.

    Raises SourceError, CheckpointError, KeyMapError, OutputError, or FailedParityError; then `out` is untouched,
    and the refused file is kept as `keep_failed` where that is given.
    """
    suffix = weights_file.suffix_of(out)
    check_writable(out)
    if keep_failed is not None:
        check_writable(keep_failed)
    source = find_source(family.name, variant)
    if checkpoint is None:
        with progress.paused():  # the hub's client draws a bar of its own
            path = fetch(source)
    else:
        path = checkpoint
    progress("reading the checkpoint")
    loaded = read_checkpoint(path, ema=ema)
    num_classes = family.num_classes(variant, loaded.state_dict)
    progress("starting TensorFlow")
    start_tensorflow()

    def build() -> keras.Model:
        return family.build_candidate(variant, num_classes)

    progress("converting")
    conversion = convert(
        loaded.state_dict,
        family.key_map(variant),
        weights_file.variable_shapes(build()),
        hint=_variant_hint(family, variant, loaded),
    )
    provenance = _provenance(family, variant, num_classes, source if checkpoint is None else None, loaded, conversion)
    report = None
    with temporary_file(out, suffix) as temporary:
        progress("writing")
        with output_errors(out):
            weights_file.write_weights(temporary, build, conversion.weights)
        if check:
            progress("reading back")
            candidate = weights_file.load_model(temporary, build)
            _refuse_other_weights(candidate, conversion.weights)
            reference = load_reference(family, variant, num_classes, loaded.state_dict)
            batch = _parity_images(family, variant, images, samples)
            report = check_parity(
                reference,
                candidate,
                batch,
                pairs={pair.source: pair.target for pair in family.key_map(variant).layers},
                max_ratio=max_ratio,
                batch_size=max(1, _PIXELS_AT_ONCE // (batch.shape[1] * batch.shape[2])),
                progress=progress,
            )
            provenance["parity"] = _verdict(report)
            report.context.update(provenance)
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
    write_text(report_path_of(out), report.to_json())
    return PortResult(out, provenance, loaded, conversion, report, report_path_of(out))


def load_reference(family: Family, variant: str, num_classes: int, state_dict: Mapping[str, Array]) -> nn.Module:
    """The PyTorch model with the checkpoint's weights, loaded by PyTorch itself and not from the conversion."""
    import torch

    reference = family.build_reference(variant, num_classes)
    tensors = {name: torch.from_numpy(np.array(_float32_or_integer(array))) for name, array in state_dict.items()}
    reference.load_state_dict(tensors, strict=True)
    return reference.eval()


def _float32_or_integer(array: Array) -> Array:
    return array if np.issubdtype(array.dtype, np.integer) else to_float32(array)


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


def _parity_images(family: Family, variant: str, folder: Path | None, samples: int | None) -> Array:
    preprocessing = family.preprocessing(variant)
    paths = find_images(folder if folder is not None else weights_folder() / "parity_images")
    if samples is None:
        samples = len(paths) if preprocessing.input_size <= 64 else 4
    # Spread over the folder: its names may be sorted by class.
    chosen = np.linspace(0, len(paths) - 1, min(samples, len(paths))).round().astype(int)
    return load_images([paths[index] for index in chosen], preprocessing)


def _provenance(
    family: Family,
    variant: str,
    num_classes: int,
    source: Source | None,
    loaded: Checkpoint,
    conversion: Conversion,
) -> dict[str, Any]:
    return {
        "family": family.name,
        "variant": variant,
        "num_classes": num_classes,
        "source": {
            "name": source.label if source else loaded.path.name,
            "sha256": loaded.sha256,
            "license": source.license if source else "unknown: the checkpoint was given by path",
            "format": loaded.format,
            "wrapper": loaded.wrapper,
            "prefixes": loaded.prefixes,
            "ema": loaded.is_ema,
            "dropped": len(conversion.dropped),
        },
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "parity": {"status": "not checked"},
    }


def _versions() -> dict[str, str]:
    """Versions of what took part; TensorFlow goes by several names, so a name that is not installed is left out."""
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    return {name: metadata.version(name) for name in _VERSIONED if name in installed}


def _verdict(report: ParityReport) -> dict[str, Any]:
    return {
        "status": "passed" if report.passed else "failed",
        "layers": len(report.comparisons),
        "worst_layer": report.worst.source,
        "worst_ratio": report.worst.ratio if math.isfinite(report.worst.ratio) else None,
        "max_ratio": report.max_ratio,
        "samples": report.logits.samples,
        "top1_agreement": report.logits.top1_agreement,
    }


def _refusal(out: Path, report: ParityReport, kept: Path | None) -> FailedParityError:
    first = report.first_divergence
    if first is None:
        message = f"{out} was not written: nothing could be compared"
    else:
        reason = first.problem or f"{first.ratio:.3g} times PyTorch's own rounding, {report.max_ratio:g} allowed"
        message = f"{out} was not written: not at parity from {first.source} on: {reason}"
    hint = f"The refused file is {kept}." if kept else "Keep the refused file with --keep-failed FILE."
    return FailedParityError(message, report, hint=hint)
