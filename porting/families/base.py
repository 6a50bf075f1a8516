"""What the engine needs to know about a family of models. `porting.families` has the implementations."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from porting.kinds.transforms import Array, Shape
from porting.mapping.convert import diff_keys
from porting.mapping.key_map import KeyMap
from porting.mapping.naming import CheckpointLayout, recognise_layout
from porting.models.images import Preprocessing
from porting.parity.training import OptimizerPair, usual_optimizers
from porting.sources.table import variants_of

if TYPE_CHECKING:
    import keras
    from torch import nn


class Family(abc.ABC):
    """A family of models that share their code and differ by variant.

    The engine calls nothing else, and imports torch and keras only through these methods. Every `variant` is one
    of `variants`. `layout` is what `recognise_layout` made of one of `layouts`, by default the first of them: its names
    for a state_dict's tensors, and its settings for the models. `num_classes` 0 is a model without a head.
    """

    name: str
    # What its checkpoints may look like; the first has the reference's own names.
    layouts: tuple[CheckpointLayout, ...]

    @property
    def variants(self) -> tuple[str, ...]:
        """The rows that weights/sources.toml has for this family."""
        return variants_of(self.name)

    @abc.abstractmethod
    def key_map(self, variant: str, layout: CheckpointLayout | None = None) -> KeyMap:
        """Every tensor of a state_dict and the Keras variable that takes it, in one order for all layouts."""

    @abc.abstractmethod
    def build_reference(self, variant: str, num_classes: int, layout: CheckpointLayout | None = None) -> nn.Module:
        """The PyTorch model, fresh; it takes `(N, 3, H, W)` and gives `(N, num_classes)` logits, or its features."""

    @abc.abstractmethod
    def build_candidate(self, variant: str, num_classes: int, layout: CheckpointLayout | None = None) -> keras.Model:
        """The Keras model, fresh; it takes `(N, H, W, 3)` and gives `(N, num_classes)` logits, or its features."""

    @abc.abstractmethod
    def how_to_build(self, variant: str, num_classes: int, layout: CheckpointLayout | None = None) -> str:
        """The call that gives the user the Keras model for these weights."""

    @abc.abstractmethod
    def weight_shapes(self, variant: str, num_classes: int) -> dict[str, dict[str, Shape]]:
        """What `build_candidate` would have, without Keras: by top-level layer, each variable's name and shape.

        Variables come in the order in which Keras reads them: those that are trained before those that are not.
        """

    @abc.abstractmethod
    def num_classes(self, variant: str, state_dict: Mapping[str, Array], layout: CheckpointLayout | None = None) -> int:
        """The number of classes that the checkpoint's head has; the variant's own where that cannot be told."""

    @abc.abstractmethod
    def preprocessing(self, variant: str, layout: CheckpointLayout | None = None) -> Preprocessing:
        """How images were prepared when the published weights were trained."""

    def build_with_dropout(
        self, variant: str, num_classes: int, layout: CheckpointLayout | None = None
    ) -> tuple[nn.Module, keras.Model] | None:
        """Both models with dropout and drop path at rates above 0, to compare what they draw; None: it has neither."""
        return None

    def fuse(self, candidate: keras.Model, form: str) -> keras.Model:
        """The same function in fewer operations, for inference in the runtime of `form`; by default the model itself.

        `form` is one of porting.formats.FORMATS. Layers whose results are PyTorch's have the names of its modules.
        """
        return candidate

    def optimizers(self) -> tuple[OptimizerPair, ...]:
        """With what training is compared."""
        return usual_optimizers()

    def unused_tensors(self, variant: str, layout: CheckpointLayout | None = None) -> dict[str, Array]:
        """What `layout`'s class has beside the tensors of the key map, with the values that it starts with.

        By default BatchNorm's counters of training steps, which Keras does not keep, at zero.
        """
        drops = self.key_map(variant, layout).drops
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

    def guess_variant(self, state_dict: Mapping[str, Array]) -> str | None:
        """The variant whose tensors a state_dict has, in any layout, or None."""
        for variant in self.variants:
            layout = recognise_layout(self.layouts, partial(self.key_map, variant), state_dict)
            shapes = self.weight_shapes(variant, self.num_classes(variant, state_dict, layout))
            if not diff_keys(state_dict, self.key_map(variant, layout), by_path(shapes)):
                return variant
        return None


def by_path(layers: Mapping[str, Mapping[str, Shape]]) -> dict[str, Shape]:
    """What `weight_shapes` gives, by variable path."""
    return {f"{layer}/{name}": shape for layer, shapes in layers.items() for name, shape in shapes.items()}
