"""Tests the conventions of keras.applications for weights, head and output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import van_tf
from porting.families.van import VanFamily
from porting.files.weights_file import write_provenance
from porting.tasks.port import port

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(family: VanFamily, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in every format."""
    folder = tmp_path_factory.mktemp("weights")
    for suffix in (".h5", ".weights.h5", ".keras"):
        port(family, "nano", folder / f"x{suffix}", checkpoint=checkpoint, check=False)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> keras.Model:
    return van_tf.van_nano(weights=folder / "x.h5")


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
def test_weights_from_a_path(model: keras.Model, folder: Path, suffix: str) -> None:
    np.testing.assert_array_equal(van_tf.van_nano(weights=str(folder / f"x{suffix}"))(IMAGES), model(IMAGES))


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
def test_another_number_of_classes_keeps_the_rest_and_says_so(model: keras.Model, folder: Path, suffix: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"x{suffix} has 10 classes, but the model has 3: the head keeps its initial weights"
    ) as caught:
        other = van_tf.van_nano(weights=folder / f"x{suffix}", classes=3)
    assert caught[0].filename == __file__
    assert other(IMAGES).shape == (2, 3)
    for name in ("patch_embed1", "block2_1", "norm4"):
        for one, theirs in zip(other.get_layer(name).weights, model.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(one, theirs)


def test_without_top(model: keras.Model, folder: Path) -> None:
    outputs = {
        pooling: np.asarray(van_tf.van_nano(include_top=False, pooling=pooling, weights=folder / "x.h5")(IMAGES))
        for pooling in (None, "avg", "max")
    }
    assert outputs[None].shape == (2, 2, 2, 96)
    np.testing.assert_allclose(outputs["avg"], outputs[None].mean((1, 2)), atol=1e-6)
    np.testing.assert_array_equal(outputs["max"], outputs[None].max((1, 2)))
    head = model.get_layer("head")
    np.testing.assert_allclose(head(outputs["avg"]), model(IMAGES), atol=1e-5)


def test_a_file_without_a_head_into_a_model_with_one(folder: Path, tmp_path: Path) -> None:
    backbone = van_tf.van_nano(include_top=False, weights=folder / "x.h5")
    backbone.save_weights(tmp_path / "x.weights.h5")
    with pytest.warns(UserWarning, match="has no head, but the model has 10"):
        whole = van_tf.van_nano(weights=tmp_path / "x.weights.h5")
    np.testing.assert_array_equal(
        van_tf.van_nano(include_top=False, weights=tmp_path / "x.weights.h5")(IMAGES), backbone(IMAGES)
    )
    np.testing.assert_array_equal(whole.get_layer("norm4").gamma, backbone.get_layer("norm4").gamma)


def test_softmax(model: keras.Model, folder: Path) -> None:
    probabilities = van_tf.van_nano(weights=folder / "x.h5", classifier_activation="softmax")(IMAGES)
    np.testing.assert_allclose(probabilities, keras.ops.softmax(model(IMAGES)), atol=1e-6)


def test_channels_first(model: keras.Model, folder: Path) -> None:
    first = van_tf.van_nano(weights=folder / "x.h5", data_format="channels_first")
    assert first.input_shape == (None, 3, None, None)
    np.testing.assert_array_equal(first(IMAGES.transpose(0, 3, 1, 2)), model(IMAGES))
    map_first = van_tf.van_nano(include_top=False, data_format="channels_first", input_shape=(3, 64, 64))
    assert map_first.output_shape == (None, 96, 2, 2)
    assert van_tf.features(map_first, [1, 4]).output_shape == [(None, 32, 16, 16), (None, 96, 2, 2)]


def test_keras_global_data_format_is_respected() -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        assert van_tf.van_nano().input_shape == (None, 3, None, None)
    finally:
        keras.config.set_image_data_format("channels_last")


def test_input_tensor_with_layers_of_its_own(model: keras.Model, folder: Path) -> None:
    inputs = keras.Input((64, 64, 3))
    before = keras.layers.Conv2D(3, 1, use_bias=False, name="before")(inputs)
    whole = van_tf.van_nano(input_tensor=before, weights=folder / "x.h5")
    kernel = np.array(whole.get_layer("before").kernel)
    np.testing.assert_allclose(whole(IMAGES), model(IMAGES @ kernel[0, 0]), atol=1e-4)
    assert whole.count_params() == model.count_params() + 9


def test_the_epsilon_comes_with_the_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "x.h5", tmp_path / "x.h5")
    van_tf.van_nano(weights=folder / "x.h5").save(tmp_path / "x.keras")
    for suffix in (".h5", ".keras"):
        write_provenance(tmp_path / f"x{suffix}", {"settings": {"layer_norm_eps": 1e-5}})
    for suffix in (".h5", ".keras"):
        assert van_tf.van_nano(weights=tmp_path / f"x{suffix}").get_layer("norm1").epsilon == 1e-5
    assert van_tf.van_nano(weights=tmp_path / "x.h5", layer_norm_epsilon=1e-3).get_layer("norm1").epsilon == 1e-3
    assert van_tf.van_nano(weights=folder / "x.h5").get_layer("norm1").epsilon == 1e-6


@pytest.mark.slow
def test_published_weights_are_ported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAN_PORT_CACHE", str(tmp_path))
    first = van_tf.van_nano(weights="cifar10")
    assert (tmp_path / "keras" / "van_nano.h5").is_file()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was there already"))
    np.testing.assert_array_equal(van_tf.van_nano(weights="cifar10")(IMAGES), first(IMAGES))


def test_published_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAN_PORT_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        van_tf.van_b6(weights="imagenet")
    message = str(caught.value)
    assert "porting them failed: no official checkpoint of van b6 is known" in message
    assert message.endswith(f"van-port --variant b6 --out {tmp_path / 'keras' / 'van_b6.h5'}")
    assert list((tmp_path / "keras").iterdir()) == []


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("imagenet", ValueError, "the published weights of van_nano are named 'cifar10': got 'imagenet'"),
        ("nowhere.h5", FileNotFoundError, "van-port --variant nano --out van_nano.h5"),
        (__file__, ValueError, "a weights file must end in .h5, .weights.h5 or .keras"),
    ],
)
def test_weights_that_are_none(weights: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        van_tf.van_nano(weights=weights)


def test_a_file_of_another_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x.h5: not the weights of van_b0: "):
        van_tf.van_b0(weights=folder / "x.h5")
    (tmp_path / "cut.h5").write_bytes((folder / "x.h5").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.h5: not a complete file of Keras weights"):
        van_tf.van_nano(weights=tmp_path / "cut.h5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "sum", "include_top": False}, "pooling must be None, 'avg' or 'max'"),
        ({"data_format": "NHWC"}, "channels_first or channels_last"),
        ({"input_tensor": np.zeros((1, 64, 64, 3))}, "input_tensor must be the output of a Keras layer"),
        ({"input_tensor": keras.Input((64, 64, 3)), "input_shape": (32, 32, 3)}, "differs from that of input_tensor"),
    ],
)
def test_arguments_that_do_not_go(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        van_tf.van_nano(**arguments)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 50)], ids=str)
def test_features_at_any_size(model: keras.Model, size: tuple[int, int]) -> None:
    images = np.random.default_rng(1).normal(size=(1, *size, 3)).astype(np.float32)
    maps = van_tf.features(model)(images)
    sides = [[-(-side // stride) for side in size] for stride in (4, 8, 16, 32)]
    assert [list(each.shape[1:]) for each in maps] == [
        [*side, dim] for side, dim in zip(sides, (32, 48, 64, 96), strict=True)
    ]
    np.testing.assert_array_equal(model.get_layer("head")(keras.ops.mean(maps[-1], (1, 2))).shape, model(images).shape)


def test_features_feed_a_small_head_that_learns(model: keras.Model) -> None:
    """Joins two upsampled stages into a mask of the brighter pixels."""
    inputs = keras.Input((64, 64, 3))
    fine, coarse = van_tf.features(model, [1, 2])(inputs)
    joined = keras.layers.Concatenate()([fine, keras.layers.UpSampling2D(2)(coarse)])
    outputs = keras.layers.Conv2D(1, 1)(joined)
    segmenter = keras.Model(inputs, outputs)
    masks = (IMAGES.reshape(2, 16, 4, 16, 4, 3).mean((2, 4, 5)) > 0)[..., None].astype(np.float32)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    segmenter.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)  # tracing takes longer than three steps
    losses = segmenter.fit(IMAGES, masks, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stages", [[], [0], [5], [1, 5]])
def test_features_of_stages_that_there_are_not(model: keras.Model, stages: list[int]) -> None:
    with pytest.raises(ValueError, match=r"stages must be among \[1, 2, 3, 4\]"):
        van_tf.features(model, stages)


@pytest.mark.slow
def test_no_torch_in_the_process_that_loads_published_weights(tmp_path: Path) -> None:
    program = (
        "import sys, van_tf; van_tf.van_nano(weights='cifar10');"
        "assert not {'torch', 'timm', 'porting'} & set(sys.modules)"
    )
    environment = {**os.environ, "VAN_PORT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pooling_changes_nothing_with_a_head() -> None:
    with_pooling, without = van_tf.van_nano(pooling="max"), van_tf.van_nano()
    assert [layer.name for layer in with_pooling.layers] == [layer.name for layer in without.layers]


def test_preprocess_input_knows_its_data_formats() -> None:
    pixels = np.full((1, 3, 2, 2), 255, np.uint8)
    assert np.all(np.asarray(van_tf.preprocess_input(pixels, data_format="channels_first")) == 1.0)
    with pytest.raises(ValueError, match="channels_first or channels_last"):
        van_tf.preprocess_input(pixels, data_format="channels")
