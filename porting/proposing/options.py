"""Finds the PyTorch tensors that a Keras layer may take, by kinds, shapes and the recorded run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from rapidfuzz import fuzz

from porting.call_names import without_number
from porting.kinds import kind_called, kind_of_layer
from porting.kinds.transforms import VECTOR, Array, Constant, Shape
from porting.mapping.key_map import TensorEntry
from porting.models.rows import entries_filling, entries_of
from porting.parity.content import Truth
from porting.parity.record import Recording
from porting.proposing.sides import KerasSide, Side, TorchSide

# A table of positions may have so many rows more in PyTorch, for padding.
_MOST_ROWS = 8
# At most this many modules without weights may lie between a tensor and the module with weights that takes it.
_DEEPEST = 4


@dataclass(frozen=True)
class Option:
    """What may stand in a Keras layer: a module of PyTorch, or one of its parameters; `kind` is that of a row.

    `also` are further modules of the same layer, in the order in which they run: the pointwise convolution of a
    separable one.
    """

    source: str
    kind: str
    entries: tuple[TensorEntry, ...]
    also: tuple[Option, ...] = ()

    @property
    def claims(self) -> frozenset[str]:
        """What nothing else may take: the modules, or the one layer of a recurrent stack."""
        own = self.source
        if self.kind.startswith("recurrent"):
            own = f"{own}:{self.kind.partition(':')[2] or 'l0'}"
        return frozenset({own}).union(*(each.claims for each in self.also))

    @property
    def parts(self) -> tuple[Option, ...]:
        """Itself and the further modules, each with a row of its own."""
        return (self, *self.also)

    @property
    def last(self) -> str:
        """The module whose result the layer gives."""
        return self.parts[-1].source

    @property
    def all_entries(self) -> tuple[TensorEntry, ...]:
        """The entries of all parts."""
        return tuple(entry for part in self.parts for entry in part.entries)

    @property
    def target(self) -> str:
        """The variable, where it is a parameter's."""
        return self.entries[0].targets[0]


class Options:
    """The layers of both models, and which of them fit together."""

    def __init__(self, source: Side, target: Side, recording: Recording, *, absorb_epsilon: bool = False) -> None:
        self._absorbs = absorb_epsilon
        self.source, self.target, self.recording = source, target, recording
        self.modules, self.tensors = source.layers, source.tensors()
        self.layers, self.shapes, self.owned = target.layers, target.shapes, target.owned
        self.kinds = {name: source.kind(name) for name in self.modules}
        self._takers: dict[int, list[str]] = {}
        for call, found in recording.calls.items():
            for truth in found.inputs:
                self._takers.setdefault(id(truth), []).append(call)
        self._calls: dict[str, list[str]] = {}
        for call in recording.calls:
            self._calls.setdefault(without_number(call), []).append(call)
        self._plain = {name for name in self.modules if not source.holds_tensors(name)}
        self._fitting_known: dict[tuple[str, str, tuple[str, ...]], tuple[Option, ...]] = {}
        self.order = {without_number(call): place for call, place in reversed(list(recording.order.items()))}

    def takers(self, truth: Truth) -> list[str]:
        """The modules of a known kind that take a tensor, directly or through modules without weights, each once."""
        found: dict[str, None] = {}
        pending, seen = [(truth, 0)], {id(truth)}
        while pending:
            each, depth = pending.pop(0)
            for call in self._takers.get(id(each), ()):
                base = without_number(call)
                if self.kinds.get(base) is not None and base not in self._plain:
                    found[base] = None
                if base in self._plain and depth < _DEEPEST:
                    for output in self.recording.calls[call].outputs:
                        if id(output) not in seen:
                            seen.add(id(output))
                            pending.append((output, depth + 1))
        return list(found)

    def calls(self, module: str) -> list[str]:
        """The calls of a module in the recorded run."""
        return self._calls.get(module, [])

    def modules_like(self, layer_name: str) -> list[Option]:
        """Every module whose kind and shapes fit a layer, in the order of execution."""
        return [option for name in self._ran for option in self.fitting(layer_name, name)]

    @cached_property
    def _ran(self) -> list[str]:
        return sorted((name for name in self.order if self.kinds.get(name) is not None), key=self.order.__getitem__)

    def fitting(self, layer_name: str, module_name: str, sides: Sequence[str] = ()) -> tuple[Option, ...]:
        """The ways in which the tensors of a module can fill all variables of a layer."""
        key = layer_name, module_name, tuple(sides)
        if key not in self._fitting_known:  # a search asks for the same ones many times
            self._fitting_known[key] = tuple(self._fitting(*key))
        return self._fitting_known[key]

    def _fitting(self, layer_name: str, module_name: str, sides: Sequence[str]) -> Iterator[Option]:
        raise NotImplementedError

    def parameters_like(self, variable: str, truths: Iterable[Truth] = ()) -> list[Option]:
        """Parameters outside the known kinds with as many numbers as a variable.

        If a module that takes one of the `truths` contains such parameters, only those are returned.
        """
        size = math.prod(self.shapes[variable])
        kind = kind_called("parameter")
        options = []
        for name in self._bare_parameters:
            entry = TensorEntry.one(name, variable, kind.leaves[0].transform)
            if self.tensors[name].size == size and self._fits(entry):
                options.append(Option(name, "parameter", (entry,)))
            elif (more := self._rows_more(name, variable)) > 0:
                row_kind = f"parameter:+{more}"
                entry = TensorEntry.one(name, variable, kind_called(row_kind).leaves[0].transform)
                options.append(Option(name, row_kind, (entry,)))
        owners = [without_number(call) for truth in truths for call in self._takers.get(id(truth), ())]
        separator = self.source.separator
        near: dict[int, list[Option]] = {}
        for owner in dict.fromkeys(owners):
            own = [option for option in options if option.source.startswith(f"{owner}{separator}")]
            near.setdefault(owner.count(separator), []).extend(own)
        # The innermost modules count, since all modules around them take the same tensor.
        for depth in sorted(near, reverse=True):
            if near[depth]:
                return list(dict.fromkeys(near[depth]))
        return options

    def _rows_more(self, name: str, variable: str) -> int:
        """How many rows a table of PyTorch has before those that a variable has; 0 if it is no such table."""
        theirs, ours = self.tensors[name].shape, self.shapes[variable]
        if len(theirs) != 2 or len(ours) != 2 or theirs[1:] != ours[1:] or theirs[0] - ours[0] > _MOST_ROWS:
            return 0
        return int(theirs[0] - ours[0])

    @cached_property
    def _bare_parameters(self) -> list[str]:
        """The parameters of no known kind, then those of embeddings: a table of positions may be either."""
        found, tables = [], []
        for name, array in self.tensors.items():
            module = self.owner_of(name)
            owner = self.kinds.get(module)
            if array.dtype.kind != "f":
                continue
            if owner is None or name not in self.source.tensors_of(module) or not owner.leaves:
                found.append(name)
            elif owner is not None and owner.name == "embedding":
                tables.append(name)
        return found + tables

    def owner_of(self, name: str) -> str:
        """The module that holds a tensor directly."""
        return name.rpartition(self.source.separator)[0]

    def similarity(self, source: str, target: str) -> float:
        """The similarity of two names, from 0 to 200."""
        return float(fuzz.token_set_ratio(_words(source), _words(target)) + fuzz.ratio(_words(source), _words(target)))

    def _fits(self, entry: TensorEntry) -> bool:
        if isinstance(entry.transform, Constant):
            # A tensor that Keras leaves out must hold nothing that would be lost.
            return all(not (self.tensors[name] != entry.transform.value).any() for name in entry.sources)
        sources = [self.tensors[name].shape for name in entry.sources]
        return entry.transform.accepts(sources, [self.shapes[name] for name in entry.targets])


class AcrossFrameworks(Options):
    """A PyTorch model and a Keras one: the kinds say how tensors move."""

    source: TorchSide
    target: KerasSide

    def _fitting(self, layer_name: str, module_name: str, sides: Sequence[str]) -> Iterator[Option]:
        layer, module = self.layers[layer_name], self.modules[module_name]
        kind, names = self.kinds[module_name], self.target.names
        if kind is None:
            return
        details = [kind.name]
        if kind.name == "recurrent":
            details = [kind.name, *(f"{kind.name}:l{index}" for index in range(1, module.num_layers))]
        if kind.name == "dense":
            details = [*(f"dense:{each}" for each in sides), *details]
        if kind.name == "layer_norm" and len(module.normalized_shape) > 1:
            details.append("layer_norm:channels_first")
        if getattr(kind_of_layer(layer), "name", "") == "attention" and kind.name in {"dense", "dense_in_first"}:
            details = ["qkv" if kind.name == "dense" else "qkv:in_first"]
        if self._absorbs and kind.name == "batch_norm" and getattr(layer, "epsilon", module.eps) != module.eps:
            details = [f"batch_norm:{module.eps - layer.epsilon:+.9g}"]
        for row_kind in details:
            own = kind_called(row_kind)
            entries = entries_filling(own, module_name, module, layer, self.tensors.keys(), names)
            filled = {name for entry in entries for name in entry.targets}
            if entries and filled >= set(self.owned.get(layer_name, ())) and all(map(self._fits, entries)):
                yield Option(module_name, row_kind, entries)

        if kind.name == "depthwise":
            yield from self._separable(layer_name, module_name)

    def _separable(self, layer_name: str, module_name: str) -> Iterator[Option]:
        """Yield a depthwise convolution with the pointwise one behind it, which Keras may hold in one layer."""
        layer = self.layers[layer_name]
        parts = [kind_called("separable_depthwise"), kind_called("separable_pointwise")]
        held = [{name: self.target.names[id(each)] for name, each in part.variables(layer).items()} for part in parts]
        if "depthwise_kernel" not in held[0] or "pointwise_kernel" not in held[1]:
            return
        outputs = [truth for call in self.calls(module_name) for truth in self.recording.calls[call].outputs]
        for behind in dict.fromkeys(taker for truth in outputs for taker in self.takers(truth)):
            options = []
            for part, own, found in zip(parts, (module_name, behind), held, strict=True):
                entries = tuple(entries_of(own, part.leaves, self.tensors.keys(), found))
                if entries and all(self._fits(entry) for entry in entries):
                    options.append(Option(own, part.name, entries))
            filled = {name for option in options for entry in option.entries for name in entry.targets}
            if len(options) == 2 and filled >= set(self.owned[layer_name]):
                yield Option(options[0].source, options[0].kind, options[0].entries, (options[1],))


class WithinFramework(Options):
    """Two models of one framework: tensors move as they are, under the same last names."""

    # Kinds that compute the same product, with axes of size 1 or split axes between their kernels.
    _PRODUCTS = frozenset({"dense", "conv"})

    def _fitting(self, layer_name: str, module_name: str, sides: Sequence[str]) -> Iterator[Option]:
        kind, other = self.kinds[module_name], self.target.kind(layer_name)
        same = type(self.modules[module_name]) is type(self.layers[layer_name])
        if kind is None or other is None:
            if not same:
                return
        elif kind.name != other.name and not {kind.name, other.name} <= self._PRODUCTS:
            return
        theirs = {name[len(module_name) :]: name for name in self.source.tensors_of(module_name)}
        ours = {name[len(layer_name) :]: name for name in self.target.tensors_of(layer_name)}
        if not ours or theirs.keys() != ours.keys():
            return
        entries = tuple(TensorEntry.one(theirs[leaf], ours[leaf], VECTOR) for leaf in ours)
        if all(self._fits(entry) for entry in entries):
            yield Option(module_name, kind.name if kind is not None else "parameter", entries)


def filled(
    entries: tuple[TensorEntry, ...], tensors: Mapping[str, Array], shapes: Mapping[str, Shape]
) -> dict[str, Array]:
    """Compute the values of the entries' variables, in float64."""
    values: dict[str, Array] = {}
    for entry in entries:
        if entry.targets:
            values |= entry.to_keras(tensors, shapes)
    return {name: np.array(array, np.float64) for name, array in values.items()}


def _words(name: str) -> str:
    return "".join(each if each.isalnum() else " " for each in name).lower()
