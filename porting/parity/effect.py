"""Finds layers that nothing proves: PyTorch computes nothing that they return, and no result depends on their weights.

Such are layers before a rounding, a sign or a nearest code, if they are not PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.call_names import without_number
from porting.kinds.transforms import Array
from porting.models.inputs import Inputs, leaves_by_key
from porting.models.observe import Replacement, observe_layers, to_torch
from porting.models.traverse import named_layers, owned_names
from porting.parity.code import tensors_of_code
from porting.parity.content import Library, as_real
from porting.parity.measure import rms
from porting.parity.record import Recording
from porting.parity.rounded_weights import differs_as_rounded
from porting.parity.session import Session

if TYPE_CHECKING:
    from torch import Tensor

# Every weight is changed by so much of the RMS of its tensor: far more than rounding, too little to pass a step.
_CHANGE = 1e-6
# One of these passes a step. What has no effect even then is not used on these inputs.
_GREAT_CHANGES = (1.0, 3.0, 10.0, 30.0)
# The rounding of float64 itself stays below this share of a result.
_NONE = 1e-14
_MOST_LAYERS = 32


class _Calls:
    """Keeps what the calls of some layers take and return."""

    watches_inputs = True

    def __init__(self, names: Collection[str]) -> None:
        self.found: dict[str, list[tuple[list[Tensor], Tensor]]] = {name: [] for name in names}
        self._inputs: list[list[Tensor]] = []

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self._inputs.append(inputs)
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        own, inputs = self.found.get(without_number(name)), self._inputs.pop()
        if own is not None:
            own += [(inputs, as_real(output)) for output in outputs if output.numel() > 1]
        return None


def unproven_layers(session: Session, called: Collection[str]) -> set[str]:
    """The layers among `called` whose weights no result depends on, and which return nothing that PyTorch computes.

    If none of them changes a result even with other weights, they are not used on these inputs. Nothing is looked for
    in a large model, which would take many passes.
    """
    unpaired = list(_unpaired(session, called))
    if session.is_large or not unpaired:
        return set()
    inputs = session.inputs.batch(0, min(session.sizes))  # which both models have run with
    try:
        others = _without_counterpart(session, inputs, unpaired)[:_MOST_LAYERS]
        return _without_effect(session, inputs, others) if others else set()
    except Exception:  # a model may raise anything, and this only adds to what the passes have shown
        return set()


def _unpaired(session: Session, called: Collection[str]) -> Iterator[str]:
    """Yield the layers with weights of their own whose result, or that of a layer around them, is not PyTorch's."""
    proven = {without_number(pair.target) for pair in session.pairs.values() if not pair.named}
    for name, own in owned_names(session.candidate).items():
        if name not in called or not own or name in proven:
            continue
        # A layer around it is no proof unless it is of a kind: code inside may hide it behind a step.
        around = name.rpartition("/")[0]
        while around and not (around in proven and session.layer_kind(around) is not None):
            around = around.rpartition("/")[0]
        if not around:
            yield name


def _without_counterpart(session: Session, inputs: Inputs, names: Sequence[str]) -> list[str]:
    """The layers that return something that PyTorch computes nowhere, in no module and in no code."""
    observer = _Calls(names)
    with session.float64.active() as model:
        with observe_layers(model, observer):
            model(inputs.for_candidate(model, exact=True), training=False)
        sizes = {output.numel() for calls in observer.found.values() for _, output in calls}
        computed = tensors_of_code(session.truth_model, inputs, wanted=sizes.__contains__)
        library, layers = session.library(Recording(), computed), named_layers(model)

        def is_right(name: str, taken: list[Tensor], output: Tensor) -> bool:
            return bool(library.find(output)) or _is_rounded(library, layers.get(name), taken, output)

        return [name for name, calls in observer.found.items() if not all(is_right(name, *call) for call in calls)]


def _is_rounded(library: Library, layer: Any, taken: list[Tensor], output: Tensor) -> bool:
    """Whether a layer gives something of PyTorch's up to the rounding of weights that the port computed."""
    near = library.find_near(output)
    return layer is not None and any(
        not each.reordered and differs_as_rounded(layer, taken, output, each.expected(output)) for each in near
    )


def _without_effect(session: Session, inputs: Inputs, names: Sequence[str]) -> set[str]:
    """The layers whose weights change no result if changed a little, while one of them does if changed by much."""
    owned = owned_names(session.candidate)
    with session.float64.overwritten() as variables, session.float64.active() as model:

        def results() -> list[Tensor]:
            leaves: dict[str, Any] = leaves_by_key(model(inputs.for_candidate(model, exact=True), training=False))
            return [as_real(to_torch(leaf)).double().clone() for leaf in leaves.values()]

        before = results()

        def has_effect(name: str, change: float) -> bool:
            own = [variables[each] for each in owned[name]]
            values = [np.array(variable) for variable in own]
            for variable, each in zip(own, values, strict=True):
                if each.dtype.kind == "f":
                    variable.assign(_changed(each, change))
            try:
                return any(not _same(one, other) for one, other in zip(before, results(), strict=True))
            finally:
                for variable, each in zip(own, values, strict=True):
                    variable.assign(each)

        idle = {name for name in names if not has_effect(name, _CHANGE)}
        # If one of them matters, those before it do.
        matters = any(has_effect(name, change) for name in sorted(idle) for change in _GREAT_CHANGES)
        return idle if matters else set()


def _changed(values: Array, change: float) -> Array:
    size = float(np.sqrt(np.square(values, dtype=np.float64).mean())) or 1.0
    noise = np.random.default_rng(round(change)).normal(0.0, change * size, values.shape)
    return np.asarray(np.abs(values + noise) if bool((values >= 0).all()) else values + noise, values.dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    scale = rms(one)
    return float((one - other).abs().max()) <= _NONE * scale if one.numel() and math.isfinite(scale) else True
