"""Compresses rows of single layers into fewer rows with placeholders, which stand for exactly the same layers.

layer1.0.conv1 -> conv2_block1_1_conv
layer1.1.conv1 -> conv2_block2_1_conv     become     layer{s}.{j}.conv1 -> conv{s+1}_block{j+1}_1_conv
layer2.0.conv1 -> conv3_block1_1_conv
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from porting.errors import KeyMapError
from porting.mapping.key_map import LayerPair, expand
from porting.mapping.rules import KeyRule

_NUMBER = re.compile(r"\d+")
# In Keras's names a letter after a number counts too: block1a.
_COUNTED = re.compile(r"\d+|(?<=\d)[a-z](?=_|/|$)")
# The text before a number decides its placeholder, so that it has the same name in all rows.
_LETTERS = "sjklmnopqrtuvwxyzabcdefghi"


@dataclass(frozen=True)
class _Numbered:
    """A row and the numbers in its source."""

    row: KeyRule
    numbers: tuple[int, ...]


def compress_rows(rows: Sequence[KeyRule], names: Collection[str]) -> list[KeyRule]:
    """Compress rows, keeping the order in which each first appears.

    `names` are the names of the PyTorch model's tensors, which decide what a placeholder matches. Returns the rows
    unchanged when the compressed ones would not stand for exactly the same layers.
    """
    groups: dict[str, list[_Numbered]] = {}
    for row in rows:
        numbers = tuple(int(text) for text in _NUMBER.findall(row.source))
        groups.setdefault(_NUMBER.sub("{}", row.source), []).append(_Numbered(row, numbers))
    compressor = _Compressor(groups)
    short = [rule for skeleton, group in groups.items() for rule in compressor.rules(skeleton, group)]
    expected = Counter(LayerPair(row.source, row.target, row.kind) for row in rows)
    try:
        found = Counter(pair for _, pair in expand(short, names))
    except KeyMapError:
        return list(rows)
    return short if found == expected else list(rows)


class _Compressor:
    def __init__(self, groups: dict[str, list[_Numbered]]) -> None:
        self._letters: dict[str, str] = {}
        # By the text before each of two numbers: all pairs of their values that occur in a row.
        self._pairs: dict[tuple[str, str], set[tuple[int, int]]] = {}
        for skeleton, group in groups.items():
            prefixes = _prefixes(skeleton)
            for (first, one), (second, other) in itertools.combinations(enumerate(prefixes), 2):
                pairs = self._pairs.setdefault((one, other), set())
                pairs.update((each.numbers[first], each.numbers[second]) for each in group)

    def rules(self, skeleton: str, group: list[_Numbered]) -> list[KeyRule]:
        """The fewest rules found for a group of rows whose sources differ only in their numbers."""
        if (rule := self._one(skeleton, group)) is not None:
            return [rule]
        found = [self._with_exceptions(skeleton, group)]
        found += [self._parted(skeleton, group, position) for position in range(skeleton.count("{}"))]
        fitting = [rules for rules in found if rules]
        return min(fitting, key=len) if fitting else [each.row for each in group]

    def _parted(self, skeleton: str, group: list[_Numbered], position: int) -> list[KeyRule]:
        """The rules when one number is written out instead of a placeholder."""
        parts: dict[int, list[_Numbered]] = {}
        for each in group:
            parts.setdefault(each.numbers[position], []).append(each)
        if len(parts) < 2:
            return []
        return [rule for part in parts.values() for rule in self.rules(skeleton, part)]

    def _with_exceptions(self, skeleton: str, group: list[_Numbered]) -> list[KeyRule]:
        """One rule for most rows, preceded by exceptions with fewer placeholders for all others."""
        forms = [(_COUNTED.sub("{}", each.row.target), each.row.kind) for each in group]
        ((usual, count),) = Counter(forms).most_common(1)
        if count == len(group):
            return []
        most = [each for each, form in zip(group, forms, strict=True) if form == usual]
        rule = self._one(skeleton, most)
        if rule is None:
            return []
        others = self.rules(skeleton, [each for each, form in zip(group, forms, strict=True) if form != usual])
        fewer = all(each.placeholders < rule.placeholders for each in others)
        return [*others, rule] if fewer and not any(_matches(o, each.row) for o in others for each in most) else []

    def _one(self, skeleton: str, group: list[_Numbered]) -> KeyRule | None:
        """One rule for a whole group; None when no single rule covers it."""
        if len({(_COUNTED.sub("{}", each.row.target), each.row.kind) for each in group}) > 1:
            return None
        if len(group) == 1:
            return group[0].row
        prefixes = _prefixes(skeleton)
        columns = list(zip(*(each.numbers for each in group), strict=True))
        varying = {name: column for name, column in zip(prefixes, columns, strict=True) if len(set(column)) > 1}
        sources = [
            f"{{{self._letter(name)}}}" if name in varying else str(column[0])
            for name, column in zip(prefixes, columns, strict=True)
        ]
        counted = list(zip(*(_COUNTED.findall(each.row.target) for each in group), strict=True))
        fields = [self._field(values, varying) for values in counted]
        if any(field is None for field in fields):
            return None
        target = _filled(_COUNTED.sub("{}", group[0].row.target), [field or "" for field in fields])
        return KeyRule(_filled(skeleton, sources), target, group[0].row.kind)

    def _letter(self, prefix: str) -> str:
        """The placeholder of the number after this text."""
        if prefix not in self._letters:
            number, letter = divmod(len(self._letters), len(_LETTERS))
            self._letters[prefix] = _LETTERS[letter] + (str(number) if number else "")
        return self._letters[prefix]

    def _field(self, values: Sequence[str], varying: dict[str, tuple[int, ...]]) -> str | None:
        """A target's number or letter as a function of the sources' numbers; None when no placeholder expresses it."""
        if len(set(values)) == 1:
            return values[0]
        if any(value.isalpha() for value in values):
            if not all(value.isalpha() for value in values):
                return None
            wanted, form = [ord(value) - ord("a") for value in values], ":letter"
        else:
            wanted, form = [int(value) for value in values], ""
        for name, column in varying.items():
            if (offset := _constant(wanted, column)) is not None:
                return f"{{{self._letter(name)}{_signed(offset)}{form}}}"
        for (one, other), pairs in self._pairs.items():
            if one in varying and other in varying:
                place = {pair: index for index, pair in enumerate(sorted(pairs))}
                column = tuple(place[pair] for pair in zip(varying[one], varying[other], strict=True))
                if (offset := _constant(wanted, column)) is not None:
                    return f"{{{self._letter(one)}.{self._letter(other)}{_signed(offset)}{form}}}"
        return None


def _prefixes(skeleton: str) -> list[str]:
    """The text before each number of a source."""
    parts = skeleton.split("{}")
    return ["{}".join(parts[: end + 1]) for end in range(len(parts) - 1)]


def _matches(rule: KeyRule, row: KeyRule) -> bool:
    """Whether the source of a rule matches that of a row."""
    pattern = "\\d+".join(re.escape(part) for part in re.split(r"\{.*?\}", rule.source))
    return re.fullmatch(pattern, row.source) is not None


def _constant(values: Iterable[int], column: Iterable[int]) -> int | None:
    """The constant by which all values exceed those of a column; None when it is not constant."""
    offsets = {value - other for value, other in zip(values, column, strict=True)}
    return offsets.pop() if len(offsets) == 1 else None


def _signed(offset: int) -> str:
    return f"{offset:+d}" if offset else ""


def _filled(skeleton: str, fields: Sequence[str]) -> str:
    parts = skeleton.split("{}")
    return "".join(part + field for part, field in zip(parts, [*fields, ""], strict=True))
