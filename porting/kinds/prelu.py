"""PReLU, an activation with learned slopes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, with_value
from porting.kinds.transforms import Slopes

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class PReLU(Kind):
    name = "prelu"
    leaves = (Leaf("weight", "alpha", Slopes()),)

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.PReLU)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.PReLU)

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        for value, text in ((0.0, "its slopes are lost"), (0.25, "its slopes are the initial ones")):
            yield Mistake(text, with_value(module, inputs, "weight", _filled(value)))


def _filled(value: float) -> Any:
    return lambda module: module.weight * 0 + value


KIND = PReLU()
