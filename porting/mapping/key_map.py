"""The key map: a table of rules with placeholders, expanded once into one entry a tensor.

    KeyRule("block{s}.{j}.attn.proj_1", "block{s}.{j}/attn/proj_1", Kind.CONV)

The kind of a rule alone decides which tensors it covers, what they are called on both sides and how their axes
move. No name is split, searched or replaced anywhere.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from porting.errors import KeyMapError
from porting.kinds.transforms import Layout


class Kind(Enum):
    """What a rule is about; `tensors` and `drops` say what follows from it."""

    CONV = "conv"
    DEPTHWISE = "depthwise"
    DENSE = "dense"
    BATCH_NORM = "batch_norm"
    LAYER_NORM = "layer_norm"
    PARAMETER = "parameter"


@dataclass(frozen=True)
class _Leaf:
    """One tensor of a kind: its last name in PyTorch and in Keras ("" for the rule's own name), and its layout."""

    source: str
    target: str
    layout: Layout = Layout.IDENTITY


_BIAS = _Leaf("bias", "bias")
_LEAVES: dict[Kind, tuple[_Leaf, ...]] = {
    Kind.CONV: (_Leaf("weight", "kernel", Layout.OIHW_TO_HWIO), _BIAS),
    Kind.DEPTHWISE: (_Leaf("weight", "kernel", Layout.DEPTHWISE_OIHW_TO_HWIO), _BIAS),
    Kind.DENSE: (_Leaf("weight", "kernel", Layout.OI_TO_IO), _BIAS),
    Kind.BATCH_NORM: (
        _Leaf("weight", "gamma"),
        _Leaf("bias", "beta"),
        _Leaf("running_mean", "moving_mean"),
        _Leaf("running_var", "moving_variance"),
    ),
    Kind.LAYER_NORM: (_Leaf("weight", "gamma"), _Leaf("bias", "beta")),
    Kind.PARAMETER: (_Leaf("", ""),),
}
# A counter of training steps; Keras keeps none, so a checkpoint's is dropped, by name.
_DROPPED_LEAVES: dict[Kind, tuple[str, ...]] = {Kind.BATCH_NORM: ("num_batches_tracked",)}


@dataclass(frozen=True)
class KeyRule:
    """One row: PyTorch name, Keras path and kind. `bias=False` is a convolution or dense layer without one.

    Both names may hold placeholders like `{s}`, or `{s-1}` where one side counts from another number; each row is
    expanded over the indices that have just those.
    """

    source: str
    target: str
    kind: Kind
    bias: bool = True

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(name for name, _ in _fields(self.source))


@dataclass(frozen=True)
class LayerPair:
    """A module in PyTorch and the layer in Keras that stands for it."""

    source: str
    target: str
    kind: Kind


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the state_dict, the Keras variable that takes it, and how its axes move."""

    source: str
    target: str
    layout: Layout


@dataclass(frozen=True)
class KeyMap:
    """The expanded table.

    `drops` are the names that a checkpoint may hold and that are left out on purpose; `foreign` are the beginnings of
    names that belong to other parts of a larger model, a segmentor's decoder, say.
    """

    layers: tuple[LayerPair, ...]
    entries: tuple[TensorEntry, ...]
    drops: frozenset[str]
    foreign: tuple[str, ...] = ()

    def dropped(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the names that are left out on purpose, sorted."""
        return tuple(sorted(name for name in names if name in self.drops or name.startswith(self.foreign)))

    @classmethod
    def expand(
        cls,
        rules: Sequence[KeyRule],
        indices: Iterable[Mapping[str, int]],
        *,
        drops: Iterable[str] = (),
        foreign: tuple[str, ...] = (),
    ) -> KeyMap:
        """Writes out every rule for every set of indices that has the rule's placeholders.

        `indices` for two stages with one block each: `[{}, {"s": 1}, {"s": 2}, {"s": 1, "j": 0}, {"s": 2, "j": 0}]`.

        Raises KeyMapError when two rows claim one name, on either side, or a row's placeholders fit no indices.
        """
        index_sets = [dict(index) for index in indices]
        layers: list[LayerPair] = []
        entries: list[TensorEntry] = []
        dropped = set(drops)
        for rule in rules:
            fitting = [index for index in index_sets if index.keys() == rule.placeholders]
            if not fitting:
                raise KeyMapError(f"rule {rule.source!r}: no indices were given for {sorted(rule.placeholders)}")
            for index in fitting:
                pair = LayerPair(_fill(rule.source, index), _fill(rule.target, index), rule.kind)
                layers.append(pair)
                for leaf in _LEAVES[rule.kind]:
                    if leaf is not _BIAS or rule.bias:
                        source, target = _join(pair.source, ".", leaf.source), _join(pair.target, "/", leaf.target)
                        entries.append(TensorEntry(source, target, leaf.layout))
                dropped.update(_join(pair.source, ".", leaf) for leaf in _DROPPED_LEAVES.get(rule.kind, ()))
        for side in ("source", "target"):
            _refuse_duplicates([getattr(entry, side) for entry in entries], side)
        return cls(tuple(layers), tuple(entries), frozenset(dropped), foreign)


def _fields(template: str) -> list[tuple[str, int]]:
    """The placeholders of a name, each with what is taken off its index."""
    found = []
    for _, field, _, _ in string.Formatter().parse(template):
        if field:
            name, _, less = field.partition("-")
            found.append((name, int(less or 0)))
    return found


def _fill(template: str, index: Mapping[str, int]) -> str:
    values = {f"{name}-{less}" if less else name: index[name] - less for name, less in _fields(template)}
    return template.format_map(values)


def _join(name: str, separator: str, leaf: str) -> str:
    return f"{name}{separator}{leaf}" if leaf else name


def _refuse_duplicates(names: Sequence[str], side: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise KeyMapError(f"two rows of the key map claim the same {side}: {', '.join(twice)}")
