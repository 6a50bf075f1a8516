"""Compare a file of Keras weights with the checkpoint that it should match. A port makes the same comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from porting.errors import FamilyError, OptionError, WeightsFileError
from porting.families.base import Family
from porting.files import weights_file
from porting.files.atomic import sha256_of
from porting.files.survey import Survey, survey_file
from porting.kinds.transforms import Array
from porting.mapping.convert import refuse_non_finite
from porting.models.frameworks import start_tensorflow, without_random_weights
from porting.models.inputs import moved
from porting.models.traverse import named_variables
from porting.parity.compare import check_parity
from porting.parity.report import Limits, ParityReport
from porting.parity.stress import stress_cases
from porting.parity.training import compare_masks, compare_training, training_batch
from porting.progress import SILENT, Progress
from porting.run import describe_run
from porting.tasks.case import Case, Reading, open_case, refuse_another, refuse_without_checkpoint
from porting.tasks.options import CheckOptions, batch_size_of

if TYPE_CHECKING:
    import keras
    from torch import nn


def check(
    family: Family,
    variant: str,
    weights: Path,
    *,
    checkpoint: str | Path | None = None,
    options: CheckOptions | None = None,
    progress: Progress = SILENT,
    **reading: Unpack[Reading],
) -> ParityReport:
    """Compare a file of Keras weights, from any source, with the checkpoint that it should match.

    `checkpoint` defaults to the variant's official one, and `reading` says how to read it, as for
    `porting.tasks.port.port`. Raises SourceError, CheckpointError, KeyMapError, or WeightsFileError if the file does
    not fit the model.
    """
    weights_file.require_file(weights)
    survey = survey_file(weights)
    refuse_another(family, variant, survey, weights)
    if checkpoint is None:
        refuse_without_checkpoint(family, variant, survey, weights)
    case = open_case(family, variant, checkpoint, progress, **reading)
    case.refuse_other_tensors()
    options = options or CheckOptions()
    used = {name: case.state_dict[name] for entry in case.key_map.entries for name in entry.sources}
    non_finite = refuse_non_finite(used, where=case.where, allowed=options.allow_non_finite)
    progress("starting TensorFlow")
    start_tensorflow()
    progress("reading the weights")
    candidate = case.load_candidate(weights)
    report = compare_models(case, candidate, options, progress)
    context = {
        **describe_run(),
        **case.describe(),
        "weights": weights.name,
        "non_finite": list(non_finite),
        "file": {"name": weights.name, "sha256": sha256_of(weights)},
    }
    return replace(report, context=context, caveats=(*report.caveats, *_other_source(case, survey, weights)))


def _other_source(case: Case, survey: Survey, weights: Path) -> tuple[str, ...]:
    """A caveat if the weights file says that it was ported from another checkpoint."""
    source = (survey.provenance or {}).get("source")
    own = "" if case.checkpoint is None else case.checkpoint.sha256
    if not isinstance(source, dict) or not isinstance(source.get("sha256"), str) or source["sha256"] == own:
        return ()
    return (
        f"{weights.name} was ported from {source.get('name')}, not from this checkpoint: its sha256 begins with "
        f"{source['sha256'][:8]}",
    )


def compare_models(
    case: Case, candidate: keras.Model, options: CheckOptions, progress: Progress = SILENT, *, built_here: bool = False
) -> ParityReport:
    """Compare a Keras model with the PyTorch model of a case, layer by layer, and under stress if requested.

    For a model that was `built_here`, settings that matter only in training are compared, too.
    """
    reference = case.load_reference()
    if options.allow_non_finite:
        _put_zeros_for_non_finite(candidate, reference, case)
    given = case.check_inputs(options.samples)
    if given is not None:
        if options.images is not None:
            raise FamilyError("--images is for families of image models", hint="Give the check's inputs with --inputs.")
        if options.stress or options.train:
            raise FamilyError(
                f"--stress and --train are for families of image models, which {case.family.described} is not",
                hint="Leave them out: a check always compares the outputs on loud weights as well.",
            )
        return _run(case, "as ported", reference, candidate, given, options, progress, built_here=built_here)
    candidate, note = _channels_last(case, candidate)
    sides = tuple(candidate.input_shape[1:3])
    if None not in sides and sides[0] != sides[1]:
        raise WeightsFileError(
            f"the model accepts only images of {sides[0]}x{sides[1]}, but the check uses square images",
            hint=f"Save its weights as .weights.h5, or save the model of {case.how_to_build} with a free image size.",
        )
    images = options.load_images(case.preprocessing, sides[0])
    compared = options.compared(images)

    def run(
        name: str, model: nn.Module, keras_model: keras.Model, batch: Array, loud: Array | None = None
    ) -> ParityReport:
        how = {"input_axes": [moved(batch.ndim)], "batch_size": batch_size_of(batch), "loud_inputs": loud}
        return _run(case, name, model, keras_model, batch, options, progress, built_here=built_here, **how)

    report = run("as ported", reference, candidate, compared, images[-1:])
    if note:
        report = replace(report, notes=(note, *report.notes))
    stressed: list[ParityReport] = []
    if options.train:
        stressed += _compare_training(case, reference, candidate, images, options.limits, progress)
    for stress in stress_cases(reference, compared, case.shrinkable) if options.stress else ():
        keras_model = candidate
        if stress.has_new_weights:
            keras_model = _with_weights(case, case.convert_reference(stress.reference))
        elif None not in sides:  # the model was saved for one image size
            keras_model = _with_weights(case, _values_of(candidate))
        if not stress.has_new_weights and not _take(stress.reference, keras_model, stress.images):
            own = "x".join(map(str, compared.shape[1:3]))
            skipped = f"--stress did not try {stress.name}: the models take only images of {own}"
            report = replace(report, caveats=(*report.caveats, skipped))
            continue
        stressed.append(run(stress.name, stress.reference, keras_model, stress.images))
    return replace(report, stress=tuple(stressed))


def _take(reference: nn.Module, candidate: keras.Model, images: Array) -> bool:
    """Whether both models take images of this size. Many are built for one."""
    import torch

    sides = candidate.input_shape[1:3]
    if any(side not in {None, own} for side, own in zip(sides, images.shape[1:3], strict=True)):
        return False
    try:
        with torch.no_grad():
            reference(torch.from_numpy(np.ascontiguousarray(np.moveaxis(images[:1], -1, 1))))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _run(
    case: Case,
    name: str,
    reference: nn.Module,
    candidate: keras.Model,
    inputs: Any,
    options: CheckOptions,
    progress: Progress,
    *,
    built_here: bool,
    **how: Any,
) -> ParityReport:
    """Run one comparison; `how` holds further arguments of `check_parity`."""
    try:
        return check_parity(
            reference,
            candidate,
            inputs,
            **how,
            pairs=case.reference_pairs,
            key_map=case.reference_map,
            limits=options.limits,
            strict_settings=(built_here and case.family.strict_settings) or options.strict_settings or options.train,
            waive=(*options.waive, *(f"{source}:eps" for source in case.reference_map.absorbed)),
            locate_culprits=options.locate,
            name=name,
            progress=progress,
        )
    except ValueError as error:  # a name in --limit or --waive that the model does not have
        raise OptionError(str(error)) from None


def _channels_last(case: Case, candidate: keras.Model) -> tuple[keras.Model, str]:
    """The model itself if it takes `(N, H, W, C)`, else its weights in one that does, and a note that says so."""
    shape = candidate.input_shape
    if len(shape) != 4 or shape[1] != 3 or shape[3] == 3:
        return candidate, ""
    rebuilt = _with_weights(case, _values_of(candidate))
    return rebuilt, f"the file's model is channels_first, so its weights were compared in {case.how_to_build}"


def _values_of(model: keras.Model) -> dict[str, Array]:
    return {name: np.array(variable) for name, variable in named_variables(model).items()}


def _with_weights(case: Case, values: Mapping[str, Array]) -> keras.Model:
    """Build the case's model and assign these weights, which must cover the whole model."""
    with without_random_weights():
        model = case.build_candidate()
    weights_file.assign_weights(model, values)
    return model


def _compare_training(
    case: Case, reference: nn.Module, candidate: keras.Model, images: Array, limits: Limits, progress: Progress
) -> tuple[ParityReport, ...]:
    """Compare how the two models train on crops of the images. The first report also compares their dropout masks."""
    # Rebuild the model: the dropout rates and frozen layers stored in the file must not affect the comparison.
    candidate = _with_weights(case, _values_of(candidate))
    batch, labels = training_batch(images, case.num_classes)
    reports = compare_training(
        reference,
        candidate,
        case.reference_map,
        batch,
        labels,
        case.optimizers(),
        limits=limits,
        progress=progress,
    )
    progress("drawing masks")
    models = case.build_with_dropout()
    if models is None:
        return reports
    return (replace(reports[0], audit=compare_masks(*models)), *reports[1:])


def _put_zeros_for_non_finite(candidate: keras.Model, reference: nn.Module, case: Case) -> None:
    """Replace non-finite weights with zeros where both models agree on them; others stay and fail the check."""
    import torch

    expected = case.convert_reference(reference)
    for name, variable in named_variables(candidate).items():
        theirs, ours = expected.get(name), np.asarray(variable)
        if theirs is None or theirs.shape != ours.shape:
            continue
        hidden = ~np.isfinite(theirs)
        if hidden.any() and np.array_equal(theirs[hidden], ours[hidden], equal_nan=True):
            variable.assign(np.where(hidden, np.float32(0), ours))
    for tensor in (*reference.parameters(), *reference.buffers()):
        if tensor.is_floating_point():  # not in place: the checkpoint may share the memory
            tensor.data = torch.nan_to_num(tensor.data, 0.0, 0.0, 0.0)
