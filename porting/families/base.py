"""What the engine needs to know about a family of models: six fields, and defaults that a family may override."""

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
from porting.models.images import Preprocessing, prepare_image, prepare_in_tensorflow
from porting.parity.training import OptimizerPair, usual_optimizers
from porting.progress import SILENT, Progress
from porting.sources.table import Source, read_table

if TYPE_CHECKING:
    import keras
    from PIL import Image
    from torch import nn

    from porting.files.checkpoint import Checkpoint


# Of a family's attributes, caches that hold live models or follow from them.
_KEPT_HERE = {"_names", "_key_maps", "_maps", "_spare", "_shapes", "namings", "table"}


@dataclass(frozen=True)
class Spec:
    """One model of a family: which variant, how many classes (0: no head), and under whose names.

    `stated` are settings that the checkpoint or what stands beside it states; all others are those of the naming.
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
        """Names and settings in words, for the user; a setting that nothing states is said to be assumed."""
        facts = [
            f"{name} {value:g}" + ("" if name in self.stated else " (assumed: the file does not state it)")
            for name, value in self.settings.items()
        ]
        head = "with a head" if self.naming.head else "without a head"
        return ", ".join([f"{self.naming.name} names", *facts, *([head] if self.naming.has_head else [])])

    def without_head(self) -> Spec:
        """The model's body saved alone: no name has a prefix that stands before all of them."""
        return replace(self, num_classes=0, naming=self.naming.without_head().without_prefix())


class Family:
    """A family of models that share their code and differ by variant.

    A subclass gives six things: `name`; `namings`, the rows of its key map under each publisher's names, of which the
    first has the reference's own; `sources`, the path of the table of its published checkpoints, or the rows
    themselves; `inputs`, how its images are prepared; `build_reference` and `build_candidate`. All else has a default
    that works from the live models; a family overrides what it can do quicker or better.
    """

    name: str
    namings: tuple[Naming, ...]
    sources: Path | tuple[Source, ...]
    inputs: Preprocessing
    # Whether settings that matter in training alone must agree between the two models that are built here.
    strict_settings = True
    # The PyTorch name of the table of tokens, where a language model without its head is one with it as the head.
    tied_head = ""

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; live models and what was found by them stay here."""
        return {name: value for name, value in vars(self).items() if name not in _KEPT_HERE}

    def build_reference(self, spec: Spec) -> nn.Module:
        """The PyTorch model, fresh; it takes `(N, 3, H, W)` and gives `(N, num_classes)` logits, or its features."""
        raise NotImplementedError

    def build_candidate(self, spec: Spec) -> keras.Model:
        """The Keras model, fresh; it takes `(N, H, W, 3)` and gives `(N, num_classes)` logits, or its features."""
        raise NotImplementedError

    @property
    def described(self) -> str:
        """What reports call it."""
        return self.name

    @cached_property
    def table(self) -> tuple[Source, ...]:
        """The rows of its table of sources, in order."""
        return read_table(self.sources, self.name) if isinstance(self.sources, Path) else self.sources

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(source.variant for source in self.table)

    def source_of(self, variant: str) -> Source:
        """The row of a variant; raises SourceError for one that the table lacks."""
        for source in self.table:
            if source.variant == variant:
                return source
        raise SourceError(
            f"{self.name} has no variant {variant!r}", hint=f"Its variants are {', '.join(self.variants)}."
        )

    def usual_classes(self, variant: str) -> int:
        """The number of classes that the published weights have."""
        return self.source_of(variant).classes

    def spec(
        self,
        variant: str,
        num_classes: int | None = None,
        naming: Naming | None = None,
        stated: Mapping[str, float] | None = None,
    ) -> Spec:
        """By default with the usual number of classes, and under the reference's own names."""
        classes = self.usual_classes(variant) if num_classes is None else num_classes
        naming = naming or self.namings[0]
        return Spec(variant, classes, naming if classes or not naming.head else naming.without_head(), stated or {})

    def reference_names(self, spec: Spec) -> Collection[str]:
        """The names of all tensors of the PyTorch model; by default it is built, without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self.build_reference(spec).state_dict().keys()

    def key_map(self, spec: Spec) -> KeyMap:
        """Every tensor of a state_dict and the Keras variable that takes it, in one order for all namings."""
        cache: dict[tuple[str, bool], Collection[str]] = vars(self).setdefault("_names", {})
        # Without a head the rows must not find one.
        key = spec.variant, bool(spec.naming.head)
        if key not in cache:
            classes = (spec.num_classes or self.usual_classes(spec.variant)) if spec.naming.head else 0
            cache[key] = self.reference_names(replace(spec, num_classes=classes))
        return spec.naming.key_map(cache[key])

    def how_to_build(self, spec: Spec) -> str:
        """The call that gives the user the Keras model for these weights."""
        return f'porting.get_family("{self.name}").build("{spec.variant}", {spec.num_classes})'

    def build(self, variant: str, num_classes: int | None = None) -> keras.Model:
        """The Keras model of a variant, fresh; `num_classes` is by default what the published weights have."""
        return self.build_candidate(self.spec(variant, num_classes))

    def weight_shapes(self, spec: Spec) -> dict[str, dict[str, Shape]]:
        """What `build_candidate` has: by top-level layer, each variable's name and shape.

        Variables come in the order in which Keras reads them: those that are trained before those that are not.
        """
        from porting.files.weights_file import weight_shapes
        from porting.models.frameworks import start_tensorflow

        start_tensorflow()
        return weight_shapes(self.build_candidate(spec))

    def num_classes(self, variant: str, state_dict: Mapping[str, Array], naming: Naming | None = None) -> int:
        """The number of classes that the checkpoint's head has; the variant's usual one where that cannot be told."""
        name = (naming or self.namings[0]).head
        if not name:
            return 0
        head = state_dict.get(f"{name}.weight")
        if head is not None and head.ndim >= 2 and head.shape[0]:
            return int(head.shape[0])
        return self.usual_classes(variant)

    def preprocessing(self, spec: Spec) -> Preprocessing:
        """How images were prepared when the published weights were trained."""
        return self.inputs

    def prepare_reference(self, spec: Spec) -> Callable[[Image.Image], Array]:
        """What turns an RGB image into what PyTorch's model takes, as `(H, W, C)` float32, by its authors' code."""
        return partial(prepare_image, preprocessing=self.preprocessing(spec))

    def prepare_candidate(self, spec: Spec) -> Callable[[Image.Image], Array]:
        """The same as a user of the Keras model would: by default with TensorFlow's functions and their defaults."""
        return partial(prepare_in_tensorflow, preprocessing=self.preprocessing(spec))

    def class_names(self, spec: Spec) -> Sequence[str]:
        """Of the head, in order; none where they are not known, or are ImageNet's."""
        return ()

    def check_inputs(self, spec: Spec) -> Any:
        """The Keras model's inputs for a check, an array or several by name.

        None: it takes images, prepared as `preprocessing` says.
        """
        return None

    def tensor_shapes(self, spec: Spec) -> dict[str, Shape]:
        """Of PyTorch's tensors, for transforms that need them on the way back; by default none does."""
        return {}

    def published(self, variant: str, progress: Progress = SILENT) -> Checkpoint | None:
        """The published weights by the publisher's own package; None where a file in the table holds them."""
        return None

    def build_with_dropout(self, spec: Spec) -> tuple[nn.Module, keras.Model] | None:
        """Both models with dropout and drop path at rates above 0, to compare what they draw; None: it has neither."""
        return None

    def fuse(self, candidate: keras.Model, form: str) -> keras.Model:
        """The same function in fewer operations, for inference in the runtime of `form`; by default the model itself.

        `form` is one of porting.exporting.FORMATS. Layers whose results are PyTorch's have the names of its modules.
        """
        return candidate

    def optimizers(self) -> tuple[OptimizerPair, ...]:
        """With what training is compared."""
        return usual_optimizers()

    def unused_tensors(self, spec: Spec) -> dict[str, Array]:
        """What the publisher's class has beside the tensors of the key map, with the values that it starts with.

        By default BatchNorm's counters of training steps, which Keras does not keep, at zero.
        """
        drops = self.key_map(spec).drops
        return {name: np.zeros((), np.int64) for name in sorted(drops) if name.endswith(".num_batches_tracked")}

    def classes_in(self, variant: str, shapes: Iterable[Shape]) -> int | None:
        """The number of classes that a file with arrays of these shapes has, 0 for no head; None: cannot be told."""
        return None

    def shrinkable(self, parameter: str) -> bool:
        """Whether a stress run makes this parameter of the reference small, so that what follows has small variances.

        Chosen well, it is what gives a residual stream its size: the first scales and those of the branches. By
        default nothing is, and that stress run is left out.
        """
        return False

    def stated_settings(self, variant: str, facts: Mapping[str, Any]) -> Mapping[str, float]:
        """Of the settings of this family's builders, those that `facts` state, which `Checkpoint.facts` explains.

        Raises KeyMapError, by name, for a statement that the family cannot build. By default nothing is read.
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
        """What a state_dict is taken for, by its tensors' names and what `facts` state, or under the naming `forced`.

        Raises KeyMapError where the names are those of several publishers whose settings differ, and nothing tells.
        """
        recognition = self._recognition(variant, state_dict, forced)
        stated = self.stated_settings(variant, facts or {})
        naming = recognition.naming
        open_settings = naming.settings.keys() - stated.keys()
        if rivals := [each for each in recognition.rivals if _differ(each, naming, open_settings)]:
            known = [f"{each.name} ({_settings_text(each)})" for each in (naming, *rivals)]
            raise KeyMapError(
                f"the tensors' names are those of {' and of '.join(known)}, and nothing in the file states which",
                hint="Say whose they are: " + " or ".join(f"--layout {each.name}" for each in (naming, *rivals)) + ".",
            )
        return Spec(variant, self.num_classes(variant, state_dict, naming), naming, stated)

    def fit(self, variant: str, names: Collection[str]) -> float:
        """Which share of the names a checkpoint of this variant has, under the naming that fits best, from 0 to 1."""
        return self._recognition(variant, names, None).fit

    def _recognition(self, variant: str, names: Collection[str], forced: str | None) -> Recognition:
        return recognise_naming(self.namings, partial(self._key_map_under, variant), names, forced=forced)

    def _key_map_under(self, variant: str, naming: Naming) -> KeyMap:
        cache: dict[tuple[str, str, str, str], KeyMap] = vars(self).setdefault("_key_maps", {})
        key = variant, naming.name, naming.head, naming.prefix
        if key not in cache:
            cache[key] = self.key_map(self.spec(variant, None if naming.head else 0, naming))
        return cache[key]

    def guess_variant(self, state_dict: Mapping[str, Array]) -> str | None:
        """The variant whose tensors a state_dict has, under any naming, or None."""
        for variant in self.variants:
            naming = self._recognition(variant, state_dict, None).naming
            spec = Spec(variant, self.num_classes(variant, state_dict, naming), naming)
            if not diff_keys(state_dict, self.key_map(spec), by_path(self.weight_shapes(spec))):
                return variant
        return None


def _differ(one: Naming, other: Naming, settings: Collection[str]) -> bool:
    return any(one.settings.get(name) != other.settings.get(name) for name in settings)


def _settings_text(naming: Naming) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in naming.settings.items())


def by_path(layers: Mapping[str, Mapping[str, Shape]]) -> dict[str, Shape]:
    """What `weight_shapes` gives, by variable path."""
    return {f"{layer}/{name}": shape for layer, shapes in layers.items() for name, shape in shapes.items()}
