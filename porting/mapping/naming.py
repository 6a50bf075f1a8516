"""The names that publishers of a model use for its tensors, and how to recognise them in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from porting.errors import KeyMapError
from porting.mapping.key_map import KeyMap
from porting.mapping.rules import KeyRule

# A naming is recognised when at least this share of names agrees with the checkpoint's.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Naming:
    """One publisher's names for the tensors of a family, and the settings of its model.

    `rules` are the family's rows under the reference's own names. `sources` are this publisher's names for the rows,
    one for each; None if they are the same. `head` is this publisher's name of the classifier's row, "" if there is
    none. `prefix` precedes all names except the head's; the body of a model saved alone lacks it. `drops` and `foreign`
    are those of `KeyMap`. `settings` are arguments for the family's builders, such as an epsilon, that this publisher's
    code uses and that no file beside the weights states.
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
        """This publisher's names for the rows."""
        return tuple(rule.source for rule in self.rules) if self.sources is None else self.sources

    def key_map(self, names: Collection[str]) -> KeyMap:
        """The key map, under this publisher's names, of a model whose reference has tensors called `names`."""
        return KeyMap.match(self.rules, names, sources=self.own_sources, drops=self.drops, foreign=self.foreign)

    def without_head(self) -> Naming:
        kept = [pair for pair in zip(self.rules, self.own_sources, strict=True) if pair[1] != self.head]
        return replace(
            self, rules=tuple(rule for rule, _ in kept), sources=tuple(source for _, source in kept), head=""
        )

    def without_prefix(self) -> Naming:
        """The naming of a model's body that was saved alone, without the prefix."""
        sources = tuple(source.removeprefix(self.prefix) for source in self.own_sources)
        drops = tuple(name.removeprefix(self.prefix) for name in self.drops)
        return replace(self, sources=sources, prefix="", drops=drops)


def naming_called(namings: Sequence[Naming], name: str) -> Naming:
    """Return the naming of that name. Raises KeyMapError if there is none."""
    for naming in namings:
        if naming.name == name:
            return naming
    known = ", ".join(repr(naming.name) for naming in namings)
    raise KeyMapError(f"there is no layout {name!r}", hint=f"The layouts of these models are {known}.")


@dataclass(frozen=True)
class Recognition:
    """The result of recognising a naming: `naming` fits best, and `fit` is the share of names that agree, 0 to 1.

    `rivals` are namings that fit equally well and have other settings.
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
    """Recognise the naming of a checkpoint from its tensor names, in a form with or without prefix and head.

    If none fits, the first naming is returned, so that an error can list the differences from it. `forced` is the name
    of the naming to use in any case. Raises KeyMapError if there is no naming of that name.
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
                # Missing names and surplus names both lower the fit.
                fits.append((len(known & own) / max(len(known | own), 1), variation))
    most = max(fit for fit, _ in fits)
    best = next(naming for fit, naming in fits if fit == most)
    if most < _ENOUGH and forced is None:
        return Recognition(namings[0], most)
    rivals = [naming for fit, naming in fits if fit == most and naming.settings != best.settings]
    return Recognition(best, most, tuple(rivals))
