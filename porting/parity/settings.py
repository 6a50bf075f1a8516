"""Settings that numbers cannot show, compared between paired layers.

A momentum changes nothing at inference, a dropout rate neither, and an epsilon hides behind ordinary variances. So
what the two layers of a pair are set to is read and compared as well. What is compared is effective: an activation is
told by its values on a grid, not by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras
    from torch import nn

Settings = dict[str, Any]
# float64 settings that went through a float32 on the way.
_RELATIVE = 1e-6


@dataclass(frozen=True)
class SettingDifference:
    """One setting of one layer that is not the same on both sides."""

    layer: str
    setting: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.setting} is {self.actual} in Keras, {self.expected} in PyTorch"


@dataclass(frozen=True)
class Audit:
    """What was compared, in how many layers, and every difference."""

    layers: int
    settings: int
    differences: tuple[SettingDifference, ...]


def audit_settings(reference: nn.Module, candidate: keras.Model, targets: Mapping[str, str]) -> Audit:
    """Compares the settings of all paired layers that both sides have settings for.

    `targets` gives the Keras path of each PyTorch module. A setting that only one side has a meaning for is left out.
    """
    layers = layers_by_path(candidate)
    differences: list[SettingDifference] = []
    compared_layers = compared = 0
    for source, target in targets.items():
        if target not in layers:
            continue
        module, layer = reference.get_submodule(source), layers[target]
        expected, actual = module_settings(module), layer_settings(layer)
        common = [name for name in expected if name in actual]
        compared_layers += bool(common)
        compared += len(common)
        for name in common:
            if not _same(expected[name], actual[name]):
                differences.append(SettingDifference(source, name, _show(expected[name]), _show(actual[name])))
    return Audit(compared_layers, compared, tuple(differences))


def layers_by_path(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Every layer of a model, at any depth."""
    found: list[keras.layers.Layer] = []
    pending = list(model.layers)
    while pending:
        layer = pending.pop(0)
        if not any(layer is other for other in found):
            found.append(layer)
            # Sublayers of a layer have no public listing; this is what Keras's own summary walks over.
            pending += list(getattr(layer, "_layers", []))
    return {layer.path or layer.name: layer for layer in found}


def module_settings(module: nn.Module) -> Settings:
    """What a PyTorch module is set to, under PyTorch's names; {} for a kind that is not known."""
    from torch import nn

    name = type(module).__name__.lower()
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        settings: Settings = {
            "kernel_size": tuple(module.kernel_size),
            "stride": tuple(module.stride),
            "dilation": tuple(module.dilation),
            "groups": module.groups,
            "bias": module.bias is not None,
        }
        if isinstance(module.padding, tuple):
            settings["padding"] = tuple(module.padding)
        return settings
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        settings = {"eps": module.eps, "affine": module.affine, "axis": "channels"}
        if module.momentum is not None:
            settings["momentum"] = module.momentum
        return settings
    if isinstance(module, nn.LayerNorm):
        return {"eps": module.eps, "axes": len(module.normalized_shape)}
    if isinstance(module, nn.GroupNorm):
        return {"eps": module.eps, "groups": module.num_groups}
    if isinstance(module, nn.Linear):
        return {"bias": module.bias is not None}
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return {"rate": module.p, "per_sample": False}
    if name in {"droppath", "stochasticdepth"}:
        rate = next((getattr(module, key) for key in ("rate", "drop_prob", "p") if hasattr(module, key)), None)
        return {} if rate is None else {"rate": float(rate or 0.0), "per_sample": True}
    if type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters()):
        return {"activation": _values_of_module(module)}
    return {}


def layer_settings(layer: keras.layers.Layer) -> Settings:
    """What a Keras layer is set to, under PyTorch's names and in PyTorch's sense; {} for a kind that is not known."""
    import keras

    kinds = keras.layers
    if isinstance(layer, (kinds.Conv1D, kinds.Conv2D, kinds.Conv3D, kinds.DepthwiseConv1D, kinds.DepthwiseConv2D)):
        depthwise = isinstance(layer, (kinds.DepthwiseConv1D, kinds.DepthwiseConv2D))
        channel_axis = 1 if layer.data_format == "channels_first" else -1
        kernel, dilation = tuple(layer.kernel_size), tuple(layer.dilation_rate)
        settings: Settings = {
            "kernel_size": kernel,
            "stride": tuple(layer.strides),
            "dilation": dilation,
            "bias": bool(layer.use_bias),
        }
        if layer.built:
            settings["groups"] = int(layer.input_spec.axes[channel_axis]) if depthwise else layer.groups
        reach = tuple((size - 1) * step for size, step in zip(kernel, dilation, strict=True))
        if layer.padding == "same":
            even = all(total % 2 == 0 for total in reach) and all(step == 1 for step in layer.strides)
            settings["padding"] = tuple(total // 2 for total in reach) if even else "asymmetric (same)"
        return settings
    if isinstance(layer, kinds.BatchNormalization):
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
        rank = len(layer.gamma.shape) if layer.scale and layer.built else 1
        channels = "channels" if axis in (-1, 1, 3) and rank == 1 else f"axis {axis}"
        # Keras's momentum is the share of the old value, PyTorch's that of the new one.
        return {
            "eps": layer.epsilon,
            "momentum": 1.0 - layer.momentum,
            "affine": bool(layer.scale and layer.center),
            "axis": channels,
        }
    if isinstance(layer, kinds.LayerNormalization):
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        return {"eps": layer.epsilon, "axes": len(axes)}
    if isinstance(layer, kinds.GroupNormalization):
        return {"eps": layer.epsilon, "groups": layer.groups}
    if isinstance(layer, kinds.Dense):
        return {"bias": bool(layer.use_bias)}
    if isinstance(layer, (kinds.Dropout, kinds.SpatialDropout2D)):
        shape = getattr(layer, "noise_shape", None)
        return {"rate": float(layer.rate), "per_sample": shape is not None and all(side == 1 for side in shape[1:])}
    if isinstance(layer, kinds.Activation):
        return {"activation": _values_of(layer.activation)}
    if type(layer).__name__ in {"ReLU", "LeakyReLU", "ELU", "Softmax"}:
        return {"activation": _values_of(layer)}
    return {}


_GRID = np.linspace(-6.0, 6.0, 97, dtype=np.float64)


def _values_of_module(module: nn.Module) -> np.ndarray[Any, Any]:
    import torch

    with torch.no_grad():
        values: np.ndarray[Any, Any] = module(torch.from_numpy(_GRID.copy()[None])).numpy()[0]
    return values


def _values_of(function: Callable[[Any], Any]) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.asarray(function(_GRID.astype(np.float32)[None]))[0]
    return values


def _same(expected: Any, actual: Any) -> bool:
    if isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray):
        return bool(np.abs(expected - actual).max() < 1e-5)
    if isinstance(expected, float) or isinstance(actual, float):
        return math.isclose(float(expected), float(actual), rel_tol=_RELATIVE, abs_tol=1e-12)
    return bool(expected == actual)


def _show(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return _name_activation(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name_activation(values: np.ndarray[Any, Any]) -> str:
    """The name of a function of one variable by its values on the grid."""
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(_GRID.copy())
    known = {
        "GELU (erf)": F.gelu(x),
        "GELU (tanh)": F.gelu(x, approximate="tanh"),
        "ReLU": F.relu(x),
        "ReLU6": F.relu6(x),
        "SiLU": F.silu(x),
        "sigmoid": torch.sigmoid(x),
        "tanh": torch.tanh(x),
        "hard swish": F.hardswish(x),
        "leaky ReLU 0.01": F.leaky_relu(x),
        "ELU": F.elu(x),
        "Mish": F.mish(x),
        "linear": x,
    }
    for name, expected in known.items():
        if np.abs(values - expected.numpy()).max() < 1e-5:
            return name
    return "another function"
