"""Group normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings
from porting.kinds.batch_norm import norm_mistakes

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class GroupNorm(Kind):
    name = "group_norm"
    leaves = (Leaf("weight", "gamma", default=1.0), Leaf("bias", "beta", default=0.0))

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.GroupNorm)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.GroupNormalization)

    def module_settings(self, module: Any) -> Settings:
        return {"eps": module.eps, "groups": module.num_groups}

    def layer_settings(self, layer: Any) -> Settings:
        return {"eps": layer.epsilon, "groups": layer.groups}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        return norm_mistakes(module, inputs)


KIND = GroupNorm()
