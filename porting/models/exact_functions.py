"""Functions of TensorFlow for float64, where its own round to float32 or take very long."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.frameworks import convolving, eager_functions, replaced
from porting.models.without_float64 import double_of, functions_without_float64, in_double, is_double

# Up to so many numbers in float32 are taken as written, with so many digits.
_WRITTEN, _DIGITS = 4096, 7
_MAPS = 4  # number of axes, with those of samples and channels


@contextlib.contextmanager
def exact_functions(*, staying: bool) -> Iterator[None]:
    """Let a Keras model that runs in float64 compute in it throughout. Does nothing on other backends.

    If it is `staying`, code that casts float64 to float32 gets what it cast, as on PyTorch's side.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf
    from keras.src.backend import nn
    from tensorflow.python.framework import override_binary_operator as operators

    raw, old = tf.raw_ops, tf.compat.v1.image
    with (
        convolving(_depthwise),
        replaced(nn, leaky_relu=_leaky_relu, gelu=_gelu),
        eager_functions(),
        replaced(tf, cast=_cast(tf.cast, staying), constant=_constant(tf.constant, staying)),
        replaced(tf, convert_to_tensor=_converting(tf.convert_to_tensor, staying)),
        replaced(tf, fill=_filling(tf.fill, staying)),
        replaced(operators, maybe_promote_tensors=_promoting(operators.maybe_promote_tensors)),
        replaced(tf, **{name: _mixing(getattr(tf, name)) for name in _MIXED}),
        replaced(tf.math, **{name: _mixing(getattr(tf.math, name)) for name in _MIXED_MATH}),
        replaced(tf.linalg, **{name: _mixing(getattr(tf.linalg, name)) for name in _MIXED_LINALG}),
        replaced(tf.image, resize=_resize(tf.image.resize)),
        replaced(raw, ResizeBilinear=_resize_bilinear(raw.ResizeBilinear)),
        replaced(old, resize_bilinear=_resize_bilinear(old.resize_bilinear)),
        replaced(tf.nn, gelu=_gelu_of_tf(tf.nn.gelu), leaky_relu=_leaky_relu_of_tf(tf.nn.leaky_relu)),
        replaced(tf.nn, silu=_silu_of_tf(tf.nn.silu), swish=_silu_of_tf(tf.nn.swish)),
        replaced(tf.nn, **{name: _mixing(getattr(tf.nn, name)) for name in _MIXED_NN}),
        replaced(tf, **_computing(tf, staying)),
        replaced(tf.TensorArray, **_collecting(tf.TensorArray, staying)),
        functions_without_float64(),
    ):
        yield


def _leaky_relu(x: Any, negative_slope: float = 0.2) -> Any:
    import keras

    x = keras.ops.convert_to_tensor(x)
    return keras.ops.where(x < 0, x * negative_slope, x)


def _gelu(x: Any, approximate: bool = True) -> Any:
    import keras
    import tensorflow as tf

    x = keras.ops.convert_to_tensor(x)
    if not approximate:
        return 0.5 * x * tf.math.erfc(-x * math.sqrt(0.5))
    return 0.5 * x * (1.0 + keras.ops.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _gelu_of_tf(own: Callable[..., Any]) -> Callable[..., Any]:
    def gelu(features: Any, approximate: bool = False, name: str | None = None) -> Any:
        return _gelu(features, approximate) if is_double(features) else own(features, approximate, name)

    return gelu


def _leaky_relu_of_tf(own: Callable[..., Any]) -> Callable[..., Any]:
    def leaky_relu(features: Any, alpha: float = 0.2, name: str | None = None) -> Any:
        return _leaky_relu(features, alpha) if is_double(features) else own(features, alpha, name)

    return leaky_relu


def _silu_of_tf(own: Callable[..., Any]) -> Callable[..., Any]:
    import tensorflow as tf

    def silu(features: Any, beta: float = 1.0) -> Any:
        return features * tf.sigmoid(features * beta) if is_double(features) else own(features, beta)

    return silu


def _cast(own: Callable[..., Any], staying: bool) -> Callable[..., Any]:
    import keras
    import tensorflow as tf

    def cast(x: Any, dtype: Any, name: str | None = None) -> Any:
        # tf.cast would turn a Python number into a float32 first.
        if isinstance(x, float) and tf.as_dtype(dtype).is_floating:
            return tf.constant(x, dtype)
        # Code that casts around a norm or a softmax, to be safe in half precision, must not leave float64.
        computed = tf.is_tensor(x) or isinstance(x, keras.Variable)
        if staying and computed and tf.as_dtype(x.dtype) in (tf.float64, tf.complex128):
            dtype = double_of(tf.as_dtype(dtype))
            if tf.as_dtype(x.dtype) == dtype:
                return tf.convert_to_tensor(x)
        return own(x, dtype, name)

    return cast


def _constant(own: Callable[..., Any], staying: bool) -> Callable[..., Any]:
    """Create constants of the code in float64, as PyTorch's code does by default there."""

    def constant(value: Any, dtype: Any = None, shape: Any = None, name: str = "Const") -> Any:
        return own(*(_typed(value, dtype) if staying else (value, dtype)), shape, name)

    return constant


def _converting(own: Callable[..., Any], staying: bool) -> Callable[..., Any]:
    """The same for the conversion of Python's and NumPy's numbers."""

    def convert(value: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        return own(*(_typed(value, dtype) if staying else (value, dtype)), *args, **kwargs)

    return convert


def _typed(value: Any, dtype: Any) -> tuple[Any, Any]:
    """Numbers of the code as written, and their type: float64 in the place of float32 and of none."""
    import tensorflow as tf

    if dtype is not None and tf.as_dtype(dtype) != tf.float32:
        return value, dtype
    value = as_written(value)
    return value, tf.float64 if _has_fractions(value) else dtype


def _filling(own: Callable[..., Any], staying: bool) -> Callable[..., Any]:
    import tensorflow as tf

    def fill(dims: Any, value: Any, name: str | None = None) -> Any:
        is_exact = staying and _has_fractions(value)
        return own(dims, tf.constant(value, tf.float64) if is_exact else value, name)

    return fill


def as_written(value: Any) -> Any:
    """NumPy's float32 numbers in float64, as the code wrote them: 0.1 for the float32 nearest to it.

    Numbers that need more digits than a person writes stay as they are.
    """
    is_single = isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float32
    if not is_single or not 0 < np.size(value) <= _WRITTEN or not np.isfinite(value).all():
        return value
    texts = [np.format_float_scientific(each, trim="-") for each in np.ravel(value)]
    if any(len(text.partition("e")[0].lstrip("-").replace(".", "")) > _DIGITS for text in texts):
        return value
    return np.array([float(text) for text in texts]).reshape(np.shape(value))


def _has_fractions(value: Any) -> bool:
    """Whether this is a Python number, or a list of them, with a fraction."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_fractions, value)) and all(isinstance(each, (list, tuple, int, float)) for each in value)
    if isinstance(value, (np.ndarray, np.generic)):
        return bool(value.dtype == np.float64)
    return isinstance(value, float)


def _computing(tf: Any, staying: bool) -> dict[str, Callable[..., Any]]:
    """Functions that state the type of what they compute by other code, by name. That code computes in float64."""
    if not staying:
        return {}

    def doubled(types: Any) -> Any:
        return tf.nest.map_structure(lambda each: double_of(each) if isinstance(each, tf.DType) else each, types)

    def map_fn(fn: Any, elems: Any, dtype: Any = None, *args: Any, fn_output_signature: Any = None, **how: Any) -> Any:
        return own_map(fn, elems, doubled(dtype), *args, fn_output_signature=doubled(fn_output_signature), **how)

    def py_function(func: Any = None, inp: Any = None, Tout: Any = None, name: str | None = None) -> Any:  # noqa: N803
        def exact(*given: Any) -> Any:
            return tf.nest.map_structure(lambda each: in_double(tf.convert_to_tensor(each)), func(*given))

        return own_function(exact, inp, doubled(Tout), name)

    own_map, own_function = tf.map_fn, tf.py_function
    return {"map_fn": map_fn, "py_function": py_function}


def _collecting(owner: Any, staying: bool) -> dict[str, Callable[..., Any]]:
    """Methods by which an array of tensors holds float64 where the code says float32."""
    if not staying:
        return {}
    import tensorflow as tf

    def create(self: Any, dtype: Any, *args: Any, **kwargs: Any) -> None:
        own_create(self, double_of(tf.as_dtype(dtype)), *args, **kwargs)

    def write(self: Any, index: Any, value: Any, name: str | None = None) -> Any:
        return own_write(self, index, in_double(value), name)

    def unstack(self: Any, value: Any, name: str | None = None) -> Any:
        return own_unstack(self, in_double(value), name)

    own_create, own_write, own_unstack = owner.__init__, owner.write, owner.unstack
    return {"__init__": create, "write": write, "unstack": unstack}


def _promoting(own: Callable[..., Any]) -> Callable[..., Any]:
    """Let operators take a tensor in float64 and one in float32, such as a mask that the code cast to it."""
    import tensorflow as tf

    def promote(*tensors: Any, **how: Any) -> Any:
        types = {each.dtype for each in tensors if tf.is_tensor(each)}
        if types.isdisjoint((tf.float64, tf.complex128)):
            return own(*tensors, **how)
        return own(*(in_double(as_written(each)) for each in tensors), **how)

    return promote


# Functions of TensorFlow that take several tensors of one type.
_COMPARING = ("equal", "greater", "greater_equal", "less", "less_equal", "not_equal")
_ARITHMETIC = ("add", "divide", "maximum", "minimum", "multiply", "pow", "subtract")
_MIXED_MATH = (*_COMPARING, *_ARITHMETIC, "add_n", "atan2", "floormod", "squared_difference")
_SCATTERING = ("tensor_scatter_nd_add", "tensor_scatter_nd_update")
_MIXED = (
    *(*_COMPARING, *_ARITHMETIC, *_SCATTERING),
    *("complex", "concat", "einsum", "matmul", "searchsorted", "stack", "tensordot", "where"),
)
_MIXED_LINALG = ("cholesky_solve", "lstsq", "matmul", "matvec", "solve", "triangular_solve")
_MIXED_NN = ("bias_add", "conv1d", "conv2d", "conv3d", "depthwise_conv2d")


def _mixing(own: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that takes tensors of one type take float64 and float32 together."""
    import tensorflow as tf

    def mixed(*args: Any, **kwargs: Any) -> Any:
        types = {each.dtype for each in tf.nest.flatten((args, kwargs)) if tf.is_tensor(each)}
        if any(double_of(each) != each and double_of(each) in types for each in types):
            args, kwargs = tf.nest.map_structure(in_double, (args, kwargs))
        return own(*args, **kwargs)

    return mixed


def _depthwise(
    inputs: Any, kernel: Any, strides: Any, padding: str, data_format: str | None, dilation_rate: Any
) -> Any | None:
    """TensorFlow has no fast grouped convolution in float64. A depthwise one computes the same sums."""
    import keras
    from keras.src.backend import nn

    channels = inputs.shape[1 if data_format == "channels_first" else -1]
    if not (kernel.shape[-2] == 1 and kernel.shape[-1] == channels > 1 and len(kernel.shape) == _MAPS):
        return None
    kernel = keras.ops.transpose(kernel, (0, 1, 3, 2))
    strides, dilation_rate = (each if isinstance(each, int) else tuple(each) for each in (strides, dilation_rate))
    return nn.depthwise_conv(inputs, kernel, strides, padding, data_format, dilation_rate)


def _resize(own: Callable[..., Any]) -> Callable[..., Any]:
    def resize(
        images: Any,
        size: Any,
        method: str = "bilinear",
        preserve_aspect_ratio: bool = False,
        antialias: bool = False,
        name: str | None = None,
    ) -> Any:
        if method == "bilinear" and not preserve_aspect_ratio and not antialias:
            resized = _interpolated(images, size, align_corners=False, half_pixel_centers=True)
            if resized is not None:
                return resized
        return own(images, size, method, preserve_aspect_ratio, antialias, name)

    return resize


def _resize_bilinear(own: Callable[..., Any]) -> Callable[..., Any]:
    def resize_bilinear(
        images: Any,
        size: Any,
        align_corners: bool = False,
        name: str | None = None,
        half_pixel_centers: bool = False,
    ) -> Any:
        how = {"align_corners": align_corners, "half_pixel_centers": half_pixel_centers}
        resized = _interpolated(images, size, **how)
        return own(images=images, size=size, name=name, **how) if resized is None else resized

    return resize_bilinear


def _interpolated(images: Any, size: Any, *, align_corners: bool, half_pixel_centers: bool) -> Any | None:
    """Resize maps `(N, H, W, C)` in float64 bilinearly; None for anything else, or if a side is not known."""
    import tensorflow as tf

    if not tf.is_tensor(images) or images.dtype != tf.float64 or images.shape.rank != _MAPS:
        return None
    given, wanted = images.shape[1:3].as_list(), tf.get_static_value(tf.convert_to_tensor(size))
    if None in given or wanted is None:
        return None
    rows, columns = (
        tf.constant(_weights(before, int(after), align_corners, half_pixel_centers))
        for before, after in zip(given, wanted, strict=True)
    )
    return tf.einsum("jw,nhwc->nhjc", columns, tf.einsum("ih,nhwc->niwc", rows, images))


def _weights(before: int, after: int, align_corners: bool, half_pixel_centers: bool) -> Array:
    """The share `(after, before)` of each position in each new one."""
    place = np.arange(after, dtype=np.float64)
    if align_corners and after > 1:
        place *= (before - 1) / (after - 1)
    elif half_pixel_centers:
        place = (place + 0.5) * (before / after) - 0.5
    else:
        place *= before / after
    below = np.floor(place)
    share = place - below
    weights = np.zeros((after, before))
    for step, part in ((0, 1.0 - share), (1, share)):
        nearest = np.clip(below.astype(int) + step, 0, before - 1)
        np.add.at(weights, (np.arange(after), nearest), part)
    return weights
