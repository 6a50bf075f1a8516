"""Stacks of recurrent layers: each layer is paired, compared and named."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting

HEIGHT, UNITS = 3, 8
SEQUENCES = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, made: Any, bidirectional: bool) -> None:
        super().__init__()
        self.rnn = made(5, UNITS, HEIGHT, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(UNITS * (1 + bidirectional), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0].mean(1))


def pair(name: str, bidirectional: bool) -> tuple[nn.Module, keras.Model]:
    torch.manual_seed(0)
    reference = Net(getattr(nn, name), bidirectional).eval()
    made = layers.SimpleRNN if name == "RNN" else getattr(layers, name)
    inputs = x = keras.Input((7, 5))
    for index in range(HEIGHT):
        one = made(UNITS, return_sequences=True, name=f"layer{index}")
        x = layers.Bidirectional(one, name=f"both{index}")(x) if bidirectional else one(x)
    candidate = keras.Model(inputs, layers.Dense(3, name="fc")(layers.GlobalAveragePooling1D()(x)))
    report = porting.port_weights(reference, candidate, inputs=SEQUENCES).report
    assert report is not None
    assert report.passed
    assert {"rnn.l0", "rnn.l1", "rnn.l2"} <= {layer.source for layer in report.layers}
    return reference, candidate


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_mistake_is_found_in_its_layer(name: str, bidirectional: bool) -> None:
    reference, candidate = pair(name, bidirectional)
    report = porting.check_parity(reference, candidate, SEQUENCES)
    assert report.passed
    assert report.verified is not None
    assert report.verified.compared_bits
    for index, label in enumerate(["rnn.l0", "rnn.l1", "rnn.l2"]):
        layer = candidate.get_layer(f"both{index}" if bidirectional else f"layer{index}")
        own = layer.get_weights()
        wrong = [each.copy() for each in own]
        wrong[0][2, 3] *= 1.01
        layer.set_weights(wrong)
        (culprit,) = porting.check_parity(reference, candidate, SEQUENCES).culprits
        layer.set_weights(own)
        assert culprit.layer == label
        assert culprit.diagnosis is not None
        assert f"rnn.weight_ih_l{index}[" in culprit.diagnosis.cause


@pytest.mark.parametrize("index", range(HEIGHT))
def test_exchanged_gates(index: int) -> None:
    reference, candidate = pair("LSTM", False)
    layer = candidate.get_layer(f"layer{index}")
    weights = layer.get_weights()
    order = np.r_[UNITS : 2 * UNITS, :UNITS, 2 * UNITS : 4 * UNITS]
    layer.set_weights([weights[0], weights[1][:, order], weights[2]])
    (culprit,) = porting.check_parity(reference, candidate, SEQUENCES).culprits
    assert culprit.layer == ["rnn.l0", "rnn.l1", "rnn.l2"][index]
    assert culprit.diagnosis is not None
    assert culprit.diagnosis.cause == f"the input gate and the forget gate are exchanged in weight_hh_l{index}"


class Own(nn.LSTM):
    """A class with arguments of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, 2, batch_first=True)


class Stacked(nn.Module):
    def __init__(self, stack: nn.Module, states: bool) -> None:
        super().__init__()
        self.rnn, self.fc, self.states = stack, nn.Linear(UNITS, 3), states

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(2, len(x), UNITS, dtype=x.dtype)
        return self.fc((self.rnn(x, (zeros, zeros)) if self.states else self.rnn(x))[0].mean(1))


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_layers_of_one_size(own: bool, states: bool) -> None:
    """The stack and its last layer take tensors of one size, and only one of them is what the Keras layer takes."""
    torch.manual_seed(0)
    reference = Stacked(Own(UNITS) if own else nn.LSTM(UNITS, UNITS, 2, batch_first=True), states).eval()
    inputs = x = keras.Input((7, UNITS))
    for index in range(2):
        x = layers.LSTM(UNITS, return_sequences=True, name=f"layer{index}")(x)
    candidate = keras.Model(inputs, layers.Dense(3, name="fc")(layers.GlobalAveragePooling1D()(x)))
    given = np.random.default_rng(0).normal(size=(3, 7, UNITS)).astype(np.float32)
    ported = porting.port_weights(reference, candidate, inputs=given).require_parity()
    for index in range(2):
        kernel = candidate.get_layer(f"layer{index}").cell.kernel
        right = kernel.numpy()
        kernel.assign(right * (1 + 0.5 * (np.arange(right.size).reshape(right.shape) == 45)))
        for key_map in (None, ported.key_map):
            (culprit,) = porting.check_parity(reference, candidate, given, key_map=key_map).culprits
            assert culprit.layer == f"rnn.l{index}"
            assert culprit.diagnosis is not None
            assert f"rnn.weight_ih_l{index}[13, 1] is " in culprit.diagnosis.cause
        kernel.assign(right)


def test_a_stack_that_computes_its_weights() -> None:
    """weight_norm computes in float64 what a port holds in float32, which is no mistake."""
    torch.manual_seed(0)
    stack = nn.LSTM(UNITS, UNITS, 2, batch_first=True)
    for index in range(2):
        nn.utils.parametrizations.weight_norm(stack, f"weight_hh_l{index}")
        stack.get_parameter(f"parametrizations.weight_hh_l{index}.original0").data *= 1.3
    reference = Stacked(stack, False).eval()
    inputs = x = keras.Input((7, UNITS))
    for index in range(2):
        x = layers.LSTM(UNITS, return_sequences=True, name=f"layer{index}")(x)
    candidate = keras.Model(inputs, layers.Dense(3, name="fc")(layers.GlobalAveragePooling1D()(x)))
    given = np.random.default_rng(0).normal(size=(3, 7, UNITS)).astype(np.float32)
    porting.port_weights(reference, candidate, inputs=given).require_parity()
    assert porting.check_parity(reference, candidate, given).passed
    kernel = candidate.get_layer("layer1").cell.recurrent_kernel
    kernel.assign(kernel * (1 + 1e-3 * (np.arange(256).reshape(8, 32) == 45)))
    (culprit,) = porting.check_parity(reference, candidate, given).culprits
    assert culprit.layer == "rnn.l1"
