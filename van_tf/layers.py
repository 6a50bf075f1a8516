"""The layers of a Visual Attention Network in Keras, with channels last.

Each class corresponds to the class of the official PyTorch code that its docstring names
(Visual-Attention-Network/VAN-Classification, `models/van.py`). Each sublayer has PyTorch's attribute name, so
`block1_0/attn/proj_1/kernel` here is `block1.0.attn.proj_1.weight` there.

Composite layers create their sublayers in `build`, with names and in the order in which they run. Keras derives the
variables' paths from these names.
"""

from __future__ import annotations

import math
import re
from typing import Any

import keras
from keras import layers, ops

# As in PyTorch's BatchNorm2d, whose momentum of 0.1 is the share of the new value; in Keras, it is that of the old.
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9
LAYER_SCALE_INIT = 1e-2

Shape = tuple[int | None, ...]

_register = keras.saving.register_keras_serializable(package="van_tf")


@_register
def gelu(x: Any) -> Any:
    """The exact GELU, x times the normal distribution function, as in PyTorch. Shape-preserving.

    Keras's own GELU uses erfc, which is slower in TensorFlow's CPU kernels. LiteRT's converter recognises this form of
    the product as GELU. Its sum cancels for negative x, so types of fewer than 32 bits are computed in float32, as in
    PyTorch.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype in {"float16", "bfloat16"}:
        return ops.cast(gelu(ops.cast(x, "float32")), dtype)
    return 0.5 * x * (1.0 + ops.erf(x * math.sqrt(0.5)))


@_register
def folded_gelu(x: Any) -> Any:
    """sqrt(2) * GELU(sqrt(2) * x): what remains of GELU after the adjacent convolutions take over its two factors."""
    return x * (1.0 + ops.erf(x))


def module_name(layer_name: str) -> str:
    """PyTorch's name of a top-level layer, such as `block1.0` for `block1_0`; Keras's torch backend allows no dots."""
    return re.sub(r"^(block\d+)_(\d+)$", r"\1.\2", layer_name)


def _conv_initializer() -> keras.initializers.Initializer:
    """Normal with std sqrt(2 / (kernel height * kernel width * out_channels / groups)), as in the official code.

    For a depthwise kernel, Keras's fan-out is height * width, which equals this formula with groups = channels.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


@_register
class BatchNorm(layers.BatchNormalization):
    """BatchNormalization whose running variance uses the unbiased variance of a batch; `BatchNorm2d` in PyTorch.

    The unbiased variance is n / (n - 1) times the biased one, which Keras's own layer uses. n is the number of values
    per channel, without masked ones. The normalisation of a batch and inference are the same in both frameworks.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        kept = self.moving_variance * self.momentum
        outputs = super().call(inputs, training=training, mask=mask)
        # Keras added the biased variance: add the missing 1 / (n - 1) of that.
        added = self.moving_variance - kept
        others = ops.cast(self._values(inputs, mask), added.dtype) - 1
        self.moving_variance.assign_add(added / ops.maximum(others, 1))
        return outputs

    def _values(self, inputs: Any, mask: Any) -> Any:
        """The number of values per channel in the statistics."""
        channels = inputs.shape[self.axis]
        if mask is None:
            return ops.size(inputs) // channels
        # As in Keras: the mask covers the leading axes of the inputs, and the remaining axes count fully.
        return ops.sum(ops.cast(mask, "int32")) * (ops.size(inputs) // (ops.size(mask) * channels))


class _Composite(layers.Layer):
    """A layer of named sublayers, which run with its dtype policy."""

    def conv(self, name: str, filters: int, kernel_size: int = 1, strides: int = 1) -> layers.Conv2D:
        return layers.Conv2D(
            filters,
            kernel_size,
            strides,
            padding="valid",
            data_format="channels_last",
            kernel_initializer=_conv_initializer(),
            dtype=self.dtype_policy,
            name=name,
        )

    def depthwise(self, name: str, kernel_size: int, dilation: int = 1) -> layers.DepthwiseConv2D:
        # With stride 1 and an odd kernel, "same" pads both sides equally, like PyTorch's padding=.
        return layers.DepthwiseConv2D(
            kernel_size,
            padding="same",
            data_format="channels_last",
            dilation_rate=dilation,
            depthwise_initializer=_conv_initializer(),
            dtype=self.dtype_policy,
            name=name,
        )

    def batch_norm(self, name: str) -> BatchNorm:
        return BatchNorm(
            axis=-1, momentum=BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON, dtype=self.dtype_policy, name=name
        )

    def gelu(self, name: str) -> layers.Activation:
        return layers.Activation(gelu, dtype=self.dtype_policy, name=name)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape


@_register
class OverlapPatchEmbed(_Composite):
    """Strided convolution with overlapping windows, then BatchNorm; `OverlapPatchEmbed` in PyTorch.

    Maps `(N, H, W, C)` to `(N, ceil(H / strides), ceil(W / strides), dim)`.
    """

    def __init__(self, dim: int, kernel_size: int, strides: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.kernel_size = kernel_size
        self.strides = strides

    def build(self, input_shape: Shape) -> None:
        # PyTorch pads both sides equally; "same" would pad a strided convolution more on the right and bottom.
        self.pad = layers.ZeroPadding2D(
            self.kernel_size // 2, data_format="channels_last", dtype=self.dtype_policy, name="pad"
        )
        self.proj = self.conv("proj", self.dim, self.kernel_size, self.strides)
        self.norm = self.batch_norm("norm")
        self.pad.build(input_shape)
        self.proj.build(input_shape)
        self.norm.build(self.compute_output_shape(input_shape))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.norm(self.proj(self.pad(inputs)), training=training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        height, width = (None if n is None else -(-n // self.strides) for n in input_shape[1:3])
        return (input_shape[0], height, width, self.dim)

    def get_config(self) -> dict[str, Any]:
        own = {"dim": self.dim, "kernel_size": self.kernel_size, "strides": self.strides}
        return {**super().get_config(), **own}


@_register
class LKA(_Composite):
    """Large kernel attention (paper, section 3.1); `AttentionModule` in PyTorch. Shape-preserving.

    It decomposes a 21x21 kernel into 5x5 depthwise, 7x7 depthwise with dilation 3, and 1x1. The result gates the input.
    """

    def build(self, input_shape: Shape) -> None:
        self.conv0 = self.depthwise("conv0", 5)
        self.conv_spatial = self.depthwise("conv_spatial", 7, dilation=3)
        self.conv1 = self.conv("conv1", _channels(input_shape))
        for layer in (self.conv0, self.conv_spatial, self.conv1):
            layer.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return inputs * self.conv1(self.conv_spatial(self.conv0(inputs)))


@_register
class Attention(_Composite):
    """1x1, GELU, LKA, 1x1, with a shortcut around all four; `SpatialAttention` in PyTorch. Shape-preserving."""

    def build(self, input_shape: Shape) -> None:
        dim = _channels(input_shape)
        self.proj_1 = self.conv("proj_1", dim)
        self.activation = self.gelu("activation")
        self.spatial_gating_unit = LKA(dtype=self.dtype_policy, name="spatial_gating_unit")
        self.proj_2 = self.conv("proj_2", dim)
        for layer in (self.proj_1, self.activation, self.spatial_gating_unit, self.proj_2):
            layer.build(input_shape)

    def call(self, inputs: Any) -> Any:
        x = self.spatial_gating_unit(self.activation(self.proj_1(inputs)))
        return self.proj_2(x) + inputs


@_register
class DWConv(_Composite):
    """3x3 depthwise convolution as a separate module; `DWConv` in PyTorch. Shape-preserving."""

    def build(self, input_shape: Shape) -> None:
        self.dwconv = self.depthwise("dwconv", 3)
        self.dwconv.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return self.dwconv(inputs)


@_register
class Mlp(_Composite):
    """1x1 to `hidden_dim`, depthwise 3x3, GELU, 1x1 back; `Mlp` in PyTorch. Shape-preserving."""

    def __init__(self, hidden_dim: int, drop_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.drop_rate = drop_rate

    def build(self, input_shape: Shape) -> None:
        hidden_shape = (*input_shape[:-1], self.hidden_dim)
        self.fc1 = self.conv("fc1", self.hidden_dim)
        self.dwconv = DWConv(dtype=self.dtype_policy, name="dwconv")
        self.act = self.gelu("act")
        self.fc2 = self.conv("fc2", _channels(input_shape))
        self.drop = layers.Dropout(self.drop_rate, dtype=self.dtype_policy, name="drop")
        self.fc1.build(input_shape)
        for layer in (self.dwconv, self.act, self.fc2, self.drop):
            layer.build(hidden_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.act(self.dwconv(self.fc1(inputs)))
        x = self.fc2(self.drop(x, training=training))
        return self.drop(x, training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "hidden_dim": self.hidden_dim, "drop_rate": self.drop_rate}


@_register
class Block(_Composite):
    """Attention and MLP, each after a BatchNorm, scaled per channel and added; `Block` in PyTorch.

    Shape-preserving. `drop_path_rate` is the probability that a sample skips a whole branch in training.
    """

    def __init__(self, mlp_ratio: float, drop_rate: float = 0.0, drop_path_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mlp_ratio = mlp_ratio
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate

    def build(self, input_shape: Shape) -> None:
        dim = _channels(input_shape)
        self.norm1 = self.batch_norm("norm1")
        self.attn = Attention(dtype=self.dtype_policy, name="attn")
        # Stochastic depth: one mask value per sample, the same for all positions and channels.
        self.drop_path = layers.Dropout(
            self.drop_path_rate, noise_shape=(None, 1, 1, 1), dtype=self.dtype_policy, name="drop_path"
        )
        self.norm2 = self.batch_norm("norm2")
        self.mlp = Mlp(int(dim * self.mlp_ratio), self.drop_rate, dtype=self.dtype_policy, name="mlp")
        for layer in (self.norm1, self.attn, self.drop_path, self.norm2, self.mlp):
            layer.build(input_shape)
        self.layer_scale_1 = self._layer_scale("layer_scale_1", dim)
        self.layer_scale_2 = self._layer_scale("layer_scale_2", dim)

    def _layer_scale(self, name: str, dim: int) -> keras.Variable:
        initializer = keras.initializers.Constant(LAYER_SCALE_INIT)
        return self.add_weight(shape=(dim,), initializer=initializer, name=name)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        branch = self.layer_scale_1 * self.attn(self.norm1(inputs, training=training))
        x = inputs + self.drop_path(branch, training=training)
        branch = self.layer_scale_2 * self.mlp(self.norm2(x, training=training), training=training)
        return x + self.drop_path(branch, training=training)

    def get_config(self) -> dict[str, Any]:
        own = {"mlp_ratio": self.mlp_ratio, "drop_rate": self.drop_rate, "drop_path_rate": self.drop_path_rate}
        return {**super().get_config(), **own}


def _channels(shape: Shape) -> int:
    channels = shape[-1]
    if channels is None:
        raise ValueError(f"the number of channels must be known, but the input shape is {shape}")
    return channels
