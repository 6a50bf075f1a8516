"""Runs the model on every Keras backend, each in its own process, and exchanges files between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from porting.references.van import VAN

BACKENDS = ("tensorflow", "jax", "torch")
# Saves the model's results and weights, and loads those of the other backends.
SCRIPT = """
import sys
from pathlib import Path

from porting.models.frameworks import load_triton

load_triton()
import keras
import numpy as np

import van_tf

folder, weights = Path(sys.argv[1]), sys.argv[2]
name = keras.backend.backend()
model = van_tf.van_nano(weights=weights)
images = np.load(folder / "images.npy")
result = keras.ops.convert_to_numpy(model(images))
np.save(folder / f"{name}.npy", result)
model.save(folder / f"{name}.keras")
model.save_weights(folder / f"{name}.weights.h5")
for path in sorted(folder.glob("*.keras")):
    again = keras.models.load_model(path)
    assert abs(keras.ops.convert_to_numpy(again(images)) - result).max() == 0, path
for path in sorted(folder.glob("*.weights.h5")):
    again = van_tf.van_nano(weights=path)
    assert abs(keras.ops.convert_to_numpy(again(images)) - result).max() == 0, path
pixels = keras.Input((None, None, 3), dtype="uint8")
whole = keras.Model(pixels, model(van_tf.Preprocessing(64, 1.0)(pixels)))
assert whole.predict(np.zeros((2, 90, 70, 3), np.uint8), verbose=0).shape == (2, 10)
maps = van_tf.features(model)(images)
assert [each.shape[-1] for each in maps] == [32, 48, 64, 96]
before = keras.ops.convert_to_numpy(model.get_layer("block1_0").norm1.moving_variance)
model.compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
loss = model.train_on_batch(images, np.arange(len(images)))
assert np.isfinite(loss)
assert abs(keras.ops.convert_to_numpy(model.get_layer("block1_0").norm1.moving_variance) - before).max() > 0
"""


@pytest.mark.slow
def test_the_model_on_every_backend(reference: VAN, checkpoint: Path, tmp_path: Path) -> None:
    from porting.families.van import VanFamily
    from porting.tasks.port import port

    weights = tmp_path / "nano.h5"
    port(VanFamily(), "nano", weights, checkpoint=checkpoint, check=False)
    folder = tmp_path / "files"
    folder.mkdir()
    images = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)
    np.save(folder / "images.npy", images)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    for backend in BACKENDS:
        command = [sys.executable, "-c", SCRIPT, str(folder), str(weights)]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        np.testing.assert_allclose(np.load(folder / f"{backend}.npy"), expected, atol=1e-5 * abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_models_own_tests_on_other_backends(backend: str) -> None:
    """Run the tests of layers and of the model. On TensorFlow these are among the fast tests."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, str(here / "test_layers.py"), str(here / "test_model.py")],
        cwd=here.parent.parent,
        env={**environment, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
