"""Compares TensorFlow's images with Pillow's, as timm prepares them for the official evaluation."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import van_tf
from porting.models.images import Preprocessing, load_images

SIZES = [(500, 375), (331, 600), (120, 90), (1000, 249), (248, 248), (255, 257)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make images of smooth colours with sharp edges and some noise, in odd sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        rows, columns = np.mgrid[:height, :width]
        waves = [np.sin(rows / (5 + 3 * c)) + np.cos(columns / (7 + 2 * c)) + (rows > columns) for c in range(3)]
        pixels = np.stack(waves, axis=-1) * 50 + 90 + rng.normal(0, 12, (height, width, 3))
        path = folder / (f"{number}.png" if number == 2 else f"{number}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def official(path: Path, size: int = 224, crop_fraction: float = 0.9) -> np.ndarray:
    from timm.data import create_transform

    transform = create_transform(
        size, is_training=False, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=crop_fraction
    )
    with Image.open(path) as file:
        return transform(file.convert("RGB")).numpy().transpose(1, 2, 0)


def test_pixels_are_pillows(photos: list[Path]) -> None:
    for path in photos:
        with Image.open(path) as file:
            np.testing.assert_array_equal(van_tf.load_image(path), np.asarray(file.convert("RGB")))


@pytest.mark.parametrize(("size", "crop_fraction"), [(224, 0.9), (64, 1.0), (97, 0.875)])
def test_images_are_timms_but_for_a_few_pixels(photos: list[Path], size: int, crop_fraction: float) -> None:
    for path in photos:
        expected = official(path, size, crop_fraction)
        actual = np.asarray(van_tf.prepare_images(van_tf.load_image(path), size, crop_fraction))
        assert actual.shape == expected.shape == (size, size, 3)
        levels = np.abs(actual - expected) * 127.5
        assert levels.max() < 2.5
        assert (levels > 0.5).mean() < 1e-3


def test_the_parity_checks_images_are_timms(photos: list[Path]) -> None:
    ours = load_images(photos, Preprocessing(input_size=224, resize_size=248))
    np.testing.assert_allclose(ours, np.stack([official(path) for path in photos]), atol=1e-6)


def test_in_tf_data(photos: list[Path]) -> None:
    dataset = tf.data.Dataset.from_tensor_slices([str(path) for path in photos])
    dataset = dataset.map(lambda path: van_tf.prepare_images(van_tf.load_image(path), 64, 1.0)).batch(4)
    assert dataset.element_spec.shape == (None, 64, 64, 3)
    images = np.concatenate(list(dataset.as_numpy_iterator()))
    assert images.shape == (len(SIZES), 64, 64, 3)
    np.testing.assert_allclose(images[1], van_tf.prepare_images(van_tf.load_image(photos[1]), 64, 1.0), atol=1e-6)


def test_as_a_layer_in_front_of_a_model(photos: list[Path], tmp_path: Path) -> None:
    inputs = keras.Input((None, None, 3), dtype="uint8")
    layer = van_tf.Preprocessing(64, crop_fraction=1.0)
    model = keras.Model(inputs, van_tf.van_nano()(layer(inputs)))
    pixels = van_tf.load_image(photos[0])[None]
    prepared = van_tf.prepare_images(pixels, 64, 1.0)
    np.testing.assert_array_equal(layer(pixels), prepared)
    model.save(tmp_path / "x.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "x.keras")(pixels), model(pixels), atol=1e-6)


def test_a_fraction_out_of_range() -> None:
    with pytest.raises(ValueError, match="crop_fraction must be above 0 and at most 1: got 1.5"):
        van_tf.prepare_images(np.zeros((40, 40, 3)), crop_fraction=1.5)


def test_decode_with_names() -> None:
    logits = np.array([[0.0, 5.0, 1.0] + [-4.0] * 7, [9.0] + [0.0] * 9])
    first, second = van_tf.decode_predictions(logits, top=2, class_names=van_tf.CIFAR10_CLASSES)
    assert [(index, name) for index, name, _ in first] == [("1", "automobile"), ("2", "bird")]
    assert first[0][2] == pytest.approx(np.exp(5) / (1 + np.exp(5) + np.exp(1) + 7 * np.exp(-4)))
    probabilities = np.full((1, 10), 0.05)
    probabilities[0, 3] = 0.55
    ((_, name, share), _) = van_tf.decode_predictions(probabilities, 2, van_tf.CIFAR10_CLASSES)[0]
    assert name == "cat"
    assert share == pytest.approx(0.55)
    assert second[0][1] == "airplane"


def test_decode_imagenet_takes_kerass_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from keras.src.applications import imagenet_utils

    names = {str(index): [f"n{index:08}", f"class{index}"] for index in range(1000)}
    monkeypatch.setattr(imagenet_utils, "CLASS_INDEX", names)
    logits = np.zeros((1, 1000))
    logits[0, 7] = 20.0
    assert van_tf.decode_predictions(logits, top=1)[0][0][:2] == ("n00000007", "class7")


def test_decode_refuses_another_number_of_columns() -> None:
    with pytest.raises(ValueError, match=r"have the shape \(N, 1000\) for 1000 class names: got \(1, 10\)"):
        van_tf.decode_predictions(np.zeros((1, 10)))


def test_a_model_with_the_layer_is_not_compiled_by_xla() -> None:
    """On a GPU, Keras turns on XLA itself unless a layer says that it does not support it."""
    from keras.src.trainers.trainer import model_supports_jit

    inputs = keras.Input((None, None, 3), dtype="uint8")
    assert not model_supports_jit(keras.Model(inputs, van_tf.van_nano()(van_tf.Preprocessing(64)(inputs))))
    assert model_supports_jit(van_tf.van_nano())
