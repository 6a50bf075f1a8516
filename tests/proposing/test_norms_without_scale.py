"""Norms without a scale in Keras, as in keras.applications' Inception models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        )
        self.fc = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([branch(x) for branch in self.branches], 1).mean((2, 3)))


@pytest.mark.parametrize("scaled", [False, True])
def test_scales_must_be_ones(scaled: bool) -> None:
    torch.manual_seed(0)
    reference = Net()
    for norm in reference.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(8)
            norm.running_var = torch.rand(8) + 0.5
            norm.bias.data.normal_()
            if scaled:
                norm.weight.data.uniform_(0.5, 2)
    reference.eval()
    inputs = keras.Input((6, 6, 3))
    found = []
    for _ in range(3):
        x = layers.BatchNormalization(scale=False, epsilon=1e-5)(layers.Conv2D(8, 1, use_bias=False)(inputs))
        found.append(layers.ReLU()(x))
    x = layers.GlobalAveragePooling2D()(layers.Concatenate()(found))
    candidate = keras.Model(inputs, layers.Dense(4)(x))
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    proposal = porting.propose_map(reference, candidate, images)
    assert proposal.complete
    (line,) = [each for each in proposal.summary.splitlines() if each.endswith("which must hold ones")]
    assert all(f"branches.{index}.1.weight" in line for index in range(3))
    before = [weight.copy() for weight in candidate.get_weights()]
    if scaled:
        with pytest.raises(porting.PortingError, match="holds numbers other than 1"):
            porting.port_weights(reference, candidate, inputs=images)
        assert all(np.array_equal(*pair) for pair in zip(before, candidate.get_weights(), strict=True))
    else:
        porting.port_weights(reference, candidate, inputs=images).require_parity()
