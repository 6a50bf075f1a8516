"""Settings that numbers cannot show, compared between paired layers.

A momentum changes nothing at inference, a dropout rate neither, and an epsilon hides behind ordinary variances. So
what the two layers of a pair are set to is read and compared as well. What is compared is effective: an activation is
told by its values on a grid, not by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_of_layer, kind_of_module
from porting.kinds.activation import name_of_function
from porting.kinds.base import Kind, Settings
from porting.models.traverse import named_layers
from porting.parity.report import Audit, SettingDifference

if TYPE_CHECKING:
    import keras
    from torch import nn

# float64 settings that went through a float32 on the way.
_RELATIVE = 1e-6


def compare_settings(
    reference: nn.Module,
    candidate: keras.Model,
    targets: Mapping[str, str],
    *,
    strict: bool = True,
    waive: Sequence[str] = (),
) -> Audit:
    """Compares the settings of all paired layers that both sides have settings for.

    `targets` gives the name of the Keras layer for each PyTorch module. A setting that only one side has a meaning for
    is left out. Without `strict` those that matter only in training do not count; those in `waive` never do, by
    module's name or "module:setting".
    """
    layers = named_layers(candidate)
    modules = dict(reference.named_modules())
    differences: list[SettingDifference] = []
    compared_layers = compared = 0
    for source, target in targets.items():
        if target not in layers or source not in modules:
            continue
        module, layer = modules[source], layers[target]
        kind = kind_of_module(module)
        if kind is None:
            continue
        expected, actual = kind.module_settings(module), settings_beside(kind, layer)
        common = [name for name in expected if name in actual]
        compared_layers += bool(common)
        compared += len(common)
        for name in common:
            if not _same(expected[name], actual[name]):
                training = name in kind.training_settings
                differences.append(
                    SettingDifference(
                        source,
                        name,
                        _show(expected[name]),
                        _show(actual[name]),
                        kind.advice(name, expected[name]),
                        training,
                        (strict or not training) and not {source, f"{source}:{name}"} & set(waive),
                    )
                )
    return Audit(compared_layers, compared, tuple(differences))


def settings_beside(kind: Kind, layer: keras.layers.Layer) -> Settings:
    """What a Keras layer is set to as a layer of this kind: its own settings, or those of what is fused into it."""
    if kind is kind_of_layer(layer):
        return kind.layer_settings(layer)
    return kind.fused_settings(layer)


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
        return expected.shape == actual.shape and bool(np.allclose(expected, actual, rtol=1e-9, atol=1e-9))
    if isinstance(expected, float) or isinstance(actual, float):
        return math.isclose(float(expected), float(actual), rel_tol=_RELATIVE, abs_tol=1e-12)
    return bool(expected == actual)


def _show(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return name_of_function(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
