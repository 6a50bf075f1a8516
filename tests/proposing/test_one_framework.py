"""Key maps between two models of one framework."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting
from porting.models.traverse import named_variables
from porting.proposing.proposal import LIKELY, PROVEN

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


class Old(nn.Module):
    """An old model: another order of definition, an operation in place, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.q, self.k = nn.Linear(8, 5), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.p, self.mix = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        x = self.bn(self.c1(x)).relu_().mean((2, 3))
        return self.fc(self.mix(self.q(x) * torch.sigmoid(self.k(x)) + self.p))


class New(nn.Module):
    """The same model, rewritten: nested, with a 1x1 convolution for a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.gate, self.value, self.shift = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.mixer, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.stem(x).mean((2, 3))
        x = torch.sigmoid(self.gate(x)) * self.value(x) + self.shift
        return self.head(self.mixer(x[:, :, None, None])[:, :, 0, 0])


def test_an_old_checkpoint_goes_into_a_rewritten_pytorch_model() -> None:
    torch.manual_seed(0)
    old, new = Old().eval(), New().eval()
    state = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    proposal = porting.propose_map(old, new, IMAGES)
    assert proposal.complete, str(proposal)
    assert all(row.confidence == PROVEN for row in proposal.rows)
    found = {row.target: row.source for row in proposal.rows}
    assert found == {
        "stem.0": "c1",
        "stem.1": "bn",
        "gate": "k",
        "value": "q",
        "shift": "p",
        "mixer": "mix",
        "head": "fc",
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in new.state_dict().items())
    proposal.copy_weights(old, new)
    given = torch.from_numpy(IMAGES)
    torch.testing.assert_close(old(given), new(given))


def test_another_setting_of_a_rewritten_model_is_no_parity() -> None:
    new = New().eval()
    new.stem[1].eps = 1e-2  # type: ignore[assignment]
    proposal = porting.propose_map(Old().eval(), new, IMAGES)
    assert not proposal.complete
    assert any("stem.1 does not give what bn gives" in line for line in proposal.differences)
    assert all(row.confidence == LIKELY for row in proposal.rows)
    assert {(row.target, row.source) for row in proposal.rows} >= {("stem.0", "c1"), ("stem.1", "bn"), ("head", "fc")}


def gated(names: str, swapped: bool) -> Any:
    inputs = keras.Input((16, 16, 3))
    x = layers.BatchNormalization(name=f"{names}_norm")(layers.Conv2D(6, 3, name=f"{names}_conv")(inputs))
    x = layers.GlobalAveragePooling2D()(x)
    dense = layers.Dense(4, name=f"{names}_one")
    gate = layers.Dense(4, name=f"{names}_two", activation="sigmoid")
    parts = [gate(x), dense(x)] if swapped else [dense(x), gate(x)]
    return keras.Model(inputs, layers.Multiply()(parts))


def test_one_keras_model_goes_into_another() -> None:
    old, new = gated("a", swapped=False), gated("b", swapped=True)
    images = np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1))
    before = {name: np.array(variable) for name, variable in named_variables(new).items()}
    proposal = porting.propose_map(old, new, images)
    assert proposal.complete, str(proposal)
    assert {row.source[1:]: row.target[1:] for row in proposal.rows}.items() >= {("_one", "_one"), ("_two", "_two")}
    assert all(np.array_equal(np.array(each), before[name]) for name, each in named_variables(new).items())
    proposal.copy_weights(old, new)
    np.testing.assert_allclose(old(images), new(images), rtol=1e-5)


def test_keras_to_pytorch_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="goes from a PyTorch model to a Keras model"):
        porting.propose_map(gated("a", swapped=False), Old(), IMAGES)
