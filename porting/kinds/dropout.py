"""Dropout and stochastic depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Settings

if TYPE_CHECKING:
    import keras
    from torch import nn

# What several libraries call stochastic depth, and its rate.
_DROP_PATH_CLASSES = {"droppath", "stochasticdepth"}
_RATES = ("rate", "drop_prob", "p")


class Dropout(Kind):
    name = "dropout"
    training_settings = frozenset({"rate", "per_sample"})

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.modules.dropout._DropoutNd) or _is_drop_path(module)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, (layers.Dropout, layers.SpatialDropout2D))

    def module_settings(self, module: Any) -> Settings:
        if not _is_drop_path(module):
            return {"rate": module.p, "per_sample": False}
        rate = next((getattr(module, name) for name in _RATES if hasattr(module, name)), None)
        return {} if rate is None else {"rate": float(rate or 0.0), "per_sample": True}

    def layer_settings(self, layer: Any) -> Settings:
        shape = getattr(layer, "noise_shape", None)
        return {"rate": float(layer.rate), "per_sample": shape is not None and all(side == 1 for side in shape[1:])}


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__.lower() in _DROP_PATH_CLASSES


KIND = Dropout()
