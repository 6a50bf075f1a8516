"""Finds why a layer returns something else: its weights, its input, or an activation after it."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.call_names import without_number
from porting.kinds import becomes, kind_called, kind_of_module
from porting.kinds.activation import LINEAR, functions, joined_names
from porting.kinds.base import Kind, Leaf, attribute, with_change, with_value
from porting.models.inputs import Axes, inverse, moved
from porting.models.stacks import layers_of_stack, modules_of, owner_of
from porting.parity.content import as_real
from porting.parity.diagnose import EXPLAINED, as_tensors, diagnose
from porting.parity.fused import Activations, Core, core_of
from porting.parity.measure import rms
from porting.parity.record import Recording
from porting.parity.report import WEIGHTS, Diagnosis
from porting.parity.trace import Node, Tracer

if TYPE_CHECKING:
    from torch import Tensor

    from porting.kinds.transforms import Array
    from porting.parity.session import Session

# A few roundings of the greatest number, as many as folding in float32 causes.
_FOLDED = 2.0**-21
# Two roundings of a number: a sum of biases may be made in float32 or in float64.
_SUMMED = 2.0**-22
_NORM = ", with the norm behind it folded in,"
# The weights of a layer with a mistake are nearer to their own than to others by this factor.
_NEAR = 0.1
# Up to this many differing numbers of a weight are named one by one.
_FEW = 3


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
    elsewhere = partial(_owner, session, base)
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
    few = _few_numbers(base, session.modules[base], layer, sides)
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
        differing = differing or _differing_weights(base, module, layer, inputs, truth, found, behind, elsewhere)
        diagnosis = differing or diagnosis
    return diagnosis


def _cause_in_core(
    core: Core, layer: Any, truth: Tensor, found: Tensor, sides: str, elsewhere: Callable[[Array], str]
) -> Diagnosis | None:
    """Diagnose a mistake in the weights of a layer that fuses several modules."""
    slack = _FOLDED if core.is_folded else 0.0
    few = _few_numbers(core.name, core.module, layer, sides, slack)
    if few is not None:
        return few
    diagnosis = diagnose(core.name, core.module, core.inputs, truth, found, {}, core.behind)
    if diagnosis is None or diagnosis.pattern:
        return _differing_weights(
            core.name, core.module, layer, core.inputs, truth, found, core.behind, elsewhere, slack
        )
    return replace(diagnosis, cause=f"{diagnosis.cause}{_NORM.rstrip(',')}") if core.is_folded else diagnosis


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
    left = _share_left(truth, found, guess)
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
        "(height, width, channels): permute the rows, or the tensor before it"
    )
    return Diagnosis.certain(call, cause)


@dataclass(frozen=True)
class _Weight:
    """A weight that both sides have, in PyTorch's order of axes, and the Keras variables that hold it."""

    name: str
    expected: np.ndarray[Any, Any]
    actual: np.ndarray[Any, Any]
    leaf: Leaf
    variables: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]

    def place_in_keras(self, place: tuple[int, ...]) -> str:
        """Where Keras holds a number of PyTorch's tensor, as a remark; empty if it holds none by itself."""
        ends = np.cumsum([0, *(math.prod(variable.shape) for variable in self.variables)])
        # Number all places, and see which number comes to this one.
        numbers = [
            np.arange(begin, end, dtype=np.float64).reshape(tuple(variable.shape))
            for begin, end, variable in zip(ends, ends[1:], self.variables, strict=False)
        ]
        try:
            made = self.leaf.transform.to_torch(numbers, list(self.shapes))
        except ValueError:
            return ""
        which = self.leaf.sources.index(self.name) if self.name in self.leaf.sources else 0
        number = float(made[which][place])
        if not number.is_integer() or not 0 <= number < ends[-1]:
            return ""
        which = int(np.searchsorted(ends, number, side="right")) - 1
        found = np.unravel_index(int(number) - int(ends[which]), tuple(self.variables[which].shape))
        return f" (in Keras {self.variables[which].path}{_indexed(found)})"


def _weights(module: Any, layer: Any, sides: str = "") -> list[_Weight]:
    """The weights that both sides have. Behind a Flatten of a map with `sides`, rows may be in the order of Keras's."""
    kind = kind_of_module(module)
    if kind is None or layer is None or not becomes(module, layer):
        return []
    kinds = [kind]
    if sides and kind.name == "dense":
        kinds.append(kind_called(f"dense:{sides}"))
    if kind.name == "layer_norm" and len(module.normalized_shape) > 1:
        kinds.append(kind_called("layer_norm:channels_first"))
    if stack := layers_of_stack(module):  # its layers were not recorded: it may be any of them
        kinds = [kind_called(f"{kind.name}:l{index}") for index in range(len(stack))]

    def differing(weights: list[_Weight]) -> int:
        return sum(int((each.expected != each.actual).sum()) for each in weights)

    return min((each for one in kinds if (each := list(_weights_as(one, module, layer)))), key=differing, default=[])


def _sides_before(tracer: Tracer, node: Node) -> str:
    """The sides of the map that a Flatten before a Keras layer takes, channels first, such as 512x7x7; "" if none."""
    given = tracer.map_before(node.inputs[0]) if node.inputs else None
    return "" if given is None else "x".join(str(side) for side in (given.shape[-1], *given.shape[1:-1]))


def _weights_as(kind: Kind, module: Any, layer: Any) -> Iterator[_Weight]:
    own = kind.variables(layer)
    for leaf in kind.leaves_for(module):
        tensors = [attribute(module, name) for name in leaf.sources]
        held = [tensor for tensor in tensors if tensor is not None]
        if not held or len(held) < len(leaf.sources):
            continue
        if not all(name in own for name in leaf.targets):
            continue
        expected = [tensor.detach().float().numpy() for tensor in held]
        arrays = [np.asarray(own[name]).astype(np.float32) for name in leaf.targets]
        shapes = tuple(array.shape for array in expected)
        try:
            actual = leaf.transform.to_torch(arrays, list(shapes))
        except ValueError:
            continue
        variables = tuple(own[name] for name in leaf.targets)
        if sum(each.size for each in actual) > sum(each.size for each in arrays):
            # The variable holds their sum, so which of them is wrong cannot be known.
            total = leaf.transform.to_torch(leaf.transform.to_keras(expected, []), list(shapes))[0]
            total = np.where(np.isclose(total, actual[0], rtol=_SUMMED, atol=0.0), actual[0], total)
            yield _Weight(f"({' + '.join(leaf.sources)})", total, actual[0], leaf, variables, shapes)
            continue
        for name, one, other in zip(leaf.sources, expected, actual, strict=True):
            if one.shape == other.shape:
                yield _Weight(name, one, other, leaf, variables, shapes)


def _joined(module: Any, layer: Any) -> dict[str, Array]:
    """Keras's values of tensors of which several make one variable, such as an LSTM's two biases."""
    kind = kind_of_module(module)
    if kind is None or layers_of_stack(module):
        return {}
    own = kind.variables(layer)
    found: dict[str, Array] = {}
    for leaf in kind.leaves_for(module):
        held = [attribute(module, name) for name in leaf.sources]
        if len(held) > len(leaf.targets) and all(name in own for name in leaf.targets):
            arrays = [np.asarray(own[name]).astype(np.float32) for name in leaf.targets]
            shapes = [tuple(tensor.shape) for tensor in held if tensor is not None]
            with contextlib.suppress(ValueError):  # Keras's may have another shape
                made = leaf.transform.to_torch(arrays, shapes) if len(shapes) == len(held) else []
                found |= dict(zip(leaf.sources, made, strict=True))
    return found


def _few_numbers(call: str, module: Any, layer: Any, sides: str, slack: float = 0.0) -> Diagnosis | None:
    """Diagnose weights of which only a few numbers differ, by more than `slack` of the greatest."""
    note = _NORM if slack else ""
    causes = []
    for weight in _weights(module, layer, sides):
        name, expected, actual = weight.name, weight.expected, weight.actual
        differing = np.argwhere(~_same(expected, actual, slack))
        if not len(differing):
            continue
        if len(differing) > _FEW or (len(differing) > 1 and len(differing) >= expected.size / 2):
            return None  # these few numbers would not be all
        said = []
        for place in differing:
            one, other = float(expected[tuple(place)]), float(actual[tuple(place)])
            times = f", {_short(other / one)} times what it should be, {one:.9g}" if one else ", which should be 0"
            inside = weight.place_in_keras(tuple(place))
            said.append(f"{call}.{name}{_indexed(place)}{note} is {other:.9g}{times}{inside}")
        channel = f"output channel {int(differing[0][0])}: " if expected.ndim > 1 else ""
        causes.append(channel + "; ".join(said))
    return Diagnosis(call, "; ".join(causes), 0.0, tuple(causes)) if causes else None


def _short(factor: float) -> str:
    """A factor with as many digits as tell it from 1."""
    text = f"{factor:.6g}"
    return text if text != "1" else f"{factor:.9g}"


def _indexed(place: Iterable[Any]) -> str:
    return f"[{', '.join(str(int(each)) for each in place)}]"


def _same(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any], slack: float) -> np.ndarray[Any, Any]:
    near = np.abs(expected - actual) <= slack * float(np.abs(expected).max(initial=0.0))
    same: np.ndarray[Any, Any] = (expected == actual) | (np.isnan(expected) & np.isnan(actual)) | near
    return same


def _differing_weights(
    call: str,
    module: Any,
    layer: Any,
    inputs: list[Tensor],
    truth: Tensor,
    found: Tensor,
    behind: Callable[[Tensor], Tensor] | None,
    elsewhere: Callable[[Array], str],
    slack: float = 0.0,
) -> Diagnosis | None:
    """Diagnose weights that differ, if PyTorch with Keras's weights in place of its own computes Keras's result."""
    weights = _weights(module, layer)
    causes = _known_change(call, weights, elsewhere, slack)
    basis = "" if causes else WEIGHTS
    causes = causes or _differences(call, weights, slack)
    if not causes:
        return None
    joined = _joined(module, layer)

    def put_in(changed: Any) -> None:
        import torch

        actual = {weight.name: weight.actual for weight in weights if weight.name in weight.leaf.sources}
        for path, values in (joined | actual).items():
            owner, _, name = path.rpartition(".")
            tensor = getattr(changed.get_submodule(owner), name)
            tensor.data = torch.from_numpy(values.astype(np.float64))

    made = as_tensors(with_change(module, inputs, put_in)())
    results = [each if behind is None else behind(each) for each in made]
    left = [_share_left(truth, found, each) for each in results if each.shape == found.shape]
    unexplained = min(left, default=math.inf)
    if unexplained > EXPLAINED:
        return None
    return Diagnosis(call, "; ".join(causes), unexplained, tuple(causes), basis=basis)


def _share_left(truth: Tensor, found: Tensor, guess: Tensor) -> float:
    """The share of the difference that a guess leaves; a negative variance makes the same numbers NaN."""
    import torch

    if not torch.equal(found.isfinite(), guess.isfinite()):
        return math.inf
    finite = found.isfinite() & truth.isfinite()
    if not finite.any():
        return 0.0
    total = rms((found - truth)[finite])
    return rms((found - guess)[finite]) / total if total else 0.0


def nearest_by_weights(session: Session, node: Node, calls: Sequence[str]) -> str:
    """The PyTorch call whose module has clearly the weights of a Keras layer, up to a mistake; else the first."""
    distances = {call: _distance_of_weights(session, node, call) for call in calls}
    first, *others = sorted(distances, key=distances.__getitem__)
    limit = _NEAR * min((distances[call] for call in others), default=math.inf)
    return first if distances[first] <= min(_NEAR, limit) else calls[0]


def _distance_of_weights(session: Session, node: Node, call: str) -> float:
    """How far a Keras layer's weights are from those of a call's module, from 0 on.

    This is their squared distance over their size or, if it is less, the share of numbers that the module does not have
    anywhere: its channels may be in another order.
    """
    weights = _weights(session.modules[without_number(call)], session.layer(node.name))
    pairs = [(each.expected.astype(np.float64), each.actual.astype(np.float64)) for each in weights]
    count, size = sum(one.size for one, _ in pairs), sum(float(np.square(one).sum()) for one, _ in pairs)
    if not size:
        return math.inf
    distance = sum(float(np.square(one - other).sum()) for one, other in pairs)
    others = sum(int((~np.isin(other, one)).sum()) for one, other in pairs)
    return min(distance / size, others / count)


def has_size_of(session: Session, node: Node, call: str) -> bool:
    """Whether the kernels of a Keras layer have as many numbers as those of a PyTorch call's module."""
    module, layer = session.modules[without_number(call)], session.layer(node.name)
    theirs = sorted(each.numel() for each in module.parameters() if each.ndim > 1)
    ours = sorted(math.prod(each.shape) for each in getattr(layer, "weights", ()) if len(each.shape) > 1)
    return theirs == ours


def _owner(session: Session, call: str, values: Array) -> str:
    """The module other than `call` that alone holds these numbers in PyTorch; empty if none does, or several do.

    Equal numbers, such as the ones of a new norm, say nothing.
    """
    if values.size < 2 or (values == values.reshape(-1)[0]).all():
        return ""
    own, found = owner_of(call, session.modules)[0], []
    for name, module in session.modules.items():
        # The layers of a stack stand for the stack.
        if name not in {call, own} and not layers_of_stack(module):
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if any(each.shape == values.shape and _equal(each, values) for each in tensors):
                found.append(name)
    return found[0] if len(found) == 1 else ""


def _equal(tensor: Tensor, values: Array) -> bool:
    return bool(np.array_equal(tensor.detach().float().numpy(), values))


def _known_change(call: str, weights: list[_Weight], elsewhere: Callable[[Array], str], slack: float) -> list[str]:
    """What was done to all weights that differ from the checkpoint's, if that is a known mistake; empty if not."""
    note = _NORM if slack else ""
    for one, other in itertools.combinations(weights, 2):
        exchanged = np.array_equal(one.expected, other.actual) and np.array_equal(other.expected, one.actual)
        if exchanged and not np.array_equal(one.expected, one.actual):
            return [f"its {one.name} and {other.name} are exchanged"]
    factors = {weight.name: _factor(weight.expected, weight.actual, slack) for weight in weights}
    if any(factor is not None for factor in factors.values()):
        return [
            f"{call}.{name}{note} is {factor:.6g} times what it should be" for name, factor in factors.items() if factor
        ]
    differing = [weight for weight in weights if not _same(weight.expected, weight.actual, slack).all()]
    moved = [_moved_channels(weight, slack) for weight in differing]
    if differing and all(moved):
        return list(dict.fromkeys(moved))
    owners = {weight.name: elsewhere(weight.actual) for weight in differing}
    if owners and all(owners.values()):
        return [_said_of_owner(owner, owners) for owner in dict.fromkeys(owners.values())]
    return []


def _differences(call: str, weights: list[_Weight], slack: float) -> list[str]:
    """By how much weights differ from the checkpoint's; empty if they do not."""
    said, note = [], _NORM if slack else ""
    for weight in weights:
        expected, actual = weight.expected, weight.actual
        count = int((~_same(expected, actual, slack)).sum())
        if not count:
            continue
        scale = float(np.sqrt(np.square(expected, dtype=np.float64).mean())) or 1.0
        greatest = float(np.abs(expected.astype(np.float64) - actual).max())
        said.append(
            f"{call}.{weight.name}{note} is not the checkpoint's: {count} of {expected.size} numbers differ, by at "
            f"most {greatest / scale:.2g} of its size"
        )
    return said


def _said_of_owner(owner: str, owners: Mapping[str, str]) -> str:
    names = [name for name, other in owners.items() if other == owner]
    return f"its {' and '.join(names)} {'is that' if len(names) == 1 else 'are those'} of {owner}"


def _moved_channels(weight: _Weight, slack: float) -> str:
    """Which channels of a weight are in each other's place; empty if they are not the same channels."""
    for axis, what in ((0, "output"), (1, "input")):
        if weight.expected.ndim <= axis or weight.expected.shape[axis] < 2 or slack:
            continue
        theirs, ours = (np.moveaxis(each, axis, 0) for each in (weight.expected, weight.actual))
        places = {row.tobytes(): index for index, row in enumerate(theirs)}
        order = [places.get(row.tobytes(), -1) for row in ours]
        if sorted(order) != list(range(len(order))):
            continue
        moved = [index for index, place in enumerate(order) if index != place]
        if len(moved) == 2:
            return f"its {what} channels {moved[0]} and {moved[1]} are exchanged"
        return f"its {what} channels are in another order: {len(moved)} of {len(order)} are in another's place"
    return ""


def _factor(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any], slack: float) -> float | None:
    """The factor, other than 1, by which all numbers of a weight were multiplied, up to rounding; None if none."""
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    power = float(np.square(one).sum())
    if not power or not np.isfinite(other).all():
        return None
    factor = float((one * other).sum()) / power
    left = float(np.abs(other - factor * one).max())
    if not factor or abs(factor - 1.0) < max(1e-6, slack) or left > max(2.0**-22, slack) * float(np.abs(other).max()):
        return None
    return factor


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
