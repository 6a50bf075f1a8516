"""Cells of recurrent layers, and biases of both cells and layers: there, back, and named where they are wrong."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn

import porting
from porting.kinds import kind_of_module

CELLS = {
    "LSTM": (nn.LSTMCell, layers.LSTMCell),
    "GRU": (nn.GRUCell, layers.GRUCell),
    "RNN": (nn.RNNCell, layers.SimpleRNNCell),
}
STEPS = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)


class Theirs(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.cell, self.out = CELLS[name][0](4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class Ours(keras.Model):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__()
        self.cell, self.out = CELLS[name][1](6), layers.Dense(3)

    def call(self, x: Any) -> Any:
        states = [ops.zeros((ops.shape(x)[0], 6), x.dtype)] * (2 if isinstance(self.cell, layers.LSTMCell) else 1)
        for step in range(5):
            result, states = self.cell(x[:, step], states)
        return self.out(result)


@pytest.mark.parametrize("name", CELLS)
def test_there_and_back(name: str) -> None:
    torch.manual_seed(0)
    reference, candidate = Theirs(name).eval(), Ours(name)
    ported = porting.port_weights(reference, candidate, inputs=STEPS).require_parity()
    assert {pair.kind for pair in ported.key_map.layers} == {"recurrent_cell", "dense"}
    back = Theirs(name).eval()
    porting.revert_weights(candidate, back, ported.key_map)
    with torch.no_grad():
        torch.testing.assert_close(back(torch.from_numpy(STEPS)), reference(torch.from_numpy(STEPS)))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", CELLS)
def test_one_wrong_number_is_named(name: str, place: int) -> None:
    torch.manual_seed(0)
    reference, candidate = Theirs(name).eval(), Ours(name)
    porting.port_weights(reference, candidate, inputs=STEPS).require_parity()
    weights = candidate.cell.get_weights()
    weights[place].flat[2] *= 1.0001
    candidate.cell.set_weights(weights)
    report = porting.check_parity(reference, candidate, STEPS)
    first = report.culprits[0]
    assert first.culprit.partition("#")[0] == "cell", str(report)
    assert first.diagnosis is not None
    assert first.diagnosis.confidence == "certain"
    assert "1.0001 times what it should be" in first.diagnosis.cause


@pytest.mark.parametrize(("theirs", "ours"), [(nn.LSTM, layers.LSTM), (nn.GRU, layers.GRU), (nn.RNN, layers.SimpleRNN)])
def test_a_wrong_bias_of_a_layer_is_named(theirs: Any, ours: Any) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = theirs(4, 6, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    torch.manual_seed(0)
    reference, inputs = Last().eval(), keras.Input((5, 4))
    candidate = keras.Model(inputs, ours(6, return_sequences=True)(inputs))
    porting.port_weights(reference, candidate, inputs=STEPS).require_parity()
    bias = candidate.weights[-1]
    values = np.array(bias)
    values.flat[3] *= 1.0001
    bias.assign(values)
    report = porting.check_parity(reference, candidate, STEPS)
    assert report.culprits[0].diagnosis is not None
    assert "bias" in report.culprits[0].diagnosis.cause, str(report)


def test_a_class_of_another_name_is_the_cell_that_it_derives_from() -> None:
    class GRU(nn.LSTMCell):
        pass

    kind = kind_of_module(GRU(3, 4))
    assert kind is not None
    assert len(kind.leaves_for(GRU(3, 4))[0].transform.order) == 4  # type: ignore[attr-defined]
