"""Finds layers that nothing proves: no result depends on their weights, and PyTorch computes nothing that they return.

Such are layers before a rounding, a sign or a nearest code, if they are not PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.models.inputs import leaves_by_key
from porting.models.observe import Replacement, observe_layers, to_torch
from porting.models.traverse import named_variables, owned_variables
from porting.parity.code import tensors_of_code
from porting.parity.content import as_real
from porting.parity.record import Recording
from porting.parity.session import Session

if TYPE_CHECKING:
    from torch import Tensor

# By so much of its size every weight is changed: far more than rounding, too little to pass a step.
_CHANGE = 1e-6
# The rounding of float64 itself stays below this share of a result.
_NONE = 1e-14
_SAMPLES = 8
_MOST_LAYERS = 32


class _Results:
    """Keeps what the calls of some layers return."""

    watches_inputs = False

    def __init__(self, names: Collection[str]) -> None:
        self.found: dict[str, list[Tensor]] = {name: [] for name in names}

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        own = self.found.get(name.partition("#")[0])
        if own is not None:
            own += [as_real(output) for output in outputs]
        return None


def unproven_layers(session: Session, called: Collection[str]) -> set[str]:
    """The layers among `called` whose weights no result depends on, and which return nothing that PyTorch computes."""
    if session.is_large:
        return set()  # it would take many passes
    idle = _without_effect(session, list(_unpaired(session, called))[:_MOST_LAYERS])
    if not idle:
        return set()
    inputs, observer = session.few(_SAMPLES), _Results(idle)
    with session.float64.active() as model, observe_layers(model, observer):
        model(inputs.for_candidate(model), training=False)
    sizes = {each.numel() for outputs in observer.found.values() for each in outputs}
    computed = tensors_of_code(session.truth_model, inputs, wanted=sizes.__contains__)
    library = session.library(Recording(), computed)
    return {name for name, outputs in observer.found.items() if not all(library.find(each) for each in outputs)}


def _without_effect(session: Session, names: Sequence[str]) -> set[str]:
    """The layers on whose weights no result depends.

    Changes each layer's weights a little, and runs the model on a few samples in float64.
    """
    if not names:
        return set()
    inputs = session.few(_SAMPLES)
    names_of = {id(variable): name for name, variable in named_variables(session.candidate).items()}
    owned = owned_variables(session.candidate)
    rng = np.random.default_rng(0)
    with session.float64.overwritten() as variables, session.float64.active() as model:

        def results() -> list[Tensor]:
            leaves: dict[str, Any] = leaves_by_key(model(inputs.for_candidate(model), training=False))
            return [as_real(to_torch(leaf)).double().clone() for leaf in leaves.values()]

        before, idle = results(), set()
        for name in names:
            own = [variables[names_of[id(variable)]] for variable in owned[name]]
            values = [np.array(variable) for variable in own]
            for variable, each in zip(own, values, strict=True):
                if each.dtype.kind == "f":
                    variable.assign(each * (1 + _CHANGE * rng.choice([-1.0, 1.0], each.shape)).astype(each.dtype))
            if all(_same(one, other) for one, other in zip(before, results(), strict=True)):
                idle.add(name)
            for variable, each in zip(own, values, strict=True):
                variable.assign(each)
    return idle


def _unpaired(session: Session, called: Collection[str]) -> Iterator[str]:
    """Yield the layers with weights of their own whose result, or that of a layer around them, is not PyTorch's."""
    proven = {pair.target.partition("#")[0] for pair in session.pairs.values() if not pair.named}
    for name, own in owned_variables(session.candidate).items():
        around = name
        while around and not (around in proven and session.layer_kind(around) is not None):
            around = around.rpartition("/")[0]
        if name in called and own and not around:
            yield name


def _same(one: Tensor, other: Tensor) -> bool:
    scale = float(one.square().mean().sqrt())
    return float((one - other).abs().max()) <= _NONE * scale if one.numel() and math.isfinite(scale) else True
