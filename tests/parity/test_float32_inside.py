"""Checks in float64 of code that computes in float32: healthy ports pass, and no mistake before it is hidden."""

from __future__ import annotations

import collections
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

from porting import check_parity, port_weights
from porting.models.exact_functions import exact_functions
from tests.parity.test_written_otherwise import dense_weights, norm_weights, numbers, seeded

EPSILONS = (1e-5, 1.001e-5, 1.1e-5)


class Upsampled(nn.Module):
    """A block before a resize and one behind it."""

    def __init__(self, align_corners: bool, last: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Identity() if last else nn.Conv2d(4, 2, 1)
        self.align_corners = align_corners

    def forward(self, x: torch.Tensor) -> Any:
        x = self.norm(self.conv(x))
        return self.head(F.interpolate(x, size=(11, 12), mode="bilinear", align_corners=self.align_corners))


def upsampled(align_corners: bool, last: bool, epsilon: float = 1e-5) -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(epsilon=epsilon, momentum=0.9)(layers.Conv2D(4, 3)(x))
    if align_corners:
        x = layers.Lambda(lambda y: tf.compat.v1.image.resize_bilinear(y, (11, 12), align_corners=True))(x)
    else:
        x = layers.Resizing(11, 12)(x)
    return keras.Model(inputs, x if last else layers.Conv2D(2, 1)(x))


@pytest.mark.parametrize("last", [False, True], ids=["then a head", "at the end"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["half pixels", "corners"])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_mistakes_before_a_resize(align_corners: bool, last: bool, epsilon: float) -> None:
    reference = seeded(lambda: Upsampled(align_corners, last))
    candidate, x = upsampled(align_corners, last, epsilon), numbers(2, 8, 8, 3)
    modules = [module for module in reference.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    for module, layer in zip(modules, [layer for layer in candidate.layers if layer.weights], strict=True):
        kernel = [np.transpose(module.weight.detach().numpy(), (2, 3, 1, 0))] if module.weight.ndim > 1 else None
        bias = module.bias
        assert bias is not None
        layer.set_weights(norm_weights(module) if kernel is None else [*kernel, bias.detach().numpy()])
    report = check_parity(reference, candidate, x)
    assert report.passed == (epsilon == 1e-5), str(report)
    assert not report.float32_inside
    if not report.passed:
        assert [culprit.layer for culprit in report.culprits] == ["norm"]
        assert "epsilon" in str(report)


@pytest.mark.parametrize("shape", [(3, 7), (9, 4), (10, 14), (5, 1)])
@pytest.mark.parametrize("align_corners", [False, True], ids=["half pixels", "corners"])
def test_resizing_is_exact(shape: tuple[int, int], align_corners: bool) -> None:
    images = np.random.default_rng(0).normal(size=(2, 5, 7, 3))
    with exact_functions(staying=True):
        if align_corners:
            made = tf.raw_ops.ResizeBilinear(images=tf.constant(images), size=shape, align_corners=True)
        else:
            made = ops.image.resize(tf.constant(images), shape, "bilinear")
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = F.interpolate(tensor, shape, mode="bilinear", align_corners=align_corners).permute(0, 2, 3, 1)
    np.testing.assert_allclose(np.asarray(made), expected.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("sides", [(2, 2), ((2, 3, 1), (1, 2, 2)), (3, 1)])
@pytest.mark.parametrize("name", ["MaxPooling3D", "AveragePooling3D"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_volumes_are_pooled(name: str, sides: Any, padding: str, data_format: str) -> None:
    volumes = np.random.default_rng(0).normal(size=(2, 6, 5, 7, 3))
    layer = getattr(layers, name)
    arguments = {"pool_size": sides[0], "strides": sides[1], "padding": padding, "data_format": data_format}
    with exact_functions(staying=True):
        made = layer(dtype="float64", **arguments)(tf.constant(volumes))
    expected = layer(**arguments)(volumes.astype(np.float32))
    np.testing.assert_allclose(np.asarray(made), np.asarray(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", ["Max", "Avg"])
def test_a_model_of_volumes_is_mapped_and_checked(pool: str) -> None:
    reference = seeded(lambda: nn.Sequential(nn.Conv3d(2, 3, 3), getattr(nn, f"{pool}Pool3d")(2), nn.Conv3d(3, 4, 1)))
    name = {"Max": "Max", "Avg": "Average"}[pool]
    pooling = getattr(layers, f"{name}Pooling3D")
    x = keras.Input((6, 8, 8, 2))
    candidate = keras.Model(x, layers.Conv3D(4, 1)(pooling(2)(layers.Conv3D(3, 3)(x))))
    report = port_weights(reference, candidate, inputs=numbers(2, 6, 8, 8, 2)).report
    assert report is not None
    assert report.passed


class Angles(layers.Layer):  # type: ignore[misc]
    """Turns pairs of features by angles that it computes in float32, as a rotary embedding does."""

    def call(self, x: Any) -> Any:
        rates = ops.power(10000.0, -ops.arange(0, 1, 0.25, dtype="float32"))
        angles = ops.arange(x.shape[1], dtype="float32")[:, None] * rates
        return self.turned(x, ops.cast(ops.cos(angles), x.dtype), ops.cast(ops.sin(angles), x.dtype))

    def turned(self, x: Any, cosine: Any, sine: Any) -> Any:
        first, second = ops.split(x, 2, axis=-1)
        return ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


class ExactAngles(Angles):
    """Computes them in the type of its input."""

    def call(self, x: Any) -> Any:
        rates = ops.power(ops.cast(10000.0, x.dtype), -ops.cast(ops.arange(0, 1, 0.25), x.dtype))
        angles = ops.cast(ops.arange(x.shape[1]), x.dtype)[:, None] * rates
        return self.turned(x, ops.cos(angles), ops.sin(angles))


class TableOfAngles(Angles):
    """Holds a table that NumPy computed in float64."""

    def call(self, x: Any) -> Any:
        angles = np.arange(9)[:, None] * 10000.0 ** -np.arange(0, 1, 0.25)
        cosine, sine = (ops.convert_to_tensor(each[: x.shape[1]], x.dtype) for each in (np.cos(angles), np.sin(angles)))
        return self.turned(x, cosine, sine)


class Turning(nn.Module):
    """Linear, turn, norm, linear. The rates are numbers of float32, or a table is."""

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        rates = 10000.0 ** -torch.arange(0, 1, 0.25)
        self.register_buffer("rates", rates, persistent=False)
        angles = torch.arange(9.0)[:, None] * rates
        self.table = table
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.a(x)
        count, tensors = x.shape[1], dict(self.named_buffers())
        angles = torch.arange(float(count), dtype=x.dtype)[:, None] * tensors["rates"]
        cosine, sine = angles.cos(), angles.sin()
        if self.table:
            cosine, sine = tensors["cosine"][:count], tensors["sine"][:count]
        first, second = x.chunk(2, -1)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
        return self.b(self.norm(turned))


def turning(layer: Callable[[], Any], reference: nn.Module, epsilon: float, first: float = 1.0) -> keras.Model:
    inputs = keras.Input((7, 6))
    parts = layers.Dense(8), layer(), layers.LayerNormalization(epsilon=epsilon), layers.Dense(3)
    x = inputs
    for each in parts:
        x = each(x)
    model = keras.Model(inputs, x)
    kernel, bias = dense_weights(reference.get_submodule("a"))
    parts[0].set_weights([kernel * np.float32(first), bias])
    norm = reference.get_submodule("norm")
    parts[2].set_weights([norm.weight.detach().numpy(), norm.bias.detach().numpy()])  # type: ignore[operator]
    parts[3].set_weights(dense_weights(reference.get_submodule("b")))
    return model


TURNS = pytest.mark.parametrize("layer", [Angles, ExactAngles, TableOfAngles])


@TURNS
@pytest.mark.parametrize("table", [False, True], ids=["rates", "table"])
def test_angles_in_float32_pass(layer: Callable[[], Any], table: bool) -> None:
    reference = seeded(lambda: Turning(table))
    report = check_parity(reference, turning(layer, reference, 1e-5), numbers(2, 7, 6))
    assert report.passed, str(report)


@TURNS
@pytest.mark.parametrize(
    ("epsilon", "first", "culprit"), [(1.001e-5, 1.0, "norm"), (1.1e-5, 1.0, "norm"), (1e-5, 1.000001, "a")]
)
def test_mistakes_beside_angles_in_float32_are_found(
    layer: Callable[[], Any], epsilon: float, first: float, culprit: str
) -> None:
    reference = seeded(Turning)
    report = check_parity(reference, turning(layer, reference, epsilon, first), numbers(2, 7, 6))
    assert not report.passed
    assert report.culprits[0].layer == culprit, str(report)


class CastingNorm(layers.Layer):  # type: ignore[misc]
    """Computes in float32 to be safe in half precision, as published layers do."""

    def __init__(self, epsilon: float, mixes: bool) -> None:
        super().__init__()
        self.epsilon, self.mixes = epsilon, mixes

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        wide = ops.cast(x, "float32")
        if self.mixes:  # TensorFlow itself multiplies only numbers of one type
            wide = tf.cast(x, tf.float32) * tf.constant(2.0, tf.float32) / tf.constant(2.0, tf.float32)
        size = ops.mean(ops.square(wide), axis=-1, keepdims=True)
        return ops.cast(wide * ops.rsqrt(size + self.epsilon) * ops.cast(self.scale, wide.dtype), self.compute_dtype)


@pytest.mark.parametrize("mixes", [False, True], ids=["casts", "mixes types"])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_a_norm_that_casts_to_float32(mixes: bool, epsilon: float) -> None:
    reference = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 3)))
    inputs = keras.Input((5, 6))
    parts = layers.Dense(8), CastingNorm(epsilon, mixes), layers.Dense(3)
    model = keras.Model(inputs, parts[2](parts[1](parts[0](inputs))))
    parts[0].set_weights(dense_weights(reference.get_submodule("0")))
    parts[2].set_weights(dense_weights(reference.get_submodule("2")))
    with torch.no_grad():
        scale = reference.get_submodule("1").weight.uniform_(0.5, 1.5)  # type: ignore[operator]
    parts[1].set_weights([scale.detach().numpy()])
    report = check_parity(reference, model, numbers(2, 5, 6))
    assert report.passed == (epsilon == 1e-5), str(report)
    assert not report.float32_inside


class Both(layers.Layer):  # type: ignore[misc]
    """A table and a norm in one layer."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def call(self, x: Any) -> Any:
        x = x + ops.convert_to_tensor(np.sin(np.arange(6)[:, None] * 1.3 + np.arange(8) * 0.7), x.dtype)
        mean = ops.mean(x, -1, keepdims=True)
        return (x - mean) / ops.sqrt(ops.mean(ops.square(x - mean), -1, keepdims=True) + self.epsilon)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 2e-5])
def test_a_mistake_in_the_layer_that_holds_a_table(epsilon: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.ln, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
            table = torch.sin(torch.arange(6.0)[:, None] * 1.3 + torch.arange(8.0) * 0.7)
            self.table = nn.Buffer(table)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.ln(self.fc(x) + self.table))

    reference, inputs = seeded(Net), keras.Input((6, 4))
    first, last = layers.Dense(8), layers.Dense(3)
    model = keras.Model(inputs, last(Both(epsilon)(first(inputs))))
    for name, layer in (("fc", first), ("head", last)):
        layer.set_weights(dense_weights(reference.get_submodule(name)))
    report = check_parity(reference, model, numbers(3, 6, 4))
    assert report.passed == (epsilon == 1e-5), str(report)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_float32_that_only_a_later_batch_shows(batch_size: int | None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> Any:
            small = F.interpolate(x, (2, 2), mode="bilinear", antialias=True, align_corners=False)
            return self.fc(small.permute(0, 2, 3, 1).flatten(1))

    reference, inputs = seeded(Net), keras.Input((6, 6, 3))
    dense = layers.Dense(3)
    model = keras.Model(inputs, dense(layers.Flatten()(layers.Resizing(2, 2, antialias=True)(inputs))))
    dense.set_weights(dense_weights(reference.get_submodule("fc")))
    images = numbers(3, 6, 6, 3)
    images[0] = 0
    report = check_parity(reference, model, images, batch_size=batch_size)
    assert report.passed, str(report)
    assert report.float32_inside


def test_a_compiled_function_beside_float32() -> None:
    @tf.function  # type: ignore[untyped-decorator]
    def scaled(x: Any) -> Any:
        return x * tf.constant([1.0, 2.0, 3.0, 4.0], x.dtype)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
            self.table = nn.Buffer(torch.sin(torch.arange(4.0)))

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(torch.tanh(self.a(x) * torch.arange(1.0, 5.0, dtype=x.dtype) + self.table))

    reference, inputs = seeded(Net), keras.Input((5,))
    first, last = layers.Dense(4), layers.Dense(3)
    table = np.sin(np.arange(4))
    x = layers.Lambda(lambda y: ops.tanh(scaled(y) + ops.convert_to_tensor(table, y.dtype)))(first(inputs))
    model = keras.Model(inputs, last(x))
    for name, layer in (("a", first), ("b", last)):
        layer.set_weights(dense_weights(reference.get_submodule(name)))
    for batch_size in (None, 1):
        report = check_parity(reference, model, numbers(3, 5), batch_size=batch_size)
        assert report.passed, str(report)


def test_a_module_that_takes_a_structure_of_its_own() -> None:
    class Part(nn.Module):
        def forward(self, features: Any) -> Any:
            return features["x"] * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.part = nn.Linear(5, 4), Part()

        def forward(self, x: torch.Tensor) -> Any:
            features = collections.defaultdict(list)
            features["x"] = self.a(x)
            return self.part(features)

    reference, inputs, dense = seeded(Net), keras.Input((5,)), layers.Dense(4)
    model = keras.Model(inputs, layers.Lambda(lambda y: y * 2)(dense(inputs)))
    dense.set_weights(dense_weights(reference.get_submodule("a")))
    assert check_parity(reference, model, numbers(3, 5)).passed
