"""Embeddings of tokens and positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings, with_value

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class Embedding(Kind):
    name = "embedding"
    leaves = (Leaf("weight", "embeddings"),)

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.Embedding)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.Embedding)

    def module_settings(self, module: Any) -> Settings:
        return {"num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim}

    def layer_settings(self, layer: Any) -> Settings:
        return {"num_embeddings": layer.input_dim, "embedding_dim": layer.output_dim}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        tokens = [each.long() for each in inputs]  # a recording keeps tokens as floats
        for offset in (1, 2, -1, -2):
            direction = "after" if offset > 0 else "before"
            yield Mistake(
                f"it takes the row {abs(offset)} {direction} the one that PyTorch takes",
                with_value(module, tokens, "weight", _rolled(-offset)),
            )


def _rolled(by: int) -> Any:
    return lambda module: module.weight.roll(by, 0)


KIND = Embedding()
