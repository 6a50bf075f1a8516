from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import van_tf
from porting.errors import OutputError, WeightsFileError
from porting.files.survey import survey_file
from porting.files.weights_file import (
    SUFFIXES,
    assign_weights,
    is_weights_file,
    load_model,
    suffix_of,
    variable_shapes,
    write_provenance,
    write_weights,
)
from porting.models.traverse import named_variables

NAMES = ["van_nano.h5", "van_nano.weights.h5", "van_nano.keras"]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in build_shapes().items()}


def build_shapes() -> dict[str, tuple[int, ...]]:
    return variable_shapes(van_tf.van_nano())


def assert_same_weights(model: keras.Model, weights: dict[str, np.ndarray]) -> None:
    assert {variable.path for variable in model.weights} == weights.keys()
    for variable in model.weights:
        np.testing.assert_array_equal(variable.numpy(), weights[variable.path])


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read_back_bit_for_bit(tmp_path: Path, weights: dict[str, np.ndarray], name: str) -> None:
    path = tmp_path / name
    write_weights(path, van_tf.van_nano(), weights)
    write_provenance(path, {"variant": "nano", "parity": {"status": "passed"}})
    assert survey_file(path).provenance == {"variant": "nano", "parity": {"status": "passed"}}
    assert is_weights_file(path)
    assert_same_weights(load_model(path, van_tf.van_nano), weights)


def test_h5_loads_in_order_and_by_name(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    path = tmp_path / "x.h5"
    write_weights(path, van_tf.van_nano(), weights)
    for by_name in (False, True):
        model = van_tf.van_nano()
        model.load_weights(path, by_name=by_name)
        assert_same_weights(model, weights)


def test_h5_by_name_into_another_number_of_classes(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    write_weights(tmp_path / "x.h5", van_tf.van_nano(), weights)
    backbone = van_tf.van_nano(include_top=False)
    backbone.load_weights(tmp_path / "x.h5", by_name=True)
    for variable in backbone.weights:
        np.testing.assert_array_equal(variable.numpy(), weights[variable.path])


def test_h5_datasets_are_named_by_variable_path(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    write_weights(tmp_path / "x.h5", van_tf.van_nano(), weights)
    assert {name for name, _, _ in survey_file(tmp_path / "x.h5").tensors} == weights.keys()
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(file["block1_0/attn/proj_1/kernel"], weights["block1_0/attn/proj_1/kernel"])


def test_names_too_long_for_one_attribute_are_split_as_keras_does(tmp_path: Path) -> None:
    def build() -> keras.Model:
        inputs = x = keras.Input((1,))
        for index in range(80):
            x = keras.layers.Dense(1, name=f"{'long_' * 200}{index}")(x)
        return keras.Model(inputs, x)

    weights = {path: np.full(shape, 0.5, np.float32) for path, shape in variable_shapes(build()).items()}
    write_weights(tmp_path / "x.h5", build(), weights)
    with h5py.File(tmp_path / "x.h5") as file:
        assert "layer_names0" in file.attrs
        assert "layer_names" not in file.attrs
    assert_same_weights(load_model(tmp_path / "x.h5", build), weights)


@pytest.mark.parametrize("name", NAMES)
def test_the_suffix_names_the_format(name: str) -> None:
    assert suffix_of(Path(name)) == name.removeprefix("van_nano")


@pytest.mark.parametrize("name", ["x.hdf5", "x.pth", "x", ".h5"])
def test_other_suffixes_are_refused(name: str) -> None:
    with pytest.raises(OutputError, match="the suffix does not name a format") as caught:
        suffix_of(Path(name))
    assert all(suffix in caught.value.hint for suffix in SUFFIXES)


@pytest.mark.parametrize("name", NAMES)
def test_no_provenance(tmp_path: Path, weights: dict[str, np.ndarray], name: str) -> None:
    write_weights(tmp_path / name, van_tf.van_nano(), weights)
    assert survey_file(tmp_path / name).provenance is None


def test_a_torch_archive_is_no_weights_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"")
    assert not is_weights_file(tmp_path / "x.pth")


def freeze_all(model: keras.Model) -> None:
    model.trainable = False


def freeze_a_stage(model: keras.Model) -> None:
    for layer in model.layers:
        if "1" in layer.name.partition(".")[0]:
            layer.trainable = False


def freeze_norms(model: keras.Model) -> None:
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
@pytest.mark.parametrize("freeze", [freeze_all, freeze_a_stage, freeze_norms])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_what_keras_saves_of_a_frozen_model_loads_into_the_right_variables(
    tmp_path: Path, weights: dict[str, np.ndarray], freeze: Callable[[keras.Model], None], suffix: str
) -> None:
    model = van_tf.van_nano()
    assign_weights(model, weights)
    freeze(model)
    path = tmp_path / f"x{suffix}"
    if suffix == ".weights.h5":
        model.save_weights(path)
    else:
        model.save(path)
    assert_same_weights(load_model(path, van_tf.van_nano), weights)
    built = van_tf.van_nano(weights=path)
    for variable in built.weights:
        np.testing.assert_array_equal(variable.numpy(), weights[variable.path])


def nested() -> keras.Model:
    def encoder(name: str) -> keras.Model:
        inputs = keras.Input((4,))
        x = keras.layers.BatchNormalization(name="norm")(keras.layers.Dense(4, name="dense")(inputs))
        return keras.Model(inputs, x, name=name)

    inputs = keras.Input((4,))
    return keras.Model(inputs, encoder("right")(encoder("left")(inputs)))


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
def test_nested_models_are_written_and_read(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in variable_shapes(nested()).items()}
    assert len(values) == 12
    path = tmp_path / f"x{suffix}"
    write_weights(path, nested(), values)
    read = load_model(path, nested)
    for name, variable in named_variables(read).items():
        np.testing.assert_array_equal(variable.numpy(), values[name])


def test_a_file_of_another_model_says_which_variables_differ(tmp_path: Path) -> None:
    def build(width: int, name: str) -> keras.Model:
        inputs = keras.Input((4,))
        x = keras.layers.Dense(width, name="a")(inputs)
        return keras.Model(inputs, keras.layers.Dense(2, use_bias=False, name=name)(x))

    path = tmp_path / "x.h5"
    model = build(3, "b")
    write_weights(path, model, {name: variable.numpy() for name, variable in named_variables(model).items()})
    with pytest.raises(WeightsFileError) as caught:
        load_model(path, lambda: build(5, "c"))
    assert caught.value.message == (
        f"{path}: its variables do not match those of the model: 1 missing: c/kernel; 1 not in the model: b/kernel; "
        "2 of another shape: a/kernel: (4, 3) instead of (4, 5), a/bias: (3,) instead of (5,)"
    )


def test_a_file_of_version_0_1_is_read_by_its_names(checkpoint: Path, tmp_path: Path) -> None:
    """Blocks used to be called block1.0, which some Keras backends reject."""
    from porting.families.van import VanFamily
    from porting.tasks.port import port

    new, old = tmp_path / "new.h5", tmp_path / "old.h5"
    port(VanFamily(), "nano", new, checkpoint=checkpoint, check=False)
    old.write_bytes(new.read_bytes())
    with h5py.File(old, "r+") as file:
        blocks = [name for name in file if name.startswith("block")]
        assert blocks
        for name in blocks:
            file.move(name, name.replace("_", "."))
        file.attrs["layer_names"] = [
            name.replace(b"_", b".") if name.startswith(b"block") else name for name in file.attrs["layer_names"]
        ]
    import van_tf

    expected = van_tf.van_nano(weights=new).get_weights()
    for model in (van_tf.van_nano(weights=old), load_model(old, van_tf.van_nano)):
        for one, other in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(one, other)
