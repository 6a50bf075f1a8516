"""Weights of one layer in another: exchanged layers, and layers that were loaded twice."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting
from porting import ParityReport


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.n1, self.n2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.n1(self.one(self.stem(x).relu())).relu()
        x = self.n2(self.two(x)).relu()
        return self.fc(x.mean((2, 3)))


def keras_net() -> keras.Model:
    inputs = keras.Input((9, 9, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="stem")(inputs)
    for conv, norm in (("one", "n1"), ("two", "n2")):
        x = layers.Conv2D(8, 3, padding="same", name=conv)(x)
        x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name=norm)(x))
    return keras.Model(inputs, layers.Dense(4, name="fc")(layers.GlobalAveragePooling2D()(x)))


def checked(change: Callable[[keras.Model], None]) -> ParityReport:
    torch.manual_seed(0)
    reference = Net()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for _ in range(3):
        reference(torch.randn(8, 3, 9, 9))
    reference.eval()
    images = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype(np.float32)
    candidate = keras_net()
    ported = porting.port_weights(reference, candidate, inputs=images)
    assert ported.report is not None
    assert ported.report.passed
    change(candidate)
    return porting.check_parity(reference, candidate, images)


def exchange(one: str, other: str) -> Callable[[keras.Model], None]:
    def change(model: keras.Model) -> None:
        first, second = model.get_layer(one), model.get_layer(other)
        own, others = first.get_weights(), second.get_weights()
        first.set_weights(others)
        second.set_weights(own)

    return change


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [("one", "two", "weight and bias"), ("n1", "n2", "weight and bias and running_mean and running_var")],
)
def test_exchanged_layers_are_both_told(one: str, other: str, what: str) -> None:
    report = checked(exchange(one, other))
    found = {culprit.layer: culprit.diagnosis.cause for culprit in report.culprits if culprit.diagnosis}
    assert found == {one: f"its {what} are those of {other}", other: f"its {what} are those of {one}"}


def test_a_layer_that_was_loaded_twice() -> None:
    def change(model: keras.Model) -> None:
        model.get_layer("two").kernel.assign(model.get_layer("one").kernel)

    (culprit,) = checked(change).culprits
    assert culprit.layer == "two"
    assert culprit.diagnosis is not None
    assert culprit.diagnosis.cause == "its weight is that of one"


def test_equal_numbers_are_nobodys() -> None:
    """Zeros for a bias are a lost bias, although another layer has a bias of zeros."""

    def change(model: keras.Model) -> None:
        model.get_layer("two").bias.assign(np.zeros(8))

    (culprit,) = checked(change).culprits
    assert culprit.layer == "two"
    assert culprit.diagnosis is not None
    assert "lost" in culprit.diagnosis.cause


class GroupedQueries(nn.Module):
    """Attention with fewer heads of keys and values than of queries, as in Llama."""

    def __init__(self, size: int = 24, heads: int = 6, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.head = heads, groups, size // heads
        self.q_proj, self.o_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.k_proj, self.v_proj = (nn.Linear(size, groups * self.head) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, steps, size = x.shape
        queries = self.q_proj(x).view(count, steps, self.heads, self.head).transpose(1, 2)
        keys, values = (
            projection(x)
            .view(count, steps, self.groups, self.head)
            .transpose(1, 2)
            .repeat_interleave(self.heads // self.groups, 1)
            for projection in (self.k_proj, self.v_proj)
        )
        found = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return self.o_proj(found.transpose(1, 2).reshape(count, steps, size))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.fc = nn.LayerNorm(24), GroupedQueries(), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x + self.attn(self.norm(x)))


def grouped_pair() -> tuple[nn.Module, keras.Model, np.ndarray]:
    torch.manual_seed(0)
    reference = Block().eval()
    for parameter in reference.parameters():
        parameter.data.normal_(0, 0.3)
    inputs = keras.Input((7, 24))
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(inputs)
    x = layers.Add()([inputs, layers.GroupQueryAttention(4, 6, 2, name="attn")(x, x)])
    candidate = keras.Model(inputs, layers.Dense(5, name="fc")(x))
    given = np.random.default_rng(0).normal(size=(2, 7, 24)).astype(np.float32)
    ported = porting.port_weights(reference, candidate, inputs=given)
    assert ported.report is not None
    assert ported.report.passed
    return reference, candidate, given


@pytest.mark.parametrize(
    ("path", "change", "layer", "cause"),
    [
        ("query/kernel", lambda k: k.reshape(24, 4, 6).transpose(0, 2, 1), "attn.q_proj", "another order"),
        # The heads of one group in a row, or one head of each group in turn.
        (
            "query/kernel",
            lambda k: k.reshape(24, 2, 3, 4).transpose(0, 2, 1, 3).reshape(24, 6, 4),
            "attn.q_proj",
            "another order",
        ),
        ("value/kernel", lambda k: k[:, ::-1], "attn.v_proj", "another order"),
        ("value/bias", np.zeros_like, "attn.v_proj", "the bias is lost"),
        ("attention_output/kernel", lambda k: 2 * k, "attn.o_proj", "2 times what it should be"),
    ],
)
def test_grouped_queries(path: str, change: Callable[[np.ndarray], np.ndarray], layer: str, cause: str) -> None:
    reference, candidate, given = grouped_pair()
    variable = next(each for each in candidate.weights if each.path == f"attn/{path}")
    variable.assign(change(variable.numpy()))
    (culprit,) = porting.check_parity(reference, candidate, given).culprits
    assert culprit.layer == layer
    assert culprit.diagnosis is not None
    assert cause in culprit.diagnosis.cause


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.table(x)).relu())


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_the_head_too(tied: bool) -> None:
    torch.manual_seed(0)
    reference = Tied().eval()
    inputs = keras.Input((7,), dtype="int32")
    table = layers.ReversibleEmbedding(30, 16, name="table") if tied else layers.Embedding(30, 16, name="table")
    x = layers.Dense(16, activation="relu", name="fc")(table(inputs))
    results = table(x, reverse=True) if tied else layers.Dense(30, use_bias=False, name="head")(x)
    candidate = keras.Model(inputs, results)
    tokens = np.random.default_rng(0).integers(0, 30, (2, 7), np.int32)
    ported = porting.port_weights(reference, candidate, inputs=tokens)
    assert ported.report is not None
    assert ported.report.passed, str(ported.report)
    table.embeddings.assign(table.embeddings * (1 + 1e-4 * (np.arange(480).reshape(30, 16) == 77)))
    assert not porting.check_parity(reference, candidate, np.full((1, 7), 4, np.int32)).passed
