"""Converts a state_dict to named Keras weights and back. These functions read, write and assign nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz, process

from porting.errors import CheckpointError, KeyMapError
from porting.kinds.transforms import Array, Shape
from porting.mapping.key_map import KeyMap, TensorEntry
from porting.wording import counted

_MOST_COMPARISONS = 4_000_000  # of two names, which takes about a second
_MOST_ROWS = 10  # of each kind of difference: what to do about them stands below the list


@dataclass(frozen=True)
class Mismatch:
    """A tensor with an unexpected shape or type. Shapes are in PyTorch's order."""

    source: str
    expected: str
    found: str


@dataclass(frozen=True)
class KeyDiff:
    """Every difference between the tensors that a model needs and those that a checkpoint has.

    `missing_keys` and `unexpected_keys` are names in the state_dict. `unwritten` are Keras variables that no row of
    the key map writes. `unknown` are targets that the Keras model lacks. Both are faults of the family's key map.
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    unwritten: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.missing_keys, self.unexpected_keys, self.mismatched, self.unwritten, self.unknown))

    def describe(self) -> str:
        """List the first differences of each kind, sorted, with the nearest unused name beside each missing one."""
        sections = [
            ("missing from the checkpoint", _with_nearest(self.missing_keys, self.unexpected_keys)),
            ("in the checkpoint, but not part of the model", _with_nearest(self.unexpected_keys, self.missing_keys)),
            (
                "of another shape or type",
                [f"{m.source}: expected {m.expected}, found {m.found}" for m in self.mismatched],
            ),
            ("Keras variables that no row of the key map writes", list(self.unwritten)),
            ("rows of the key map whose Keras variable does not exist", list(self.unknown)),
        ]
        lines: list[str] = []
        for title, rows in sections:
            if rows:
                shown = sorted(rows)[:_MOST_ROWS]
                lines += [f"{len(rows)} {title}:", *(f"  {row}" for row in shown)]
                if len(rows) > len(shown):
                    lines.append(f"  and {len(rows) - len(shown):,} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Conversion:
    """Keras weights by path, float32 in Keras's axis order.

    Each array is made from the checkpoint's when it is asked for, since together they may be as large. `dropped` are
    the tensors that were dropped on purpose, `non_finite` those that hold NaN or infinity.
    """

    weights: Mapping[str, Array]
    dropped: tuple[str, ...]
    non_finite: tuple[str, ...] = ()


def diff_keys(state_dict: Mapping[str, Array], key_map: KeyMap, target_shapes: Mapping[str, Shape]) -> KeyDiff:
    """Compare the tensors that `key_map` needs with those that both sides have. Never raises."""
    used = {name for entry in key_map.entries for name in entry.sources}
    targets = {name for entry in key_map.entries for name in entry.targets}
    mismatched = []
    for entry in key_map.entries:
        if not all(name in state_dict for name in entry.sources):
            continue
        if not all(name in target_shapes for name in entry.targets):
            continue
        arrays = [state_dict[name] for name in entry.sources]
        for name, array in zip(entry.sources, arrays, strict=True):
            if not is_float(array):
                mismatched.append(Mismatch(name, "a floating-point type", str(array.dtype)))
        wanted = [target_shapes[name] for name in entry.targets]
        if not entry.transform.accepts([array.shape for array in arrays], wanted):
            found = ", ".join(str(array.shape) for array in arrays)
            mismatched.append(Mismatch(", ".join(entry.sources), entry.expected(target_shapes), found))
    return KeyDiff(
        missing_keys=tuple(sorted(used - state_dict.keys())),
        unexpected_keys=tuple(sorted(state_dict.keys() - used - set(key_map.dropped(state_dict)))),
        mismatched=tuple(mismatched),
        unwritten=tuple(sorted(target_shapes.keys() - targets)),
        unknown=tuple(sorted(targets - target_shapes.keys())),
    )


def convert(
    state_dict: Mapping[str, Array],
    key_map: KeyMap,
    target_shapes: Mapping[str, Shape],
    *,
    where: str = "the checkpoint",
    hint: Callable[[], str] = str,
    allow_non_finite: bool = False,
) -> Conversion:
    """Convert every tensor to Keras's name and axis order, in float32.

    float16 and bfloat16 become float32 exactly; float64 is rounded to the nearest float32. Every source tensor is
    used once or dropped by name, and every Keras variable is written once.

    Raises KeyMapError, with the first differences of each kind and the text of `hint`, when that is not possible, and
    CheckpointError when a tensor holds NaN or infinity and `allow_non_finite` is False. Messages say `where` the
    tensors are.
    """
    refuse_other_keys(state_dict, key_map, target_shapes, where=where, hint=hint)
    for entry in key_map.entries:
        try:
            _convert_row(entry, state_dict, target_shapes)
        except ValueError as error:
            raise KeyMapError(f"{where}: {', '.join(entry.sources)}: {error}", hint=hint()) from None
    used = {name: state_dict[name] for entry in key_map.entries for name in entry.sources}
    non_finite = refuse_non_finite(used, where=where, allowed=allow_non_finite)
    weights = _ConvertedWeights(state_dict, key_map, target_shapes)
    return Conversion(weights, key_map.dropped(state_dict), non_finite)


def _convert_row(
    entry: TensorEntry, state_dict: Mapping[str, Array], target_shapes: Mapping[str, Shape]
) -> dict[str, Array]:
    return entry.to_keras({name: to_float32(state_dict[name]) for name in entry.sources}, target_shapes)


class _ConvertedWeights(Mapping[str, Array]):
    """The result of `convert`, which holds nothing but the row that writes each weight."""

    def __init__(self, state_dict: Mapping[str, Array], key_map: KeyMap, target_shapes: Mapping[str, Shape]) -> None:
        self._state_dict, self._shapes = state_dict, target_shapes
        self._rows = {name: entry for entry in key_map.entries for name in entry.targets}
        self._last: tuple[TensorEntry, dict[str, Array]] | None = None

    def __getitem__(self, name: str) -> Array:
        row = self._rows[name]
        if self._last is None or self._last[0] is not row:  # the weights of a row are asked for one after another
            self._last = row, _convert_row(row, self._state_dict, self._shapes)
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def invert(
    weights: Mapping[str, Array], key_map: KeyMap, shapes: Mapping[str, Shape] | None = None
) -> dict[str, Array]:
    """Convert Keras weights back to the state_dict that `convert` made them from, without the dropped tensors.

    `shapes` are the shapes of PyTorch's tensors, if known; some transforms need them. Raises KeyError for a missing
    variable, and ValueError when numbers would be lost.
    """
    tensors: dict[str, Array] = {}
    for entry in key_map.entries:
        tensors |= entry.to_torch(weights, shapes or {})
    return tensors


def refuse_other_keys(
    state_dict: Mapping[str, Array],
    key_map: KeyMap,
    target_shapes: Mapping[str, Shape],
    *,
    where: str = "the checkpoint",
    hint: Callable[[], str] = str,
) -> None:
    """Raise KeyMapError unless both sides have the same tensors.

    The message says `where` the tensors are, and has the first differences of each kind and the text of `hint`.
    """
    if diff := diff_keys(state_dict, key_map, target_shapes):
        raise KeyMapError(f"{where}: its tensors are not those of the model\n{diff.describe()}", hint=hint())


def is_float(array: Array) -> bool:
    """Whether an array has a floating-point type, including bfloat16, which NumPy itself does not know."""
    return np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"


def to_float32(array: Array) -> Array:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused by name
        return array.astype(np.float32, copy=False)


def refuse_non_finite(
    tensors: Mapping[str, Array], *, where: str = "the checkpoint", allowed: bool = False
) -> tuple[str, ...]:
    """Return the names of tensors with NaN or infinity. Raise CheckpointError with all of them unless `allowed`.

    The message says `where` the tensors are.
    """
    found = {name: array for name, given in tensors.items() if not np.isfinite(array := to_float32(given)).all()}
    if found and not allowed:
        rows = [
            f"  {name}: {np.isnan(array).sum()} NaN, {np.isinf(array).sum()} infinite of {array.size}"
            for name, array in found.items()
        ]
        raise CheckpointError(
            f"{where}: {counted(len(rows), 'tensor')} with values that are not finite:\n" + "\n".join(rows),
            hint="A model with such weights computes nothing; use a checkpoint from before training diverged, or "
            "--allow-non-finite to keep them as they are.",
        )
    return tuple(found)


def _with_nearest(names: Iterable[str], others: tuple[str, ...]) -> list[str]:
    """Add the nearest of the other names to each name, unless there are too many pairs to compare."""
    names = list(names)
    if len(names) * len(others) > _MOST_COMPARISONS:
        return names
    rows = []
    for name in names:
        match = process.extractOne(name, others, scorer=fuzz.ratio, score_cutoff=80.0) if others else None
        rows.append(f"{name} (nearest: {match[0]})" if match else name)
    return rows
