"""How the publishers of a model name its tensors, and telling a checkpoint's publisher from its tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from porting.errors import KeyMapError
from porting.mapping.key_map import KeyMap
from porting.mapping.rules import KeyRule

# Of a checkpoint's tensors, at least this share must have a naming's names for it to be recognised.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Naming:
    """One publisher's names for a family's tensors, and what its model does differently.

    `rules` are the family's rows, under the reference's own names, and `sources` this publisher's names for them, one
    for each row; None where they are the same. `head` is this publisher's name of the row for the classifier, "" where
    there is none. `prefix` stands before all names but the head's; a part of the model saved alone lacks it. `drops`
    and `foreign` are what `KeyMap` has under these names. `settings` are arguments for the family's builders, such as
    an epsilon: what this publisher's code has where nothing beside the weights states it.
    """

    name: str
    rules: tuple[KeyRule, ...]
    sources: tuple[str, ...] | None = None
    head: str = "head"
    prefix: str = ""
    drops: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)
    # Whether models under these names have a classifier at all.
    has_head: bool = True

    @property
    def own_sources(self) -> tuple[str, ...]:
        """This publisher's names of the rows."""
        return tuple(rule.source for rule in self.rules) if self.sources is None else self.sources

    def key_map(self, names: Collection[str]) -> KeyMap:
        """The key map for a model whose reference has tensors of these names, under this publisher's names."""
        return KeyMap.match(self.rules, names, sources=self.own_sources, drops=self.drops, foreign=self.foreign)

    def without_head(self) -> Naming:
        kept = [pair for pair in zip(self.rules, self.own_sources, strict=True) if pair[1] != self.head]
        return replace(
            self, rules=tuple(rule for rule, _ in kept), sources=tuple(source for _, source in kept), head=""
        )

    def without_prefix(self) -> Naming:
        """The names of the model's body saved alone."""
        sources = tuple(source.removeprefix(self.prefix) for source in self.own_sources)
        drops = tuple(name.removeprefix(self.prefix) for name in self.drops)
        return replace(self, sources=sources, prefix="", drops=drops)


def naming_called(namings: Sequence[Naming], name: str) -> Naming:
    """The naming of that name; raises KeyMapError where there is none."""
    for naming in namings:
        if naming.name == name:
            return naming
    raise KeyMapError(f"there is no layout {name!r}", hint=f"There are {', '.join(naming.name for naming in namings)}.")


@dataclass(frozen=True)
class Recognition:
    """What a checkpoint's names show: `naming` fits best, `fit` is the share of names that agree, from 0 to 1.

    `rivals` are namings that fit as well and have other settings.
    """

    naming: Naming
    fit: float
    rivals: tuple[Naming, ...] = ()


def recognise_naming(
    namings: Sequence[Naming],
    key_map: Callable[[Naming], KeyMap],
    names: Collection[str],
    *,
    forced: str | None = None,
) -> Recognition:
    """The naming that a checkpoint has, in the form that fits it: with or without prefix and head.

    Where none fits, the first is taken, so that the differences from it are what the user is told. `forced` is the name
    of the naming to take in any case; raises KeyMapError where there is none of that name.
    """
    if forced is not None:
        namings = [naming_called(namings, forced)]
    own_names = set(names)
    fits: list[tuple[float, Naming]] = []
    for naming in namings:
        for form in (naming, naming.without_prefix()) if naming.prefix else (naming,):
            for variation in (form, form.without_head()) if form.head else (form,):
                table = key_map(variation)
                known = {name for entry in table.entries for name in entry.sources}
                own = own_names - set(table.dropped(own_names))
                # Both a name too few and one too many count against it.
                fits.append((len(known & own) / max(len(known | own), 1), variation))
    most = max(fit for fit, _ in fits)
    best = next(naming for fit, naming in fits if fit == most)
    if most < _ENOUGH and forced is None:
        return Recognition(namings[0], most)
    rivals = [naming for fit, naming in fits if fit == most and naming.settings != best.settings]
    return Recognition(best, most, tuple(rivals))
