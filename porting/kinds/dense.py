"""Dense layers: Linear in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, with_value
from porting.kinds.convolution import bias_mistakes
from porting.kinds.transforms import DENSE

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class Dense(Kind):
    name = "dense"
    leaves = (Leaf("weight", "kernel", DENSE), Leaf("bias", "bias"))

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.Linear)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.Dense)

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from bias_mistakes(module, inputs)
        yield Mistake(
            "the kernel is not transposed", with_value(module, inputs, "weight", lambda m: m.weight.t().contiguous())
        )


KIND = Dense()
