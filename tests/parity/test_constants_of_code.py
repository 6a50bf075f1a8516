"""Constants, masks and compiled functions in the code of either model, in whatever type the code makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers, ops
from torch import nn

import porting

THIRDS = [0.1, 0.2, 0.3]
VALUES = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class Theirs(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(4, 3), function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.fc(x), x)


class Ours(keras.Model):  # type: ignore[misc]
    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.fc, self.function = layers.Dense(3), function

    def call(self, x: Any) -> Any:
        return self.function(self.fc(x), x)


def check(theirs: Callable[..., Any], ours: Callable[..., Any]) -> porting.ParityReport:
    torch.manual_seed(0)
    reference, candidate = Theirs(theirs).eval(), Ours(ours)
    candidate(VALUES)
    candidate.fc.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    return porting.check_parity(reference, candidate, VALUES)


HEALTHY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "numbers": (lambda y, _: y * torch.tensor(0.1), lambda y, _: y * 0.1),
    "roots": (lambda y, _: y / torch.sqrt(torch.tensor(3.0)), lambda y, _: y / 3**0.5),
    "a list in a tensor": (lambda y, _: y * torch.tensor(THIRDS), lambda y, _: y * tf.constant(THIRDS)),
    "a list": (lambda y, _: y * torch.tensor(THIRDS), lambda y, _: ops.multiply(y, THIRDS)),
    "a list, converted": (lambda y, _: y * torch.tensor(THIRDS), lambda y, _: y * ops.convert_to_tensor(THIRDS)),
    "an array in float32": (lambda y, _: y * torch.tensor(THIRDS), lambda y, _: y * np.array(THIRDS, np.float32)),
    "a number in float32": (lambda y, _: y * 0.1, lambda y, _: y * np.float32(0.1)),
    "ones": (lambda y, _: y + torch.ones(3), lambda y, _: y + tf.ones(3)),
    "a range": (lambda y, _: y * torch.arange(3).float(), lambda y, _: y * tf.cast(tf.range(3), tf.float32)),
    "steps": (lambda y, _: y * torch.linspace(0, 1, 3), lambda y, _: y * tf.linspace(0.0, 1.0, 3)),
    "a mask": (lambda y, x: y * (x[:, :3] > 0).float(), lambda y, x: y * ops.cast(x[:, :3] > 0, "float32")),
    "zeros beside": (
        lambda y, x: torch.cat([y, torch.zeros(len(x), 2)], 1),
        lambda y, x: tf.concat([y, tf.zeros((tf.shape(x)[0], 2))], 1),
    ),
    "a choice": (
        lambda y, x: torch.where(x[:, :3] > 0, y, torch.zeros(3)),
        lambda y, x: tf.where(x[:, :3] > 0, y, tf.zeros(3)),
    ),
    "infinities": (
        lambda y, x: y.masked_fill(x[:, :3] > 0, -torch.inf),
        lambda y, x: tf.where(x[:, :3] > 0, tf.constant(-np.inf, y.dtype), y),
    ),
    "an empty result": (lambda y, _: (y, y[:0]), lambda y, _: (y, y[:0])),
    "Python's numbers": (lambda y, _: (y, 1.5, 2), lambda y, _: (y, 1.5, 2)),
    "a sparse result": (lambda y, _: torch.relu(y).to_sparse(), lambda y, _: ops.relu(y)),
}
WRONG: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a list by 1e-6": (
        lambda y, _: y * torch.tensor(THIRDS),
        lambda y, _: y * tf.constant([0.1, 0.2000002, 0.3]),
    ),
    "an array by 1e-5": (
        lambda y, _: y * torch.tensor(THIRDS),
        lambda y, _: y * np.array([0.1, 0.200002, 0.3], np.float32),
    ),
    "a mask": (lambda y, x: y * (x[:, :3] > 0).float(), lambda y, x: y * ops.cast(x[:, :3] > 0.6, "float32")),
    "one infinity": (
        lambda y, x: y.masked_fill(x[:, :3] > 0, -torch.inf),
        lambda y, x: tf.where(x[:, :3] > 0.3, tf.constant(-np.inf, y.dtype), y),
    ),
    "another infinity": (
        lambda y, x: y.masked_fill(x[:, :3] > 0, -torch.inf),
        lambda y, x: tf.where(x[:, :3] > 0, tf.constant(np.inf, y.dtype), y),
    ),
    "numbers beside infinities": (
        lambda y, x: y.masked_fill(x[:, :3] > 0, -torch.inf),
        lambda y, x: tf.where(x[:, :3] > 0, tf.constant(-np.inf, y.dtype), y * 1.00001),
    ),
    "Python's numbers": (lambda y, _: (y, 1.5), lambda y, _: (y, 1.25)),
    "Python's counts": (lambda y, _: (y, 3), lambda y, _: (y, 2)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_code_makes_is_no_difference(name: str) -> None:
    report = check(*HEALTHY[name])
    assert report.passed, str(report)


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_in_it_are_found(name: str) -> None:
    assert not check(*WRONG[name]).passed


class Compiled(keras.Model):  # type: ignore[misc]
    """Calls its layers inside compiled functions, one of which takes only float32."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second, self.scale = layers.Dense(6), layers.Dense(3), scale

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32)])  # type: ignore[untyped-decorator]
    def body(self, x: Any) -> Any:
        return tf.nn.relu(self.first(x)) * self.scale

    @tf.function  # type: ignore[untyped-decorator]
    def head(self, x: Any) -> Any:
        return self.second(x)

    def call(self, x: Any) -> Any:
        return self.head(self.body(x))


@pytest.mark.parametrize("scale", [1.0, 1.00001])
def test_layers_inside_compiled_functions_are_observed(scale: float) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    candidate = Compiled(scale)
    candidate(VALUES)
    for dense, place in ((candidate.first, 0), (candidate.second, 2)):
        linear: Any = reference[place]
        dense.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    report = porting.check_parity(reference, candidate, VALUES)
    assert report.passed == (scale == 1.0), str(report)
    assert {"0", "2"} <= {layer.source for layer in report.layers} or scale != 1.0
    assert not tf.config.functions_run_eagerly()


@pytest.mark.parametrize("row", [2, 9])
@pytest.mark.parametrize("change", [1.001, 0.0])
def test_rows_of_a_table_that_no_input_reads_count(row: int, change: float) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(self.table(ids).mean(1))

    torch.manual_seed(0)
    reference, inputs = Bag().eval(), keras.Input((3,), dtype="int64")
    table, dense = layers.Embedding(10, 4), layers.Dense(3)
    candidate = keras.Model(inputs, dense(ops.mean(table(inputs), 1)))
    ids = np.random.default_rng(0).integers(0, 7, (4, 3))
    assert 2 in ids
    rows = reference.table.weight.detach().numpy().copy()
    dense.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    table.set_weights([rows])
    assert porting.check_parity(reference, candidate, ids).passed
    rows[row] *= change
    table.set_weights([rows])
    assert not porting.check_parity(reference, candidate, ids).passed


def test_results_that_only_one_side_has_are_said() -> None:
    report = check(lambda y, _: (y, 2 * y), lambda y, _: y)
    assert report.passed
    assert "PyTorch gives 2 results and Keras 1; the first 1 are compared" in str(report)
