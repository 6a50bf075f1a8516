"""Layer normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError
from porting.kinds.base import Kind, Leaf, Mistake, Settings, with_forward
from porting.kinds.batch_norm import norm_mistakes, scaled_and_shifted
from porting.kinds.transforms import Permutation

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


_CHANNELS_LAST = Permutation("channels_last", last=(0,), ranks=(2, 3, 4))


class LayerNorm(Kind):
    name = "layer_norm"
    leaves: tuple[Leaf, ...] = (Leaf("weight", "gamma", default=1.0), Leaf("bias", "beta", default=0.0))

    def with_details(self, details: str) -> Kind:
        """`channels_first`: the module normalises maps `(C, H, W)`, and the layer `(H, W, C)`."""
        if details != "channels_first":
            raise KeyMapError(f"the kind layer_norm takes channels_first: got {details!r}")
        other = LayerNorm()
        other.leaves = tuple(replace(leaf, transform=_CHANNELS_LAST) for leaf in self.leaves)
        return other

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.LayerNorm)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.LayerNormalization)

    def module_settings(self, module: Any) -> Settings:
        return {"eps": module.eps, "axes": len(module.normalized_shape)}

    def layer_settings(self, layer: Any) -> Settings:
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        return {"eps": layer.epsilon, "axes": len(axes)}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from norm_mistakes(module, inputs)
        yield Mistake(
            "its statistics are those of the whole sample, not of the last axis",
            with_forward(module, inputs, _over_the_sample),
        )


def _over_the_sample(module: Any, x: Tensor) -> Tensor:
    from torch.nn import functional

    normalized = functional.layer_norm(x, x.shape[1:], eps=module.eps)
    # Subclasses for maps `(N, C, H, W)` move the channels to the end and back.
    last = module.weight is None or x.shape[-1] == len(module.weight)
    return scaled_and_shifted(module, normalized, (-1,) if last else (1, -1, *[1] * (x.ndim - 2)))


KIND = LayerNorm()
