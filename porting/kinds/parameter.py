"""A single parameter that a module holds by itself, such as a layer scale: the same numbers in the same order."""

from __future__ import annotations

from porting.kinds.base import Kind, Leaf
from porting.kinds.transforms import VECTOR


class Parameter(Kind):
    name = "parameter"
    leaves = (Leaf("", "", VECTOR),)


KIND = Parameter()
