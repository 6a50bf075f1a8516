"""Pooling of sequences, maps and volumes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Mistake, in_double, same_pads

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

_GREATEST, _MEAN = "max", "avg"


class Pooling(Kind):
    name = "pooling"

    def is_module(self, module: nn.Module) -> bool:
        from torch.nn.modules import pooling

        own = pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd
        return isinstance(module, own)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        return type(layer).__name__.removeprefix("Global").startswith(("MaxPooling", "AveragePooling"))

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        from torch.nn.modules import pooling

        x = in_double(inputs[0])
        takes_greatest = isinstance(module, (pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd))
        own, other = (_GREATEST, _MEAN) if takes_greatest else (_MEAN, _GREATEST)
        text = "it takes the mean, not the greatest" if takes_greatest else "it takes the greatest, not the mean"
        if hasattr(module, "output_size"):
            yield Mistake(text, partial(_adapted, module, x, other))
            return
        axes = x.ndim - 2
        padding = _for_axes(module.padding, axes)
        pool = partial(_pooled, module, x, own)
        yield Mistake(text, partial(_pooled, module, x, other))
        if any(padding) and takes_greatest:
            yield Mistake(
                "the border is padded by zeros, which exceed negative numbers: PyTorch pads by minus infinity, as "
                'padding="same" does in Keras',
                partial(pool, fill=0.0),
            )
        if any(padding) and not takes_greatest:
            counted = module.count_include_pad
            said = "leaves the padding out, and PyTorch counts it" if counted else "counts the padding"
            yield Mistake(f"its mean {said} (count_include_pad={counted})", partial(pool, counts=not counted))
        if module.ceil_mode:
            yield Mistake("windows that reach over the end are left out (ceil_mode=True)", partial(pool, ceil=False))
        pads = _pads_of_same(module, x)
        if pads[::2] != pads[1::2]:
            yield Mistake(
                'its border is that of TensorFlow\'s "same", with less in front than behind',
                partial(_as_same, module, x, own),
            )


def _for_axes(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _adapted(module: Any, x: Tensor, how: str) -> Tensor:
    from torch.nn import functional as F

    result: Tensor = getattr(F, f"adaptive_{how}_pool{x.ndim - 2}d")(x, module.output_size)
    return result


def _pooled(
    module: Any,
    x: Tensor,
    how: str,
    *,
    fill: float | None = None,
    counts: bool | None = None,
    ceil: bool | None = None,
) -> Tensor:
    """The module's result, with one of its settings changed. `fill` pads beforehand."""
    from torch.nn import functional as F

    axes = x.ndim - 2
    kernel, padding = _for_axes(module.kernel_size, axes), _for_axes(module.padding, axes)
    stride = _for_axes(module.stride if module.stride is not None else kernel, axes)
    if fill is not None:
        x, padding = F.pad(x, [side for each in reversed(padding) for side in (each, each)], value=fill), (0,) * axes
    more: dict[str, Any] = {"ceil_mode": module.ceil_mode if ceil is None else ceil}
    if how == _GREATEST:
        more["dilation"] = getattr(module, "dilation", 1)
    else:
        more["count_include_pad"] = getattr(module, "count_include_pad", False) if counts is None else counts
    result: Tensor = getattr(F, f"{how}_pool{axes}d")(x, kernel, stride, padding, **more)
    return result


def _pads_of_same(module: Any, x: Tensor) -> list[int]:
    """What TensorFlow's "same" pads in front and behind, as F.pad takes it: the last axis first."""
    axes = x.ndim - 2
    kernel = _for_axes(module.kernel_size, axes)
    stride = _for_axes(module.stride if module.stride is not None else kernel, axes)
    return same_pads(x.shape[2:], kernel, stride)


def _as_same(module: Any, x: Tensor, how: str) -> Tensor:
    """Pool with as many windows as TensorFlow's "same" has, none of whose numbers come from the border."""
    import torch
    from torch.nn import functional as F

    pads = _pads_of_same(module, x)
    pool = partial(getattr(F, f"{how}_pool{x.ndim - 2}d"), kernel_size=module.kernel_size, stride=module.stride)
    if how == _GREATEST:
        greatest: Tensor = pool(F.pad(x, pads, value=-math.inf))
        return greatest
    mean: Tensor = pool(F.pad(x, pads)) / pool(F.pad(torch.ones_like(x), pads))
    return mean


KIND = Pooling()
