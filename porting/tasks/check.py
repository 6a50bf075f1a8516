"""A family's two models, one state_dict, some images: the check that a port and `van-port check` both make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.data import weights_folder
from porting.errors import WeightsFileError
from porting.families.base import Family, by_path
from porting.files import weights_file
from porting.files.checkpoint import Checkpoint, read_checkpoint
from porting.files.provenance import describe_source, versions
from porting.files.survey import Survey, survey_file
from porting.kinds.transforms import Array, Shape
from porting.mapping.convert import convert, refuse_non_finite, refuse_other_keys, to_float32
from porting.mapping.key_map import KeyMap
from porting.mapping.naming import CheckpointLayout, layout_named, recognise_layout
from porting.models.frameworks import start_tensorflow
from porting.models.images import find_images, load_images
from porting.parity.compare import check_parity
from porting.parity.report import Limits, ParityReport
from porting.parity.stress import stress_cases
from porting.parity.training import audit_masks, check_training, training_batch
from porting.progress import SILENT, Progress
from porting.sources.download import check_sha256
from porting.sources.table import Source, fetch, find_source, parse_location

if TYPE_CHECKING:
    import keras
    from torch import nn

# Images of 64x64 pixels that run at once; larger ones run one by one.
_PIXELS_AT_ONCE = 8 * 64 * 64
SAMPLES_OF_LARGE_IMAGES = 4


@dataclass(frozen=True)
class CheckOptions:
    """How thorough a check is.

    `images` is a folder, by default the embedded one, and `samples` how many of them: by default all for a small
    input and four for a large one. `isolated` adds the isolated and input views, `stress` other weights and shapes,
    `train` ten steps of training with each of the family's optimisers.
    `allow_non_finite` lets NaN and infinity pass: where the same weight has the same on both sides, the check has zero
    in its place on both, so that it can tell anything of the others.
    """

    limits: Limits = field(default_factory=Limits)
    images: Path | None = None
    samples: int | None = None
    isolated: bool = True
    stress: bool = False
    train: bool = False
    allow_non_finite: bool = False


@dataclass(frozen=True)
class Subject:
    """A checkpoint that has been read, and what it is taken for.

    `source` is its row in the table of sources, None for a file that was given by path.
    """

    family: Family
    variant: str
    source: Source | None
    checkpoint: Checkpoint
    layout: CheckpointLayout
    num_classes: int

    @property
    def key_map(self) -> KeyMap:
        return self.family.key_map(self.variant, self.layout)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the Keras model's variables, by path."""
        return by_path(self.family.weight_shapes(self.variant, self.num_classes))

    def build_candidate(self) -> keras.Model:
        return self.family.build_candidate(self.variant, self.num_classes, self.layout)

    @property
    def how_to_build(self) -> str:
        return self.family.how_to_build(self.variant, self.num_classes, self.layout)

    def load_reference(self) -> nn.Module:
        """The PyTorch model with the checkpoint's weights."""
        own = {entry.target: entry.source for entry in self.reference_map().entries}
        state_dict = {own[entry.target]: self.checkpoint.state_dict[entry.source] for entry in self.key_map.entries}
        return load_reference(self.family, self.variant, self.num_classes, state_dict, self.layout)

    def reference_pairs(self) -> dict[str, str]:
        """The Keras layer of every module of the reference."""
        return {pair.source: pair.target for pair in self.reference_map().layers}

    def convert_reference(self, reference: nn.Module) -> dict[str, Array]:
        """Keras's weights, by path, for a reference with other weights than the checkpoint's."""
        tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
        return convert(tensors, self.reference_map(), self.shapes, allow_non_finite=True).weights

    def reference_map(self) -> KeyMap:
        """The key map under the reference's own names."""
        first = self.family.layouts[0]
        return self.family.key_map(self.variant, first if self.num_classes else first.without_head())

    def describe(self) -> dict[str, Any]:
        """For provenance and reports."""
        return {
            "family": self.family.name,
            "variant": self.variant,
            "num_classes": self.num_classes,
            "layout": self.layout.name,
            "settings": dict(self.layout.settings),
            "build": self.how_to_build,
            "source": describe_source(self.source, self.checkpoint),
            "versions": versions(),
        }


def check_models(
    subject: Subject, candidate: keras.Model, options: CheckOptions, progress: Progress = SILENT
) -> ParityReport:
    """Compares a Keras model with the PyTorch model of a checkpoint, layer by layer, and under stress if asked."""
    reference = subject.load_reference()
    if options.allow_non_finite:
        _put_zeros_for_non_finite(candidate, reference, subject)
    images = parity_images(subject.family, subject.variant, options, subject.layout)
    pairs = subject.reference_pairs()

    def run(name: str, model: nn.Module, keras_model: keras.Model, batch: Array) -> ParityReport:
        return check_parity(
            model,
            keras_model,
            batch,
            pairs=pairs,
            isolated=options.isolated,
            limits=options.limits,
            batch_size=max(1, _PIXELS_AT_ONCE // (batch.shape[1] * batch.shape[2])),
            name=name,
            progress=progress,
        )

    report = run("as ported", reference, candidate, images)
    stressed: list[ParityReport] = []
    if options.train:
        stressed += check_training_of(subject, reference, candidate, images, options.limits, progress)
    for case in stress_cases(reference, images, subject.family.shrinkable) if options.stress else ():
        keras_model = candidate
        if case.has_new_weights:
            keras_model = subject.build_candidate()
            weights_file.assign_weights(keras_model, subject.convert_reference(case.reference))
        stressed.append(run(case.name, case.reference, keras_model, case.images))
    return replace(report, stress=tuple(stressed))


def check_training_of(
    subject: Subject, reference: nn.Module, candidate: keras.Model, images: Array, limits: Limits, progress: Progress
) -> tuple[ParityReport, ...]:
    """Compares how the two models train, on crops of the images; the first report also has what their masks are."""
    family = subject.family
    # What a file says of dropout and of frozen layers is not what is compared here.
    values = {variable.path: np.array(variable) for variable in candidate.weights}
    candidate = subject.build_candidate()
    if {variable.path: tuple(variable.shape) for variable in candidate.weights} != {
        path: array.shape for path, array in values.items()
    }:
        raise WeightsFileError(
            f"--train needs the weights of {subject.how_to_build}, and the file has others",
            hint="Check --variant and the number of classes, or leave --train out.",
        )
    weights_file.assign_weights(candidate, values)
    batch, labels = training_batch(images, subject.num_classes)
    reports = check_training(
        reference,
        candidate,
        subject.reference_map(),
        batch,
        labels,
        family.optimizers(),
        limits=limits,
        progress=progress,
    )
    progress("drawing masks")
    models = family.build_with_dropout(subject.variant, subject.num_classes, subject.layout)
    if models is None:
        return reports
    masks = audit_masks(*models)
    return (replace(reports[0], audit=masks), *reports[1:])


def _put_zeros_for_non_finite(candidate: keras.Model, reference: nn.Module, subject: Subject) -> None:
    """In both models, where they agree about what is not finite; elsewhere it stays and fails the check."""
    import torch

    expected = subject.convert_reference(reference)
    for variable in candidate.weights:
        theirs, ours = expected.get(variable.path), np.asarray(variable)
        if theirs is None or theirs.shape != ours.shape:
            continue
        hidden = ~np.isfinite(theirs)
        if hidden.any() and np.array_equal(theirs[hidden], ours[hidden], equal_nan=True):
            variable.assign(np.where(hidden, np.float32(0), ours))
    for tensor in (*reference.parameters(), *reference.buffers()):
        if tensor.is_floating_point():  # not in place: the checkpoint may have the same memory
            tensor.data = torch.nan_to_num(tensor.data, 0.0, 0.0, 0.0)


def check_file(
    family: Family,
    variant: str,
    weights: Path,
    *,
    checkpoint: str | Path | None = None,
    layout: str | None = None,
    ema: bool = False,
    sha256: str | None = None,
    options: CheckOptions | None = None,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compares a file of Keras weights, wherever it comes from, with the checkpoint it should hold.

    The checkpoint is the variant's official one where none is given; its layout is recognised by its names, or is the
    one called `layout`. Raises SourceError, CheckpointError, KeyMapError, or WeightsFileError when the file does not
    fit the model.
    """
    weights_file.require_file(weights)
    survey_file(weights)
    subject = open_checkpoint(family, variant, checkpoint, layout=layout, ema=ema, sha256=sha256, progress=progress)
    state_dict, key_map = subject.checkpoint.state_dict, subject.key_map
    refuse_other_keys(state_dict, key_map, subject.shapes)
    options = options or CheckOptions()
    used = {entry.source: state_dict[entry.source] for entry in key_map.entries}
    non_finite = refuse_non_finite(used, allowed=options.allow_non_finite)
    progress("starting TensorFlow")
    start_tensorflow()
    progress("reading the weights")
    candidate = load_candidate(weights, subject.build_candidate, subject.how_to_build)
    report = check_models(subject, candidate, options, progress)
    return replace(report, context={**subject.describe(), "weights": weights.name, "non_finite": list(non_finite)})


def load_candidate(weights: Path, build: Callable[[], keras.Model], how_to_build: str) -> keras.Model:
    """The Keras model with the weights of a file; raises WeightsFileError where they do not fit what is built."""
    try:
        return weights_file.load_model(weights, build)
    except Exception as error:  # Keras has no error of its own: a file may end in any
        raise WeightsFileError(
            f"{weights}: Keras cannot load it into {how_to_build}: "
            f"{str(error).partition(chr(10))[0][:300] or repr(error)}",
            hint="Check --variant and the number of classes; `van-port inspect` shows what the file holds.",
        ) from None


def model_of_file(family: Family, variant: str, survey: Survey) -> tuple[CheckpointLayout, int]:
    """The layout that a file's weights were ported from, and their number of classes.

    The layout is that of its provenance, else the family's first; the classes are as the shapes in the file show them,
    or its provenance, else the variant's own. Raises KeyMapError for an unknown layout.
    """
    provenance = survey.provenance or {}
    layout = layout_named(family.layouts, str(provenance.get("layout", family.layouts[0].name)))
    found = family.classes_in(variant, [shape for _, shape, _ in survey.tensors])
    if found is None:
        found = provenance.get("num_classes")
    return layout, found if isinstance(found, int) and found >= 0 else family.num_classes(variant, {})


def open_checkpoint(
    family: Family,
    variant: str,
    location: str | Path | None,
    *,
    layout: str | None,
    ema: bool,
    sha256: str | None = None,
    progress: Progress,
) -> Subject:
    """The checkpoint at `location`, or the variant's official one, and the layout it has or is said to have."""
    found = find_source(family.name, variant) if location is None else parse_location(family.name, variant, location)
    source = found if isinstance(found, Source) else None
    path = fetch(found, sha256=sha256, progress=progress) if isinstance(found, Source) else found
    progress("reading the checkpoint")
    loaded = read_checkpoint(path, ema=ema)
    if source is None:
        check_sha256(str(path), loaded.sha256, sha256)
    own = recognise_layout(family.layouts, partial(family.key_map, variant), loaded.state_dict, forced=layout)
    return Subject(family, variant, source, loaded, own, family.num_classes(variant, loaded.state_dict, own))


def load_reference(
    family: Family,
    variant: str,
    num_classes: int,
    state_dict: Mapping[str, Array],
    layout: CheckpointLayout | None = None,
) -> nn.Module:
    """The PyTorch model with a checkpoint's weights, loaded by PyTorch itself and not from the conversion.

    The state_dict has the reference's own names; the two share memory where it is float32 already.
    """
    import torch

    reference = family.build_reference(variant, num_classes, layout)
    arrays = {name: _float32_or_integer(array) for name, array in state_dict.items()}
    tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
    reference.load_state_dict(tensors, strict=True, assign=True)
    return reference.eval()


def _float32_or_integer(array: Array) -> Array:
    return array if np.issubdtype(array.dtype, np.integer) else to_float32(array)


def parity_images(
    family: Family,
    variant: str,
    options: CheckOptions,
    layout: CheckpointLayout | None = None,
    input_size: int | None = None,
) -> Array:
    """The images of a check, `(N, H, W, 3)`, prepared as the variant's authors did; raises SourceError.

    For another `input_size` than theirs the resized side grows or shrinks with it.
    """
    preprocessing = family.preprocessing(variant, layout)
    if input_size is not None:
        resize_size = preprocessing.resize_size * input_size // preprocessing.input_size
        preprocessing = replace(preprocessing, input_size=input_size, resize_size=resize_size)
    paths = find_images(options.images if options.images is not None else weights_folder() / "parity_images")
    samples = options.samples
    if samples is None:
        samples = len(paths) if preprocessing.input_size <= 64 else SAMPLES_OF_LARGE_IMAGES
    # Spread over the folder: its names may be sorted by class.
    chosen = np.linspace(0, len(paths) - 1, min(samples, len(paths))).round().astype(int)
    return load_images([paths[index] for index in chosen], preprocessing)
