"""The families that can be ported. A new one is a file in this folder and a line in this table."""

from __future__ import annotations

from importlib import import_module

from porting.errors import SourceError
from porting.families.base import Family

_FAMILIES = {
    "van": "porting.families.van:VanFamily",
}


def family_names() -> tuple[str, ...]:
    return tuple(_FAMILIES)


def get_family(name: str) -> Family:
    """The family of that name; raises SourceError for one that is not registered."""
    if name not in _FAMILIES:
        raise SourceError(f"no family {name!r}", hint=f"The families are {', '.join(_FAMILIES)}.")
    module, _, attribute = _FAMILIES[name].partition(":")
    family: Family = getattr(import_module(module), attribute)()
    return family
