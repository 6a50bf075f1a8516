"""Finds why a layer returns something else: its weights, its input, or an activation after it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.call_names import without_number
from porting.kinds import kind_of_module
from porting.kinds.activation import LINEAR, functions, joined_names
from porting.kinds.base import with_value
from porting.models.inputs import Axes, inverse, moved
from porting.models.stacks import modules_of, owner_of
from porting.parity.content import as_real
from porting.parity.diagnose import EXPLAINED, diagnose
from porting.parity.differing_weights import (
    FOLDED,
    WITH_NORM,
    Reordered,
    differing_weights,
    few_numbers,
    owner_by_numbers,
    reordered_weights,
    share_left,
)
from porting.parity.fused import Activations, Core, core_of
from porting.parity.measure import rms
from porting.parity.record import Recording
from porting.parity.report import Diagnosis
from porting.parity.trace import Node, Tracer

if TYPE_CHECKING:
    from torch import Tensor

    from porting.kinds.transforms import Array
    from porting.parity.session import Session


# An explanation leaves at most this share of a difference, or else of the tensor, but never so much of the difference.
_ROUNDS, _FINEST, _SMALL = 1e-9, 1e-14, 1e-3
# So many tensors before a culprit are tried as what an activation was applied to, first on so many of their rows.
_MOST_SOURCES, _MOST_ROWS = 24, 64
# With fewer different values, many functions fit.
_FEWEST_VALUES = 3


def other_activation(
    label: str, expected: Tensor, actual: Tensor, place: str, near: Mapping[str, Tensor], axes: Axes
) -> Diagnosis | None:
    """Diagnose an activation that one side lacks, or that is another one in Keras, where PyTorch has no module for it.

    `place` says where it is, such as "before fc2". `near` are tensors of PyTorch's run that it may be applied to, and
    `axes` bring them into Keras's order. Something may be added to its result, or multiplied with it.
    """
    if not bool(expected.isfinite().all()) or not bool(actual.isfinite().all()):
        return None  # a mask of minus infinity is no activation
    return _exchanged_activation(label, expected, actual, place, near, axes) or _lone_activation(
        label, expected, actual, place
    )


def _lone_activation(label: str, expected: Tensor, actual: Tensor, place: str) -> Diagnosis | None:
    """Diagnose an activation that only one side has, if it is applied to a tensor that no module gives."""
    if min(np.unique(each.numpy()).size for each in (expected, actual)) < _FEWEST_VALUES:
        return None  # zeros alone, such as behind a dead layer, are what many functions give
    known = {name: function for name, function in functions(expected.ndim).items() if name != LINEAR}
    limit = _rounding_of(expected, actual)
    for side, given, target in (("Keras", expected, actual), ("PyTorch", actual, expected)):
        fitting = [name for name, function in known.items() if rms(function(given) - target) <= limit]
        if fitting:
            text = f"{joined_names(fitting)} comes {place} in {side} alone"
            return Diagnosis.certain(label, text)
    return None


def _exchanged_activation(
    label: str, expected: Tensor, actual: Tensor, place: str, near: Mapping[str, Tensor], axes: Axes
) -> Diagnosis | None:
    """Diagnose an activation of a tensor of PyTorch's run. All that fit are named: they may give the same numbers."""
    import torch

    if not expected.ndim or not bool(actual.isfinite().all()):
        return None
    worst = _rows(actual - expected).square().sum(1)
    chosen = worst.topk(min(len(worst), _MOST_ROWS)).indices
    some = _rows(expected)[chosen], _rows(actual)[chosen]
    floats = ((name, each) for name, each in near.items() if each.ndim == len(axes) and each.is_floating_point())
    # Code may move the axes between a module and what takes its result.
    rank = len(axes)
    both = (moved(rank), inverse(moved(rank))) if rank > 1 else ()
    orders = dict.fromkeys((axes, tuple(range(rank)), *both))
    sources = [
        (name, each.permute(order))
        for name, each in floats
        for order in orders
        if tuple(each.shape[axis] for axis in order) == tuple(expected.shape)
    ]
    known = functions()
    for name, source in reversed(sources[-_MOST_SOURCES:]):
        made = {own: function(_rows(source)[chosen].double()) for own, function in known.items()}
        # A function that gives one number alone, such as a saturated one, explains any factor or offset.
        made = {own: values for own, values in made.items() if float(values.std()) > 0}
        pairs = [pair for pair in itertools.permutations(made, 2) if _explains(made[pair[0]], made[pair[1]], *some)]
        fitting = [
            (theirs, ours)
            for theirs, ours in pairs
            if _explains(known[theirs](source.double()), known[ours](source.double()), expected, actual)
        ]
        if not fitting:
            continue
        theirs, ours = (list(dict.fromkeys(each)) for each in zip(*fitting, strict=True))
        taken = name if name.startswith("the input") else f"the result of {name}"
        text = f"PyTorch applies {joined_names(theirs)} to {taken}, and Keras {joined_names(ours)}"
        sides = ("PyTorch", theirs, ours, actual), ("Keras", ours, theirs, expected)
        for side, lone, other, without in sides:
            if other == [LINEAR] and bool(torch.allclose(without, source.double(), rtol=1e-9, atol=0.0)):
                text = f"{joined_names(lone)} comes {place} in {side} alone"
        return Diagnosis.certain(label, text)
    return None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _explains(theirs: Tensor, ours: Tensor, expected: Tensor, actual: Tensor) -> bool:
    """Whether `actual` contains `ours`, added or as a factor, where `expected` contains `theirs`."""
    difference, limit = actual - expected, _rounding_of(expected, actual)
    differs = difference.abs() > limit
    if not limit or not bool((theirs != ours)[differs].all()):
        return False
    if rms(ours - theirs - difference) <= limit:
        return True
    if not bool((differs & (theirs != 0)).any()):
        return False  # a factor of zero hides the other factor
    # Compared as products: a quotient would have the other factor's zeros.
    return rms(actual * theirs - expected * ours) <= limit / rms(difference) * rms(difference * theirs)


def _rounding_of(expected: Tensor, actual: Tensor) -> float:
    """How far from `actual` an explanation may be; 0 if that is too much to explain the difference to `expected`."""
    size = rms(actual - expected)
    limit = max(_ROUNDS * size, _FINEST * rms(actual))
    return limit if limit <= _SMALL * size else 0.0


def tensors_near(recording: Recording, call: str) -> dict[str, Tensor]:
    """The tensors near a call that a port might use by mistake, by name."""
    parent = without_number(call).rpartition(".")[0]
    scope = f"{parent}." if parent else ""
    near = {
        name: each.outputs[0].tensor
        for name, each in recording.calls.items()
        if name.startswith(scope) and name != call and each.outputs
    }
    if parent in recording.calls and recording.calls[parent].inputs:
        near[f"the input of {parent}"] = recording.calls[parent].inputs[0].tensor
    return near


def tensors_before(recording: Recording, call: str) -> dict[str, Tensor]:
    """The tensors near a call of calls that began before it, and the input of the module around it."""
    later = set(itertools.dropwhile(lambda name: name != call, recording.calls))
    return {name: tensor for name, tensor in tensors_near(recording, call).items() if name not in later}


def with_names_of_stack(session: Session, call: str, found: Diagnosis | None) -> Diagnosis | None:
    """A diagnosis with the names that the tensors of a layer in a stack have in the stack."""
    base = without_number(call)
    owner, place = owner_of(base, session.modules)
    if found is None or owner == base:
        return found

    def named(text: str) -> str:
        return re.sub(r"\b((?:weight|bias)_\w\w)_l0", rf"\1_l{place}", text.replace(f"{base}.", f"{owner}."))

    return replace(found, cause=named(found.cause), checked=tuple(named(each) for each in found.checked))


def cause_of(
    session: Session,
    recording: Recording,
    tracer: Tracer,
    node: Node,
    call: str,
    index: int,
    axes: Axes,
    actual: Tensor,
    inside: Activations | None = None,
) -> Diagnosis | None:
    """Look for the cause why a Keras call differs from the PyTorch call; `inside` is the Keras layer's activation."""
    base = without_number(call)
    module = modules_of(session.double_model).get(base)
    layer = session.layer(node.name)
    inputs = recording.calls[call].taken()
    truth = recording.calls[call].outputs[index].tensor
    if module is None:
        return None
    in_keras = [truth.shape[axis] for axis in axes]
    if in_keras == list(actual.shape):
        found = actual.permute(inverse(axes))
    elif [side for side in truth.shape if side > 1] == [side for side in actual.shape if side > 1]:
        found = actual.reshape(truth.shape)  # in PyTorch a state has an axis for layers
    elif truth.numel() == actual.numel():
        found = actual.reshape(in_keras).permute(inverse(axes))  # Keras reshapes it around the layer
    else:
        return None
    sides = _sides_before(tracer, node)
    elsewhere = partial(owner_by_numbers, session, base)
    core = core_of(session, recording, call, layer)
    behind = None if inside is None else inside.behind
    if behind is not None:
        truth = behind(truth)
        core = replace(core or Core(base, module, inputs, (), False), tail=(*(core.tail if core else ()), behind))
    if core is not None:
        cause = _cause_in_core(core, layer, truth, found, sides, elsewhere)
        cause = cause or _other_order(tracer, node, core.module, core.inputs, found, core.name, core.behind)
        if cause is not None:
            return cause
    few = few_numbers(base, session.modules[base], layer, sides)
    if few is not None:
        return few
    other_order = _other_order(tracer, node, module, inputs, found, call, behind)
    if other_order is not None:
        return other_order
    known = kind_of_module(module) is not None or not list(module.children())
    near = tensors_near(recording, call)
    diagnosis = diagnose(call, module if known else None, inputs if known else [], truth, found, near, behind)
    if diagnosis is None or diagnosis.pattern:
        differing = _other_epsilon(call, module, layer, inputs, truth, found)
        differing = differing or differing_weights(base, module, layer, inputs, truth, found, behind, elsewhere)
        diagnosis = differing or diagnosis
    return diagnosis


def reordered_channels(session: Session, recording: Recording, node: Node, call: str) -> Reordered | None:
    """Diagnose some wrong numbers of a layer that has the channels of its module in another order."""
    layer, name = session.layer(node.name), without_number(call)
    core = core_of(session, recording, call, layer)
    if core is not None and not core.is_folded:
        name = core.name
    module = session.modules.get(name)
    return None if module is None else reordered_weights(name, module, layer)


def _cause_in_core(
    core: Core, layer: Any, truth: Tensor, found: Tensor, sides: str, elsewhere: Callable[[Array], str]
) -> Diagnosis | None:
    """Diagnose a mistake in the weights of a layer that fuses several modules."""
    slack = FOLDED if core.is_folded else 0.0
    few = few_numbers(core.name, core.module, layer, sides, slack)
    if few is not None:
        return few
    diagnosis = diagnose(core.name, core.module, core.inputs, truth, found, {}, core.behind)
    if diagnosis is None or diagnosis.pattern:
        return differing_weights(
            core.name, core.module, layer, core.inputs, truth, found, core.behind, elsewhere, slack
        )
    return replace(diagnosis, cause=f"{diagnosis.cause}{WITH_NORM.rstrip(',')}") if core.is_folded else diagnosis


def _other_epsilon(
    call: str, module: Any, layer: Any, inputs: list[Tensor], truth: Tensor, found: Tensor
) -> Diagnosis | None:
    """Diagnose the epsilon that the Keras layer has, which may differ from PyTorch's by less than any usual one."""
    import torch

    expected, actual = getattr(module, "eps", None), getattr(layer, "epsilon", None)
    if expected is None or actual is None or expected == actual:
        return None
    guess = with_value(module, inputs, "eps", lambda _: actual)()
    if not isinstance(guess, torch.Tensor) or guess.shape != found.shape:
        return None
    left = share_left(truth, found, guess)
    text = f"its epsilon is {actual!r} in Keras, {expected!r} in PyTorch"
    return Diagnosis(call, text, left, (text,)) if left <= EXPLAINED else None


def _other_order(
    tracer: Tracer,
    node: Node,
    module: Any,
    inputs: list[Tensor],
    found: Tensor,
    call: str,
    behind: Callable[[Tensor], Tensor] | None,
) -> Diagnosis | None:
    """Diagnose a layer that takes the same numbers in another order, with weights that were not permuted to match."""
    import torch

    if len(node.inputs) != 1 or len(inputs) != 1 or node.inputs[0].numel() != inputs[0].numel():
        return None
    found_by = [match for match in tracer.library.find(as_real(node.inputs[0])) if match.truth.tensor is inputs[0]]
    if not found_by or not found_by[0].reordered or not tracer.is_flattened(node.inputs[0], inputs[0]):
        return None
    with torch.no_grad():
        guess = module(node.inputs[0].double().reshape(inputs[0].shape))
        guess = guess if behind is None else behind(guess)
    if guess.shape != found.shape or rms(guess - found) > 1e-9 * float(found.std() + 1e-300):
        return None
    cause = (
        f"the rows of {call} are in PyTorch's order (channels, height, width), and what comes in is in Keras's "
        f"(height, width, channels): permute the rows, which is the kind dense:{_sides_before(tracer, node)} of a map, "
        "or the tensor before it"
    )
    return Diagnosis.certain(call, cause)


def _sides_before(tracer: Tracer, node: Node) -> str:
    """The sides of the map that a Flatten before a Keras layer takes, channels first, such as 512x7x7; "" if none."""
    given = tracer.map_before(node.inputs[0]) if node.inputs else None
    return "" if given is None else "x".join(str(side) for side in (given.shape[-1], *given.shape[1:-1]))


def exchanged_parts(tracer: Tracer, node: Node, call: str) -> Diagnosis | None:
    """Diagnose sibling layers that return parts of one PyTorch tensor, such as q, k and v, in an exchanged order."""
    if node.parent is None:
        return None
    parts: list[tuple[str, int, int]] = []
    for child in node.parent.children:
        for output in child.outputs[:1]:
            part = tracer.library.find_part(as_real(output))
            if part is not None and tracer.match(output) is None:
                parts.append((child.name, part[1], id(part[0])))
    indices = [index for _, index, _ in parts]
    if len(parts) < 2 or len({owner for *_, owner in parts}) != 1 or indices == sorted(indices):
        return None
    moved = [
        name.rpartition("/")[2]
        for (name, index, _), right in zip(parts, sorted(indices), strict=True)
        if index != right
    ]
    cause = f"{' and '.join(moved)} are exchanged: each gives another's part of one PyTorch tensor"
    return Diagnosis.certain(call, cause)
