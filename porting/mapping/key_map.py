"""The key map: a table of rows, expanded once into one entry a tensor.

No name is split, searched or replaced anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from porting.errors import KeyMapError
from porting.kinds.transforms import Transform
from porting.mapping.rules import Counters, KeyRule, bind, fill, join_name


@dataclass(frozen=True)
class LayerPair:
    """A module in PyTorch, the layer in Keras that stands for it, and the name of their kind."""

    source: str
    target: str
    kind: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the state_dict, the Keras variable that takes it, and how its axes move."""

    source: str
    target: str
    transform: Transform


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
    def match(
        cls,
        rules: Sequence[KeyRule],
        names: Collection[str],
        *,
        sources: Sequence[str] | None = None,
        drops: Iterable[str] = (),
        foreign: tuple[str, ...] = (),
    ) -> KeyMap:
        """Matches every row against the names of a PyTorch model's tensors.

        A row covers those tensors of its kind that the model has: a convolution without a bias has none here either.
        `sources` are the rows' names in PyTorch under another naming, one for each row, and the key map is then one
        for that naming.

        Raises KeyMapError when two rows claim one name, on either side, or a row matches nothing.
        """
        found = bind(rules, names)
        counters = Counters(indices for bindings in found for indices in bindings)
        layers: list[LayerPair] = []
        entries: list[TensorEntry] = []
        dropped = set(drops)
        for rule, source, bindings in zip(rules, sources or [rule.source for rule in rules], found, strict=True):
            for indices in bindings:
                pair = LayerPair(fill(source, indices, counters), fill(rule.target, indices, counters), rule.kind)
                layers.append(pair)
                own = fill(rule.source, indices, counters)
                kind = rule.rules_of_kind
                for leaf in kind.leaves:
                    if join_name(own, ".", leaf.source) in names:
                        here, there = join_name(pair.source, ".", leaf.source), join_name(pair.target, "/", leaf.target)
                        entries.append(TensorEntry(here, there, leaf.transform))
                dropped.update(join_name(pair.source, ".", name) for name in kind.drops)
        for side in ("source", "target"):
            _refuse_duplicates([getattr(entry, side) for entry in entries], side)
        return cls(tuple(layers), tuple(entries), frozenset(dropped), foreign)


def _refuse_duplicates(names: Sequence[str], side: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise KeyMapError(f"two rows of the key map claim the same {side}: {', '.join(twice)}")
