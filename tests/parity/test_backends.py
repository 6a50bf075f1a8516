"""The check gives the same result on every Keras backend. Each backend runs in its own process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
import keras
import torch
from keras import layers
from torch import nn

from porting import check_parity
from porting.parity.report import EXACT

torch.manual_seed(0)
reference = nn.Sequential(
    nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
).eval()
with torch.no_grad():
    reference[1].running_mean.uniform_(-0.5, 0.5)
    reference[1].running_var.uniform_(0.5, 1.5)
inputs = keras.Input((8, 8, 3))
conv, norm = layers.Conv2D(6, 3, padding="same"), layers.BatchNormalization(epsilon=1e-5, momentum=0.9)
x = layers.Activation("gelu")(norm(conv(inputs)))
dense = layers.Dense(4)
model = keras.Model(inputs, dense(layers.GlobalAveragePooling2D()(x)))
conv.set_weights([reference[0].weight.detach().numpy().transpose(2, 3, 1, 0), reference[0].bias.detach().numpy()])
norm.set_weights([t.detach().numpy() for n, t in reference[1].state_dict().items() if "num" not in n])
dense.set_weights([reference[5].weight.detach().numpy().T, reference[5].bias.detach().numpy()])
images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
before = [keras.ops.convert_to_numpy(each).copy() for each in model.weights]
report = check_parity(reference, model, images)
assert report.passed, report.objections
assert report.worst_exact.relative_error < 1e-14
assert all((keras.ops.convert_to_numpy(a) == b).all() for a, b in zip(model.weights, before))
norm.epsilon = 1.001e-5
wrong = check_parity(reference, model, images)
assert not wrong.passed
assert [culprit.culprit for culprit in wrong.culprits] == ["1"], wrong.culprits
assert wrong.diagnosis.cause == "an epsilon of 1.001e-05 instead of 1e-05"
print(keras.backend.backend(), "agrees")
"""


@pytest.mark.parametrize(
    "backend",
    ["tensorflow", pytest.param("torch", marks=pytest.mark.slow), pytest.param("jax", marks=pytest.mark.slow)],
)
def test_the_check_says_the_same_on_every_backend(backend: str) -> None:
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{backend} agrees" in done.stdout
