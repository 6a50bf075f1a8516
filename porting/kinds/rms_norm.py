"""Normalisation by the root mean square."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings, with_value
from porting.kinds.batch_norm import USUAL_EPSILONS, constant

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class RMSNorm(Kind):
    name = "rms_norm"
    leaves = (Leaf("weight", "scale", default=1.0),)

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        # Classes of transformers that compute the same as PyTorch's use this name for epsilon. Gemma's class does not.
        others = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
        return isinstance(module, nn.RMSNorm) or others

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.RMSNormalization)

    def module_settings(self, module: Any) -> Settings:
        axes = len(module.normalized_shape) if hasattr(module, "normalized_shape") else module.weight.ndim
        eps = getattr(module, _epsilon(module))
        return {"axes": axes} if eps is None else {"axes": axes, "eps": eps}

    def layer_settings(self, layer: Any) -> Settings:
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        return {"axes": len(axes), "eps": layer.epsilon}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        import torch

        if module.weight is not None:
            lost = with_value(module, inputs, "weight", lambda m: torch.ones_like(m.weight))
            yield Mistake("its scale is lost", lost)
            more = with_value(module, inputs, "weight", lambda m: m.weight + 1)
            yield Mistake("1 is added to its scale", more)
        name = _epsilon(module)
        own = getattr(module, name)
        for eps in USUAL_EPSILONS:
            if eps != own:
                usual = "its type's own" if own is None else f"{own:g}"
                cause = f"an epsilon of {eps:g} instead of {usual}"
                yield Mistake(cause, with_value(module, inputs, name, partial(constant, eps)))


def _epsilon(module: nn.Module) -> str:
    """The name of the attribute that holds epsilon."""
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


KIND = RMSNorm()
