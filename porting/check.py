"""A family's two models, one state_dict, some images: the check that a port and `van-port check` both make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting import weights_file
from porting.checkpoint import Checkpoint, read_checkpoint
from porting.comparison import check_parity
from porting.convert import convert, refuse_non_finite, refuse_other_keys, to_float32
from porting.data import weights_folder
from porting.errors import SourceError, WeightsFileError
from porting.family import Family
from porting.frameworks import start_tensorflow
from porting.images import find_images, load_images
from porting.layout import Array
from porting.parity import Limits, ParityReport
from porting.progress import SILENT, Progress
from porting.provenance import describe_source, versions
from porting.sources import Source, fetch, find_source
from porting.stress import stress_cases

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
    input and four for a large one. `isolated` adds the isolated and input views, `stress` other weights and shapes.
    """

    limits: Limits = field(default_factory=Limits)
    images: Path | None = None
    samples: int | None = None
    isolated: bool = True
    stress: bool = False


def check_models(
    family: Family,
    variant: str,
    num_classes: int,
    state_dict: Mapping[str, Array],
    candidate: keras.Model,
    options: CheckOptions,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compares a Keras model with the PyTorch model of `state_dict`, layer by layer, and under stress if asked."""
    reference = load_reference(family, variant, num_classes, state_dict)
    images = parity_images(family, variant, options)
    key_map = family.key_map(variant)
    pairs = {pair.source: pair.target for pair in key_map.layers}

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
    if not options.stress:
        return report
    stressed = []
    for case in stress_cases(reference, images, family.shrinkable):
        keras_model = candidate
        if case.has_new_weights:
            keras_model = family.build_candidate(variant, num_classes)
            tensors = {name: tensor.numpy() for name, tensor in case.reference.state_dict().items()}
            weights = convert(tensors, key_map, weights_file.variable_shapes(keras_model)).weights
            weights_file.assign_weights(keras_model, weights)
        stressed.append(run(case.name, case.reference, keras_model, case.images))
    return replace(report, stress=tuple(stressed))


def check_file(
    family: Family,
    variant: str,
    weights: Path,
    *,
    checkpoint: Path | None = None,
    ema: bool = False,
    options: CheckOptions | None = None,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compares a file of Keras weights, wherever it comes from, with the checkpoint it should hold.

    The checkpoint is the variant's official one where none is given. Raises SourceError, CheckpointError,
    KeyMapError, or WeightsFileError when the file does not fit the model.
    """
    if not weights.is_file():
        raise SourceError(f"{weights}: no such file", hint="--weights takes a file that van-port or Keras has written.")
    weights_file.suffix_of(weights)
    source, loaded = open_checkpoint(family, variant, checkpoint, ema=ema, progress=progress)
    num_classes = family.num_classes(variant, loaded.state_dict)
    progress("starting TensorFlow")
    start_tensorflow()

    def build() -> keras.Model:
        return family.build_candidate(variant, num_classes)

    progress("reading the weights")
    try:
        candidate = weights_file.load_model(weights, build)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise WeightsFileError(
            f"{weights}: Keras cannot load it into {family.name} {variant} with {num_classes} classes: "
            f"{str(error).partition(chr(10))[0][:300]}",
            hint="Check --variant and --checkpoint; `van-port inspect` shows what the file holds.",
        ) from None
    key_map = family.key_map(variant)
    # A .keras file brings a model of its own, so the shapes to expect come from a fresh one.
    expected = weights_file.variable_shapes(build() if weights.suffix == ".keras" else candidate)
    refuse_other_keys(loaded.state_dict, key_map, expected)
    refuse_non_finite({entry.source: loaded.state_dict[entry.source] for entry in key_map.entries})
    report = check_models(
        family, variant, num_classes, loaded.state_dict, candidate, options or CheckOptions(), progress
    )
    context: dict[str, Any] = {
        "family": family.name,
        "variant": variant,
        "num_classes": num_classes,
        "weights": weights.name,
        "source": describe_source(source, loaded),
        "versions": versions(),
    }
    return replace(report, context=context)


def open_checkpoint(
    family: Family, variant: str, path: Path | None, *, ema: bool, progress: Progress
) -> tuple[Source | None, Checkpoint]:
    """The checkpoint at `path`, or the variant's official one with its row in the table of sources."""
    source = None
    if path is None:
        source = find_source(family.name, variant)
        with progress.paused():  # the hub's client draws a bar of its own
            path = fetch(source)
    progress("reading the checkpoint")
    return source, read_checkpoint(path, ema=ema)


def load_reference(family: Family, variant: str, num_classes: int, state_dict: Mapping[str, Array]) -> nn.Module:
    """The PyTorch model with the checkpoint's weights, loaded by PyTorch itself and not from the conversion.

    It shares memory with the state_dict where that is float32 already: nothing here trains it.
    """
    import torch

    reference = family.build_reference(variant, num_classes)
    arrays = {name: _float32_or_integer(array) for name, array in state_dict.items()}
    tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
    reference.load_state_dict(tensors, strict=True, assign=True)
    return reference.eval()


def _float32_or_integer(array: Array) -> Array:
    return array if np.issubdtype(array.dtype, np.integer) else to_float32(array)


def parity_images(family: Family, variant: str, options: CheckOptions) -> Array:
    """The images of a check, `(N, H, W, 3)`, prepared as the variant's authors did; raises SourceError."""
    preprocessing = family.preprocessing(variant)
    paths = find_images(options.images if options.images is not None else weights_folder() / "parity_images")
    samples = options.samples
    if samples is None:
        samples = len(paths) if preprocessing.input_size <= 64 else SAMPLES_OF_LARGE_IMAGES
    # Spread over the folder: its names may be sorted by class.
    chosen = np.linspace(0, len(paths) - 1, min(samples, len(paths))).round().astype(int)
    return load_images([paths[index] for index in chosen], preprocessing)
