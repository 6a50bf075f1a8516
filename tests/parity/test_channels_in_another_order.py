"""Channels that a port has in another order on purpose are not blamed for a mistake beside them."""

from __future__ import annotations

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
