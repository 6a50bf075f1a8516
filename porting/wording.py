"""Numbers and lists in messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number and its noun, such as "1 layer" and "1,200 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or f'{noun}s'}"


def listed(names: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """The first `most` names, and how many there are beside them."""
    shown = separator.join(names[:most])
    return shown if len(names) <= most else f"{shown}{separator}and {len(names) - most:,} more"
