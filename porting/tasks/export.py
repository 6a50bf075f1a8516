"""Export a file of Keras weights for other runtimes. The result is checked in its runtime before it gets its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from porting.errors import ExportError, OutputError, ParityError, PortingError, failed_parity
from porting.evaluation.labels import IMAGENET, IMAGENET_CLASSES, read_labels, usual_labels
from porting.exporting import FORMATS, NEEDED, open_runtime, write
from porting.exporting.base import Exportable
from porting.exporting.ends import Ends
from porting.exporting.usage import Usage, usage_of
from porting.families.base import Family
from porting.families.given import GivenFamily
from porting.files import weights_file
from porting.files.atomic import output_errors
from porting.files.result import pending_result
from porting.files.survey import survey_file
from porting.kinds.transforms import Array
from porting.models.frameworks import start_tensorflow, without_logs
from porting.models.images import Preprocessing
from porting.models.inputs import Inputs, image_inputs, make_inputs
from porting.models.precision import PRECISIONS, in_precision
from porting.models.traverse import named_variables
from porting.parity.bits import compare_bits
from porting.parity.exported import compare_outputs
from porting.parity.report import Limits, ParityReport, refusal
from porting.progress import SILENT, Progress
from porting.reports.document import to_json
from porting.run import describe_run
from porting.sources.table import GIVEN_BY_ADDRESS, GIVEN_BY_PATH
from porting.tasks.case import (
    Case,
    Reading,
    case_of_file,
    files_of,
    open_case,
    refuse_another,
    refuse_without_checkpoint,
)
from porting.tasks.options import CheckOptions
from porting.wording import counted, reason_of

if TYPE_CHECKING:
    import keras
    from torch import nn

    from porting.exporting.base import Runtime

_OF_A_SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}


@dataclass(frozen=True)
class ExportResult:
    """The result of an export: its file, size in bytes, operation counts, usage, and parity report."""

    path: Path
    form: str
    precision: str
    size: int
    operators: Counter[str]
    usage: Usage
    report: ParityReport | None = None
    report_path: Path | None = None


def export(
    family: Family,
    variant: str,
    weights: Path,
    out: Path,
    *,
    form: str,
    precision: str = "float32",
    checkpoint: str | Path | None = None,
    input_size: int | None = None,
    fused: bool = True,
    split_kernels: bool | None = None,
    with_preprocessing: bool = False,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    with_softmax: bool = False,
    labels: Path | None = None,
    check: bool = True,
    options: CheckOptions | None = None,
    progress: Progress = SILENT,
    **reading: Unpack[Reading],
) -> ExportResult:
    """Export a ported file as a SavedModel (a folder), for LiteRT or as ONNX.

    `checkpoint` and `reading` are those of `porting.tasks.port.port`; only a check needs them. `precision` is
    float32, float16 or int8; int8 calibrates on the images of `options`. In a SavedModel it applies only
    to the stored weights, and all computation is in float32. An image model takes `(N, input_size, input_size, 3)`
    (LiteRT: N = 1); the default size is the variant's. A token model takes sequences of `input_size` tokens in LiteRT,
    by default as long as those of its check, and of any length in the other formats. `fused` applies the family's
    fusions. `split_kernels` splits large depthwise kernels for LiteRT into sums of smaller ones, which run faster on
    its CPU kernels; the default is on for float32 and float16.

    `with_preprocessing` puts the normalisation of images into the graph, which then takes RGB from 0 to 255, and
    `with_softmax` a softmax behind the logits. `normalization` is the mean and the standard deviation per channel, of
    values from 0 to 1, that a model of images was trained with, if it is not the family's own. `labels` is a file with
    the names of the classes, one per line, for the artifact's metadata, or "imagenet". By default they are those of a
    published checkpoint; nobody knows what another one was trained on.

    With `check`, the artifact is loaded in its own runtime and compared with the PyTorch model of the checkpoint, in
    units of the error that this precision causes in PyTorch. If it passes, it gets its name, with the report beside
    it. The weights must be the checkpoint's bit by bit. Without `check`, no checkpoint is read: the weights file
    determines what to build.

    Raises SourceError, CheckpointError, KeyMapError, WeightsFileError, OutputError, ExportError if the model cannot be
    converted or run, or ParityError. `out` is then unchanged.
    """
    _check_arguments(form, precision, out)
    if with_preprocessing and normalization is None and not family.knows_preprocessing:
        raise ExportError(
            "--with-preprocessing needs the normalisation that this model was trained with",
            hint="State it for values from 0 to 1: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225.",
        )
    weights_file.require_file(weights)
    options = options or CheckOptions()
    if split_kernels is None:
        split_kernels = precision != "int8"
    inputs = {"--weights": [weights], "--checkpoint": files_of(checkpoint)}
    with pending_result(out, FORMATS[form], inputs=inputs, folder=form == "saved_model") as pending:
        survey = survey_file(weights)
        refuse_another(family, variant, survey, weights)
        if check:
            if checkpoint is None:
                refuse_without_checkpoint(family, variant, survey, weights)
            case = open_case(family, variant, checkpoint, progress, **reading)
            case.refuse_other_tensors()
        else:
            case = case_of_file(family, variant, survey, layout=reading.get("layout"))
        progress("starting TensorFlow")
        start_tensorflow()
        progress("reading the weights")
        model = case.load_candidate(weights)
        if check:
            _refuse_other_weights(case, model, weights)
        if not getattr(model, "inputs", None):
            raise ExportError(
                f"{case.how_to_build}: a subclassed Keras model, which does not declare its inputs and outputs",
                hint="Wrap it: inputs = keras.Input(...); keras.Model(inputs, model(inputs)).",
            )
        given = case.check_inputs(options.samples)
        if precision == "int8" and given is not None and case.family.inputs_are_random:
            raise ExportError(
                "int8 is calibrated on inputs, and random ones say nothing of the range of real ones",
                hint="Give some real inputs with --inputs FILE.npz.",
            )
        samples = _samples(case, model, given, options, input_size)
        if fused:
            progress("fusing")
            with _export_errors("the model cannot be fused"):
                model = case.fuse(model, form)
        preprocessing = case.preprocessing if given is None else None
        if normalization is not None:
            preprocessing = _stated(normalization, samples)
        classes = _classes(case, model)
        if with_preprocessing and preprocessing is None:
            raise ExportError("--with-preprocessing is for families of image models", hint="Leave it out.")
        if not classes and (with_softmax or labels is not None):
            option = "--with-softmax" if with_softmax else "--labels"
            raise ExportError(f"{option} is for classifiers, whose result is a row of logits", hint="Leave it out.")
        ends = Ends(preprocessing if with_preprocessing else None, with_softmax)
        exportable = Exportable(model, ends.unprepared(samples), ends)
        usage = usage_of(
            exportable,
            fixed=form == "litert",
            preprocessing=preprocessing,
            facts=_facts(case, precision, survey.provenance, classes=classes, check=check),
            labels=_labels(case, classes, labels, is_published=_is_published(_source(case, survey.provenance))),
            classifies=bool(classes and (case.num_classes or with_softmax)),
        )
        progress(f"exporting to {form}")
        with (
            without_logs("absl", "tf2onnx", "tensorflow", "root"),
            output_errors(out),
            _export_errors(f"the model cannot be converted for {form}"),
        ):
            write(form, exportable, pending.path, precision, usage=usage, split_kernels=split_kernels)
        report = None
        # The result of the last layer is also the model's output, which is compared as such.
        last = {tensor._keras_history.operation.name for tensor in model.outputs}
        layers = [layer.name for layer in model.layers if layer.name not in last]
        with open_runtime(form, pending.path, layers) as runtime:
            operators = runtime.operators()
            if check:
                report = _compare(case, form, precision, runtime, exportable, options.limits, progress)
        if report is None:
            report_path = pending.commit(None)
        else:
            how = {"fused": fused} | ({"split_kernels": split_kernels} if form == "litert" else {})
            how |= {"with_preprocessing": with_preprocessing, "with_softmax": with_softmax}
            exported = {"format": form, "precision": precision, **how, "operators": dict(operators)}
            facts = {"weights": weights.name, "export": exported, "file": pending.identity()}
            context = {**describe_run(), **case.describe(), **facts}
            report = replace(report, context=context)
            if not report.passed:
                raise failed_parity(f"{out} was not written: {refusal(report)}", report)
            report_path = pending.commit(to_json(report))
    return ExportResult(out, form, precision, _size(out), operators, usage, report, report_path)


def _refuse_other_weights(case: Case, model: keras.Model, weights: Path) -> None:
    """Raise ParityError if a weight is not the checkpoint's. In low precision, an export would hide such a mistake."""
    differing = compare_bits(case.load_reference(), named_variables(model), case.reference_map).differing
    if differing:
        raise ParityError(
            f"{weights}: {counted(len(differing), 'weight')} not the checkpoint's: {next(iter(differing.values()))}",
            hint="`van-port check` shows what it changes. If the weights are meant so, such as after fine-tuning, port "
            "them back with `van-port revert`, and give its result as --checkpoint.",
        )


def _stated(normalization: tuple[Sequence[float], Sequence[float]], samples: Inputs) -> Preprocessing:
    """The preprocessing that the caller states. Raises ExportError unless the model takes images of these channels."""
    mean, std = (tuple(map(float, each)) for each in normalization)
    shapes = [array.shape for array in samples.candidate if array.dtype.kind == "f"]
    if len(samples.candidate) > 1 or len(shapes) != 1 or len(shapes[0]) != 4:
        raise ExportError("--mean and --std are for models of one image", hint="Leave them out.")
    _, height, _, channels = shapes[0]
    if not len(mean) == len(std) == channels:
        raise ExportError(
            f"--mean has {counted(len(mean), 'number')} and --std {len(std)}, and the images have {channels} channels",
            hint="Give one number per channel, such as --mean 0.485,0.456,0.406.",
        )
    if not all(each > 0 for each in std):
        raise ExportError("--std has a number that is not above 0", hint="Give the deviations of values from 0 to 1.")
    return Preprocessing(height, height, mean, std)


def _facts(
    case: Case, precision: str, provenance: Mapping[str, Any] | None, *, classes: int, check: bool
) -> dict[str, Any]:
    """Facts to store in the exported file. They may state parity, because a file that fails is never named."""
    known = _source(case, provenance)
    return {
        **case.family.facts(case.spec),
        "num_classes": classes,
        "precision": precision,
        "checkpoint_sha256": str(known.get("sha256", "unknown")),
        "license": str(known.get("license", "unknown")),
        "parity_with_pytorch": "passed" if check else "not checked",
    }


def _source(case: Case, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of the checkpoint: from the check, or else from the weights file."""
    source = case.describe().get("source") or (provenance or {}).get("source") or {}
    return source if isinstance(source, dict) else {}  # a file's own metadata is not trusted


def _is_published(source: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is one of the family's table."""
    return bool(source) and source.get("license") not in {GIVEN_BY_PATH, GIVEN_BY_ADDRESS}


def _classes(case: Case, model: keras.Model) -> int:
    """The number of classes of a classifier, whose only result is a row of logits; 0 for other models."""
    shapes = [tuple(tensor.shape) for tensor in model.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        return 0
    found = int(shapes[0][1] or 0)
    # Only its owner knows whether a model of one's own is a classifier.
    return found if found == case.num_classes or isinstance(case.family, GivenFamily) else 0


def _labels(case: Case, classes: int, path: Path | None, *, is_published: bool) -> tuple[str, ...]:
    """The names of the classes in order; empty if they are unknown. Raises as `read_labels` does."""
    if path is not None and str(path) == IMAGENET and not path.exists() and classes == IMAGENET_CLASSES:
        known = usual_labels(classes, ())
    elif path is not None:
        known = read_labels(path, classes)
    elif not case.num_classes or not is_published:
        return ()  # a model of one's own may be no classifier, and of other classes
    else:
        known = usual_labels(classes, case.family.class_names(case.spec))
    return tuple(known.name(number) for number in range(classes)) if known.names else ()


def _samples(case: Case, model: keras.Model, given: Any, options: CheckOptions, input_size: int | None) -> Inputs:
    """The inputs to run the artifact on: images if `given` is None, else the given arrays.

    For token sequences, `input_size` is their length; the check's tokens repeat to fill it.
    """
    if given is None:
        return image_inputs(options.load_images(case.preprocessing, input_size))
    if input_size is not None:
        if not isinstance(given, dict) or not any(_is_sequence(array) for array in given.values()):
            raise ExportError(
                "--input-size applies only to models of images or tokens",
                hint="Give the inputs with --inputs FILE.npz.",
            )
        given = {
            name: np.resize(array.T, (input_size, len(array))).T if _is_sequence(array) else array
            for name, array in given.items()
        }
    return make_inputs(case.family.build_reference(case.spec), model, given)


def _is_sequence(array: Array) -> bool:
    return array.ndim == 2 and array.dtype.kind in "iu"


def _compare(
    case: Case, form: str, precision: str, runtime: Runtime, given: Exportable, limits: Limits, progress: Progress
) -> ParityReport:
    """Compare the artifact, in its own runtime, with the PyTorch model of the case."""
    reference = case.load_reference()
    given.ends.add_to(reference)

    def run(sample: Inputs) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        with _export_errors(f"the {form} runtime cannot run the result"):
            results, layers = runtime.run(dict(zip(given.names, sample.candidate, strict=True)))
        return {key: results[name] for key, name in given.result_names().items()}, layers

    report = compare_outputs(
        reference,
        run,
        given.inputs,
        rounded=_in_precision(reference, form, precision, given.inputs),
        limits=limits,
        name=f"{form}, {precision}",
        progress=progress,
    )
    return replace(report, precision=precision)


def _check_arguments(form: str, precision: str, out: Path) -> None:
    import importlib.util

    if form not in FORMATS:
        raise ExportError(f"unknown format {form!r}", hint=f"Choose from {', '.join(FORMATS)}.")
    if precision not in PRECISIONS:
        raise ExportError(f"unknown precision {precision!r}", hint=f"Choose from {', '.join(PRECISIONS)}.")
    if missing := [name for name in NEEDED[form] if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"exporting to {form} needs {', '.join(missing)}", hint="Install them: pip install 'van-port[export]'."
        )
    if FORMATS[form] and out.suffix != FORMATS[form]:
        raise OutputError(f"{out}: the suffix does not match the format", hint=f"Use {FORMATS[form]}.")
    if form == "saved_model":
        if not out.name:
            raise OutputError(f"{out} has no name", hint="Give the SavedModel's folder a name.")
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= _OF_A_SAVED_MODEL):
            raise OutputError(f"{out} exists and is not a SavedModel", hint="Choose another folder name.")


def _in_precision(reference: nn.Module, form: str, precision: str, inputs: Inputs) -> nn.Module | None:
    """The reference rounded as `form` rounds it: a SavedModel and float16 LiteRT (on a CPU) round only the weights."""
    if precision == "float32":
        return None
    weights_only = form == "saved_model" or (form == "litert" and precision == "float16")
    return in_precision(reference, precision, inputs, results=not weights_only)


@contextmanager
def _export_errors(what: str) -> Iterator[None]:
    """Turn any error of a converter or runtime into an ExportError."""
    try:
        yield
    except (PortingError, OSError):
        raise
    except Exception as error:
        raise ExportError(f"{what}: {reason_of(error)}") from None


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())
