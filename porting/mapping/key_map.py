"""The key map: a table of rows, expanded once into one entry per tensor.

All names come from this table. Only a family rewrites names elsewhere, for another version of its package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from porting.errors import KeyMapError
from porting.kinds import kind_called
from porting.kinds.transforms import Array, Shape, Transform
from porting.mapping.rules import KeyRule, bind, fill, join_name
from porting.wording import counted


@dataclass(frozen=True)
class LayerPair:
    """A PyTorch module, the Keras layer that stands for it, and the name of their kind."""

    source: str
    target: str
    kind: str


@dataclass(frozen=True)
class TensorEntry:
    """Tensors of the state_dict, the Keras variables that take them, and their transform. Mostly one to one.

    Without sources, the transform fills the variables with a default. Without targets, the tensors are left out, and
    they must hold nothing that would be lost.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform

    @classmethod
    def one(cls, source: str, target: str, transform: Transform) -> TensorEntry:
        """An entry of one tensor and one variable."""
        return cls((source,), (target,), transform)

    def is_in(self, names: Collection[str], variables: Collection[str]) -> bool:
        """Whether the entry has tensors on both sides and both models have all of them."""
        both = bool(self.sources) and bool(self.targets)
        return both and all(name in names for name in self.sources) and all(name in variables for name in self.targets)

    def to_keras(self, state_dict: Mapping[str, Array], shapes: Mapping[str, Shape]) -> dict[str, Array]:
        """The variables' values by name. Raises ValueError when the tensors do not fit the shapes."""
        made = self.transform.to_keras(
            [state_dict[name] for name in self.sources], [shapes[name] for name in self.targets]
        )
        return dict(zip(self.targets, made, strict=True)) if self.targets else {}

    def to_torch(self, weights: Mapping[str, Array], shapes: Mapping[str, Shape]) -> dict[str, Array]:
        """The tensors' values by name. `shapes` are the shapes of the tensors, if known."""
        known = [shapes[name] for name in self.sources] if all(name in shapes for name in self.sources) else []
        made = self.transform.to_torch([weights[name] for name in self.targets], known)
        return dict(zip(self.sources, made, strict=True)) if self.sources else {}

    def expected(self, shapes: Mapping[str, Shape]) -> str:
        """Describe, for an error message, the shape that the tensors must have for these variables."""
        wanted = [shapes[name] for name in self.targets]
        if sources := self.transform.source_shapes(wanted):
            return ", ".join(map(str, sources))
        return f"what becomes {', '.join(map(str, wanted))} ({self.transform.name})"


@dataclass(frozen=True, repr=False)
class KeyMap:
    """The expanded table.

    `drops` are names in a checkpoint that are left out on purpose. `foreign` are prefixes of names that belong to
    other parts of a larger model, such as the decoder of a segmentation model.
    """

    layers: tuple[LayerPair, ...]
    entries: tuple[TensorEntry, ...]
    drops: frozenset[str]
    foreign: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<KeyMap: {counted(len(self.layers), 'layer')}, {counted(len(self.entries), 'row')} of tensors>"

    def dropped(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names that are left out on purpose, sorted."""
        return tuple(sorted(name for name in names if name in self.drops or name.startswith(self.foreign)))

    @property
    def absorbed(self) -> tuple[str, ...]:
        """The batch norms whose epsilon differs between the two models. Their variance absorbs the difference."""
        return tuple(pair.source for pair in self.layers if pair.kind.startswith("batch_norm:"))

    @property
    def one_to_one(self) -> dict[str, str]:
        """The layer of each module that has a layer to itself, without rows for single parameters.

        The layers of a stack, one module with several rows, are called `lstm.l0` and so on.
        """
        count = Counter(pair.target for pair in self.layers)
        layers = [pair for pair in self.layers if pair.kind.partition(":")[0] != "parameter"]
        stacks = {pair.source for pair in layers if pair.kind.startswith("recurrent:")}
        names = {
            pair: f"{pair.source}.{pair.kind.partition(':')[2] or 'l0'}" if pair.source in stacks else pair.source
            for pair in layers
        }
        return {names[pair]: pair.target for pair in layers if count[pair.target] == 1}

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
        """Match every row against the names of a PyTorch model's tensors.

        A row covers those tensors of its kind that the model has: a convolution without a bias has no bias here either.
        `sources` are the rows' names under another naming, one for each row; the key map is then for that naming.

        Raises KeyMapError when two rows claim the same name on either side, or when a row matches nothing.
        """
        layers: list[LayerPair] = []
        entries: list[TensorEntry] = []
        dropped = set(drops)
        for own, pair in expand(rules, names, sources=sources):
            kind = kind_called(pair.kind)
            if pair.target:
                layers.append(pair)
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
        """Build a key map from entries. Raises KeyMapError when two of them claim the same name on either side."""
        entries = tuple(entries)
        _refuse_duplicates([name for entry in entries for name in entry.sources], "source")
        _refuse_duplicates([name for entry in entries for name in entry.targets], "target")
        return cls(tuple(layers), entries, frozenset(drops), foreign)


def expand(
    rules: Sequence[KeyRule], names: Collection[str], *, sources: Sequence[str] | None = None
) -> Iterator[tuple[str, LayerPair]]:
    """Yield every layer that the rows stand for in a model with tensors of these names, in the order of the rows.

    Each comes as the module's name in that model and a pair that uses the name of `sources`. Raises KeyMapError for a
    row that matches nothing.
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
