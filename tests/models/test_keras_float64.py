from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch.nn import functional as F

from porting.models.keras_float64 import BUILT, CLONED, IN_PLACE, Float64Model

X = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)


def small() -> keras.Model:
    inputs = keras.Input((6, 8))
    x = layers.LayerNormalization()(layers.Dense(8, activation="gelu")(inputs))
    x = layers.LSTM(5, return_sequences=True)(layers.MultiHeadAttention(2, 3)(x, x))
    return keras.Model(inputs, layers.Dense(4)(x))


def test_the_model_computes_in_float64_and_is_as_before() -> None:
    model = small()
    before = [np.array(variable).tobytes() for variable in model.weights]
    single = np.asarray(model(X))
    turned = Float64Model(model)
    for _ in range(2):
        with turned.active() as exact:
            result = np.asarray(exact(X))
        assert result.dtype == np.float64
        assert 0 < np.abs(result - single).max() < 1e-5
        assert not np.array_equal(result.astype(np.float32).astype(np.float64), result)
    assert turned.how == IN_PLACE
    assert [np.array(variable).tobytes() for variable in model.weights] == before
    np.testing.assert_array_equal(np.asarray(model(X)), single)
    assert {layer.dtype_policy.name for layer in model._flatten_layers()} == {"float32"}


def test_a_clone_and_a_built_model_compute_the_same() -> None:
    model = small()
    results = []
    for how in (IN_PLACE, CLONED, BUILT):
        turned = Float64Model(model, small if how == BUILT else None)
        if how == CLONED:
            turned.clone()
        assert turned.how == how
        with turned.active() as exact:
            results.append(np.asarray(exact(X)))
    assert np.abs(results[0] - results[1]).max() < 1e-14
    assert np.abs(results[0] - results[2]).max() < 1e-14


def test_what_was_changed_on_a_layer_by_hand_is_in_the_exact_model() -> None:
    model = small()
    turned = Float64Model(model)
    with turned.active() as exact:
        before = np.asarray(exact(X))
    model.layers[-1].activation = lambda x: x + 1e-9
    with turned.active() as exact:
        assert np.abs(np.asarray(exact(X)) - before - 1e-9).max() < 1e-15


def test_a_nested_model_takes_float64() -> None:
    def double(name: str) -> keras.Model:
        inputs = keras.Input((8,))
        return keras.Model(inputs, layers.Dense(8, activation="tanh")(inputs), name=name)

    inputs = keras.Input((8,))
    model = keras.Model(inputs, double("second")(double("first")(inputs)))
    first, second = (
        [np.asarray(each).astype(np.float64) for each in model.get_layer(n).weights] for n in ("first", "second")
    )
    x = X[:, 0].astype(np.float64)
    expected = np.tanh(np.tanh(x @ first[0] + first[1]) @ second[0] + second[1])
    with Float64Model(model).active() as exact:
        assert np.abs(np.asarray(exact(X[:, 0])) - expected).max() < 1e-15
    assert model.get_layer("second").inputs[0].dtype == "float32"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: keras.activations.gelu(x, approximate=False), F.gelu),
        (lambda x: keras.activations.gelu(x, approximate=True), lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: keras.activations.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
        (keras.activations.silu, F.silu),
        (keras.activations.softplus, F.softplus),
        (keras.activations.hard_silu, F.hardswish),
        (keras.activations.mish, F.mish),
        (keras.activations.elu, F.elu),
        (keras.activations.selu, F.selu),
        (keras.activations.hard_sigmoid, F.hardsigmoid),
    ],
)
def test_functions_are_what_they_are_defined_as(ours: Any, theirs: Any) -> None:
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.Activation(ours)(inputs))
    x = (X[:, 0] * 3).astype(np.float32)
    with Float64Model(model).active() as exact:
        result = np.asarray(exact(x))
    expected = theirs(torch.from_numpy(x.astype(np.float64))).numpy()
    assert np.abs(result - expected).max() <= 2e-15 * np.abs(expected).max()


def test_weights_can_be_given_other_values_meanwhile() -> None:
    model = small()
    turned = Float64Model(model)
    count = turned.substitute(lambda name, values: values + 1e-12 if values.ndim == 1 else None)
    assert count == sum(len(variable.shape) == 1 for variable in model.weights)
    with turned.active() as exact:
        assert float(np.asarray(exact.layers[-1].bias)[0]) == 1e-12
    assert float(np.asarray(model.layers[-1].bias)[0]) == 0.0
