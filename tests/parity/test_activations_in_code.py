"""Mistakes are named alike whether an activation is a layer, part of a layer, a module, or a function in the code."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting

IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


class Net(nn.Module):
    """A convolution, a Flatten and two dense layers. With `functional`, only layers with weights are modules."""

    def __init__(self, functional: bool, dropout: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 20), nn.Linear(20, 5)
        self.act = None if functional else nn.ReLU()
        self.drop = nn.Dropout(0.3) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        relu = torch.relu if self.act is None else self.act
        x = torch.flatten(torch.max_pool2d(relu(self.conv(x)), 4), 1)
        return self.fc2(self.drop(relu(self.fc1(x))))


def candidate_of(fused: bool, dropout: bool) -> keras.Model:
    def activated(layer: layers.Layer, x: keras.KerasTensor) -> keras.KerasTensor:
        layer.activation = keras.activations.relu if fused else layer.activation
        return layer(x) if fused else layers.ReLU()(layer(x))

    inputs = keras.Input((16, 16, 3))
    x = activated(layers.Conv2D(8, 3, padding="same"), inputs)
    x = layers.Flatten()(layers.MaxPooling2D(4)(x))
    x = activated(layers.Dense(20), x)
    x = layers.Dropout(0.3)(x) if dropout else x
    return keras.Model(inputs, layers.Dense(5)(x))


def bias_lost(layer: layers.Layer) -> None:
    layer.bias.assign(np.zeros(layer.bias.shape))


def rows_as_in_pytorch(layer: layers.Layer) -> None:
    kernel = np.array(layer.kernel)
    layer.kernel.assign(kernel.reshape(4, 4, 8, -1).transpose(2, 0, 1, 3).reshape(kernel.shape))


def channels_exchanged(layer: layers.Layer) -> None:
    for variable in layer.weights:
        values = np.array(variable)
        values[..., [2, 6]] = values[..., [6, 2]]
        variable.assign(values)


def number_changed(layer: layers.Layer) -> None:
    values = np.array(layer.kernel)
    values[(0,) * (values.ndim - 1) + (3,)] += 0.1
    layer.kernel.assign(values)


MISTAKES = {
    "bias lost": (1, bias_lost, "the bias is lost"),
    "rows of a Flatten": (1, rows_as_in_pytorch, "are in PyTorch's order (channels, height, width)"),
    "channels exchanged": (0, channels_exchanged, "its output channels 2 and 6 are exchanged"),
    "a number": (1, number_changed, "fc1.weight[3, 0] is "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_one_mistake_is_one_culprit(functional: bool, fused: bool, dropout: bool, mistake: str) -> None:
    reference, candidate = Net(functional, dropout).eval(), candidate_of(fused, dropout)
    porting.port_weights(reference, candidate, inputs=IMAGES).require_parity()
    index, plant, cause = MISTAKES[mistake]
    plant([layer for layer in candidate.layers if layer.weights][index])
    report = porting.check_parity(reference, candidate, IMAGES)
    assert [culprit.layer for culprit in report.culprits] == ["conv" if index == 0 else "fc1"], str(report)
    assert cause in str(report.diagnosis)
    assert report.diagnosis is not None
    assert report.diagnosis.confidence == "certain"
