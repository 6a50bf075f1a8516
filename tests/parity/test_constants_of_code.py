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
from torch.nn import functional as F

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
    "functions of TensorFlow": (
        lambda y, _: [F.gelu(y), F.gelu(y, approximate="tanh"), F.leaky_relu(y, 0.3), y * torch.sigmoid(1.7 * y)],
        lambda y, _: [tf.nn.gelu(y), tf.nn.gelu(y, True), tf.nn.leaky_relu(y, 0.3), tf.nn.silu(y, 1.7)],
    ),
    "a system of equations": (
        lambda y, _: torch.linalg.solve(torch.eye(3) * 2 + 1, y.T).T,
        lambda y, _: tf.transpose(tf.linalg.solve(tf.eye(3) * 2 + 1, tf.transpose(y))),
    ),
    "a root before a norm": (
        lambda y, _: F.layer_norm(y * 3**0.5, (3,)),
        lambda y, _: layers.LayerNormalization(epsilon=1e-5)(y * tf.sqrt(3.0)),
    ),
    "an empty result": (lambda y, _: (y, y[:0]), lambda y, _: (y, y[:0])),
    "Python's numbers": (lambda y, _: (y, 1.5, 2), lambda y, _: (y, 1.5, 2)),
    "numbers on one side": (lambda y, _: (False, y, 2 * y, 3), lambda y, _: (y, 2 * y)),
    "a filled tensor": (lambda y, _: y * torch.full((3,), 0.1), lambda y, _: y * tf.fill((3,), 0.1)),
    "boxes in float32": (
        lambda y, _: y,
        lambda y, _: (y, tf.image.crop_and_resize(tf.ones((1, 5, 3, 1)), tf.constant([[0.0, 0, 1, 1]]), [0], [5, 3]))[
            0
        ],
    ),
    "an array of TensorFlow": (
        lambda y, _: y,
        lambda y, _: y * tf.cast(tf.TensorArray(tf.float32, 1).write(0, tf.constant(1.0)).read(0), y.dtype),
    ),
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
    "an array by 5e-7": (
        lambda y, _: y * torch.tensor(THIRDS),
        lambda y, _: y * np.array([0.1, 0.2000001, 0.3], np.float32),
    ),
    "another polynomial": (
        lambda y, _: F.gelu(y, approximate="tanh"),
        lambda y, _: 0.5 * y * (1 + tf.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (y + 0.0447 * y**3))),
    ),
    "a number by 3e-6": (lambda y, _: y * 0.1, lambda y, _: y * np.float32(0.1000003)),
    "numbers on one side": (lambda y, _: (False, y, 3 * y), lambda y, _: (y, 2 * y)),
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


class Holding(keras.Model):  # type: ignore[misc]
    """Holds in float32, in a tensor or in a weight, what PyTorch's code makes anew in each call."""

    def __init__(self, mean: list[float], *, in_weight: bool) -> None:
        super().__init__()
        self.fc = layers.Dense(3)
        self.mean = tf.constant(mean)
        if in_weight:
            self.mean = self.add_weight(shape=(3,), trainable=False)
            self.mean.assign(mean)

    def call(self, x: Any) -> Any:
        return self.fc(x) - self.mean


@pytest.mark.parametrize("in_weight", [False, True], ids=["tensor", "weight"])
@pytest.mark.parametrize("change", [0.0, 5e-7], ids=["healthy", "wrong"])
def test_constants_that_keras_holds(in_weight: bool, change: float) -> None:
    torch.manual_seed(0)
    mean = [0.485, 0.456, 0.406]
    reference = Theirs(lambda y, _: y - torch.tensor(mean)).eval()
    candidate = Holding([mean[0], mean[1] + change, mean[2]], in_weight=in_weight)
    candidate(VALUES)
    candidate.fc.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    assert porting.check_parity(reference, candidate, VALUES).passed is not bool(change)


class WithBuffer(nn.Module):
    def __init__(self, values: Any, *, plain: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        if plain:
            self.table = torch.tensor(values)  # neither a parameter nor a buffer
        else:
            self.register_buffer("table", torch.tensor(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) @ self.table if self.table.ndim == 2 else self.fc(x) * self.table


TABLES: dict[str, tuple[Any, Any, bool]] = {
    "a number": (0.1, 0.1, True),
    "a number in float32": (0.1, np.float32(0.1), True),
    "a third": (1 / 3, 1 / 3, True),
    "equal numbers": ([0.1, 0.1, 0.1], 0.1, True),
    "a matrix": ([[0.1, 0.2, 0.3]] * 3, np.array([[0.1, 0.2, 0.3]] * 3, np.float32), True),
    "a number by 1e-6": (0.1, 0.1000001, False),
    "a small entry beside a large one": ([1000.0, 0.1, 0.001], np.array([1000, 0.1, 0.00102]), False),
    "an entry by 1 %": ([1.0, 0.01, 0.0001], np.array([1, 0.01, 0.000101]), False),
}


@pytest.mark.parametrize("plain", [False, True], ids=["buffer", "attribute"])
@pytest.mark.parametrize("name", TABLES)
def test_numbers_that_pytorch_holds(name: str, plain: bool) -> None:
    theirs, ours, healthy = TABLES[name]
    torch.manual_seed(0)
    reference = WithBuffer(theirs, plain=plain).eval()
    candidate = Ours(lambda y, _: ops.matmul(y, ours) if np.ndim(ours) == 2 else y * ours)
    candidate(VALUES)
    candidate.fc.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    report = porting.check_parity(reference, candidate, VALUES)
    assert report.passed is healthy, str(report)


class Compiled(keras.Model):  # type: ignore[misc]
    """Calls its layers inside compiled functions, one of which takes only float32."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second, self.scale = layers.Dense(6), layers.Dense(3), scale
        self.first.build((None, 4))  # variables that are made during a compilation keep their first values in it
        self.second.build((None, 6))

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
    assert "PyTorch gives 2 results and Keras 1; the first is compared" in str(report)


def test_a_function_that_was_compiled_with_other_values_is_refused() -> None:
    class Stale(Ours):
        scale = 1.5

        @tf.function  # type: ignore[untyped-decorator]
        def call(self, x: Any) -> Any:
            return self.fc(x) * self.scale

    torch.manual_seed(0)
    reference, candidate = Theirs(lambda y, _: 2 * y).eval(), Stale(lambda y, _: y)
    candidate(VALUES)
    candidate.fc.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    candidate.scale = 2.0
    report = porting.check_parity(reference, candidate, VALUES)
    assert "compiled with other values" in report.problem


class Gated(nn.Module):
    def __init__(self, most: float) -> None:
        super().__init__()
        self.a, self.g, self.b, self.most = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3), most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.clamp(self.a(x), -self.most, self.most) * torch.sigmoid(30 * self.g(x)))


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Linear(4, 200), nn.Linear(4, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, places = torch.sigmoid(self.u(x)).topk(3)
        return torch.cat([self.v(x).gather(1, places), scores], 1)


@pytest.mark.parametrize("locates", [True, False])
def test_a_clamp_is_found_beside_scores_that_saturate(locates: bool) -> None:
    """On loud inputs, a sort may choose differently among equal scores. That must not excuse anything else."""
    torch.manual_seed(0)
    reference, inputs = Gated(16.0).eval(), keras.Input((4,))
    a, g, b = layers.Dense(6), layers.Dense(6), layers.Dense(3)
    candidate = keras.Model(inputs, b(a(inputs) * ops.sigmoid(30 * g(inputs))))
    for linear, dense in ((reference.a, a), (reference.g, g), (reference.b, b)):
        dense.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    report = porting.check_parity(reference, candidate, VALUES, locate_culprits=locates)
    assert report.loud is not None
    assert not report.loud.passed


@pytest.mark.parametrize("wrong", [False, True])
def test_another_choice_among_equal_scores_is_no_difference(wrong: bool) -> None:
    torch.manual_seed(0)
    reference, inputs = Choosing().eval(), keras.Input((4,))
    u, v = layers.Dense(200), layers.Dense(200)
    scores, places = ops.top_k(ops.sigmoid(u(inputs)), 3)
    chosen = ops.take_along_axis(v(inputs), ops.flip(places, 1) if wrong else places, 1)
    candidate = keras.Model(inputs, ops.concatenate([chosen, scores], 1))
    for linear, dense in ((reference.u, u), (reference.v, v)):
        dense.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    assert porting.check_parity(reference, candidate, VALUES).passed is not wrong
