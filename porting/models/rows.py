"""Expands the rows of a key map against two live models."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from porting.errors import KeyMapError
from porting.kinds import kind_called, kind_of_module
from porting.kinds.base import Kind, Leaf
from porting.kinds.transforms import Constant
from porting.mapping.key_map import KeyMap, LayerPair, TensorEntry, expand
from porting.mapping.rules import KeyRule, join_name
from porting.models.live import effective_names
from porting.models.stacks import modules_of
from porting.models.traverse import named_layers, named_variables
from porting.wording import listed

if TYPE_CHECKING:
    import keras
    from torch import nn


def key_map_of_rows(reference: nn.Module, candidate: keras.Model, rows: Iterable[KeyRule]) -> KeyMap:
    """Build the key map that rows stand for in two live models. Raises KeyMapError for a row that fits nothing."""
    rows = list(rows)
    if other := [row for row in rows if not isinstance(row, KeyRule)]:
        raise KeyMapError(
            f"a key map is a KeyMap or a list of KeyRule: got {other[0]!r:.100}", hint="Arrays are passed as inputs=."
        )
    tensors = effective_names(reference)
    modules = dict(reference.named_modules())
    layers, variables = named_layers(candidate), named_variables(candidate)
    names = {id(variable): name for name, variable in variables.items()}
    pairs: list[LayerPair] = []
    entries: list[TensorEntry] = []
    drops: list[str] = []
    owners = {name.rpartition(".")[0] for name in tensors}
    # A norm without weights in PyTorch may be a layer with weights in Keras.
    bare = {f"{name}.weight" for name, each in modules.items() if name not in owners and _has_weights(each)}
    for own, pair in expand(rows, tensors | bare):
        kind = kind_called(pair.kind)
        drops += [join_name(own, ".", name) for name in kind.drops]
        if not pair.target:
            continue
        pairs.append(pair)
        if pair.target in variables:  # a parameter that a module holds by itself
            entries.append(TensorEntry.one(own, pair.target, kind.leaves[0].transform))
            continue
        layer = layers.get(pair.target)
        if layer is None:
            hint = f"It has {listed(list(layers))}."
            if any(_unnumbered(name) == _unnumbered(pair.target) for name in layers):
                hint = (
                    "Keras numbers unnamed layers through the whole process: name them, or call "
                    f"keras.utils.clear_session() before the model is built. {hint}"
                )
            raise KeyMapError(f"row {pair.source!r}: the Keras model has no layer {pair.target!r}", hint=hint)
        module = modules.get(own)
        leaves = kind.leaves if module is None else kind.leaves_for(module)
        found = {name: names[id(each)] for name, each in kind.variables(layer).items() if id(each) in names}
        entries += entries_of(own, leaves, tensors, found)
    return KeyMap.of(pairs, entries, drops)


def pairs_of(key_map: KeyMap, reference: nn.Module, candidate: keras.Model) -> dict[str, str]:
    """The layer of each module, for modules and layers that correspond one to one, as `check_parity` takes them."""
    modules, layers = modules_of(reference), named_layers(candidate)
    found = key_map.one_to_one.items()
    return {source: target for source, target in found if source and source in modules and target in layers}


def _unnumbered(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def entries_filling(
    kind: Kind,
    own: str,
    module: nn.Module,
    layer: keras.layers.Layer,
    tensors: Collection[str],
    names: Mapping[int, str],
) -> tuple[TensorEntry, ...]:
    """The entries by which the tensors of the module `own` fill all variables of a layer; empty if they do not.

    `names` are the names of the Keras model's variables, by their ids.
    """
    found = {name: names[id(each)] for name, each in kind.variables(layer).items() if id(each) in names}
    entries = tuple(entries_of(own, kind.leaves_for(module), tensors, found))
    if not any(entry.sources and entry.targets for entry in entries):
        return ()
    return entries if {name for entry in entries for name in entry.targets} == set(found.values()) else ()


def _has_weights(module: nn.Module) -> bool:
    """Whether modules of this kind usually have weights."""
    kind = kind_of_module(module)
    return kind is not None and bool(kind.leaves)


def entries_of(
    own: str, leaves: Iterable[Leaf], tensors: Collection[str], variables: Mapping[str, str]
) -> Iterator[TensorEntry]:
    """Yield the entries of one layer: tensors of both sides first, then those of one side that have a default."""
    taken: set[str] = set()
    leaves = list(leaves)
    for leaf in leaves:
        sources = tuple(join_name(own, ".", name) for name in leaf.sources)
        if all(name in tensors for name in sources) and all(name in variables for name in leaf.targets):
            yield TensorEntry(sources, tuple(variables[name] for name in leaf.targets), leaf.transform)
            taken |= {*sources, *leaf.targets}
    for leaf in leaves:
        if leaf.default is None:
            continue
        sources = tuple(join_name(own, ".", name) for name in leaf.sources)
        if any(name in taken for name in (*sources, *leaf.targets)):
            continue
        if all(name in tensors for name in sources) and not any(name in variables for name in leaf.targets):
            yield TensorEntry(sources, (), Constant(leaf.default))
            taken |= {*sources}
        elif not any(name in tensors for name in sources) and all(name in variables for name in leaf.targets):
            yield TensorEntry((), tuple(variables[name] for name in leaf.targets), Constant(leaf.default))
            taken |= {*leaf.targets}
