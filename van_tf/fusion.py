"""Fuse a VAN into fewer operations for inference.

At inference, a BatchNorm is a factor and a summand per channel, and a layer scale is a factor. Both can be folded into
the adjacent convolutions, which is algebraically exact. With a and b for `norm1` of a block, its attention branch

    x + layer_scale_1 * (proj_2(z) + a x + b)      is      (1 + layer_scale_1 a) x + (layer_scale_1 proj_2(z) + ...)

and the factor of x is carried along: the stream is stored divided by it, channel by channel, and multiplied by it
before the stage's LayerNorm. Of a block, eight convolutions, two GELUs, one product and two sums remain.

GELU is x / 2 * (1 + erf(x / sqrt(2))). Its two factors can also be folded into the convolutions before and after it. In
a runtime without its own GELU, this leaves three passes over memory instead of five.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import keras
import numpy as np
from keras import layers

from van_tf.layers import BATCH_NORM_EPSILON, Block, OverlapPatchEmbed, folded_gelu, gelu, module_name

Array = np.ndarray[Any, np.dtype[np.float64]]
# If a channel's factor leaves these bounds, it is applied at once, because dividing by it would lose precision.
_SMALLEST, _GREATEST = 0.1, 10.0


def fuse(model: keras.Model, *, fold_gelu: bool = True) -> keras.Model:
    """Return a model without normalisations that computes the same as `model`, built by `van`, up to rounding.

    It is for inference, has the same input and output shapes, and consists of Keras's own layers. A layer whose result
    equals PyTorch's has the module's name, such as `block1.0.attn.proj_1`. Its weights cannot be ported back.

    `fold_gelu` also folds GELU's factors into the convolutions, which is fastest in TensorFlow. Runtimes that compute
    GELU in one operation, such as LiteRT and ONNX Runtime, are faster without it.

    Raises ValueError if `model` was not built by `van`, takes channels first, or does not compute in float32.
    """
    if not _is_van(model):
        raise ValueError(f"{model.name} is not a VAN built by van_tf with channels last and in float32")
    inputs = keras.Input(model.input_shape[1:], name="images")
    stream = _Stream(inputs, fold_gelu)
    for layer in model.layers[1:]:
        if isinstance(layer, OverlapPatchEmbed):
            stream.embed(layer)
        elif isinstance(layer, Block):
            stream.block(layer)
        elif isinstance(layer, layers.LayerNormalization):
            stream.norm(layer)
        else:
            stream.x = layer.__class__.from_config(layer.get_config())(stream.x)
            if layer.weights:
                stream.weights[layer.name] = layer.get_weights()
    fused = keras.Model(inputs, stream.x, name=f"{model.name}_fused")
    for name, values in stream.weights.items():
        fused.get_layer(name).set_weights([value.astype(np.float32) for value in values])
    return fused


def _is_van(model: keras.Model) -> bool:
    """Whether the model is a single chain of layers that contains blocks, in float32 and with channels last."""
    found = list(model.layers)
    if not any(isinstance(layer, Block) for layer in found) or len(model.inputs) != 1 or len(model.outputs) != 1:
        return False
    if not isinstance(found[0], layers.InputLayer) or any(layer.compute_dtype != "float32" for layer in found):
        return False
    chained = all(after.input is before.output for before, after in pairwise(found))
    return chained and model.outputs[0] is found[-1].output and "channels_last" not in {layer.name for layer in found}


class _Stream:
    """The network built so far. `x` times `factor`, channel by channel, equals the original model's tensor."""

    def __init__(self, inputs: Any, fold_gelu: bool) -> None:
        self.x = inputs
        self.gelu = folded_gelu if fold_gelu else gelu
        # The factor for GELU's input and output, and the suffix of layers whose result differs from PyTorch's.
        self.gelu_factor = math.sqrt(0.5) if fold_gelu else 1.0
        self.folded = ".folded" if fold_gelu else ""
        self.factor: Array = np.ones(1)
        self.weights: dict[str, list[Array]] = {}

    def conv(self, x: Any, name: str, kernel: Array, bias: Array, strides: int = 1) -> Any:
        self.weights[name] = [kernel, bias]
        return layers.Conv2D(kernel.shape[-1], kernel.shape[0], strides, data_format="channels_last", name=name)(x)

    def depthwise(self, x: Any, name: str, layer: layers.DepthwiseConv2D, kernel: Array, bias: Array) -> Any:
        self.weights[name] = [kernel, bias]
        return layers.DepthwiseConv2D(
            layer.kernel_size,
            padding="same",
            data_format="channels_last",
            dilation_rate=layer.dilation_rate,
            name=name,
        )(x)

    def embed(self, layer: OverlapPatchEmbed) -> None:
        kernel, bias = _kernel_and_bias(layer.proj)
        scale, shift = _scale_and_shift(layer.norm)
        x = layers.ZeroPadding2D(layer.kernel_size // 2, data_format="channels_last", name=f"{layer.name}.pad")(self.x)
        self.x = self.conv(x, layer.name, kernel * scale, bias * scale + shift, layer.strides)
        self.factor = np.ones(layer.dim)

    def block(self, layer: Block) -> None:
        attn, mlp, name, root = layer.attn, layer.mlp, module_name(layer.name), self.gelu_factor
        scale, shift = _scale_and_shift(layer.norm1)
        branch = np.asarray(layer.layer_scale_1, np.float64)
        x = self._into(attn.proj_1, f"{name}.attn.proj_1{self.folded}", scale, shift, root)
        x = gate = layers.Activation(self.gelu, name=f"{name}.attn.activation{self.folded}")(x)
        unit = attn.spatial_gating_unit
        path = f"{name}.attn.spatial_gating_unit"
        kernel, bias = _kernel_and_bias(unit.conv0)
        x = self.depthwise(x, f"{path}.conv0", unit.conv0, kernel * root, bias)
        x = self.depthwise(x, f"{path}.conv_spatial", unit.conv_spatial, *_kernel_and_bias(unit.conv_spatial))
        x = self.conv(x, f"{path}.conv1", *_kernel_and_bias(unit.conv1))
        x = layers.Multiply(name=f"{path}{self.folded}")([gate, x])
        kernel, bias = _kernel_and_bias(attn.proj_2)
        self._out_of(x, f"{name}.attn.scaled", kernel * root, bias + shift, branch, 1.0 + branch * scale)

        scale, shift = _scale_and_shift(layer.norm2)
        branch = np.asarray(layer.layer_scale_2, np.float64)
        x = self._into(mlp.fc1, f"{name}.mlp.fc1", scale, shift)
        depthwise = mlp.dwconv.dwconv
        kernel, bias = _kernel_and_bias(depthwise)
        x = self.depthwise(x, f"{name}.mlp.dwconv{self.folded}", depthwise, kernel * root, bias * root)
        x = layers.Activation(self.gelu, name=f"{name}.mlp.act{self.folded}")(x)
        kernel, bias = _kernel_and_bias(mlp.fc2)
        self._out_of(x, f"{name}.mlp.scaled", kernel * root, bias, branch, np.ones_like(branch))

    def norm(self, layer: layers.LayerNormalization) -> None:
        if not (self.factor == 1.0).all():
            self._multiply(f"{layer.name}.factor", self.factor)
        self.weights[layer.name] = layer.get_weights()
        self.x = layers.LayerNormalization(epsilon=layer.epsilon, name=layer.name)(self.x)

    def _into(self, conv: layers.Conv2D, name: str, scale: Array, shift: Array, times: float = 1.0) -> Any:
        """Apply a 1x1 convolution to the normalised stream, multiplied by `times`."""
        kernel, bias = _kernel_and_bias(conv)
        bias = bias + shift @ kernel[0, 0]
        return self.conv(self.x, name, kernel * (scale * self.factor)[:, None] * times, bias * times)

    def _out_of(self, x: Any, name: str, kernel: Array, bias: Array, branch: Array, shortcut: Array) -> None:
        """Add a scaled 1x1 convolution to the stream, after multiplying the stream by `shortcut`."""
        factor = self.factor * shortcut
        if not ((np.abs(factor) > _SMALLEST) & (np.abs(factor) < _GREATEST)).all():
            self._multiply(f"{name}.factor", factor)
            factor = np.ones_like(factor)
        x = self.conv(x, name, kernel * (branch / factor), bias * branch / factor)
        self.x = layers.Add(name=f"{name}.sum")([self.x, x])
        self.factor = factor

    def _multiply(self, name: str, factor: Array) -> None:
        self.weights[name] = [factor[None, None, :, None]]
        self.x = layers.DepthwiseConv2D(1, use_bias=False, data_format="channels_last", name=name)(self.x)


def _kernel_and_bias(layer: Any) -> tuple[Array, Array]:
    kernel, bias = (np.asarray(value, np.float64) for value in layer.get_weights())
    return kernel, bias


def _scale_and_shift(norm: layers.BatchNormalization) -> tuple[Array, Array]:
    """A BatchNorm at inference, as `scale * x + shift`."""
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in norm.get_weights())
    scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
    return scale, beta - mean * scale
