"""Models that are too large for copies in float64 are judged by the same numbers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting
from porting.parity import derived, session

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))
ROWS = [
    porting.KeyRule("table", "table", "embedding"),
    porting.KeyRule("attn", "attn", "attention"),
    porting.KeyRule("norm", "norm", "layer_norm"),
    porting.KeyRule("fc", "fc", "dense"),
]


class Encoder(nn.Module):
    """A table, attention, and casts to the types of the weights, as in models that may run in half precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.attn = nn.Embedding(40, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 5)
        self.register_buffer("scale", torch.tensor(0.25), persistent=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens).to(self.norm.weight.dtype) * self.scale
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = self.norm(x.float()).to(self.fc.weight.dtype)
        return self.fc(x) + nn.functional.linear(x, self.table.weight[:5])  # a weight that another module holds


class FirstRows(layers.Layer):  # type: ignore[misc]
    """A dense layer without a bias whose kernel is the first rows of a table."""

    def __init__(self, table: Any, count: int) -> None:
        super().__init__()
        self.table, self.count = table, count

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, keras.ops.transpose(self.table.embeddings[: self.count]))


def make_candidate() -> keras.Model:
    tokens = keras.Input((9,), dtype="int32")
    table = layers.Embedding(40, 12, name="table")
    x = table(tokens) * 0.25
    x = x + layers.MultiHeadAttention(3, 4, name="attn")(x, x)
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    return keras.Model(tokens, layers.Dense(5, name="fc")(x) + FirstRows(table, 5)(x))


def test_the_same_numbers_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = Encoder().eval(), make_candidate()
    small = porting.port_weights(reference, candidate, ROWS, inputs=TOKENS).report
    assert small is not None
    assert small.passed, str(small)
    monkeypatch.setattr(derived, "LARGE", 0)
    monkeypatch.setattr(session, "in_float64", lambda model: pytest.fail("a copy in float64"))
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    weights = candidate.get_weights()
    large = porting.port_weights(reference, candidate, ROWS, inputs=TOKENS).report
    assert large is not None
    assert large.passed, str(large)
    assert large.loud is not None
    assert [layer.source for layer in large.layers] == [layer.source for layer in small.layers]
    for one, other in zip(large.layers, small.layers, strict=True):
        assert one.views["float32"].ratio == pytest.approx(other.views["float32"].ratio, rel=1e-3)
    # Both models are as they were.
    assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())
    assert all(np.array_equal(*pair) for pair in zip(candidate.get_weights(), weights, strict=True))
    assert {variable.dtype for variable in candidate.weights} == {"float32"}
    assert candidate.get_layer("fc").dtype_policy.name == "float32"


@pytest.mark.parametrize("name", ["table/embeddings", "attn/query/kernel", "norm/gamma", "fc/kernel"])
def test_mistakes_are_found_and_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(derived, "LARGE", 0)
    reference, candidate = Encoder().eval(), make_candidate()
    porting.port_weights(reference, candidate, ROWS)
    variable = next(each for each in candidate.weights if each.path == name)
    place = (int(TOKENS[0, 0]), 3) if name.startswith("table") else (0,) * len(variable.shape)
    values = np.array(variable)
    values[place] *= np.float32(1.001)
    variable.assign(values)
    report = porting.check_parity(reference, candidate, TOKENS)
    assert not report.passed
    assert report.culprits[0].layer == name.partition("/")[0]
    assert "1.001" in str(report.diagnosis) or "1.00100" in str(report.diagnosis)


class Writing(nn.Module):
    """Writes into tensors of its own, as old models do with tables and caches."""

    kept: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(6, 4), how
        self.register_buffer("kept", torch.zeros(2, 4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.how == "a buffer":
            self.kept.zero_()
            return self.kept.add_(x) * 2
        result = torch.zeros(x.shape)
        result[:, :] = x
        return result * 2


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.jit.script(nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * 2


def dense_for(reference: Any, dtype: str = "float32") -> keras.Model:
    inputs = keras.Input((6,))
    fc = layers.Dense(4, name="fc", dtype=dtype)
    candidate = keras.Model(inputs, fc(inputs) * 2)
    fc.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    return candidate


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*grad attribute:UserWarning")
@pytest.mark.parametrize("how", ["a buffer", "a new tensor", "scripted in part"])
def test_models_that_need_a_copy_get_one(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(derived, "LARGE", 0)
    reference = (Scripted() if how == "scripted in part" else Writing(how)).eval()
    candidate, numbers = dense_for(reference), np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    healthy = porting.check_parity(reference, candidate, numbers)
    assert healthy.passed, str(healthy)
    candidate.get_layer("fc").kernel.assign(1.5 * np.array(candidate.get_layer("fc").kernel))
    assert not porting.check_parity(reference, candidate, numbers).passed
