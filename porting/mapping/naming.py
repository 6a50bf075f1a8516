"""How the publishers of a model name its tensors, and telling from the names whose checkpoint one is.

Not to be confused with `porting.kinds.transforms`, which is about the axes of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from porting.errors import KeyMapError
from porting.mapping.key_map import KeyMap, KeyRule

# Of a checkpoint's tensors, at least this share must have a layout's names for the layout to be recognised.
_ENOUGH = 0.5


@dataclass(frozen=True)
class CheckpointLayout:
    """One publisher's names for a family's tensors, and what its model does differently.

    `rules` are the family's rows in its own order, with this publisher's names; `head` is the source name of the row
    for the classifier, "" where there is none. `prefix` stands before all names but the head's; a part of the model
    saved alone lacks it. `headless` is whether a checkpoint without a head is taken for this publisher's. `drops` and
    `foreign` are what `KeyMap` has under these names. `settings` are arguments for the family's builders, such as an
    epsilon.
    """

    name: str
    rules: tuple[KeyRule, ...]
    head: str = "head"
    prefix: str = ""
    headless: bool = True
    drops: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)

    def without_head(self) -> CheckpointLayout:
        return replace(self, rules=tuple(rule for rule in self.rules if rule.source != self.head), head="")

    def without_prefix(self) -> CheckpointLayout:
        """The names of the model's body saved alone."""
        rules = tuple(replace(rule, source=rule.source.removeprefix(self.prefix)) for rule in self.rules)
        return replace(self, rules=rules, prefix="", drops=tuple(name.removeprefix(self.prefix) for name in self.drops))

    def described(self) -> str:
        """The layout in words, for the user."""
        facts = [f"{name} {value:g}" for name, value in self.settings.items()]
        return ", ".join([f"{self.name} names", *facts, "with a head" if self.head else "without a head"])


def layout_named(layouts: Sequence[CheckpointLayout], name: str) -> CheckpointLayout:
    """The layout of that name; raises KeyMapError where there is none."""
    for layout in layouts:
        if layout.name == name:
            return layout
    raise KeyMapError(f"there is no layout {name!r}", hint=f"There are {', '.join(layout.name for layout in layouts)}.")


def recognise_layout(
    layouts: Sequence[CheckpointLayout],
    key_map: Callable[[CheckpointLayout], KeyMap],
    names: Collection[str],
    *,
    forced: str | None = None,
) -> CheckpointLayout:
    """The layout whose names a checkpoint has, in the form that fits it: with or without prefix and head.

    Where several fit equally, the first is taken; where none fits, also the first, so that the differences from it are
    what the user is told. `forced` is the name of the layout to take in any case; raises KeyMapError where there is
    none of that name.
    """
    if forced is not None:
        layouts = [layout_named(layouts, forced)]
    best, most = layouts[0], 0.0
    for layout in layouts:
        for form in (layout, layout.without_prefix()) if layout.prefix else (layout,):
            bare = form.head and (form.headless or forced is not None)
            for variation in (form, form.without_head()) if bare else (form,):
                table = key_map(variation)
                known = {entry.source for entry in table.entries}
                own = set(names) - set(table.dropped(names))
                # Both a name too few and one too many count against it.
                fit = len(known & own) / max(len(known | own), 1)
                if fit > most:
                    best, most = variation, fit
    return best if most >= _ENOUGH or forced is not None else layouts[0]
