"""A single parameter that a module holds by itself, such as a layer scale: the same name and shape on both sides."""

from __future__ import annotations

from porting.kinds.base import Kind, Leaf


class Parameter(Kind):
    name = "parameter"
    leaves = (Leaf("", ""),)


KIND = Parameter()
