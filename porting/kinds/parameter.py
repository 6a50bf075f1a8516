"""A single parameter that a module holds directly, such as a layer scale: the same numbers in the same order."""

from __future__ import annotations

from porting.errors import KeyMapError
from porting.kinds.base import Kind, Leaf
from porting.kinds.transforms import VECTOR, RowsBehind


class Parameter(Kind):
    name = "parameter"
    leaves: tuple[Leaf, ...] = (Leaf("", "", VECTOR),)

    def with_details(self, details: str) -> Kind:
        """`+2`: a table whose first two rows Keras lacks, such as RoBERTa's positions with two rows for padding."""
        if not details.startswith("+") or not details[1:].isdigit():
            raise KeyMapError(f"the kind parameter takes the number of rows to leave out, such as +2: got {details!r}")
        behind = Parameter()
        behind.leaves = (Leaf("", "", RowsBehind("rows left out", int(details[1:]))),)
        return behind


KIND = Parameter()
