"""Tells the rounding of weights that a port computed, such as a convolution of several branches, from a mistake.

Nothing in PyTorch holds such weights, so they cannot be compared. A layer that is right but for their rounding to
float32 differs in a known size: a sum of products with random errors of one rounding each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_of_layer
from porting.models.observe import to_torch
from porting.parity.content import as_real
from porting.parity.report import FLOAT32_ROUNDOFF

if TYPE_CHECKING:
    import keras
    from torch import Tensor

# A weight that several operations computed in float32 has an RMS error of less than one rounding.
_ROUNDINGS = 1.5
# The kinds of layers that multiply their input by numbers of their own and add up.
_LINEAR = {"conv", "conv_transpose", "depthwise", "separable", "dense"}


def differs_as_rounded(layer: keras.layers.Layer, inputs: Sequence[Tensor], actual: Tensor, expected: Tensor) -> bool:
    """Whether a layer's result differs by no more than the rounding of its own weights makes, channel by channel.

    `layer` is in float64, as are all tensors, which are in Keras's order. Weights are as wrong as their rounding if the
    result is, in each channel, within some roundings of the root of the sum of squared products. A factor for a whole
    channel, such as that of a norm, is rounded once for all its weights, so as much of the result itself may differ.
    """
    kind = kind_of_layer(layer)
    if len(inputs) != 1 or not actual.ndim or not (is_rounding_rescaling(layer) or (kind and kind.name in _LINEAR)):
        return False
    power = _power(layer, inputs[0])
    if power is None or power.shape != actual.shape:
        return False
    axes = tuple(range(actual.ndim - 1))
    distance, size, products = (
        (each.mean(axes) if axes else each) for each in ((actual - expected) ** 2, actual**2, power)
    )
    limit = _ROUNDINGS * FLOAT32_ROUNDOFF * (products.sqrt() + size.sqrt())
    return bool((distance.sqrt() <= limit).all())


def is_rounding_rescaling(layer: Any) -> bool:
    """Whether a layer is a Rescaling by numbers that float32 does not hold exactly."""
    from keras import layers

    if not isinstance(layer, layers.Rescaling):
        return False
    numbers = (np.asarray(each, np.float64) for each in (layer.scale, layer.offset))
    return any(bool((each.astype(np.float32) != each).any()) for each in numbers)


def _power(layer: keras.layers.Layer, given: Tensor) -> Tensor | None:
    """The sum of squared products for each result of a layer that is linear in its input; None if it cannot be had."""
    import keras

    squared = keras.ops.convert_to_tensor(given.double().square().contiguous().numpy())
    try:
        with _squared(layer):
            return as_real(to_torch(layer.call(squared)))
    except Exception:  # a layer may raise anything, or take more than one tensor
        return None


@contextlib.contextmanager
def _squared(layer: Any) -> Iterator[None]:
    """Square all numbers of a layer, and leave out its activation."""
    import keras

    values = [np.array(variable) for variable in layer.weights]
    names = ("scale", "offset") if isinstance(layer, keras.layers.Rescaling) else ("activation",)
    attributes = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    try:
        for variable, each in zip(layer.weights, values, strict=True):
            variable.assign(each**2)
        for name, value in attributes.items():
            other = keras.activations.linear if name == "activation" else np.square(np.asarray(value, np.float64))
            setattr(layer, name, other)
        yield
    finally:
        for name, value in attributes.items():
            setattr(layer, name, value)
        for variable, each in zip(layer.weights, values, strict=True):
            variable.assign(each)
