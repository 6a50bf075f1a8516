"""Depthwise convolutions: in PyTorch, convolutions with as many groups as input channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings
from porting.kinds.convolution import (
    bias_mistakes,
    convolution_layer_settings,
    convolution_module_settings,
    grouped_mistakes,
    kernel_mistakes,
    padding_advice,
    reach_mistakes,
)
from porting.kinds.transforms import MULTIPLIED

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class Depthwise(Kind):
    name = "depthwise"
    leaves = (Leaf("weight", "kernel", MULTIPLIED), Leaf("bias", "bias", default=0.0))

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == module.in_channels > 1

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D))

    def module_settings(self, module: Any) -> Settings:
        return convolution_module_settings(module)

    def layer_settings(self, layer: Any) -> Settings:
        if not layer.built:
            return convolution_layer_settings(layer, groups=0)
        channel_axis = 1 if layer.data_format == "channels_first" else -1
        return convolution_layer_settings(layer, groups=int(layer.input_spec.axes[channel_axis]))

    def advice(self, setting: str, expected: Any) -> str:
        return padding_advice(expected) if setting == "padding" else ""

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from bias_mistakes(module, inputs)
        yield from kernel_mistakes(module, inputs)
        yield from grouped_mistakes(module, inputs)
        yield from reach_mistakes(module, inputs)


KIND = Depthwise()
