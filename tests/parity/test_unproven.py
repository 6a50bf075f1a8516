"""Layers before a step, such as a rounding or a nearest code, through which no small mistake shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn

from porting import check_parity, port_weights
from porting.mapping.rules import KeyRule
from porting.models.rows import key_map_of_rows

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
STEPS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "round": (lambda x: torch.round(3 * torch.tanh(x)), lambda x: ops.round(3 * ops.tanh(x))),
    "sign": (torch.sign, ops.sign),
    "threshold": (lambda x: (x > 0.1).to(x.dtype), lambda x: ops.cast(x > 0.1, x.dtype)),
    "arg max": (
        lambda x: nn.functional.one_hot(x.argmax(1), 6).to(x.dtype),
        lambda x: ops.one_hot(ops.argmax(x, 1), 6, dtype=x.dtype),
    ),
}


class Stepped(nn.Module):
    """A convolution, a norm, an activation and a dense layer before a step, and a dense layer behind it."""

    def __init__(self, step: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.encode, self.head = (
            nn.Conv2d(3, 5, 3),
            nn.BatchNorm2d(5),
            nn.Linear(5, 6),
            nn.Linear(6, 3),
        )
        self.norm.load_state_dict(
            self.norm.state_dict() | {"running_mean": 0.4 * torch.rand(5) - 0.2, "running_var": torch.rand(5) + 0.5}
        )
        self.step = STEPS[step][0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.step(self.encode(torch.relu(self.norm(self.conv(x))).mean((2, 3)))))


def stepped(step: str, mistake: str = "", *, fused: bool = False) -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(5, 3, name="a")(inputs)
    x = layers.BatchNormalization(epsilon=1e-3 if mistake == "epsilon" else 1e-5, name="b")(x)
    x = ops.leaky_relu(x, 0.01) if mistake == "activation" else layers.ReLU(name="r")(x)
    x = layers.GlobalAveragePooling2D(name="p")(x)
    if fused:  # what the layer returns is shown to no module in PyTorch
        x = ops.round(3 * layers.Dense(6, activation="tanh", name="c")(x))
    else:
        x = STEPS[step][1](layers.Dense(6, name="c")(x))
    return keras.Model(inputs, layers.Dense(3, name="d")(x))


def ported(step: str, mistake: str = "", **how: Any) -> tuple[Stepped, keras.Model]:
    reference, healthy = Stepped(step).eval(), stepped(step)
    port_weights(reference, healthy, inputs=IMAGES).require_parity()
    candidate = stepped(step, mistake, **how)
    candidate.set_weights(healthy.get_weights())
    return reference, candidate


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("mistake", "named"), [("epsilon", "b"), ("activation", "c"), ("number", "a"), ("bias", "c")])
def test_a_mistake_before_a_step_fails(step: str, mistake: str, named: str) -> None:
    reference, candidate = ported(step, mistake)
    if mistake in {"number", "bias"}:
        variable = candidate.get_layer(named).weights[mistake == "bias"]
        values = np.array(variable)
        values.flat[np.abs(values).argmax()] *= 1.001
        variable.assign(values)
    report = check_parity(reference, candidate, IMAGES)
    assert not report.passed
    assert report.verified is not None
    places = [*report.verified.unproven, *(culprit.target for culprit in report.culprits)]
    assert places[:1] == [named], str(report)


def test_a_layer_before_a_step_may_be_written_otherwise() -> None:
    reference, candidate = ported("round", fused=True)
    report = check_parity(reference, candidate, IMAGES)
    assert report.passed, str(report)


def test_a_key_map_tells_whose_settings_must_agree() -> None:
    reference, candidate = ported("round", "epsilon")
    names = {"conv": "a", "norm": "b", "encode": "c", "head": "d"}
    kinds = {"conv": "conv", "norm": "batch_norm", "encode": "dense", "head": "dense"}
    rows = [KeyRule(source, target, kinds[source]) for source, target in names.items()]
    report = check_parity(reference, candidate, IMAGES, key_map=key_map_of_rows(reference, candidate, rows))
    assert report.audit is not None
    assert [str(each) for each in report.audit.failures if "eps" in str(each)], str(report)


def dense_weights(module: nn.Linear) -> list[Any]:
    return [module.weight.detach().numpy().T, *([] if module.bias is None else [module.bias.detach().numpy()])]


class Routed(nn.Module):
    """Two experts, of which only the one that is chosen runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.first if float(x.sum()) < 1e6 else self.second
        return self.head(torch.tanh(chosen(x)))


def test_an_expert_that_is_not_chosen_is_no_mistake() -> None:
    reference = Routed().eval()
    inputs = keras.Input((6,))
    first, second = layers.Dense(4, name="first")(inputs), layers.Dense(4, name="second")(inputs)
    x = ops.where(ops.sum(inputs, -1, keepdims=True) < 1e6, first, second)
    candidate = keras.Model(inputs, layers.Dense(2, name="head")(ops.tanh(x)))
    for name in ("first", "second", "head"):
        candidate.get_layer(name).set_weights(dense_weights(getattr(reference, name)))
    report = check_parity(reference, candidate, np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    assert report.passed, str(report)


class Gated(nn.Module):
    """A gate that is one number a sample, and passes a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.gate, self.head = nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * (1 + (self.gate(x) > 0).to(x.dtype))


@pytest.mark.parametrize("samples", [1, 3])
def test_a_layer_that_gives_one_number_is_no_mistake(samples: int) -> None:
    reference = Gated().eval()
    inputs = keras.Input((6,))
    gate = ops.cast(layers.Dense(1, name="gate")(inputs) > 0, "float32")
    candidate = keras.Model(inputs, layers.Dense(3, name="head")(inputs) * (1 + gate))
    for name in ("gate", "head"):
        candidate.get_layer(name).set_weights(dense_weights(getattr(reference, name)))
    given = np.random.default_rng(0).normal(size=(samples, 6)).astype(np.float32)
    assert check_parity(reference, candidate, given).passed


class Split(nn.Module):
    """A fused projection that code splits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.both, self.head = nn.Linear(6, 8, bias=False), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.both(x).chunk(2, -1)
        return self.head(one * torch.sigmoid(other))


def test_a_keras_model_of_a_fixed_batch() -> None:
    reference = Split().eval()
    inputs = keras.Input(batch_shape=(4, 6))
    one = layers.Dense(4, use_bias=False, name="one")(inputs)
    other = layers.Dense(4, use_bias=False, name="other")(inputs)
    candidate = keras.Model(inputs, layers.Dense(3, name="head")(one * ops.sigmoid(other)))
    kernels = np.split(dense_weights(reference.both)[0], 2, -1)
    candidate.get_layer("one").set_weights(kernels[:1])
    candidate.get_layer("other").set_weights(kernels[1:])
    candidate.get_layer("head").set_weights(dense_weights(reference.head))
    given = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    assert check_parity(reference, candidate, given, batch_size=4).passed
