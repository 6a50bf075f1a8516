"""Unexpected files of Keras weights: they are loaded by name, or the error says what they are."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import van_tf
from porting.errors import WeightsFileError
from porting.families.van import VanFamily
from porting.files import weights_file
from porting.tasks.check import check
from porting.tasks.options import CheckOptions
from porting.tasks.port import port
from porting.tasks.revert import revert

ONE = CheckOptions(samples=1)


@pytest.fixture(scope="module")
def ported(family: VanFamily, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ported") / "x.h5"
    port(family, "nano", out, checkpoint=checkpoint, check=False)
    return out


@pytest.fixture(scope="module")
def model(ported: Path) -> keras.Model:
    return van_tf.van_nano(weights=str(ported))


def whole_h5(model: keras.Model, ported: Path, path: Path) -> Path:
    model.save(path.with_suffix(".h5"))
    return path.with_suffix(".h5")


def frozen_h5(model: keras.Model, ported: Path, path: Path) -> Path:
    """Frozen layers change the order of a model's weights, and the order in a file of the whole model."""
    frozen = van_tf.van_nano(weights=str(ported))
    frozen.trainable = False
    frozen.layers[2].trainable = True
    frozen.save(path.with_suffix(".h5"))
    return path.with_suffix(".h5")


def fixed_size(model: keras.Model, ported: Path, path: Path) -> Path:
    van_tf.van_nano(weights=str(ported), input_shape=(48, 48, 3)).save(path.with_suffix(".keras"))
    return path.with_suffix(".keras")


def channels_first(model: keras.Model, ported: Path, path: Path) -> Path:
    van_tf.van_nano(weights=str(ported), data_format="channels_first").save(path.with_suffix(".keras"))
    return path.with_suffix(".keras")


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("write", [whole_h5, frozen_h5, fixed_size, channels_first], ids=lambda f: f.__name__)
def test_models_saved_in_other_ways_are_checked(
    family: VanFamily,
    checkpoint: Path,
    model: keras.Model,
    ported: Path,
    tmp_path: Path,
    write: Callable[[keras.Model, Path, Path], Path],
) -> None:
    path = write(model, ported, tmp_path / "x")
    options = CheckOptions(samples=1, stress=write is fixed_size)
    report = check(family, "nano", path, checkpoint=checkpoint, options=options)
    assert report.passed, report.objections
    if write is channels_first:
        assert "channels_first" in report.notes[0]
    if write is fixed_size:
        assert report.input_shapes[0] == (1, 48, 48, 3)


def foreign(model: keras.Model, path: Path) -> Path:
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(path.with_suffix(".keras"))
    return path.with_suffix(".keras")


def extra_layer(model: keras.Model, path: Path) -> Path:
    keras.Model(model.input, keras.layers.Dense(3, name="extra")(model.output)).save(path.with_suffix(".keras"))
    return path.with_suffix(".keras")


def empty(model: keras.Model, path: Path) -> Path:
    zipfile.ZipFile(path.with_suffix(".keras"), "w").close()
    return path.with_suffix(".keras")


def code(model: keras.Model, path: Path) -> Path:
    inputs = keras.Input((4,))
    keras.Model(inputs, keras.layers.Lambda(lambda x: x + 1)(inputs)).save(path.with_suffix(".keras"))
    return path.with_suffix(".keras")


def huge_description(model: keras.Model, path: Path) -> Path:
    model.save(path.with_suffix(".small.keras"))
    out = path.with_suffix(".keras")
    with zipfile.ZipFile(path.with_suffix(".small.keras")) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                changed = content.replace(b'"mlp_ratio": 4', b'"mlp_ratio": 200000')
                assert changed != content
                content = changed
            target.writestr(name, content)
    return out


def another_extension(model: keras.Model, path: Path) -> Path:
    model.save_weights(path.with_suffix(".weights.h5"))
    with h5py.File(path.with_suffix(".weights.h5"), "r+") as file:
        file["layers/dense/vars"].create_dataset("2", data=np.ones(3, np.float32))
    return path.with_suffix(".weights.h5")


REFUSED: dict[Callable[[Any, Path], Path], str] = {
    foreign: "2 not in the model: dense",
    extra_layer: "2 not in the model: extra/bias, extra/kernel",
    empty: "no item named 'model.weights.h5'",
    code: "holds code, such as a Lambda layer; nothing in it was run",
    huge_description: "describes a model of more than .* MiB, but has only .* bytes",
    another_extension: r"1 arrays not in the model, of shape \(3,\)",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda f: f.__name__)
def test_other_files_are_named_for_what_they_are(
    family: VanFamily,
    checkpoint: Path,
    model: keras.Model,
    tmp_path: Path,
    write: Callable[[keras.Model, Path], Path],
) -> None:
    path = write(model, tmp_path / "x")
    for command in (
        lambda: check(family, "nano", path, checkpoint=checkpoint, options=ONE),
        lambda: revert(family, "nano", path, tmp_path / "back.pth", check=False),
    ):
        with pytest.raises(WeightsFileError, match=REFUSED[write]) as caught:
            command()
        assert "safe_mode" not in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "back.pth").exists()


@pytest.fixture
def changed(ported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(ported, tmp_path / "changed.h5"))


def test_a_provenance_of_ten_million_classes_is_not_believed(family: VanFamily, changed: Path, tmp_path: Path) -> None:
    with h5py.File(changed, "r+") as file:
        provenance = json.loads(file.attrs["provenance"])
        file.attrs["provenance"] = json.dumps({**provenance, "num_classes": 10_000_000})
        del file["head"]
    with pytest.raises(WeightsFileError, match="lists the layer head, but does not hold it"):
        revert(family, "nano", changed, tmp_path / "x.pth", check=False)


def test_classes_that_only_a_provenance_states_are_bounded(changed: Path) -> None:
    """Simulate a family that cannot derive the number of classes from the shapes."""
    with pytest.raises(WeightsFileError, match="describes a model of more than"):
        weights_file.load_model(changed, lambda: van_tf.van_nano(classes=10_000_000))


def test_imaginary_parts_are_never_dropped(family: VanFamily, checkpoint: Path, changed: Path, tmp_path: Path) -> None:
    with h5py.File(changed, "r+") as file:
        kernel = file["head/kernel"][()]
        del file["head/kernel"]
        file["head/kernel"] = kernel.astype(np.complex64) + 1j
    with pytest.raises(WeightsFileError, match="head/kernel is of type complex64"):
        check(family, "nano", changed, checkpoint=checkpoint, options=ONE)
    with pytest.raises(ValueError, match="head/kernel is of type complex64"):
        van_tf.van_nano(weights=str(changed))


def test_van_tf_does_not_unpack_a_bomb(tmp_path: Path, changed: Path) -> None:
    with h5py.File(changed, "r+") as file:
        shape = (100_000, 10_000)
        file["block1_0"].create_dataset("bomb", shape, np.float32, compression="gzip", fillvalue=0.0)
    with pytest.raises(ValueError, match="bomb says it has the shape"):
        van_tf.van_nano(weights=str(changed))
    bomb = tmp_path / "x.keras"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(64 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="unpacks to"):
        van_tf.van_nano(weights=str(bomb))
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(FileNotFoundError):
        van_tf.van_nano(weights=str(tmp_path / "pipe.h5"))
