"""Preprocess images for the published weights, and decode predictions.

The official evaluation (VAN-Classification, `validate.py` with timm's transforms) decodes and resizes with Pillow: the
shorter side to 248 pixels, bicubic with antialiasing, then the central 224 pixels, then mean = std = 0.5. Pillow rounds
to integer pixel values after each of its two passes, along rows and along columns. With the same rounding, TensorFlow's
pixels equal Pillow's except for one in some thousands. `scripts/compare_preprocessing.py` measures this and other ways.
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
    """Scale pixel values from 0 to 255 to the range [-1, 1], as in the training of the official B0 to B3 and of nano.

    This is mean = std = 0.5 on values from 0 to 1 for every channel, so `data_format` has no effect; it is accepted as
    in keras.applications. Takes arrays and tensors of any shape and dtype, and returns float32.

    Raises ValueError for an unknown `data_format`.
    """
    if data_format not in {None, "channels_first", "channels_last"}:
        raise ValueError(f"data_format must be channels_first or channels_last: got {data_format!r}")
    return keras.ops.cast(images, "float32") / 127.5 - 1.0


def load_image(path: str | os.PathLike[str] | Any) -> Any:
    """Load a JPEG or PNG file as `(H, W, 3)` uint8, with the same pixels as Pillow. `path` may be a string tensor.

    Works inside tf.data. TensorFlow's errors for missing files or files that are not images are passed on.
    """
    import tensorflow as tf

    contents = tf.io.read_file(os.fspath(path) if isinstance(path, os.PathLike) else path)
    # This decoder also reads PNG. Its default, faster transform is off by up to 24 of 255.
    return tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")


def prepare_images(images: Any, size: int = 224, crop_fraction: float = 0.9) -> Any:
    """Resize, crop and normalise as in the official evaluation. For tf.data, or before a model.

    Maps `(H, W, 3)` or `(N, H, W, 3)` with values from 0 to 255, of any dtype and size, to `(size, size, 3)` or
    `(N, size, size, 3)` float32 from -1 to 1. The shorter side becomes `size / crop_fraction` pixels, rounded down.
    nano was trained with `size=64, crop_fraction=1`.

    Raises ValueError for a fraction outside (0, 1].
    """
    import tensorflow as tf

    if not 0.0 < crop_fraction <= 1.0:
        raise ValueError(f"crop_fraction must be above 0 and at most 1: got {crop_fraction}")
    resized_side = int(size / crop_fraction)
    images = tf.cast(tf.convert_to_tensor(images), tf.float32)
    height, width = tf.shape(images)[-3], tf.shape(images)[-2]
    # The longer side is rounded down, as in torchvision's Resize.
    shorter = tf.minimum(height, width)
    new_height, new_width = resized_side * height // shorter, resized_side * width // shorter
    # Like Pillow: horizontally first, then vertically, with rounding in between.
    for shape in ((height, new_width), (new_height, new_width)):
        images = tf.image.resize(images, shape, method="bicubic", antialias=True)
        images = tf.clip_by_value(tf.floor(images + 0.5), 0.0, 255.0)  # halves round up
    # Halves round to even, as in torchvision's CenterCrop.
    top, left = (tf.cast(tf.round((side - size) / 2), tf.int32) for side in (new_height, new_width))
    images = images[..., top : top + size, left : left + size, :]
    images.set_shape([*images.shape[:-3], size, size, images.shape[-1]])
    return preprocess_input(images)


@keras.saving.register_keras_serializable(package="van_tf")
class Preprocessing(keras.layers.Layer):
    """`prepare_images` as a layer, from `(N, H, W, 3)` pixels in [0, 255] to `(N, size, size, 3)` in [-1, 1].

    Keras does not compile a model that contains it with XLA, which has no kernel for TensorFlow's antialiased resize.
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
    """Decode each row of logits or probabilities, `(N, classes)`, to its `top` classes as `(id, name, probability)`.

    Without `class_names`, the classes are ImageNet's 1000, whose names Keras downloads on first use. With them, the id
    is the number of the class. nano's are `van_tf.CIFAR10_CLASSES`.

    Raises ValueError if the number of names differs from the number of columns.
    """
    scores = np.asarray(predictions, np.float64)
    count = _IMAGENET_CLASSES if class_names is None else len(class_names)
    if scores.ndim != 2 or scores.shape[1] != count:
        raise ValueError(f"predictions must have the shape (N, {count}) for {count} class names: got {scores.shape}")
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
