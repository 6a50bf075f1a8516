"""Functions of TensorFlow that have no float64 version: the same computed in float64, or in float32 and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.frameworks import replaced

_VOLUMES = 5  # number of axes, with those of samples and channels


@contextlib.contextmanager
def functions_without_float64() -> Iterator[None]:
    """Let these functions take float64 in this context.

    Those that computed in float32 return its rounding, which a `Float32Trace` follows.
    """
    import tensorflow as tf

    image, nn, old = tf.image, tf.nn, tf.compat.v1
    normalize = _normalizing(nn.local_response_normalization)
    with (
        replaced(nn, max_pool=_pooling(nn.max_pool, nn.max_pool), avg_pool=_pooling(nn.avg_pool, nn.avg_pool)),
        replaced(nn, max_pool3d=_pooling(nn.max_pool3d, nn.max_pool), avg_pool3d=_pooling(nn.avg_pool3d, nn.avg_pool)),
        replaced(nn, lrn=normalize, local_response_normalization=normalize),
        replaced(image, non_max_suppression=_suppressing(image.non_max_suppression)),
        replaced(image, **{name: _in_single(getattr(image, name)) for name in _SINGLE_IMAGE}),
        replaced(old.nn, fused_batch_norm=_in_single(old.nn.fused_batch_norm)),
        replaced(tf.math, in_top_k=_in_single(tf.math.in_top_k)),
    ):
        yield


_SINGLE_IMAGE = (
    "combined_non_max_suppression",
    "crop_and_resize",
    "extract_glimpse",
    "non_max_suppression_overlaps",
    "non_max_suppression_padded",
    "non_max_suppression_with_scores",
)


def is_double(value: Any) -> bool:
    """Whether this is a tensor in float64."""
    import tensorflow as tf

    return bool(tf.is_tensor(value) and value.dtype == tf.float64)


def in_double(value: Any) -> Any:
    """A tensor in double precision, or any other value as it is.

    A user's casts may be left out, so this one is a raw operation.
    """
    import tensorflow as tf

    is_single = tf.is_tensor(value) and double_of(value.dtype) != value.dtype
    return tf.raw_ops.Cast(x=value, DstT=double_of(value.dtype)) if is_single else value


def double_of(dtype: Any) -> Any:
    """The type of double precision in the place of one of single precision; any other as it is."""
    import tensorflow as tf

    return {tf.float32: tf.float64, tf.complex64: tf.complex128}.get(dtype, dtype)


def _in_single(own: Callable[..., Any]) -> Callable[..., Any]:
    """Compute in float32 and return float64."""
    import tensorflow as tf

    def to_single(value: Any) -> Any:
        return tf.raw_ops.Cast(x=value, DstT=tf.float32) if is_double(value) else value

    def compute(*args: Any, **kwargs: Any) -> Any:
        if not any(map(is_double, tf.nest.flatten((args, kwargs)))):
            return own(*args, **kwargs)
        args, kwargs = tf.nest.map_structure(to_single, (args, kwargs))
        return tf.nest.map_structure(in_double, own(*args, **kwargs))

    return compute


def _normalizing(own: Callable[..., Any]) -> Callable[..., Any]:
    def local_response_normalization(
        input: Any,
        depth_radius: int = 5,
        bias: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.5,
        name: str | None = None,
    ) -> Any:
        """Divide by a power of the sum of squares over the channels nearby, as tf.nn documents it."""
        import tensorflow as tf

        if not is_double(input):
            return own(input, depth_radius, bias, alpha, beta, name)
        channels = input.shape[-1]
        padded = tf.pad(input, [(0, 0)] * (input.shape.rank - 1) + [(depth_radius, depth_radius)])
        squares = padded * padded
        nearby = tf.add_n([squares[..., start : start + channels] for start in range(2 * depth_radius + 1)])
        return input / (float(bias) + float(alpha) * nearby) ** float(beta)

    return local_response_normalization


def _suppressing(own: Callable[..., Any]) -> Callable[..., Any]:
    def non_max_suppression(
        boxes: Any,
        scores: Any,
        max_output_size: Any,
        iou_threshold: Any = 0.5,
        score_threshold: Any = -np.inf,
        name: str | None = None,
    ) -> Any:
        import tensorflow as tf

        if not (is_double(boxes) or is_double(scores)) or not tf.executing_eagerly():
            return own(boxes, scores, max_output_size, iou_threshold, score_threshold, name)
        limits = float(iou_threshold), float(score_threshold)
        return tf.constant(_kept(np.asarray(boxes), np.asarray(scores), int(max_output_size), *limits), tf.int32)

    return non_max_suppression


def _kept(boxes: Array, scores: Array, count: int, most: float, least: float) -> list[int]:
    """The indices of at most `count` boxes `(N, 4)`, best first, of which no two overlap by more than `most`.

    Boxes of a score up to `least` are left out. A box is given by any two opposite corners. The overlap is the area
    that two boxes share, relative to the area that they cover, as tf.image documents it.
    """
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    areas = (high - low).prod(axis=1)
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if len(kept) == count or not scores[index] > least:
            break
        sides = np.minimum(high[kept], high[index]) - np.maximum(low[kept], low[index])
        shared = np.maximum(sides, 0.0).prod(axis=1)
        has_area = (areas[kept] > 0) & (areas[index] > 0)
        covered = np.where(has_area, areas[kept] + areas[index] - shared, 1.0)
        if not (np.where(has_area, shared / covered, 0.0) > most).any():
            kept.append(int(index))
    return kept


def _pooling(own: Callable[..., Any], of_maps: Callable[..., Any]) -> Callable[..., Any]:
    """TensorFlow pools volumes only in float32. Pooling along one axis after the others gives the same."""

    def pool(
        input: Any, ksize: Any, strides: Any, padding: Any, data_format: str | None = None, name: str | None = None
    ) -> Any:
        import tensorflow as tf

        volumes = is_double(input) and input.shape.rank == _VOLUMES
        if not volumes or data_format not in {None, "NDHWC"}:
            format_ = {} if data_format is None else {"data_format": data_format}
            return own(input, ksize, strides, padding, name=name, **format_)
        sides, steps = _of_volume(ksize), _of_volume(strides)
        count, depth, height, width, channels = tf.unstack(tf.shape(input))
        maps = tf.reshape(input, (count * depth, height, width, channels))
        maps = of_maps(maps, sides[1:], steps[1:], padding)
        _, height, width, _ = tf.unstack(tf.shape(maps))
        rows = tf.reshape(maps, (count, depth, height * width, channels))
        rows = of_maps(rows, (sides[0], 1), (steps[0], 1), padding)
        return tf.reshape(rows, (count, tf.shape(rows)[1], height, width, channels))

    return pool


def _of_volume(sides: Any) -> tuple[int, ...]:
    """Depth, height and width, of a number or of a list that may name samples and channels too."""
    if isinstance(sides, int):
        return (sides,) * 3
    return tuple(sides) if len(sides) == 3 else tuple(sides)[1:-1] if len(sides) == _VOLUMES else tuple(sides) * 3
