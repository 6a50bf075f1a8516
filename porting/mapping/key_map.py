"""The key map: a table of rows, expanded once into one entry a tensor.

No name is split, searched or replaced anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from porting.errors import KeyMapError
from porting.kinds import kind_called
from porting.kinds.transforms import Array, Shape, Transform
from porting.mapping.rules import KeyRule, bind, fill, join_name


@dataclass(frozen=True)
class LayerPair:
    """A module in PyTorch, the layer in Keras that stands for it, and the name of their kind."""

    source: str
    target: str
    kind: str


@dataclass(frozen=True)
class TensorEntry:
    """Tensors of the state_dict, the Keras variables that take them, and how they move: mostly one to one.

    Without sources the variables are filled with what PyTorch does not have, without targets the tensors must hold
    nothing that would be lost.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform

    @classmethod
    def one(cls, source: str, target: str, transform: Transform) -> TensorEntry:
        """One tensor, one variable."""
        return cls((source,), (target,), transform)

    def is_in(self, names: Collection[str], variables: Collection[str]) -> bool:
        """Whether both models have all that it is about, and it is about something on both sides."""
        both = bool(self.sources) and bool(self.targets)
        return both and all(name in names for name in self.sources) and all(name in variables for name in self.targets)

    def to_keras(self, state_dict: Mapping[str, Array], shapes: Mapping[str, Shape]) -> dict[str, Array]:
        """The variables' values by name; raises ValueError where the tensors do not have the shapes."""
        made = self.transform.to_keras(
            [state_dict[name] for name in self.sources], [shapes[name] for name in self.targets]
        )
        return dict(zip(self.targets, made, strict=True)) if self.targets else {}

    def to_torch(self, weights: Mapping[str, Array], shapes: Mapping[str, Shape]) -> dict[str, Array]:
        """The tensors' values by name; `shapes` are those of the tensors, where they are known."""
        known = [shapes[name] for name in self.sources] if all(name in shapes for name in self.sources) else []
        made = self.transform.to_torch([weights[name] for name in self.targets], known)
        return dict(zip(self.sources, made, strict=True)) if self.sources else {}

    def expected(self, shapes: Mapping[str, Shape]) -> str:
        """In words, for an error: the shape that its tensor must have, given the variables'."""
        wanted = [shapes[name] for name in self.targets]
        if sources := self.transform.source_shapes(wanted):
            return ", ".join(map(str, sources))
        return f"what becomes {', '.join(map(str, wanted))} ({self.transform.name})"


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

    @property
    def absorbed(self) -> tuple[str, ...]:
        """The batch norms whose epsilon differs between the two models; the difference is in their variance."""
        return tuple(pair.source for pair in self.layers if pair.kind.startswith("batch_norm:"))

    @property
    def one_to_one(self) -> dict[str, str]:
        """The layer of each module, where no other module goes into it; parameters are none."""
        count = Counter(pair.target for pair in self.layers)
        layers = [pair for pair in self.layers if pair.kind.partition(":")[0] != "parameter"]
        return {pair.source: pair.target for pair in layers if count[pair.target] == 1}

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
        layers: list[LayerPair] = []
        entries: list[TensorEntry] = []
        dropped = set(drops)
        for own, pair in expand(rules, names, sources=sources):
            layers.append(pair)
            kind = kind_called(pair.kind)
            for leaf in kind.leaves:
                if all(join_name(own, ".", name) in names for name in leaf.sources):
                    entries.append(
                        TensorEntry(
                            tuple(join_name(pair.source, ".", name) for name in leaf.sources),
                            tuple(join_name(pair.target, "/", name) for name in leaf.targets),
                            leaf.transform,
                        )
                    )
            dropped.update(join_name(pair.source, ".", name) for name in kind.drops)
        return cls.of(layers, entries, dropped, foreign)

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerPair],
        entries: Iterable[TensorEntry],
        drops: Iterable[str] = (),
        foreign: tuple[str, ...] = (),
    ) -> KeyMap:
        """A key map of entries made elsewhere; raises KeyMapError when two of them claim one name, on either side."""
        entries = tuple(entries)
        _refuse_duplicates([name for entry in entries for name in entry.sources], "source")
        _refuse_duplicates([name for entry in entries for name in entry.targets], "target")
        return cls(tuple(layers), entries, frozenset(drops), foreign)


def expand(
    rules: Sequence[KeyRule], names: Collection[str], *, sources: Sequence[str] | None = None
) -> Iterator[tuple[str, LayerPair]]:
    """Every layer that the rows stand for, given the names of a PyTorch model's tensors, in the rows' order.

    With each comes the module's name in that model; the pair has that of `sources`. Raises KeyMapError for a row that
    matches nothing.
    """
    found, counters = bind(rules, names)
    for rule, source, bindings in zip(rules, sources or [rule.source for rule in rules], found, strict=True):
        for indices in bindings:
            own = fill(rule.source, indices, counters)
            yield (
                own,
                LayerPair(fill(source, indices, counters), fill(rule.target, indices, counters), rule.kind),
            )


def _refuse_duplicates(names: Sequence[str], side: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise KeyMapError(f"two rows of the key map claim the same {side}: {', '.join(twice)}")
