"""The interface of a model family: six required fields, and defaults that a family may override."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import KeyMapError, SourceError
from porting.kinds.transforms import Array, Shape
from porting.mapping.convert import diff_keys
from porting.mapping.key_map import KeyMap
from porting.mapping.naming import Naming, Recognition, recognise_naming
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing, prepare_image, prepare_in_tensorflow
from porting.parity.training import OptimizerPair, usual_optimizers
from porting.progress import SILENT, Progress
from porting.sources.table import Source, read_table

if TYPE_CHECKING:
    import keras
    from PIL import Image
    from torch import nn

    from porting.files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Spec:
    """One model of a family: its variant, number of classes (0: no head), and naming.

    `stated` holds the settings that the checkpoint or a file beside it states. All others come from the naming.
    """

    variant: str
    num_classes: int
    naming: Naming
    stated: Mapping[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, float]:
        """Arguments for the family's builders, such as an epsilon."""
        return {**self.naming.settings, **self.stated}

    def described(self) -> str:
        """The naming and settings in words, for the user. Settings that nothing states are marked as assumed."""
        facts = [
            f"{name} {value:g}" + ("" if name in self.stated else " (assumed: the file does not state it)")
            for name, value in self.settings.items()
        ]
        head = "with a head" if self.naming.head else "without a head"
        return ", ".join([f"{self.naming.name} names", *facts, *([head] if self.naming.has_head else [])])

    def without_head(self) -> Spec:
        """The model's body saved without its head: names then lack the prefix that all of them would share."""
        return replace(self, num_classes=0, naming=self.naming.without_head().without_prefix())


class Family:
    """A family of models that share their code and differ by variant.

    A subclass defines six members: `name`; `namings`, the rows of its key map under each publisher's names, of which
    the first has the reference's own; `sources`, the path of the table of its published checkpoints, or the table's
    rows; `inputs`, the preprocessing of images; `build_reference`; and `build_candidate`. Everything else has a
    default that works on the live models. A family overrides what it can do faster or better.
    """

    name: str
    namings: tuple[Naming, ...]
    sources: Path | tuple[Source, ...]
    inputs: Preprocessing
    # Whether there are published weights to use where no checkpoint is given.
    has_published = True
    # Whether settings that matter only in training must agree between the two models that are built here.
    strict_settings = True
    # Whether the family knows how its images are normalised, or takes none.
    knows_preprocessing = True
    # The PyTorch name of the token embedding, for language models whose head shares its weights.
    tied_head = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.described}>"

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle for another process, without live models and what is derived from them."""
        return {name: value for name, value in vars(self).items() if name not in {"cache", "namings", "table"}}

    @cached_property
    def cache(self) -> dict[str, Any]:
        """Live models and what is derived from them, by the method that keeps it. It is not pickled."""
        return {}

    def build_reference(self, spec: Spec) -> nn.Module:
        """Build the PyTorch model, which maps `(N, 3, H, W)` to `(N, num_classes)` logits, or to its features."""
        raise NotImplementedError

    def build_empty_reference(self, spec: Spec) -> nn.Module:
        """Build the PyTorch model for weights that are about to be loaded: its parameters may hold anything."""
        return self.build_reference(spec)

    def build_candidate(self, spec: Spec) -> keras.Model:
        """Build the Keras model, which maps `(N, H, W, 3)` to `(N, num_classes)` logits, or to its features."""
        raise NotImplementedError

    @property
    def described(self) -> str:
        """The name of the family in reports."""
        return self.name

    def refuse_unfit_rows(self, spec: Spec, state_dict: Mapping[str, Array]) -> None:
        """Raise KeyMapError if the rows are a user's and at fault. By default, they are the family's own."""

    def expected(self, spec: Spec) -> str:
        """Which weights the family takes, in sentences, for a checkpoint that holds others."""
        layouts = [naming.name for naming in self.namings]
        others = f" --layout chooses other names ({', '.join(layouts)})." if len(layouts) > 1 else ""
        return f"Expected the weights of {self.name} {spec.variant} with {spec.naming.name} names.{others}"

    def facts(self, spec: Spec) -> dict[str, str]:
        """What names the model in reports, in the provenance of its files and in exports."""
        return {"family": self.described, "variant": spec.variant}

    @cached_property
    def table(self) -> tuple[Source, ...]:
        """The rows of the table of sources, in order."""
        return read_table(self.sources, self.name) if isinstance(self.sources, Path) else self.sources

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(source.variant for source in self.table)

    def source_of(self, variant: str) -> Source:
        """The row of a variant; raises SourceError if the table lacks it."""
        for source in self.table:
            if source.variant == variant:
                return source
        raise SourceError(f"{self.name} has no variant {variant!r}", hint=f"Choose from {', '.join(self.variants)}.")

    def usual_classes(self, variant: str) -> int:
        """The number of classes of the published weights."""
        return self.source_of(variant).classes

    def spec(
        self,
        variant: str,
        num_classes: int | None = None,
        naming: Naming | None = None,
        stated: Mapping[str, float] | None = None,
    ) -> Spec:
        """The spec of a variant, by default with the published number of classes and the reference's own names."""
        classes = self.usual_classes(variant) if num_classes is None else num_classes
        naming = naming or self.namings[0]
        return Spec(variant, classes, naming if classes or not naming.head else naming.without_head(), stated or {})

    def reference_names(self, spec: Spec) -> Collection[str]:
        """The names of all tensors of the PyTorch model. By default, it is built on the meta device to find them."""
        from porting.models.frameworks import without_memory

        with without_memory():
            return self.build_reference(spec).state_dict().keys()

    def key_map(self, spec: Spec) -> KeyMap:
        """The key map: each tensor of a state_dict and its Keras variable, in the same order for all namings."""
        cache: dict[tuple[str, bool], Collection[str]] = self.cache.setdefault("_names", {})
        # The rows must not match a head in a model without one.
        key = spec.variant, bool(spec.naming.head)
        if key not in cache:
            classes = (spec.num_classes or self.usual_classes(spec.variant)) if spec.naming.head else 0
            cache[key] = self.reference_names(replace(spec, num_classes=classes))
        return spec.naming.key_map(cache[key])

    def how_to_build(self, spec: Spec) -> str:
        """The Python call that builds the Keras model for these weights."""
        return f'porting.get_family("{self.name}").build("{spec.variant}", {spec.num_classes})'

    def build(self, variant: str, num_classes: int | None = None) -> keras.Model:
        """Build the Keras model of a variant. `num_classes` defaults to that of the published weights.

        Raises SourceError for a variant that the family does not have, and ValueError for a negative number of classes.
        """
        self.source_of(variant)
        if num_classes is not None and num_classes < 0:
            raise ValueError(f"num_classes must be 0, for no head, or more: got {num_classes}")
        return self.build_candidate(self.spec(variant, num_classes))

    def weight_shapes(self, spec: Spec) -> dict[str, dict[str, Shape]]:
        """The variables of the Keras model: by top-level layer, each variable's name and shape.

        Variables are in the order in which Keras reads them: trainable before non-trainable.
        """
        from porting.files.weights_file import weight_shapes
        from porting.models.frameworks import start_tensorflow

        start_tensorflow()
        return weight_shapes(self.build_candidate(spec))

    def num_classes(self, variant: str, state_dict: Mapping[str, Array], naming: Naming | None = None) -> int:
        """The number of classes of the checkpoint's head, or the variant's usual one if the head does not show it."""
        name = (naming or self.namings[0]).head
        if not name:
            return 0
        head = state_dict.get(f"{name}.weight")
        if head is not None and head.ndim >= 2 and head.shape[0]:
            return int(head.shape[0])
        return self.usual_classes(variant)

    def preprocessing(self, spec: Spec) -> Preprocessing:
        """The preprocessing of images that the published weights were trained with."""
        return self.inputs

    def prepare_reference(self, spec: Spec) -> Callable[[Image.Image], Array]:
        """The authors' preprocessing: a function from an RGB image to the PyTorch input, `(H, W, C)` float32."""
        return partial(prepare_image, preprocessing=self.preprocessing(spec))

    def prepare_candidate(self, spec: Spec) -> Callable[[Image.Image], Array]:
        """The preprocessing that a Keras user would apply; by default, TensorFlow's functions with their defaults."""
        return partial(prepare_in_tensorflow, preprocessing=self.preprocessing(spec))

    def class_names(self, spec: Spec) -> Sequence[str]:
        """The class names of the head, in order; empty if they are unknown or are ImageNet's."""
        return ()

    def check_inputs(self, spec: Spec) -> Any:
        """The Keras model's inputs for a check: one array, or several by name.

        None means that the model takes images, prepared according to `preprocessing`.
        """
        return None

    # Whether the inputs of a check are random numbers, which say nothing of the range of real ones.
    inputs_are_random = False

    def inputs_of(self, spec: Spec, samples: int | None) -> Any:
        """The inputs of a check, with at most so many samples."""
        given = self.check_inputs(spec)
        if isinstance(given, dict):
            return {name: array[:samples] for name, array in given.items()}
        if isinstance(given, (tuple, list)):
            return [array[:samples] for array in given]
        return None if given is None else given[:samples]

    def tensor_shapes(self, spec: Spec) -> dict[str, Shape]:
        """The shapes of PyTorch's tensors, for transforms that need them when reverting; empty by default."""
        return {}

    def published(self, variant: str, progress: Progress = SILENT) -> Checkpoint | None:
        """Load the published weights with the publisher's package; None if the table names a file to load instead."""
        return None

    def build_with_dropout(self, spec: Spec) -> tuple[nn.Module, keras.Model] | None:
        """Both models with dropout and drop path enabled, to compare their masks; None if the family has neither."""
        return None

    def fuse(self, candidate: keras.Model, form: str) -> keras.Model:
        """Fuse operations for inference in the runtime of `form`. By default, return the model unchanged.

        `form` is one of porting.exporting.FORMATS. Layers whose results match PyTorch's keep the names of its modules.
        """
        return candidate

    def optimizers(self) -> tuple[OptimizerPair, ...]:
        """The pairs of optimisers with which to compare training."""
        return usual_optimizers()

    def unused_tensors(self, spec: Spec) -> dict[str, Array]:
        """The tensors of the publisher's class that the key map drops, with their initial values.

        By default, these are BatchNorm's `num_batches_tracked`, which Keras does not have, at zero.
        """
        drops = self.key_map(spec).drops
        return {name: np.zeros((), np.int64) for name in sorted(drops) if name.endswith(".num_batches_tracked")}

    def classes_in(self, variant: str, shapes: Iterable[Shape]) -> int | None:
        """The number of classes in a file with arrays of these shapes: 0 for no head, None if they do not show it."""
        return None

    def shrinkable(self, parameter: str) -> bool:
        """Whether a stress run makes this parameter of the reference small, so that later variances are small.

        Choose the parameters that set the scale of the residual stream: the first scales and those of the branches.
        By default, there are none, and this stress run is skipped.
        """
        return False

    def stated_settings(self, variant: str, facts: Mapping[str, Any]) -> Mapping[str, float]:
        """The settings of this family's builders that `facts` states; `Checkpoint.facts` explains its form.

        Raises KeyMapError, with the name, for a setting that the family cannot build. By default, nothing is read.
        """
        return {}

    def recognise(
        self,
        variant: str,
        state_dict: Mapping[str, Array],
        *,
        forced: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Spec:
        """Recognise the spec of a state_dict from its tensor names and `facts`, or under the naming `forced`.

        Raises KeyMapError if the names fit several publishers whose settings differ and no stated setting decides.
        """
        recognition = self._recognition(variant, state_dict, forced)
        stated = self.stated_settings(variant, facts or {})
        naming = recognition.naming
        open_settings = naming.settings.keys() - stated.keys()
        if rivals := [each for each in recognition.rivals if _differ(each, naming, open_settings)]:
            known = [f"{each.name} ({_settings_text(each)})" for each in (naming, *rivals)]
            raise KeyMapError(
                f"the tensor names fit {' and '.join(known)}, and nothing in the file says which",
                hint="Choose one: " + " or ".join(f"--layout {each.name}" for each in (naming, *rivals)) + ".",
            )
        return Spec(variant, self.num_classes(variant, state_dict, naming), naming, stated)

    def coverage(self, names: Collection[str]) -> float:
        """The share of these names that the family's rows cover, from 0 to 1. Nothing is built for it."""
        rows = [
            [replace(rule, source=source) for rule, source in zip(naming.rules, naming.own_sources, strict=True)]
            for naming in self.namings
        ]
        return max(coverage(each, names) for each in rows)

    def fit(self, variant: str, names: Collection[str]) -> float:
        """How well names agree with those of this variant under the best-fitting naming, from 0 to 1.

        This is the number of common names over the number of all names.
        """
        return self._recognition(variant, names, None).fit

    def _recognition(self, variant: str, names: Collection[str], forced: str | None) -> Recognition:
        return recognise_naming(self.namings, partial(self._key_map_under, variant), names, forced=forced)

    def _key_map_under(self, variant: str, naming: Naming) -> KeyMap:
        cache: dict[tuple[str, str, str, str], KeyMap] = self.cache.setdefault("_key_maps", {})
        key = variant, naming.name, naming.head, naming.prefix
        if key not in cache:
            cache[key] = self.key_map(self.spec(variant, None if naming.head else 0, naming))
        return cache[key]

    def guess_variant(self, state_dict: Mapping[str, Array]) -> str | None:
        """The variant whose tensors match a state_dict under any naming, or None."""
        for variant in self.variants:
            naming = self._recognition(variant, state_dict, None).naming
            spec = Spec(variant, self.num_classes(variant, state_dict, naming), naming)
            if not diff_keys(state_dict, self.key_map(spec), by_path(self.weight_shapes(spec))):
                return variant
        return None


def coverage(rows: Iterable[KeyRule], names: Collection[str]) -> float:
    """The share of these names that the rows cover, from 0 to 1."""
    rows = list(rows)
    return sum(any(row.covers(name) for row in rows) for name in names) / max(len(names), 1)


def _differ(one: Naming, other: Naming, settings: Collection[str]) -> bool:
    return any(one.settings.get(name) != other.settings.get(name) for name in settings)


def _settings_text(naming: Naming) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in naming.settings.items())


def by_path(layers: Mapping[str, Mapping[str, Shape]]) -> dict[str, Shape]:
    """The result of `weight_shapes`, by variable path."""
    return {f"{layer}/{name}": shape for layer, shapes in layers.items() for name, shape in shapes.items()}
