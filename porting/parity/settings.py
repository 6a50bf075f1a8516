"""Compares the settings of paired layers, which the computed numbers do not show.

A momentum or a dropout rate changes nothing at inference, and ordinary variances hide an epsilon. The settings of both
layers of a pair are therefore compared too. The comparison is of effects: an activation is identified by its values on
a grid, not by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_of_layer, kind_of_module
from porting.kinds.activation import name_of_function
from porting.kinds.base import Kind, Settings
from porting.kinds.convolution import ASYMMETRIC
from porting.models.stacks import modules_of
from porting.models.traverse import named_layers
from porting.parity.report import Audit, SettingDifference

if TYPE_CHECKING:
    import keras
    from torch import nn

# Allows for float64 settings that were stored as float32 on the way.
_RELATIVE = 1e-6


def compare_settings(
    reference: nn.Module,
    candidate: keras.Model,
    targets: Mapping[str, str],
    *,
    strict: bool = True,
    waive: Sequence[str] = (),
) -> Audit:
    """Compare the settings of all paired layers that have settings on both sides.

    `targets` gives the name of the Keras layer for each PyTorch module. A setting that only one side has is left out.
    Without `strict`, settings that matter only in training do not count. Those in `waive`, given as "module" or
    "module:setting", never count, and neither does a padding that depends on the size of images, where the Keras model
    takes images of one size alone: the numbers say all there is to say.
    """
    one_size = _takes_one_size(candidate)
    layers = named_layers(candidate)
    modules = modules_of(reference)
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
            if not same_setting(expected[name], actual[name]):
                training = name in kind.training_settings
                shown, stated = _show(actual[name]), kind.in_keras(name, actual[name])
                settled = one_size and name == "padding" and actual[name] == ASYMMETRIC
                differences.append(
                    SettingDifference(
                        source,
                        name,
                        _show(expected[name]),
                        f"{stated} (PyTorch's {shown})" if stated else shown,
                        kind.advice(name, expected[name]),
                        training,
                        (strict or not training) and not settled and not {source, f"{source}:{name}"} & set(waive),
                    )
                )
    return Audit(compared_layers, compared, tuple(differences))


def _takes_one_size(model: keras.Model) -> bool:
    """Whether every side of a model's inputs is fixed, except for the number of samples."""
    inputs = getattr(model, "inputs", None)
    return bool(inputs) and all(None not in tuple(each.shape)[1:] for each in inputs or ())


def settings_beside(kind: Kind, layer: keras.layers.Layer) -> Settings:
    """The settings of a Keras layer as a layer of this kind: its own, or those of a part that is fused into it."""
    if kind is kind_of_layer(layer):
        return kind.layer_settings(layer)
    return kind.fused_settings(layer)


def settings_of_module(module: nn.Module) -> Settings:
    """The settings of a PyTorch module, under PyTorch's names; {} for an unknown kind."""
    kind = kind_of_module(module)
    return {} if kind is None else kind.module_settings(module)


def same_setting(expected: Any, actual: Any) -> bool:
    """Whether two settings agree, floats up to the rounding of float32."""
    if isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray):
        return expected.shape == actual.shape and bool(np.allclose(expected, actual, rtol=1e-9, atol=1e-9))
    if isinstance(expected, float) or isinstance(actual, float):
        return math.isclose(float(expected), float(actual), rel_tol=_RELATIVE, abs_tol=1e-12)
    return bool(expected == actual)


def _show(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return name_of_function(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
