"""Clamps in PyTorch's code that neither the given nor the loud inputs reach."""

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
from porting.models.clamps import Bound, watching_clamps
from porting.models.float64 import computing_in_float64

Function = Callable[[Any], Any]


class Inner(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.a, self.function = nn.Linear(8, 16, bias=False), function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.a(x))


class Theirs(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.inner, self.b = Inner(function), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.inner(x))


def check(theirs: Function, ours: Function, **options: Any) -> porting.ParityReport:
    torch.manual_seed(0)
    reference, inputs = Theirs(theirs).eval(), keras.Input((8,))
    a, b = layers.Dense(16, use_bias=False), layers.Dense(5)
    candidate = keras.Model(inputs, b(ours(a(inputs))))
    a.set_weights([reference.inner.a.weight.detach().numpy().T])
    b.set_weights([reference.b.weight.detach().numpy().T, reference.b.bias.detach().numpy()])
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    return porting.check_parity(reference, candidate, x, **options)


# PyTorch's function, Keras's, and the function of a port without the bound.
CASES: dict[str, tuple[Function, Function, Function, str]] = {
    "both sides": (
        lambda y: y.clamp(-500, 500),
        lambda y: ops.clip(y, -500, 500),
        lambda y: y,
        "to at least -500",
    ),
    "by name": (
        lambda y: torch.clamp(y, max=900.0),
        lambda y: ops.minimum(y, 900.0),
        lambda y: y,
        "to at most 900",
    ),
    "a wider bound": (
        lambda y: y.clip(max=500),
        lambda y: ops.minimum(y, 500),
        lambda y: ops.minimum(y, 520),
        "to at most 500",
    ),
    "a bound a little wider": (
        lambda y: y.clip(max=500),
        lambda y: ops.minimum(y, 500),
        lambda y: ops.minimum(y, 500.1),
        "to at most 500",
    ),
    "one side is lost": (
        lambda y: F.hardtanh(y, -300.0, 300.0),
        lambda y: ops.clip(y, -300, 300),
        lambda y: ops.minimum(y, 300),
        "to at least -300",
    ),
    "six, of small numbers": (
        lambda y: F.relu6(y / 50),
        lambda y: ops.relu6(y / 50),
        lambda y: ops.relu(y / 50),
        "to at most 6",
    ),
    "in place": (
        lambda y: y.clone().clamp_min_(-400),
        lambda y: ops.maximum(y, -400),
        lambda y: y,
        "to at least -400",
    ),
    "a divisor that is zero": (
        lambda y: (y + 1.0) / y.norm(dim=-1, keepdim=True).clamp(min=1e-3),
        lambda y: (y + 1.0) / ops.maximum(ops.sqrt(ops.sum(y * y, axis=-1, keepdims=True)), 1e-3),
        lambda y: (y + 1.0) / ops.maximum(ops.sqrt(ops.sum(y * y, axis=-1, keepdims=True)), 1e-5),
        "to at least 0.001",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_port_with_the_bound_passes(name: str) -> None:
    theirs, ours, _, _ = CASES[name]
    report = check(theirs, ours)
    assert report.passed, str(report)
    assert not report.caveats


OTHERS = {"a bound a little wider"}


@pytest.mark.parametrize("name", CASES)
def test_a_port_without_it_is_found_and_named(name: str) -> None:
    theirs, _, without, said = CASES[name]
    report = check(theirs, without)
    assert not report.passed
    (culprit,) = report.culprits
    assert culprit.layer == "inner"
    assert culprit.diagnosis is not None
    how = "has another bound" if name in OTHERS else "has no such bound"
    assert culprit.diagnosis.cause == f"PyTorch clamps numbers there {said}, and Keras {how}"
    assert "times as large" in str(report)


def test_a_bound_that_was_rounded_to_float32_passes() -> None:
    third = np.float32(1000 / 3)
    report = check(lambda y: y.clamp(max=1000 / 3), lambda y: ops.minimum(y, ops.cast(third, y.dtype)))
    assert report.passed, str(report)


def test_what_cannot_be_reached_is_a_note() -> None:
    report = check(lambda y: y.clamp(max=1e9), lambda y: y)
    assert report.passed
    assert "at most 1e+09 in inner" in report.caveats[0]


def test_bounds_of_a_type_limit_nothing() -> None:
    report = check(lambda y: y.clamp(min=torch.finfo(torch.float32).min), lambda y: y)
    assert report.passed
    assert not report.caveats


def test_without_loud_inputs_nothing_is_looked_for() -> None:
    assert not check(lambda y: y.clamp(max=1e9), lambda y: y, loud=False).caveats


def test_a_run_without_a_bound() -> None:
    model = Theirs(lambda y: F.hardtanh(y, -0.1, 0.1)).double()
    x = torch.ones(1, 8, dtype=torch.float64)
    with torch.no_grad(), computing_in_float64(model), watching_clamps(model) as found:
        limited = model(x)
    assert list(found.bounds) == [Bound(0, -0.1, False), Bound(0, 0.1, True)]
    assert found.modules == {0: "inner"}
    assert found.reached
    with torch.no_grad(), computing_in_float64(model), watching_clamps(without=found.bounds):
        free = model(x)
    model.inner.function = lambda y: y
    with torch.no_grad():
        assert torch.equal(free, model(x))
    assert not torch.equal(free, limited)
