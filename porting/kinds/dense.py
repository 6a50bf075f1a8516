"""Dense layers: Linear in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError
from porting.kinds.base import Kind, Leaf, Mistake, with_value
from porting.kinds.convolution import bias_mistakes
from porting.kinds.transforms import DENSE, VECTOR, Flattened

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class Dense(Kind):
    name = "dense"
    leaves = (Leaf("weight", "kernel", DENSE), Leaf("bias", "bias", VECTOR, 0.0))

    def with_details(self, details: str) -> Kind:
        """`512x7x7`: channels, height and width of the map that the Flatten before the layer takes in PyTorch."""
        try:
            sides = tuple(int(side) for side in details.split("x"))
        except ValueError:
            sides = ()
        if len(sides) < 2 or min(sides) < 1:
            raise KeyMapError(
                f"the kind dense takes the sides of the flattened map: got {details!r}",
                hint="Such as dense:512x7x7, channels first.",
            )
        behind = Dense()
        behind.leaves = (Leaf("weight", "kernel", Flattened("rows behind a Flatten", sides)), self.leaves[1])
        return behind

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.Linear)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, (layers.Dense, layers.EinsumDense))

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from bias_mistakes(module, inputs)
        yield Mistake(
            "the kernel is not transposed", with_value(module, inputs, "weight", lambda m: m.weight.t().contiguous())
        )


KIND = Dense()
