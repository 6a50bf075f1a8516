"""Images as the published weights want them, and names for what comes out.

The official evaluation (VAN-Classification, `validate.py` with timm's transforms) decodes and resizes with Pillow:
the shorter side to 248 pixels, bicubic with antialiasing, then the central 224, then mean = std = 0.5. Pillow rounds
to whole pixel values after each of the two passes, along rows and along columns. Resized so, TensorFlow's pixels are
Pillow's but for one in some thousands; `scripts/compare_preprocessing.py` measures that, and what other ways do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGENET_CLASSES = 1000


def preprocess_input(images: Any, data_format: str | None = None) -> Any:
    """Pixel values from 0 to 255 to the range [-1, 1], as the official B0 to B3 and nano were trained.

    That is mean = std = 0.5 on values from 0 to 1, for every channel, so that `data_format` changes nothing; it is an
    argument as in keras.applications. Arrays and tensors of any shape and dtype; returns float32.

    Raises ValueError for an unknown `data_format`.
    """
    if data_format not in {None, "channels_first", "channels_last"}:
        raise ValueError(f"data_format is channels_first or channels_last: got {data_format!r}")
    return keras.ops.cast(images, "float32") / 127.5 - 1.0


def load_image(path: str | os.PathLike[str] | Any) -> Any:
    """The pixels of a JPEG or PNG file, `(H, W, 3)` uint8, the same as Pillow's; `path` may be a string tensor.

    Works inside tf.data. TensorFlow's errors for a file that is missing or no image are not caught.
    """
    import tensorflow as tf

    contents = tf.io.read_file(os.fspath(path) if isinstance(path, os.PathLike) else path)
    # This decoder takes PNG too. Its usual, faster transform is off by up to 24 of 255.
    return tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")


def prepare_images(images: Any, size: int = 224, crop_fraction: float = 0.9) -> Any:
    """Resizes, crops and normalises as the official evaluation does; for tf.data, and for use before a model.

    `(H, W, 3)` or `(N, H, W, 3)` with values from 0 to 255, of any dtype and any size, to `(size, size, 3)` or
    `(N, size, size, 3)` float32 from -1 to 1. The shorter side becomes `size / crop_fraction` pixels, rounded down.
    Nano was trained with `size=64, crop_fraction=1`.

    Raises ValueError for a fraction outside (0, 1].
    """
    import tensorflow as tf

    if not 0.0 < crop_fraction <= 1.0:
        raise ValueError(f"crop_fraction is above 0 and at most 1: got {crop_fraction}")
    resized_side = int(size / crop_fraction)
    images = tf.cast(tf.convert_to_tensor(images), tf.float32)
    height, width = tf.shape(images)[-3], tf.shape(images)[-2]
    # The longer side is rounded down, as in torchvision's Resize.
    shorter = tf.minimum(height, width)
    new_height, new_width = resized_side * height // shorter, resized_side * width // shorter
    # Rows before columns, and whole numbers in between: so does Pillow.
    for shape in ((height, new_width), (new_height, new_width)):
        images = tf.image.resize(images, shape, method="bicubic", antialias=True)
        images = tf.clip_by_value(tf.floor(images + 0.5), 0.0, 255.0)  # halves go up
    # Halves go to the even number, as in torchvision's CenterCrop.
    top, left = (tf.cast(tf.round((side - size) / 2), tf.int32) for side in (new_height, new_width))
    images = images[..., top : top + size, left : left + size, :]
    images.set_shape([*images.shape[:-3], size, size, images.shape[-1]])
    return preprocess_input(images)


@keras.saving.register_keras_serializable(package="van_tf")
class Preprocessing(keras.layers.Layer):
    """`prepare_images` as a layer: `(N, H, W, 3)` pixels from 0 to 255 to `(N, size, size, 3)` from -1 to 1.

    A model with it is not compiled by XLA, which has no kernel for TensorFlow's antialiased resize.
    """

    def __init__(self, size: int = 224, crop_fraction: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = False
        self.size = size
        self.crop_fraction = crop_fraction

    def call(self, inputs: Any) -> Any:
        return keras.ops.cast(prepare_images(inputs, self.size, self.crop_fraction), self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-3], self.size, self.size, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size, "crop_fraction": self.crop_fraction}


def decode_predictions(
    predictions: Any, top: int = 5, class_names: Sequence[str] | None = None
) -> list[list[tuple[str, str, float]]]:
    """For each row of logits or probabilities, `(N, classes)`, the `top` classes as `(id, name, probability)`.

    Without `class_names` the classes are ImageNet's 1000, and Keras fetches their names on first use; with them, the id
    is the class's number. `van_tf.CIFAR10_CLASSES` are nano's.

    Raises ValueError when names and columns do not agree in number.
    """
    scores = np.asarray(predictions, np.float64)
    count = _IMAGENET_CLASSES if class_names is None else len(class_names)
    if scores.ndim != 2 or scores.shape[1] != count:
        raise ValueError(f"predictions are of shape (N, {count}) for {count} class names: got {scores.shape}")
    if (scores < 0).any() or not np.allclose(scores.sum(axis=1), 1.0, atol=1e-3):
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    if class_names is None:
        return keras.applications.imagenet_utils.decode_predictions(scores, top)  # type: ignore[no-any-return]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [
        [(str(index), class_names[index], float(row[index])) for index in indices]
        for row, indices in zip(scores, best, strict=True)
    ]
