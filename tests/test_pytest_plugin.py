"""Uses the fixture as another project would, in a separate pytest run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """
import keras
import numpy as np
import pytest
from torch import nn

linear = nn.Linear(4, 3)
images = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def make(scale):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="0")(inputs))
    weights = [parameter.detach().numpy().T * scale for parameter in linear.parameters()]
    model.set_weights(weights)
    return model


def test_right(assert_parity):
    assert_parity(nn.Sequential(linear), make(1.0), images)


def test_wrong(assert_parity):
    assert_parity(nn.Sequential(linear), make(1.1), images)
"""


@pytest.mark.slow
def test_the_fixture_gates_a_port(tmp_path: Path) -> None:
    (tmp_path / "test_port.py").write_text(PROJECT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_port.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "First divergence: 0: " in done.stdout
    assert (
        "Cause, certain: 0.weight is 1.1 times what it should be; 0.bias is 1.1 times what it should be" in done.stdout
    )
