"""Pairs layers of the Keras model with modules of the PyTorch model by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rapidfuzz import process

from porting.call_names import without_number
from porting.models.stacks import modules_of
from porting.models.traverse import named_layers

if TYPE_CHECKING:
    import keras
    from torch import nn

# In `pairs`: the module has no layer of its own.
NO_PARTNER = "-"


class Names:
    """Pairs by name: first as the caller or a key map states, then by equal names in both models, with `/` as `.`.

    Raises ValueError for names that a model does not have, and for two modules paired with one layer.
    """

    def __init__(self, reference: nn.Module, candidate: keras.Model, pairs: Mapping[str, Any] | None) -> None:
        modules = [name for name in modules_of(reference) if name]
        layers = named_layers(candidate)
        given = {source: _layer_name(target, layers) for source, target in (pairs or {}).items()}
        _refuse_unknown("pairs", [without_number(source) for source in given], modules, "module of the PyTorch model")
        named = [target for target in given.values() if target != NO_PARTNER]
        known = {_dotted(name) for name in layers} | {_dotted(f"{candidate.name}/{name}") for name in layers}
        _refuse_unknown(
            "pairs",
            [name for name in named if _dotted(without_number(name)) not in known],
            layers,
            "layer of the Keras model",
        )
        if twice := sorted({target for target in named if named.count(target) > 1}):
            raise ValueError(f"pairs: two modules are paired with one layer: {', '.join(twice)}")
        self.layers = layers
        target_of = {module: module for module in modules} | given
        # A path may begin with the model's own name.
        self._source_of = {_dotted(f"{candidate.name}/{target}"): source for source, target in target_of.items()}
        self._source_of |= {_dotted(target): source for source, target in target_of.items() if target != NO_PARTNER}
        for target in named:
            self._source_of[_dotted(target)] = next(source for source, own in given.items() if own == target)
        # `block1_0` may mean `block1.0`, since some Keras backends reject dots. Used only if no name matches exactly.
        self._loosely = {_loose(name): source for name, source in self._source_of.items()}
        self._sources: dict[str, str | None] = {}  # of the calls that were asked for

    def source(self, call: str, calls: Iterable[str]) -> str | None:
        """The PyTorch call that a Keras call stands for by its name; None if there was none."""
        if call not in self._sources:
            self._sources[call] = self._named(call)
        name = self._sources[call]
        return name if name is not None and name in calls else None

    def _named(self, call: str) -> str | None:
        base, _, number = call.partition("#")
        exact = self._source_of.get(_dotted(call)) or self._source_of.get(_dotted(base))
        source = exact or self._loosely.get(_loose(base))
        return f"{source}#{number}" if source is not None and number and "#" not in source else source


def _layer_name(target: Any, layers: Mapping[str, Any]) -> str:
    if isinstance(target, str):
        # A nested layer may be given by its last name alone if that is unique.
        inside = [name for name in layers if name.rpartition("/")[2] == target]
        return inside[0] if target not in layers and len(inside) == 1 else target
    for name, layer in layers.items():
        if layer is target:
            return name
    raise ValueError(f"pairs: {target!r} is neither a layer of the Keras model nor its name")


def _refuse_unknown(what: str, names: list[str], known: Iterable[str], whose: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            nearest = process.extractOne(name, known, score_cutoff=60.0) if known else None
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise ValueError(f"{what}: {name!r} is no {whose}{hint}")


def refuse_unknown_layers(what: str, names: Iterable[str], reference: nn.Module, others: Iterable[str] = ()) -> None:
    """Raise ValueError for a name that is no module of the PyTorch model. Call numbers are ignored."""
    known = [*(name for name in modules_of(reference) if name), *others]
    _refuse_unknown(what, [without_number(name) for name in names], known, "module of the PyTorch model")


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _loose(path: str) -> str:
    """Rewrite `_` before a number as a dot."""
    return re.sub(r"_(?=\d+(?:\.|$))", ".", _dotted(path))
