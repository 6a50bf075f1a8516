"""Numbers and lists in messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number and its noun, such as "1 layer" and "1,200 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or f'{noun}s'}"


def listed(names: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """The first `most` names, and how many there are beside them."""
    shown = separator.join(names[:most])
    return shown if len(names) <= most else f"{shown}{separator}and {len(names) - most:,} more"


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names; "" if none is near."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"Did you mean {found[0]}? " if found else ""


def reason_of(error: BaseException) -> str:
    """The line of an error's text that says what is wrong, without the frames of TensorFlow and Keras around it."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))  # Keras prints the reason in bold
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    frames = [place for place, line in enumerate(lines) if "Exception encountered when calling" in line]
    if frames and frames[-1] + 1 < len(lines):
        return lines[frames[-1] + 1][:300]
    return lines[-1 if lines[0] == "in user code:" else 0][:300]  # of a traced function, whose frames come first


def typed_reason_of(error: Exception) -> str:
    """The type of an error and its reason."""
    reason, name = reason_of(error), type(error).__name__
    return reason if reason.startswith(name) else f"{name}: {reason}"
