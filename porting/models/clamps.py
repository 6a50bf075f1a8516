"""Watches where the code of a PyTorch model clamps numbers, and whether any number reaches the bound."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# A bound that no number of float32 goes beyond, such as that of a type, limits nothing.
_BOUNDLESS = 1e30
# Where each function takes its lower and its upper bound: the place of the argument, its name, and the default.
_NAMES: dict[str, tuple[tuple[int, str, float | None] | None, tuple[int, str, float | None] | None]] = {
    "clamp": ((1, "min", None), (2, "max", None)),
    "clip": ((1, "min", None), (2, "max", None)),
    "clamp_min": ((1, "min", None), None),
    "clamp_max": (None, (1, "max", None)),
    "relu6": (None, (9, "", 6.0)),
    "hardtanh": ((1, "min_val", -1.0), (2, "max_val", 1.0)),
}


@dataclass(frozen=True)
class Bound:
    """One side of a clamp: the number of the call in the order of a run, the bound, and which side it limits."""

    call: int
    value: float
    is_upper: bool

    def __str__(self) -> str:
        return f"at {'most' if self.is_upper else 'least'} {self.value:g}"


@dataclass
class Clamps:
    """The bounds of a run, and those that a number went beyond. Bounds in `without` are left out of the run."""

    without: frozenset[Bound] = frozenset()
    bounds: dict[Bound, None] = field(default_factory=dict)
    reached: set[Bound] = field(default_factory=set)
    # The module around each call, if a model is given to `watching_clamps`.
    modules: dict[int, str] = field(default_factory=dict)
    calls: int = 0


_WATCHED: ContextVar[Clamps | None] = ContextVar("watched", default=None)


@contextlib.contextmanager
def watching_clamps(model: nn.Module | None = None, *, without: Collection[Bound] = ()) -> Iterator[Clamps]:
    """Yield what the runs in this context clamp. With a `model`, also in which of its modules.

    The functions of its code are seen where they run in `staying_in_float64`. Those inside PyTorch's own functions,
    such as F.normalize, are not.
    """
    found = Clamps(frozenset(without))
    token = _WATCHED.set(found)
    try:
        with contextlib.nullcontext() if model is None else _naming(model, found):
            yield found
    finally:
        _WATCHED.reset(token)


@contextlib.contextmanager
def _naming(model: nn.Module, clamps: Clamps) -> Iterator[None]:
    from torch.nn.modules import module as hooks

    names = {id(each): name for name, each in model.named_modules()}
    stack = [""]

    def note() -> None:
        for call in range(len(clamps.modules), clamps.calls):
            clamps.modules[call] = stack[-1]

    def enter(module: nn.Module, _: Any) -> None:
        note()
        stack.append(names.get(id(module), ""))

    def leave(*_: Any) -> None:
        note()
        stack.pop()

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_clamp(name: str) -> bool:
    """Whether a function of this name clamps."""
    return name.rstrip("_") in _NAMES


def clamped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Note a call of a function that clamps, if anybody watches. Returns the call, without bounds to leave out."""
    import torch

    watched, values = _WATCHED.get(), args[0] if args else kwargs.get("input")
    if watched is None or not isinstance(values, torch.Tensor) or not values.is_floating_point():
        return func, args, kwargs
    name = func.__name__.rstrip("_")
    call, watched.calls = watched.calls, watched.calls + 1
    given = list(args)
    for is_upper, argument in enumerate(_NAMES[name]):
        if argument is None:
            continue
        place, keyword, default = argument
        value = given[place] if len(given) > place else kwargs.get(keyword, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _BOUNDLESS:
            continue
        bound = Bound(call, float(value), bool(is_upper))
        watched.bounds[bound] = None
        if values.numel() and bool(((values > value) if is_upper else (values < value)).any()):
            watched.reached.add(bound)
        if bound not in watched.without:
            continue
        if name == "relu6":
            return torch.relu, (values,), {}
        beyond = math.inf if is_upper else -math.inf
        if len(given) > place:
            given[place] = beyond
        else:
            kwargs = {**kwargs, keyword: beyond}
    return func, tuple(given), kwargs
