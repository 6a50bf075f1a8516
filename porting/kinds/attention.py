"""Multi-head attention, and dense layers that compute queries, keys and values at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError
from porting.kinds.base import CallInputs, Kind, Leaf, Mistake, Settings, with_change
from porting.kinds.transforms import DENSE, VECTOR, HeadsInFront

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

_MASKS = {"attn_mask": "attention mask", "key_padding_mask": "padding mask"}
_PARTS = ("query", "key", "value")
# PyTorch orders the rows of a projection as (heads, size).
_ROWS = {"heads": "(heads, size) read as (size, heads)", "size": "(size, heads) read as (heads, size)"}


def _joined(*, in_first: bool) -> tuple[Leaf, ...]:
    kernels, biases = (tuple(f"{part}/{leaf}" for part in _PARTS) for leaf in ("kernel", "bias"))
    return (
        Leaf("weight", kernels, HeadsInFront(in_first=in_first)),
        Leaf("bias", biases, HeadsInFront(), 0.0),
    )


class Attention(Kind):
    name = "attention"
    # PyTorch has one input projection when query, key and value have the same size, and three otherwise.
    leaves: tuple[Leaf, ...] = (
        Leaf("in_proj_weight", ("query/kernel", "key/kernel", "value/kernel"), HeadsInFront()),
        Leaf("q_proj_weight", "query/kernel", DENSE),
        Leaf("k_proj_weight", "key/kernel", DENSE),
        Leaf("v_proj_weight", "value/kernel", DENSE),
        Leaf("in_proj_bias", ("query/bias", "key/bias", "value/bias"), HeadsInFront(), 0.0),
        Leaf("out_proj.weight", "output/kernel", DENSE),
        Leaf("out_proj.bias", "output/bias", VECTOR, 0.0),
    )

    def variables(self, layer: Any) -> dict[str, keras.Variable]:
        found = {}
        for part in (*_PARTS, "output"):
            dense = getattr(layer, f"_{part}_dense", None)
            for name in ("kernel", "bias"):
                if (variable := getattr(dense, name, None)) is not None:
                    found[f"{part}/{name}"] = variable
        return found

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.MultiheadAttention)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.MultiHeadAttention)

    def module_settings(self, module: Any) -> Settings:
        return {"num_heads": module.num_heads, "head_dim": module.head_dim}

    def layer_settings(self, layer: Any) -> Settings:
        return {"num_heads": layer.num_heads, "head_dim": layer.key_dim}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        made = partial(_made, module, inputs)
        yield from _mask_mistakes(module, inputs)
        if module.in_proj_weight is not None:
            for order in itertools.permutations(range(3)):
                moved = [part for index, part in enumerate(_PARTS) if order[index] != index]
                if moved:
                    text = f"its {' and '.join(moved)} are exchanged"
                    if len(moved) == 3:
                        text = f"its query, key and value have come in the order {', '.join(_PARTS[i] for i in order)}"
                    yield made(text, partial(_reorder, order, True))
                    yield made(f"{text} in the kernels, not in the biases", partial(_reorder, order, False))
            for parts in ((0,), (1,), (2,), (0, 1, 2)):
                named = "of all three" if len(parts) == 3 else f"of its {_PARTS[parts[0]]}"
                for first, order_of_rows in _ROWS.items():
                    text = f"the heads {named} are split wrongly, as {order_of_rows}"
                    yield made(text, partial(_split_otherwise, parts, first))
            factor = math.sqrt(module.head_dim)
            yield made("its scores are not divided by the root of the head's size", partial(_scaled, factor))
            yield made("its scores are divided by the root of the head's size twice", partial(_scaled, 1 / factor))
        for first, order_of_rows in _ROWS.items():
            text = f"the heads that its output takes are split wrongly, as {order_of_rows}"
            yield made(text, partial(_output_otherwise, first))
        if module.in_proj_bias is not None:
            yield made("its bias in front (in_proj_bias) is lost", lambda m: m.in_proj_bias.data.zero_())
            for index, part in enumerate(_PARTS):
                yield made(f"its {part}'s bias is lost", partial(_without_bias, index))
        if module.out_proj.bias is not None:
            yield made("its output's bias is lost", lambda m: m.out_proj.bias.data.zero_())


def _mask_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    import torch

    if not isinstance(inputs, CallInputs):
        return
    given = {name: tensor for name, tensor in zip(inputs.keywords, inputs, strict=True) if name in _MASKS}
    for mask, tensor in given.items():
        yield _made(module, inputs.without(mask, "is_causal"), f"its {_MASKS[mask]} ({mask}) is not applied", _nothing)
        if tensor.dtype == torch.bool:
            inverted = inputs.change(mask, torch.logical_not)
            yield _made(module, inverted, f"its {_MASKS[mask]} ({mask}) is inverted", _nothing)
    if len(given) > 1:
        yield _made(module, inputs.without(*given, "is_causal"), "none of its masks is applied", _nothing)


def _nothing(module: Any) -> None:
    """Change nothing: the inputs are changed."""


def _made(module: Any, inputs: list[Tensor], cause: str, change: Callable[[Any], object]) -> Mistake:
    return Mistake(cause, with_change(module, inputs, change))


def _in_front(module: Any) -> list[Any]:
    return [each for each in (module.in_proj_weight, module.in_proj_bias) if each is not None]


def _reorder(order: tuple[int, ...], with_bias: bool, module: Any) -> None:
    import torch

    for parameter in _in_front(module) if with_bias else _in_front(module)[:1]:
        chunks = parameter.data.chunk(3)
        parameter.data = torch.cat([chunks[index] for index in order])


def _split_otherwise(parts: tuple[int, ...], first: str, module: Any) -> None:
    """Reorder the rows of some projections from (heads, size) to (size, heads), or the other way round."""
    import torch

    for parameter in _in_front(module)[:1]:
        chunks = list(parameter.data.chunk(3))
        for index in parts:
            chunks[index] = _transposed(chunks[index], module, first)
        parameter.data = torch.cat(chunks)


def _output_otherwise(first: str, module: Any) -> None:
    weight = module.out_proj.weight
    weight.data = _transposed(weight.data.T, module, first).T


def _transposed(rows: Tensor, module: Any, first: str) -> Tensor:
    shape = (module.num_heads, module.head_dim) if first == "heads" else (module.head_dim, module.num_heads)
    return rows.reshape(*shape, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _without_bias(index: int, module: Any) -> None:
    module.in_proj_bias.data.chunk(3)[index].zero_()


def _scaled(factor: float, module: Any) -> None:
    for parameter in _in_front(module):
        parameter.data[: module.embed_dim] *= factor


class JoinedProjections(Attention):
    """One dense layer in PyTorch that computes queries, keys and values; in Keras they belong to an attention layer."""

    name = "qkv"
    leaves = _joined(in_first=False)

    def with_details(self, details: str) -> Kind:
        """`in_first`: the kernel is `(in, 3 * size)`, as in GPT-2."""
        if details != "in_first":
            raise KeyMapError(f"the kind qkv takes in_first: got {details!r}")
        other = JoinedProjections()
        other.leaves = _joined(in_first=True)
        return other

    def variables(self, layer: Any) -> dict[str, keras.Variable]:
        return {name: each for name, each in super().variables(layer).items() if not name.startswith("output/")}

    def is_module(self, module: nn.Module) -> bool:
        return False

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        return False


KINDS = (Attention(), JoinedProjections())
