"""Convolutions in one to three dimensions, plain and grouped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings, in_double, same_pads, with_change, with_value
from porting.kinds.transforms import CONVOLUTION, VECTOR

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

_AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


class Convolution(Kind):
    name = "conv"
    leaves = (Leaf("weight", "kernel", CONVOLUTION), Leaf("bias", "bias", VECTOR, 0.0))

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, (layers.Conv1D, layers.Conv2D, layers.Conv3D))

    def module_settings(self, module: Any) -> Settings:
        return convolution_module_settings(module)

    def layer_settings(self, layer: Any) -> Settings:
        return convolution_layer_settings(layer, groups=layer.groups)

    def advice(self, setting: str, expected: Any) -> str:
        return padding_advice(expected) if setting == "padding" else ""

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from bias_mistakes(module, inputs)
        yield from kernel_mistakes(module, inputs)
        if module.groups == 1:
            yield Mistake(
                "the kernel's input and output channels are swapped",
                with_value(module, inputs, "weight", lambda m: m.weight.transpose(0, 1).contiguous()),
            )
        else:
            yield from grouped_mistakes(module, inputs)
        yield from reach_mistakes(module, inputs)


def padding_advice(expected: Any) -> str:
    """How to pad in Keras as a module with this padding does."""
    if not isinstance(expected, tuple):
        return ""
    if not any(expected):
        return 'use padding="valid"'
    sides = expected[0] if len(set(expected)) == 1 else expected
    return f'put ZeroPadding{len(expected)}D({sides}) before it, and use padding="valid"'


def convolution_module_settings(module: Any) -> Settings:
    """Settings of any PyTorch convolution that is not transposed."""
    settings: Settings = {
        "kernel_size": tuple(module.kernel_size),
        "stride": tuple(module.stride),
        "dilation": tuple(module.dilation),
        "groups": module.groups,
    }
    # A class that pads in its own way, such as timm's Conv2dSame, does not state that in `padding`.
    if isinstance(module.padding, tuple) and type(module).forward is _plain_forward(module):
        settings["padding"] = tuple(module.padding)
    return settings


def _plain_forward(module: Any) -> Any:
    from torch import nn

    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(module.kernel_size)].forward


def convolution_layer_settings(layer: Any, *, groups: int) -> Settings:
    """Settings of any Keras convolution that is not transposed, in PyTorch's conventions."""
    kernel, dilation = tuple(layer.kernel_size), tuple(layer.dilation_rate)
    settings: Settings = {
        "kernel_size": kernel,
        "stride": tuple(layer.strides),
        "dilation": dilation,
    }
    if layer.built:
        settings["groups"] = groups
    reach = tuple((size - 1) * step for size, step in zip(kernel, dilation, strict=True))
    if layer.padding == "same":
        even = all(total % 2 == 0 for total in reach) and all(step == 1 for step in layer.strides)
        settings["padding"] = tuple(total // 2 for total in reach) if even else ASYMMETRIC
    return settings


def bias_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    import torch

    if module.bias is not None:
        yield Mistake("the bias is lost", with_value(module, inputs, "bias", lambda m: torch.zeros_like(m.bias)))


def kernel_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    """Mistakes that swap or flip spatial axes of the kernel."""
    spatial = len(module.kernel_size)
    names, axes = _AXIS_NAMES[spatial], range(2, 2 + spatial)
    for one, other in itertools.combinations(axes, 2):
        yield Mistake(
            f"the kernel's {names[one - 2]} and {names[other - 2]} are swapped",
            with_value(module, inputs, "weight", partial(_swapped, one, other)),
        )
    longer = [axis for axis in axes if module.kernel_size[axis - 2] > 1]
    for count in range(len(longer), 0, -1):
        for flipped in itertools.combinations(longer, count):
            where = " and ".join(names[axis - 2] for axis in flipped)
            yield Mistake(
                f"the kernel is flipped in {where}",
                with_value(module, inputs, "weight", partial(_flipped, flipped)),
            )


def _swapped(one: int, other: int, module: Any) -> Tensor:
    swapped: Tensor = module.weight.transpose(one, other)
    return swapped


def _flipped(axes: tuple[int, ...], module: Any) -> Tensor:
    flipped: Tensor = module.weight.flip(axes)
    return flipped


def grouped_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    yield Mistake(
        "the groups of the kernel are interleaved",
        with_value(module, inputs, "weight", lambda m: _interleaved(m.weight, m.groups)),
    )
    yield Mistake(
        "the groups of the kernel are interleaved the other way",
        with_value(module, inputs, "weight", lambda m: _interleaved(m.weight, m.weight.shape[0] // m.groups)),
    )


def _interleaved(weight: Tensor, groups: int) -> Tensor:
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


# TensorFlow's "same" where it pads more behind than in front, at least for some sizes.
ASYMMETRIC = "asymmetric (same)"
# The dilations that are tried in the place of a module's own.
_DILATIONS = (2, 3, 4, 6, 8, 12, 16, 18, 24, 36)


def reach_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    """Mistakes in the dilation and the padding."""
    if any(step > 1 for step in module.dilation):
        yield Mistake("the dilation is lost", partial(_dilated, module, inputs[0], 1))
    yield from _padding_mistakes(module, inputs)
    own = module.dilation[0] if len(set(module.dilation)) == 1 else module.dilation
    for step in _DILATIONS if max(module.kernel_size) > 1 else ():
        if step != own:
            text = f"its dilation is {step} in Keras, {own} in PyTorch"
            yield Mistake(text, partial(_dilated, module, inputs[0], step))


def _padding_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    padding = module.padding
    if not isinstance(padding, tuple) or not any(padding):
        return
    if module.padding_mode != "zeros":
        yield Mistake(
            f"the border is padded by zeros, not by {module.padding_mode}",
            with_value(module, inputs, "padding_mode", lambda _: "zeros"),
        )
        return
    yield Mistake(
        'zero padding as in TensorFlow\'s "same", less on the left and top than on the right and bottom: '
        f"{padding_advice(padding)}",
        lambda: _padded_as_same(module, inputs[0]),
    )
    if not isinstance(padding, str):
        most = max(padding)
        for shift in dict.fromkeys((1, most)):
            for sign, where in ((1, "in front"), (-1, "behind")):
                yield Mistake(
                    f"it pads {shift} more {where} and {shift} less on the other side: {padding_advice(padding)}",
                    partial(_padded_unevenly, module, inputs[0], sign * shift),
                )
    for mode in ("reflect", "replicate"):
        yield Mistake(
            f"the border is padded by {mode}, not by zeros", with_change(module, inputs, _with_padding_mode(mode))
        )


def _convolve(module: Any, x: Tensor, padding: Any, dilation: Any) -> Tensor:
    from torch.nn import functional as F

    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
    bias = None if module.bias is None else module.bias.double()
    return convolve(in_double(x), module.weight.double(), bias, module.stride, padding, dilation, module.groups)


def _dilated(module: Any, x: Tensor, step: int) -> Tensor | None:
    """The result with another dilation and as much padding as keeps its size.

    If the module does not pad, code around it may have, as for a causal convolution: then more or less is in front.
    """
    from torch.nn import functional as F

    more = [(size - 1) * (step - own) for size, own in zip(module.kernel_size, module.dilation, strict=True)]
    if isinstance(module.padding, str):
        return _convolve(module, x, module.padding, (step,) * len(more))
    if any(module.padding):
        if any(each % 2 for each in more):
            return None
        padding = tuple(own + each // 2 for own, each in zip(module.padding, more, strict=True))
        return None if min(padding) < 0 else _convolve(module, x, padding, (step,) * len(more))
    in_front = [side for each in reversed(more) for side in (each, 0)]  # F.pad takes the last axis first
    return _convolve(module, F.pad(in_double(x), in_front), 0, (step,) * len(more))


def _padded_as_same(module: Any, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    reaches = ((size - 1) * step + 1 for size, step in zip(module.kernel_size, module.dilation, strict=True))
    pads = same_pads(x.shape[2:], reaches, module.stride)
    return _convolve(module, F.pad(in_double(x), pads), 0, module.dilation)


def _padded_unevenly(module: Any, x: Tensor, shift: int) -> Tensor:
    """Pad by as much as the module in all, but so much more in front and less behind."""
    from torch.nn import functional as F

    pads = [side for pad in reversed(module.padding) for side in (pad + min(pad, shift), pad - min(pad, shift))]
    return _convolve(module, F.pad(in_double(x), pads), 0, module.dilation)


def _with_padding_mode(mode: str) -> Any:
    def change(module: Any) -> None:
        module.padding_mode = mode
        module._reversed_padding_repeated_twice = [int(pad) for pad in reversed(module.padding) for _ in range(2)]

    return change


KIND = Convolution()
