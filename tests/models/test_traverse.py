from __future__ import annotations

import keras
import numpy as np
from keras import layers

from porting.models.traverse import named_layers, named_variables


def encoder(name: str) -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(4, name="dense")(inputs), name=name)


class Twice(keras.Model):  # type: ignore[misc]
    """A subclassed model with two layers of the same name, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layers.Dense(3, name="dense")
        self.others = [layers.Dense(3, name="dense")]

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return self.others[0](self.first(inputs))


def test_two_submodels_built_alike_have_variables_of_their_own() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, encoder("right")(encoder("left")(inputs)))
    assert len({variable.path for variable in model.weights}) == 2
    assert list(named_variables(model)) == [
        "left/dense/kernel",
        "left/dense/bias",
        "right/dense/kernel",
        "right/dense/bias",
    ]


def test_layers_of_one_name_are_told_apart() -> None:
    model = Twice()
    model(np.zeros((1, 3), np.float32))
    assert list(named_variables(model)) == ["dense/kernel", "dense/bias", "dense~1/kernel", "dense~1/bias"]
    assert named_layers(model)["dense"] is model.first


def test_a_models_own_name_is_no_part_of_a_name() -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="a"), layers.Dense(2, name="b")], name="chain")
    assert list(named_variables(model)) == ["a/kernel", "a/bias", "b/kernel", "b/bias"]


def test_a_shared_layer_has_the_name_of_its_first_place() -> None:
    shared = layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    inner = keras.Model(inputs, shared(inputs), name="inner")
    outer = keras.Input((4,))
    model = keras.Model(outer, shared(inner(outer)))
    assert list(named_variables(model)) == ["inner/shared/kernel", "inner/shared/bias"]


def test_layers_inside_layers() -> None:
    inputs = keras.Input((5, 4))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="both")(inputs)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = keras.Model(inputs, x)
    names = list(named_variables(model))
    assert len(names) == len(set(names)) == len(model.weights)
    assert names[0].startswith("both/forward_lstm")
    assert names[0].endswith("/lstm_cell/kernel")
    assert "attention/query/kernel" in names
