"""Transposed convolutions in one to three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings, with_change, with_value
from porting.kinds.convolution import bias_mistakes, kernel_mistakes
from porting.kinds.transforms import CONVOLUTION, VECTOR

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class ConvTranspose(Kind):
    """The kernel, `(in, out, *spatial)` in PyTorch and `(*spatial, out, in)` in Keras, permutes as in a convolution."""

    name = "conv_transpose"
    leaves = (Leaf("weight", "kernel", CONVOLUTION), Leaf("bias", "bias", VECTOR, 0.0))

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose))

    def module_settings(self, module: Any) -> Settings:
        return {
            "kernel_size": tuple(module.kernel_size),
            "stride": tuple(module.stride),
            "dilation": tuple(module.dilation),
            "groups": module.groups,
        }

    def layer_settings(self, layer: Any) -> Settings:
        return {
            "kernel_size": tuple(layer.kernel_size),
            "stride": tuple(layer.strides),
            "dilation": tuple(layer.dilation_rate),
            "groups": 1,
        }

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from bias_mistakes(module, inputs)
        yield from kernel_mistakes(module, inputs)
        if module.groups == 1:
            yield Mistake(
                "the kernel's input and output channels are swapped",
                with_value(module, inputs, "weight", lambda m: m.weight.transpose(0, 1).contiguous()),
            )
        if any(module.padding):
            yield Mistake(
                "the border is cropped on the right and bottom alone", with_change(module, inputs, _cropped_at_the_end)
            )


def _cropped_at_the_end(module: Any) -> None:
    """Crop the whole padding at the end of each axis, and nothing at the beginning."""
    padding, forward = module.padding, module.forward
    module.padding = tuple(0 for _ in padding)

    def cropped(*args: Any, **options: Any) -> Tensor:
        result = forward(*args, **options)
        for axis, pad in enumerate(padding, start=result.ndim - len(padding)):
            result = result.narrow(axis, 0, result.shape[axis] - 2 * pad)
        return result  # type: ignore[no-any-return]

    module.forward = cropped


KIND = ConvTranspose()
