"""Weights that a port computes from several, moves or leaves whole, and results that hide them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from porting import KeyRule, check_parity, port_weights
from tests.parity.test_written_otherwise import dense_weights, norm_weights, numbers, seeded


class Attention(nn.Module):
    """One head in plain code."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, size) for _ in range(3))
        self.size = size

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / self.size**0.5
        return scores.softmax(-1) @ self.v(x)


class Unscaled(keras.Model):  # type: ignore[misc]
    """The same with the factor in the queries' weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (layers.Dense(size) for _ in range(3))

    def call(self, x: Any) -> Any:
        scores = ops.matmul(self.q(x), ops.transpose(self.k(x), (0, 2, 1)))
        return ops.matmul(ops.softmax(scores), self.v(x))


@pytest.mark.parametrize("size", [8, 12, 16])
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-6])
def test_a_factor_in_the_weights_of_queries(size: int, factor: float) -> None:
    reference, candidate, x = seeded(lambda: Attention(size)), Unscaled(size), numbers(2, 5, 6)
    candidate(x)
    for name in "qkv":
        scale = size**-0.5 * factor if name == "q" else 1.0
        weights = [(each.astype(np.float64) * scale).astype(np.float32) for each in _dense(reference, name)]
        getattr(candidate, name).set_weights(weights)
    report = check_parity(reference, candidate, x)
    assert report.passed == (factor == 1.0), str(report)


def _dense(model: nn.Module, name: str) -> list[Any]:
    return dense_weights(model.get_submodule(name))


@pytest.mark.parametrize("epsilon", [1e-5, 2e-5])
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_a_norm_in_the_weights_behind_it(kind: str, epsilon: float) -> None:
    is_dense = kind == "dense"
    shape = (5,) if is_dense else (7, 7, 5)
    reference = seeded(
        lambda: (
            nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
            if is_dense
            else nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3))
        )
    )
    inputs = keras.Input(shape)
    candidate = keras.Model(inputs, (layers.Dense(3) if is_dense else layers.Conv2D(3, 3))(inputs))
    norm, module = reference.get_submodule("0"), reference.get_submodule("1")
    scale, shift, mean, variance = (each.astype(np.float64) for each in norm_weights(norm))
    factor = scale / np.sqrt(variance + epsilon)
    weight, bias = (each.detach().double().numpy() for each in module.parameters())
    axes = (1,) if is_dense else (2, 3, 1, 0)
    per_input = factor.reshape(-1, *[1] * (weight.ndim - 2))
    more = (weight * (shift - mean * factor).reshape(-1, *[1] * (weight.ndim - 2))).reshape(3, -1).sum(1)
    kernel = (weight * per_input).T if is_dense else (weight * per_input).transpose(axes)
    candidate.set_weights([kernel.astype(np.float32), (bias + more).astype(np.float32)])
    report = check_parity(reference, candidate, numbers(3, *shape))
    assert report.passed == (epsilon == 1e-5), str(report)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_computed_weights_behind_a_flatten(norm: Callable[[nn.Module], nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.l = nn.Conv2d(3, 4, 3), norm(nn.Linear(64, 5))

        def forward(self, x: torch.Tensor) -> Any:
            return self.l(F.relu(self.c(x)).flatten(1))

    reference, inputs = seeded(Net), keras.Input((6, 6, 3))
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(inputs))
    candidate = keras.Model(inputs, layers.Dense(5)(x))
    assert port_weights(reference, candidate, inputs=numbers(3, 6, 6, 3)).require_parity()


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 5, 6)])
def test_a_layer_norm_over_maps(shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    reference = seeded(lambda: nn.Sequential(nn.Conv2d(2, channels, 1), nn.LayerNorm(shape), nn.Conv2d(channels, 2, 1)))
    with torch.no_grad():
        for parameter in reference.get_submodule("1").parameters():
            parameter.uniform_(0.5, 1.5)
    inputs = keras.Input((height, width, 2))
    norm = layers.LayerNormalization(axis=[1, 2, 3], epsilon=1e-5)
    candidate = keras.Model(inputs, layers.Conv2D(2, 1)(norm(layers.Conv2D(channels, 1)(inputs))))
    ported = port_weights(reference, candidate, inputs=numbers(2, height, width, 2))
    assert ported.require_parity()
    first, _, last = (layer.name for layer in candidate.layers if layer.weights)
    rows = [
        KeyRule("0", first, "conv"),
        KeyRule("1", norm.name, "layer_norm:channels_first"),
        KeyRule("2", last, "conv"),
    ]
    assert port_weights(reference, candidate, rows, inputs=numbers(2, height, width, 2)).require_parity()


class Tempered(nn.Module):
    """A single number, as CLIP's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.t = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> Any:
        return self.l(x) * self.t.exp()


class KerasTempered(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.t = self.add_weight(shape=(), name="t")

    def call(self, x: Any) -> Any:
        return self.dense(x) * ops.exp(self.t)


def test_a_single_number() -> None:
    reference, candidate, x = seeded(Tempered), KerasTempered(), numbers(3, 4)
    candidate(x)
    ported = port_weights(reference, candidate, inputs=x)
    assert ported.require_parity()
    assert float(np.asarray(candidate.t)) == np.float32(0.7)


class Best(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(F.relu(self.a(x))).argmax(-1)


@pytest.mark.parametrize("wrong", [False, True])
def test_whole_numbers_do_not_prove_the_weights_behind_them(wrong: bool) -> None:
    reference, inputs = seeded(Best), keras.Input((5,))
    dense = layers.Dense(4)
    best = layers.Lambda(lambda y: ops.argmax(y, axis=-1))
    candidate = keras.Model(inputs, best(dense(layers.Dense(8, activation="relu")(inputs))))
    x = numbers(6, 5)
    ported = port_weights(reference, candidate, inputs=x).require_parity()
    kernel, bias = dense.get_weights()
    dense.set_weights([kernel * np.float32(1 + 1e-4 * wrong), bias])
    report = check_parity(reference, candidate, x)
    assert report.passed == (not wrong), str(report)
    if wrong:
        assert any("not the checkpoint's" in each for each in report.objections)
    assert check_parity(reference, candidate, x, key_map=ported.key_map).passed == (not wrong)


def test_constants_of_pytorch_survive_the_search() -> None:
    """The search sets tensors that no row takes to zero, to see whether they matter; these divide."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.std = (
                nn.Buffer(torch.tensor(each).view(1, 3, 1, 1))
                for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            )
            self.c = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.c((x - self.mean) / self.std).sigmoid().mean((2, 3))

    inputs = keras.Input((8, 8, 3))
    x = layers.Normalization(mean=[0.485, 0.456, 0.406], variance=[0.229**2, 0.224**2, 0.225**2])(inputs)
    x = layers.Activation("sigmoid")(layers.Conv2D(4, 3)(x))
    candidate = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    assert port_weights(seeded(Net), candidate, inputs=numbers(2, 8, 8, 3), drop=["mean", "std"]).require_parity()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_were_rounded_on_the_way_are_said_so(dtype: torch.dtype) -> None:
    reference, inputs = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))), keras.Input((5,))
    candidate = keras.Model(inputs, layers.Dense(3)(layers.Dense(4)(inputs)))
    for name, layer in zip("01", candidate.layers[1:], strict=True):
        kernel, bias = _dense(reference, name)
        layer.set_weights([torch.from_numpy(kernel.copy()).to(dtype).float().numpy(), bias])
    report = check_parity(reference, candidate, numbers(3, 5))
    said = f"all kernels in Keras hold numbers of {str(dtype).removeprefix('torch.')}: they were rounded on the way"
    assert said in report.notes


class Typed(nn.Module):
    """Words, positions behind two rows for padding, and the only type of token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.types = nn.Embedding(30, 6), nn.Embedding(10, 6), nn.Embedding(1, 6)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> Any:
        places = torch.arange(tokens.shape[1]) + 2
        return self.out(self.norm(self.words(tokens) + self.places(places) + self.types(tokens * 0)))


class Untyped(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = layers.Embedding(30, 6), layers.Embedding(8, 6)
        self.norm, self.dense = layers.LayerNormalization(epsilon=1e-5), layers.Dense(3)

    def call(self, tokens: Any) -> Any:
        return self.dense(self.norm(self.words(tokens) + self.places(ops.arange(tokens.shape[1]))))


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-5])
def test_a_row_that_is_added_to_a_table(factor: float) -> None:
    reference, candidate = seeded(Typed), Untyped()
    tokens = np.random.default_rng(0).integers(0, 30, (3, 8)).astype(np.int32)
    candidate(tokens)
    words, places, types, scale, shift, kernel, bias = (each.detach().numpy() for each in reference.parameters())
    values = [words, places[2:] + types[0] * np.float32(factor), scale, shift, kernel.T, bias]
    candidate.set_weights(values)
    report = check_parity(reference, candidate, tokens)
    assert report.passed == (factor == 1.0), str(report)
    candidate.set_weights([*values[:4], kernel.T * np.float32(1.0001), bias])
    culprits = [culprit.layer for culprit in check_parity(reference, candidate, tokens).culprits]
    assert culprits[-1] == "out"
    assert factor != 1.0 or culprits == ["out"]


MAPS = np.random.default_rng(5).normal(size=(3, 8, 8, 3)).astype(np.float32)


class Branches(nn.Module):
    """Two convolutions, each with a norm, whose results are added by code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv3, self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.norm3, self.norm1, self.head = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        for norm in (self.norm3, self.norm1):
            state = {"running_mean": torch.rand(4) - 0.5, "running_var": torch.rand(4) + 0.5}
            norm.load_state_dict(norm.state_dict() | state | {"weight": torch.rand(4) + 0.5, "bias": torch.rand(4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm3(self.conv3(x)) + self.norm1(self.conv1(x))))


def with_weights(model: keras.Model, reference: Any, kernel: np.ndarray, bias: np.ndarray) -> keras.Model:
    """Give the convolution that stands for several these weights, and the head the reference's own."""
    model.get_layer("both").set_weights([kernel.transpose(2, 3, 1, 0), bias])
    head, last = (each.detach().numpy() for each in reference.head.parameters())
    model.get_layer("head").set_weights([head.transpose(2, 3, 1, 0), last])
    return model


def joined(reference: Branches, epsilon: float = 1e-5) -> keras.Model:
    """One convolution for both branches, with `epsilon` for the second norm."""

    def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, epsilon: float) -> tuple[Any, Any]:
        state = {name: tensor.detach().double().numpy() for name, tensor in norm.state_dict().items()}
        factor = state["weight"] / np.sqrt(state["running_var"] + epsilon)
        kernel = conv.weight.detach().double().numpy() * factor[:, None, None, None]
        return kernel, state["bias"] - state["running_mean"] * factor

    kernel, bias = folded(reference.conv3, reference.norm3, 1e-5)
    other, offset = folded(reference.conv1, reference.norm1, epsilon)
    kernel[:, :, 1:2, 1:2] += other
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(layers.Conv2D(4, 3, padding="same", name="both")(inputs))
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x))
    return with_weights(model, reference, kernel, bias + offset)


def test_branches_may_be_one_convolution() -> None:
    reference = Branches().eval()
    report = check_parity(reference, joined(reference), MAPS)
    assert report.passed, str(report)
    assert any("rounded to float32" in note for note in report.notes)


@pytest.mark.parametrize("mistake", ["epsilon", "number", "bias", "all"])
def test_a_mistake_in_joined_branches_is_found(mistake: str) -> None:
    reference = Branches().eval()
    candidate = joined(reference, 1e-4 if mistake == "epsilon" else 1e-5)
    kernel, bias = (np.array(variable) for variable in candidate.get_layer("both").weights)
    if mistake == "number":
        kernel[1, 1, 0, 2] *= 1 + 1e-5
    if mistake == "bias":
        bias[np.abs(bias).argmax()] *= 1 + 1e-5
    candidate.get_layer("both").set_weights([kernel * (1 + 1e-6 * (mistake == "all")), bias])
    report = check_parity(reference, candidate, MAPS)
    assert not report.passed
    assert report.culprits[0].target == "both", str(report)
    assert report.diagnosis is None or report.diagnosis.confidence != "certain", str(report)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_rescaling_may_round_its_numbers_otherwise(wrong: bool) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            for name, values in {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}.items():
                self.register_buffer(name, torch.tensor(values)[:, None, None])
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv((x - self.get_buffer("mean")) / self.get_buffer("std"))

    reference = Normalised().eval()
    scale = [1 / 0.229, 1 / 0.224, 1 / (0.22501 if wrong else 0.225)]
    offset = [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    inputs = keras.Input((8, 8, 3))
    candidate = keras.Model(inputs, layers.Conv2D(4, 3)(layers.Rescaling(scale, offset)(inputs)))
    kernel, bias = (each.detach().numpy() for each in reference.conv.parameters())
    candidate.layers[-1].set_weights([kernel.transpose(2, 3, 1, 0), bias])
    report = check_parity(reference, candidate, MAPS)
    assert report.passed is not wrong, str(report)


class Normed(nn.Module):
    """A norm in code, a factor, and a convolution of two branches without norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv3, self.conv1 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean((1, 2, 3), keepdim=True) + 1e-6)
        return self.head(torch.tanh(self.conv3(x) + self.conv1(x)))


def normed(reference: Normed, epsilon: float, factor: float = 1.0) -> keras.Model:
    kernel, bias = (each.detach().double().numpy() for each in reference.conv3.parameters())
    other, offset = (each.detach().double().numpy() for each in reference.conv1.parameters())
    kernel = kernel.copy()
    kernel[:, :, 1:2, 1:2] += other
    kernel[0, 1, 2, 0] *= factor
    inputs = keras.Input((8, 8, 3))
    x = inputs * ops.rsqrt(ops.mean(ops.square(inputs), (1, 2, 3), keepdims=True) + epsilon)
    x = layers.Conv2D(4, 3, padding="same", activation=layers.Activation("tanh"), name="both")(x)
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x))
    return with_weights(model, reference, kernel, bias + offset)


def test_the_rounding_of_joined_branches_hides_no_mistake_before_them() -> None:
    reference = Normed().eval()
    assert check_parity(reference, normed(reference, 1e-6), MAPS).passed
    report = check_parity(reference, normed(reference, 0.8e-6), MAPS)
    assert not report.passed


@pytest.mark.parametrize("factor", [1.001, 1.1])
def test_no_wrong_cause_is_certain_for_joined_branches(factor: float) -> None:
    reference = Normed().eval()
    report = check_parity(reference, normed(reference, 1e-6, factor), MAPS)
    assert report.culprits[0].target == "both", str(report)
    assert len(report.culprits) == 1, str(report)
    said = report.culprits[0].diagnosis
    assert said is None or said.confidence != "certain" or "conv3.weight[0, 1, 2, 0]" in said.cause, str(report)
