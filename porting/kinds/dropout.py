"""Dropout and stochastic depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Settings

if TYPE_CHECKING:
    import keras
    from torch import nn

# The names of stochastic depth in several libraries.
_DROP_PATH_CLASSES = {"droppath", "stochasticdepth"}
_WHOLE_CHANNELS = {"Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"}
# The unit that a mask drops.
_NUMBER, _CHANNEL, _SAMPLE = "number by number", "a channel at once", "a sample at once"
# The attributes that may hold its rate.
_RATES = ("rate", "drop_prob", "p")


class Dropout(Kind):
    name = "dropout"
    # A mask of another unit is another layer, though it shows in training alone.
    training_settings = frozenset({"rate"})

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.modules.dropout._DropoutNd) or _is_drop_path(module)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(
            layer, (layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D)
        )

    def module_settings(self, module: Any) -> Settings:
        if not _is_drop_path(module):
            whole = type(module).__name__ in _WHOLE_CHANNELS
            return {"rate": module.p, "mask": _CHANNEL if whole else _NUMBER}
        rate = next((getattr(module, name) for name in _RATES if hasattr(module, name)), None)
        return {} if rate is None else {"rate": float(rate or 0.0), "mask": _SAMPLE}

    def layer_settings(self, layer: Any) -> Settings:
        if type(layer).__name__.startswith("SpatialDropout"):
            return {"rate": float(layer.rate), "mask": _CHANNEL}
        shape = getattr(layer, "noise_shape", None)
        if shape is None:
            return {"rate": float(layer.rate), "mask": _NUMBER}
        if all(side == 1 for side in shape[1:]):
            return {"rate": float(layer.rate), "mask": _SAMPLE}
        whole = shape[-1] != 1 and all(side == 1 for side in shape[1:-1])
        return {"rate": float(layer.rate), "mask": _CHANNEL if whole else f"of shape {tuple(shape)}"}


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__.lower() in _DROP_PATH_CLASSES


KIND = Dropout()
