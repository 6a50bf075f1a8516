"""Channels that a port has in another order on purpose are not blamed for a mistake beside them."""

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

import porting

ORDER = np.array([4, 5, 0, 1, 6, 7, 2, 3])  # heads of two channels
NAMES = ("i", "q", "k", "v", "o", "h")
Weights = dict[str, list[np.ndarray]]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.h = nn.Linear(5, 8), nn.Linear(8, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.i(x))
        q, k, v = (each(x).unflatten(2, (4, 2)).transpose(1, 2) for each in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.h(x + self.o(heads))


class Ours(keras.Model):  # type: ignore[misc]
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.i, self.h, self.scale = layers.Dense(8), layers.Dense(3), scale
        self.q, self.k, self.v, self.o = (layers.Dense(8) for _ in range(4))

    def call(self, x: Any) -> Any:
        x = ops.tanh(self.i(x))
        q, k, v = (
            ops.transpose(ops.reshape(each(x), (-1, 6, 4, 2)), (0, 2, 1, 3)) for each in (self.q, self.k, self.v)
        )
        scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, 2, 3)) / self.scale**0.5)
        heads = ops.reshape(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)), (-1, 6, 8))
        return self.h(x + self.o(heads))


def attention(mistake: str = "", scale: float = 2.0, reorder: str = "qkv") -> porting.ParityReport:
    """A port whose heads are in another order, with one weight of a layer wrong by a thousandth."""
    torch.manual_seed(0)
    reference, candidate = Attention().eval(), Ours(scale)
    values = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    candidate(values)
    weights: Weights = {}
    for name in NAMES:
        linear = reference.get_submodule(name)
        weights[name] = [each.detach().numpy().T.copy() for each in (linear.weight, linear.bias)]  # type: ignore[operator]
    for name in reorder:
        weights[name] = [each[..., ORDER] for each in weights[name]]
    if "v" in reorder:
        weights["o"][0] = weights["o"][0][ORDER]
    if mistake:
        weights[mistake][0].flat[3] *= 1.001
    for name, each in weights.items():
        getattr(candidate, name).set_weights(each)
    return porting.check_parity(reference, candidate, values)


def test_heads_in_another_order_pass() -> None:
    assert attention().passed


@pytest.mark.parametrize("mistake", NAMES)
def test_the_layer_with_the_mistake_is_blamed(mistake: str) -> None:
    report = attention(mistake)
    assert not report.passed
    assert report.culprits[0].culprit == mistake, str(report)


def test_code_is_blamed_for_its_own_mistake() -> None:
    report = attention(scale=2.001)
    assert not report.passed
    assert all(each.is_input for each in report.culprits), str(report)


@pytest.mark.parametrize("reorder", ["q", "k"])
def test_another_order_that_is_a_mistake_is_named(reorder: str) -> None:
    report = attention(reorder=reorder)
    assert not report.passed
    first = report.culprits[0]
    assert first.culprit == reorder, str(report)
    assert first.diagnosis is not None
    assert "in another order" in first.diagnosis.cause


class Siblings(nn.Module):
    """Two heads of one shape, of which only the first has an activation in PyTorch's code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.u, self.v = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        return torch.cat([self.v(x) * torch.sigmoid(self.u(x)), torch.sin(self.v(x))], 1)


@pytest.mark.parametrize("name", ["u", "v"])
def test_a_sibling_of_the_same_shape_is_not_blamed(name: str) -> None:
    torch.manual_seed(0)
    reference, inputs = Siblings().eval(), keras.Input((4,))
    ours = {"a": layers.Dense(6, "relu"), "u": layers.Dense(3, "sigmoid"), "v": layers.Dense(3)}
    x = ours["a"](inputs)
    u, v = ours["u"](x), ours["v"](x)
    candidate = keras.Model(inputs, ops.concatenate([v * u, ops.sin(ours["v"](x))], 1))
    for each, layer in ours.items():
        linear = reference.get_submodule(each)
        layer.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])  # type: ignore[operator]
    values = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    assert porting.check_parity(reference, candidate, values).passed
    kernel, bias = ours[name].get_weights()
    kernel[2, 1] *= 1.001
    ours[name].set_weights([kernel, bias])
    report = porting.check_parity(reference, candidate, values)
    assert not report.passed
    assert report.culprits[0].culprit == name, str(report)


class Gated(nn.Module):
    """A gated unit of which the first half of `a` is the gate, then two more layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, values = self.a(self.norm(x)).chunk(2, -1)
        return self.c(torch.relu(self.b(F.silu(gate) * values)))


HALVES, HIDDEN = np.r_[8:16, 0:8], np.random.default_rng(1).permutation(12)


def gated(
    layer: str = "", change: Callable[[list[np.ndarray]], None] | None = None, forgotten: bool = False, rank: int = 3
) -> porting.ParityReport:
    """A port with `values` before `gate`, and with the results of `b` in another order, which `c` follows.

    `change` spoils the Keras weights of a layer. With `forgotten`, `c` is in PyTorch's order.
    """
    torch.manual_seed(0)
    reference = Gated().eval()
    ours = {"norm": layers.LayerNormalization(epsilon=1e-5), "a": layers.Dense(16)}
    ours |= {"b": layers.Dense(12, "relu"), "c": layers.Dense(4)}
    inputs = keras.Input((5, 6)[3 - rank :])
    x = ours["a"](ours["norm"](inputs))
    candidate = keras.Model(inputs, ours["c"](ours["b"](ops.silu(x[..., 8:]) * x[..., :8])))
    weights: Weights = {
        name: [each.detach().numpy().T.copy() for each in reference.get_submodule(name).parameters()] for name in ours
    }
    weights["a"] = [each[..., HALVES] for each in weights["a"]]
    weights["b"] = [each[..., HIDDEN] for each in weights["b"]]
    if not forgotten:
        weights["c"][0] = weights["c"][0][HIDDEN]
    if change is not None:
        change(weights[layer])
    for name, each in weights.items():
        ours[name].set_weights(each)
    values = np.random.default_rng(0).normal(size=(*(3, 5, 6)[: rank - 1], 6)).astype(np.float32)
    return porting.check_parity(reference, candidate, values)


def scaled(index: int, place: int, factor: float = 1.001) -> Callable[[list[np.ndarray]], None]:
    def change(weights: list[np.ndarray]) -> None:
        weights[index].flat[place] *= factor

    return change


@pytest.mark.parametrize("rank", [2, 3])
def test_halves_and_hidden_units_in_another_order_pass(rank: int) -> None:
    assert gated(rank=rank).passed


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("index", [0, 1], ids=["weight", "bias"])
@pytest.mark.parametrize("layer", ["a", "b", "c"])
def test_a_number_of_a_reordered_layer_is_named(layer: str, index: int, rank: int) -> None:
    order = {"a": HALVES, "b": HIDDEN, "c": np.arange(4)}[layer]
    row, column = (2, 2) if not index else (0, 3)  # in Keras's kernel, or of a bias
    (culprit,) = gated(layer, scaled(index, row * len(order) + column), rank=rank).culprits
    assert culprit.culprit == layer, str(culprit)
    assert culprit.diagnosis is not None
    assert culprit.diagnosis.confidence == "certain"
    assert "1.001 times what it should be" in culprit.diagnosis.cause
    # Keras's place is where the number was changed, PyTorch's is where the channel comes from.
    theirs = f"bias[{order[column]}]" if index else f"weight[{order[column]}, {HIDDEN[row] if layer == 'c' else row}]"
    ours = f"bias[{column}]" if index else f"kernel[{row}, {column}]"
    assert f"{layer}.{theirs} is" in culprit.diagnosis.cause
    assert f"{ours})" in culprit.diagnosis.cause


def test_a_number_behind_a_dead_unit_of_a_reordered_layer_is_named() -> None:
    report = gated("c", scaled(0, 3), rank=2)
    assert not report.passed
    assert not report.culprits
    assert "kernel[0, 3] is" in str(report)
    assert "the numbers of this run agree" in str(report)


def test_reordered_weights_are_compared_bit_by_bit() -> None:
    verified = gated().verified
    assert verified is not None
    assert verified.compared_bits == 8


def test_a_channel_of_a_reordered_layer_is_named() -> None:
    def change(weights: list[np.ndarray]) -> None:
        weights[0][:, 2] *= 2.0

    (culprit,) = gated("b", change).culprits
    assert culprit.culprit == "b"
    assert culprit.diagnosis is not None
    assert "8 of 96 numbers differ" in culprit.diagnosis.cause


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("spoilt", [False, True])
def test_an_order_that_what_follows_does_not_take_is_named(spoilt: bool, rank: int) -> None:
    report = gated("b", scaled(0, 3) if spoilt else None, forgotten=True, rank=rank)
    (culprit,) = report.culprits
    assert culprit.culprit == "b", str(report)
    assert culprit.diagnosis is not None
    assert "its output channels are in another order" in culprit.diagnosis.cause
    assert ("1.001 times what it should be" in culprit.diagnosis.cause) is spoilt


def test_a_norm_in_another_order_beside_a_mistake() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    for number, each in enumerate(reference.state_dict().values()):
        if each.is_floating_point():
            each.data.add_(0.1 * torch.rand(each.shape, generator=torch.Generator().manual_seed(number)))
    candidate = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8), layers.BatchNormalization(epsilon=1e-5, momentum=0.9), layers.Dense(3)]
    )
    order = np.random.default_rng(2).permutation(8)
    arrays = [each.numpy().T for each in reference.state_dict().values() if each.is_floating_point()]
    arrays[:6] = [each[..., order] for each in arrays[:6]]
    arrays[6] = arrays[6][order]
    arrays[4] = arrays[4] + np.eye(8)[5].astype(np.float32)  # of the moving mean
    candidate.set_weights(arrays)
    report = porting.check_parity(reference, candidate, np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    (culprit,) = report.culprits
    assert culprit.culprit == "1", str(report)
    assert culprit.diagnosis is not None
    assert f"1.running_mean[{order[5]}]" in culprit.diagnosis.cause
