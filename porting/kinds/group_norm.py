"""Group normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings, with_forward, with_value
from porting.kinds.batch_norm import constant, norm_mistakes, scaled_and_shifted

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class GroupNorm(Kind):
    name = "group_norm"
    leaves = (Leaf("weight", "gamma", default=1.0), Leaf("bias", "beta", default=0.0))

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.GroupNorm)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.GroupNormalization)

    def module_settings(self, module: Any) -> Settings:
        return {"eps": module.eps, "groups": module.num_groups}

    def layer_settings(self, layer: Any) -> Settings:
        return {"eps": layer.epsilon, "groups": layer.groups}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from norm_mistakes(module, inputs)
        channels = module.num_channels
        for groups in dict.fromkeys((1, 2, 4, 8, 16, 32, channels)):
            if groups != module.num_groups and channels % groups == 0:
                cause = f"{groups} groups instead of {module.num_groups}"
                yield Mistake(cause, with_value(module, inputs, "num_groups", partial(constant, groups)))
        yield Mistake("its groups take channels in turn, not side by side", with_forward(module, inputs, _in_turn))
        yield Mistake(
            "it normalises each position by itself, not the whole map", with_forward(module, inputs, _by_position)
        )
        for axis in range(2, inputs[0].ndim if inputs else 2):
            cause = f"it groups along axis {axis} of PyTorch's tensor instead of the channels"
            yield Mistake(cause, with_forward(module, inputs, partial(_along, axis=axis)))


def _in_turn(module: Any, x: Tensor) -> Tensor:
    """Channel c belongs to group c % groups."""
    import torch
    from torch.nn import functional

    order = torch.arange(x.shape[1]).reshape(-1, module.num_groups).T.reshape(-1)
    mixed = functional.group_norm(x[:, order], module.num_groups, eps=module.eps)
    return _affine(module, mixed[:, order.argsort()])


def _by_position(module: Any, x: Tensor) -> Tensor:
    from torch.nn import functional

    rows = x.movedim(1, -1)
    flat = functional.group_norm(rows.reshape(-1, x.shape[1]), module.num_groups, eps=module.eps)
    return _affine(module, flat.reshape(rows.shape).movedim(-1, 1))


def _along(module: Any, x: Tensor, axis: int) -> Tensor:
    return type(module).forward(module, x.transpose(1, axis)).transpose(1, axis)  # type: ignore[no-any-return]


def _affine(module: Any, x: Tensor) -> Tensor:
    return scaled_and_shifted(module, x, (1, -1, *[1] * (x.ndim - 2)))


KIND = GroupNorm()
