"""What the engine needs to know about a family of models. `porting.families` has the implementations."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING

from porting.images import Preprocessing
from porting.key_map import KeyMap
from porting.layout import Array
from porting.sources import variants_of

if TYPE_CHECKING:
    import keras
    from torch import nn


class Family(abc.ABC):
    """A family of models that share their code and differ by variant.

    The engine calls nothing else, and imports torch and keras only through these methods. Every `variant` is one
    of `variants`; a state_dict has the names of the reference's own.
    """

    name: str

    @property
    def variants(self) -> tuple[str, ...]:
        """The rows that weights/sources.toml has for this family."""
        return variants_of(self.name)

    @abc.abstractmethod
    def key_map(self, variant: str) -> KeyMap:
        """Every tensor of the reference's state_dict and the Keras variable that takes it."""

    @abc.abstractmethod
    def build_reference(self, variant: str, num_classes: int) -> nn.Module:
        """The PyTorch model, fresh; it takes `(N, 3, H, W)` and gives `(N, num_classes)` logits."""

    @abc.abstractmethod
    def build_candidate(self, variant: str, num_classes: int) -> keras.Model:
        """The Keras model, fresh; it takes `(N, H, W, 3)` and gives `(N, num_classes)` logits."""

    @abc.abstractmethod
    def num_classes(self, variant: str, state_dict: Mapping[str, Array]) -> int:
        """The number of classes that the checkpoint's head has, or the variant's own where it has no head."""

    @abc.abstractmethod
    def preprocessing(self, variant: str) -> Preprocessing:
        """How images were prepared when the published weights were trained."""

    def shrinkable(self, parameter: str) -> bool:
        """Whether a stress run makes this parameter of the reference small, so that what follows has small variances.

        Chosen well, it is what gives a residual stream its size: the first scales and those of the branches. By
        default nothing is, and that stress run is left out.
        """
        return False

    @abc.abstractmethod
    def guess_variant(self, state_dict: Mapping[str, Array]) -> str | None:
        """The variant whose shapes a state_dict has, or None."""
