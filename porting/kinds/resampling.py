"""Resizing of maps, and pixel shuffles between channels and pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Mistake, in_double

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

_SMOOTH = ("bilinear", "bicubic")


class Resampling(Kind):
    name = "resampling"

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, (nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle))

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, (layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D, layers.Resizing))

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        from torch import nn

        if isinstance(module, (nn.PixelShuffle, nn.PixelUnshuffle)):
            yield Mistake(
                "channels and pixels are in TensorFlow's order (block, block, channels), not in PyTorch's "
                "(channels, block, block)",
                partial(_shuffled_as_tensorflow, module, inputs[0]),
            )
            return
        if inputs[0].ndim != 4:
            return
        aligned = bool(module.align_corners)
        if module.mode in _SMOOTH:
            text = f"align_corners={not aligned} instead of {aligned}"
            yield Mistake(text, partial(_resized, module, inputs[0], module.mode, not aligned))
        for mode in ("nearest", "nearest-exact", *_SMOOTH):
            if mode != module.mode:
                align = False if mode in _SMOOTH else None
                text = f"{mode} interpolation instead of {module.mode}"
                yield Mistake(text, partial(_resized, module, inputs[0], mode, align))


def _resized(module: Any, x: Tensor, mode: str, align: bool | None) -> Tensor:
    from torch.nn import functional as F

    size, factor = module.size, module.scale_factor
    return F.interpolate(in_double(x), size=size, scale_factor=factor, mode=mode, align_corners=align)


def _shuffled_as_tensorflow(module: Any, x: Tensor) -> Tensor | None:
    """Shuffle as TensorFlow's depth_to_space and space_to_depth do, with the block before the channels."""
    if x.ndim != 4:
        return None
    x = in_double(x)
    count, channels, height, width = x.shape
    if hasattr(module, "upscale_factor"):
        r = module.upscale_factor
        split = x.reshape(count, r, r, channels // (r * r), height, width)
        return split.permute(0, 3, 4, 1, 5, 2).reshape(count, channels // (r * r), height * r, width * r)
    r = module.downscale_factor
    split = x.reshape(count, channels, height // r, r, width // r, r)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(count, channels * r * r, height // r, width // r)


KIND = Resampling()
