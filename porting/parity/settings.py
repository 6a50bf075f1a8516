"""Settings that numbers cannot show, compared between paired layers.

A momentum changes nothing at inference, a dropout rate neither, and an epsilon hides behind ordinary variances. So
what the two layers of a pair are set to is read and compared as well. What is compared is effective: an activation is
told by its values on a grid, not by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_of_layer, kind_of_module
from porting.kinds.activation import name_of_function
from porting.kinds.base import Settings
from porting.models.traverse import named_layers
from porting.parity.report import Audit, SettingDifference

if TYPE_CHECKING:
    import keras
    from torch import nn

# float64 settings that went through a float32 on the way.
_RELATIVE = 1e-6


def compare_settings(reference: nn.Module, candidate: keras.Model, targets: Mapping[str, str]) -> Audit:
    """Compares the settings of all paired layers that both sides have settings for.

    `targets` gives the Keras path of each PyTorch module. A setting that only one side has a meaning for is left out.
    """
    layers = named_layers(candidate)
    differences: list[SettingDifference] = []
    compared_layers = compared = 0
    for source, target in targets.items():
        if target not in layers:
            continue
        expected, actual = settings_of_module(reference.get_submodule(source)), settings_of_layer(layers[target])
        common = [name for name in expected if name in actual]
        compared_layers += bool(common)
        compared += len(common)
        for name in common:
            if not _same(expected[name], actual[name]):
                differences.append(SettingDifference(source, name, _show(expected[name]), _show(actual[name])))
    return Audit(compared_layers, compared, tuple(differences))


def settings_of_module(module: nn.Module) -> Settings:
    """What a PyTorch module is set to, under PyTorch's names; {} for a kind that is not known."""
    kind = kind_of_module(module)
    return {} if kind is None else kind.module_settings(module)


def settings_of_layer(layer: keras.layers.Layer) -> Settings:
    """What a Keras layer is set to, under PyTorch's names and in its conventions; {} for a kind that is not known."""
    kind = kind_of_layer(layer)
    return {} if kind is None else kind.layer_settings(layer)


def _same(expected: Any, actual: Any) -> bool:
    if isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray):
        return bool(np.abs(expected - actual).max() < 1e-5)
    if isinstance(expected, float) or isinstance(actual, float):
        return math.isclose(float(expected), float(actual), rel_tol=_RELATIVE, abs_tol=1e-12)
    return bool(expected == actual)


def _show(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return name_of_function(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
