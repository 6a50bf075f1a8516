"""The rows of a key map: names with placeholders, matched against the tensor names of a model.

    KeyRule("block{s}.{j}.attn.proj_1", "block{s}_{j}/attn/proj_1", "conv")

A placeholder stands for a whole number. Its form says how that side counts:

    {s}, {s-1}, {s+1}   the number itself, or with an offset
    {s:letter}          a letter, a for 0
    {s.j}, {s.j+1}      s and j as one running count: the place of this pair among all pairs, from 0 or from 1

When two rows match the same module, the one with fewer placeholders takes it, as an exception from the other.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rapidfuzz import fuzz, process

from porting.errors import KeyMapError
from porting.kinds import kind_called
from porting.kinds.base import Kind
from porting.wording import listed

Indices = Mapping[str, int]
_PLACEHOLDER = re.compile(r"(?P<names>[a-z]\w*(\.[a-z]\w*)*)(?P<offset>[+-]\d+)?")


@dataclass(frozen=True)
class KeyRule:
    """One row: a PyTorch module, the Keras layer that stands for it, and the name of their kind.

    The kind decides which tensors the row covers, what they are called on both sides and how their axes move. The
    target is "" for a kind that has nothing in Keras, such as `constant`.

    Raises KeyMapError for an unknown kind, for a placeholder in the target that the source lacks, and for a missing
    target.
    """

    source: str
    target: str
    kind: str

    def __post_init__(self) -> None:
        try:
            kind_called(self.kind)
        except KeyMapError as error:
            raise KeyMapError(f"row {self.source!r}: {error.message}", hint=error.hint) from None
        if bool(self.target) != self.rules_of_kind.has_target:
            needed = "needs a target" if self.rules_of_kind.has_target else "has no target"
            raise KeyMapError(f"row {self.source!r}: the kind {self.kind} {needed}")
        if unknown := sorted(_names_in(self.target) - _names_in(self.source)):
            raise KeyMapError(f"row {self.source!r}: its target has placeholders that it lacks: {', '.join(unknown)}")

    @property
    def rules_of_kind(self) -> Kind:
        return kind_called(self.kind)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """The source as a regular expression with one group per placeholder."""
        parts = []
        for literal, field, form, _ in string.Formatter().parse(self.source):
            parts.append(re.escape(literal))
            if field:
                parts.append("([a-z])" if form == "letter" else r"(\d+)")
        leaves = "|".join(re.escape(join_name("", ".", name)) for name in self._leaf_names)
        return re.compile(f"{''.join(parts)}(?:{leaves})")

    @property
    def _leaf_names(self) -> tuple[str, ...]:
        kind = self.rules_of_kind
        return (*(name for leaf in kind.leaves for name in leaf.sources), *kind.drops)

    def covers(self, name: str) -> bool:
        """Whether a PyTorch tensor of this name would belong to this row."""
        return self._pattern.fullmatch(name) is not None

    @property
    def placeholders(self) -> int:
        """The number of placeholders in the source."""
        return len(list(_fields(self.source)))

    def bindings(self, names: Iterable[str]) -> list[dict[str, int]]:
        """The placeholders' numbers for which PyTorch has a tensor of this row, each once, in order."""
        fields = list(_fields(self.source))
        found: set[tuple[tuple[str, int], ...]] = set()
        for name in names:
            match = self._pattern.fullmatch(name)
            if match is None:
                continue
            numbers: dict[str, int] = {}
            for (placeholder, offset, _), text in zip(fields, match.groups(), strict=True):
                number = (int(text) if text.isdigit() else ord(text) - ord("a")) - offset
                if numbers.setdefault(placeholder, number) != number:
                    break  # one placeholder twice, with two numbers
            else:
                found.add(tuple(numbers.items()))
        return [dict(numbers) for numbers in sorted(found, key=lambda numbers: [number for _, number in numbers])]


def _fields(template: str) -> Iterable[tuple[str, int, str]]:
    """Yield the placeholders of a name, each as its names, its offset and its form."""
    for _, field, form, _ in string.Formatter().parse(template):
        if field:
            match = _PLACEHOLDER.fullmatch(field)
            if match is None:
                raise KeyMapError(
                    f"row {template!r}: {{{field}}} is no placeholder", hint="Examples: {s}, {s-1}, {s.j}."
                )
            yield match["names"], int(match["offset"] or 0), form or ""


def _names_in(template: str) -> set[str]:
    return {name for names, _, _ in _fields(template) for name in names.split(".")}


class Counters:
    """Computes what `{s.j}` stands for: the place of a pair of numbers among all pairs that any row has."""

    def __init__(self, bindings: Iterable[Indices]) -> None:
        self._bindings = list(bindings)
        self._places: dict[str, dict[tuple[int, ...], int]] = {}

    def place(self, names: str, indices: Indices) -> int:
        keys = names.split(".")
        if names not in self._places:
            tuples = {tuple(each[key] for key in keys) for each in self._bindings if set(keys) <= each.keys()}
            self._places[names] = {numbers: place for place, numbers in enumerate(sorted(tuples))}
        return self._places[names][tuple(indices[key] for key in keys)]


def fill(template: str, indices: Indices, counters: Counters) -> str:
    """Fill the placeholders of a template with these numbers."""
    parts = []
    for literal, field, form, _ in string.Formatter().parse(template):
        parts.append(literal)
        if field:
            ((names, offset, _),) = _fields(f"{{{field}}}")
            number = (counters.place(names, indices) if "." in names else indices[names]) + offset
            parts.append(chr(ord("a") + number) if form == "letter" else str(number))
    return "".join(parts)


def join_name(name: str, separator: str, leaf: str) -> str:
    return f"{name}{separator}{leaf}" if leaf else name


def bind(rules: Sequence[KeyRule], names: Collection[str]) -> tuple[list[list[dict[str, int]]], Counters]:
    """Return, for each row, the numbers for which PyTorch has its tensors, and the counters for pairs of numbers.

    When two rows match the same module, the one with fewer placeholders takes it, as an exception. The counters still
    count that module for the other row. Raises KeyMapError when a row matches nothing.
    """
    matched = [rule.bindings(names) for rule in rules]
    if unused := [rule.source for rule, bindings in zip(rules, matched, strict=True) if not bindings]:
        owners = sorted({name.rpartition(".")[0] for name in names})
        shown = []
        for source in unused:
            nearest = process.extractOne(source, owners, scorer=fuzz.ratio, score_cutoff=60.0)
            shown.append(f"{source} (nearest: {nearest[0]})" if nearest else source)
        raise KeyMapError(f"rows of the key map that no tensor of the PyTorch model matches: {listed(shown)}")
    counters = Counters(indices for bindings in matched for indices in bindings)
    sources = [[fill(rule.source, each, counters) for each in own] for rule, own in zip(rules, matched, strict=True)]
    fewest: dict[str, int] = {}
    for rule, own in zip(rules, sources, strict=True):
        fewest |= {source: min(fewest.get(source, rule.placeholders), rule.placeholders) for source in own}
    found = [
        [each for each, source in zip(bindings, own, strict=True) if rule.placeholders == fewest[source]]
        for rule, bindings, own in zip(rules, matched, sources, strict=True)
    ]
    return found, counters
