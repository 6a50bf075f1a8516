"""Finds the PyTorch tensors that a Keras layer may take, by kinds, shapes and the recorded run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from rapidfuzz import fuzz

from porting.kinds import kind_called, kind_of_layer, kind_of_module
from porting.kinds.transforms import Array, Constant, Shape
from porting.mapping.key_map import TensorEntry
from porting.models.rows import entries_of
from porting.models.traverse import named_layers, named_variables, owned_variables
from porting.parity.content import Match, Truth
from porting.parity.record import Recording

if TYPE_CHECKING:
    import keras
    from torch import nn

# At most this many modules without weights may lie between a tensor and the module with weights that takes it.
_DEEPEST = 4


@dataclass(frozen=True)
class Option:
    """A PyTorch module or parameter that may fill a Keras layer. `kind` is the kind of the row."""

    source: str
    kind: str
    entries: tuple[TensorEntry, ...]

    @property
    def claim(self) -> str:
        """The source that only one layer may use: the module, or one layer of a stack that is one module."""
        return (
            f"{self.source}:{self.kind.partition(':')[2] or 'l0'}" if self.kind.startswith("recurrent") else self.source
        )

    @property
    def target(self) -> str:
        """The Keras variable, if the option is a parameter."""
        return self.entries[0].targets[0]


class Options:
    """The layers of both models, and which of them fit together."""

    def __init__(
        self,
        truth_model: nn.Module,
        candidate: keras.Model,
        recording: Recording,
        tensors: Mapping[str, Array],
        *,
        absorb_epsilon: bool = False,
    ) -> None:
        self._absorbs = absorb_epsilon
        self.modules = dict(truth_model.named_modules())
        self.recording = recording
        self.tensors = tensors
        self.layers = named_layers(candidate)
        self.variables = named_variables(candidate)
        self.shapes = {name: tuple(variable.shape) for name, variable in self.variables.items()}
        self.names = {id(variable): name for name, variable in self.variables.items()}
        self.owned = {
            name: [self.names[id(each)] for each in own if id(each) in self.names]
            for name, own in owned_variables(candidate).items()
        }
        self.kinds = {name: kind_of_module(module) for name, module in self.modules.items() if name}
        self._takers: dict[int, list[str]] = {}
        for call, found in recording.calls.items():
            for truth in found.inputs:
                self._takers.setdefault(id(truth), []).append(call)
        self._plain = {
            name for name, module in self.modules.items() if name and not any(True for _ in module.parameters())
        }
        self.order = {call.partition("#")[0]: place for call, place in reversed(list(recording.order.items()))}

    def takers(self, truth: Truth) -> list[str]:
        """The modules of a known kind that take a tensor, directly or through modules without weights, each once."""
        found: dict[str, None] = {}
        pending, seen = [(truth, 0)], {id(truth)}
        while pending:
            each, depth = pending.pop(0)
            for call in self._takers.get(id(each), ()):
                base = call.partition("#")[0]
                if self.kinds.get(base) is not None and base not in self._plain:
                    found[base] = None
                if base in self._plain and depth < _DEEPEST:
                    for output in self.recording.calls[call].outputs:
                        if id(output) not in seen:
                            seen.add(id(output))
                            pending.append((output, depth + 1))
        return list(found)

    def modules_like(self, layer_name: str) -> list[Option]:
        """Every module whose kind and shapes fit a layer, in the order of execution."""
        ran = sorted((name for name in self.order if self.kinds.get(name) is not None), key=self.order.__getitem__)
        return [option for name in ran for option in self.fitting(layer_name, name, [])]

    def fitting(self, layer_name: str, module_name: str, matches: list[Match]) -> Iterator[Option]:
        """Yield the ways in which the tensors of a module can fill all variables of a layer."""
        layer, module = self.layers[layer_name], self.modules[module_name]
        kind = self.kinds[module_name]
        if kind is None:
            return
        details = [kind.name]
        if kind.name == "recurrent":
            details = [kind.name, *(f"{kind.name}:l{index}" for index in range(1, module.num_layers))]
        if kind.name == "dense":
            details = [*(f"dense:{sides}" for sides in self._flattened(matches)), *details]
        if getattr(kind_of_layer(layer), "name", "") == "attention" and kind.name in {"dense", "dense_in_first"}:
            details = ["qkv" if kind.name == "dense" else "qkv:in_first"]
        if self._absorbs and kind.name == "batch_norm" and getattr(layer, "epsilon", module.eps) != module.eps:
            details = [f"batch_norm:{module.eps - layer.epsilon:+.9g}"]
        for row_kind in details:
            own = kind_called(row_kind)
            found = {
                name: self.names[id(each)] for name, each in own.variables(layer).items() if id(each) in self.names
            }
            entries = tuple(entries_of(module_name, own.leaves_for(module), self.tensors.keys(), found))
            filled = {name for entry in entries for name in entry.targets}
            if not entries or not any(entry.sources and entry.targets for entry in entries):
                continue
            if filled != set(found.values()) or not filled >= set(self.owned.get(layer_name, ())):
                continue
            if all(self._fits(entry) for entry in entries):
                yield Option(module_name, row_kind, entries)

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
        owners = {call.partition("#")[0] for truth in truths for call in self._takers.get(id(truth), ())}
        # The innermost module counts, since all modules around it take the same tensor.
        for owner in sorted(owners, key=lambda each: -each.count(".")):
            if near := [option for option in options if option.source.startswith(f"{owner}.")]:
                return near
        return options

    @cached_property
    def _bare_parameters(self) -> list[str]:
        """The parameters of no known kind, then those of embeddings: a table of positions may be either."""
        found, tables = [], []
        for name, array in self.tensors.items():
            owner = self.kinds.get(name.rpartition(".")[0])
            held = {leaf for own in (owner.leaves if owner is not None else ()) for leaf in own.sources}
            if array.dtype.kind != "f":
                continue
            if name.rpartition(".")[2] not in held:
                found.append(name)
            elif owner is not None and owner.name == "embedding":
                tables.append(name)
        return found + tables

    def similarity(self, source: str, target: str) -> float:
        """The similarity of two names, from 0 to 200."""
        return float(fuzz.token_set_ratio(_words(source), _words(target)) + fuzz.ratio(_words(source), _words(target)))

    def _fits(self, entry: TensorEntry) -> bool:
        if isinstance(entry.transform, Constant):
            # A tensor that Keras leaves out must hold nothing that would be lost.
            return all(not (self.tensors[name] != entry.transform.value).any() for name in entry.sources)
        sources = [self.tensors[name].shape for name in entry.sources]
        return entry.transform.accepts(sources, [self.shapes[name] for name in entry.targets])

    def _flattened(self, matches: list[Match]) -> Iterator[str]:
        """Yield the sides of maps whose numbers come in another order, as after a Flatten."""
        if any(match.reordered and match.truth.tensor.ndim == 2 for match in matches):
            for match in matches:
                if match.truth.tensor.ndim > 2:
                    yield "x".join(map(str, match.truth.tensor.shape[1:]))


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
