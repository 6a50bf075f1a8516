"""The names of calls: a module or layer that runs more than once has the calls `name`, `name#1`, `name#2`."""

from __future__ import annotations


def call_name(owner: str, number: int) -> str:
    """The name of a call of a module or layer, which are numbered from 0."""
    return f"{owner}#{number}" if number else owner


def without_number(call: str) -> str:
    """The name of the module or layer that a call belongs to."""
    return call.partition("#")[0]
