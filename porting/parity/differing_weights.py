"""Diagnoses a layer by its weights: how they differ from those of its module in PyTorch."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.call_names import without_number
from porting.kinds import becomes, kind_called, kind_of_module
from porting.kinds.base import Kind, Leaf, attribute, with_change
from porting.models.stacks import layers_of_stack, owner_of
from porting.parity.diagnose import EXPLAINED, as_tensors
from porting.parity.measure import rms
from porting.parity.report import WEIGHTS, Diagnosis
from porting.parity.trace import Node

if TYPE_CHECKING:
    from torch import Tensor

    from porting.kinds.transforms import Array
    from porting.parity.session import Session

# A few roundings of the greatest number, as many as folding in float32 causes.
FOLDED = 2.0**-21
# Two roundings of a number: a sum of biases may be made in float32 or in float64.
_SUMMED = 2.0**-22
WITH_NORM = ", with the norm behind it folded in,"
# The weights of a layer with a mistake are nearer to their own than to others by this factor.
_NEAR = 0.1
# Up to this many differing numbers of a weight are named one by one.
_FEW = 3
# Up to so many channels without an equal one are given to the nearest.
_MOST_LEFT = 64


@dataclass(frozen=True)
class _Weight:
    """A weight that both sides have, in PyTorch's order of axes, and the Keras variables that hold it."""

    name: str
    expected: np.ndarray[Any, Any]
    actual: np.ndarray[Any, Any]
    leaf: Leaf
    variables: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    # By axis of `actual`: the places in Keras of PyTorch's channels, where the layer has them in another order.
    places: Mapping[int, Array] = field(default_factory=dict)

    def in_order(self, axis: int, places: Array) -> _Weight:
        """The same weight, with Keras's channels along an axis brought into PyTorch's order."""
        return replace(self, actual=np.take(self.actual, places, axis), places={**self.places, axis: places})

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
        place = tuple(self.places[axis][each] if axis in self.places else each for axis, each in enumerate(place))
        which = self.leaf.sources.index(self.name) if self.name in self.leaf.sources else 0
        number = float(made[which][place])
        if not number.is_integer() or not 0 <= number < ends[-1]:
            return ""
        which = int(np.searchsorted(ends, number, side="right")) - 1
        found = np.unravel_index(int(number) - int(ends[which]), tuple(self.variables[which].shape))
        return f" (in Keras {self.variables[which].path}{_indexed(found)})"


def weights_of(module: Any, layer: Any, sides: str = "") -> list[_Weight]:
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


def few_numbers(call: str, module: Any, layer: Any, sides: str, slack: float = 0.0) -> Diagnosis | None:
    """Diagnose weights of which only a few numbers differ, by more than `slack` of the greatest."""
    return _few_of(call, weights_of(module, layer, sides), slack)


def _few_of(call: str, weights: list[_Weight], slack: float = 0.0) -> Diagnosis | None:
    note = WITH_NORM if slack else ""
    causes = []
    for weight in weights:
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


@dataclass(frozen=True)
class Reordered:
    """A layer that has the channels of its module in another order, and some numbers beside that wrong.

    `order` is PyTorch's number of each output channel of Keras, or None if these are in order. `orders` says which
    channels are in another order. That may be so on purpose, which the layer itself does not show.
    """

    order: Array | None
    orders: tuple[str, ...]
    mistake: Diagnosis

    @property
    def with_orders(self) -> Diagnosis:
        """The mistake and the orders, as one diagnosis."""
        causes = (*self.orders, *self.mistake.checked)
        return replace(self.mistake, cause="; ".join(causes), checked=causes)


def reordered_weights(call: str, module: Any, layer: Any) -> Reordered | None:
    """Diagnose a layer with its channels in another order of which some numbers differ, in less than half of them."""
    weights, found = _in_order(weights_of(module, layer))
    if not found:
        return None
    mistake = _few_of(call, weights)
    if mistake is None:
        said = tuple(_differences(call, weights, 0.0))
        if not said:
            return None
        mistake = Diagnosis(call, "; ".join(said), 0.0, said, basis=WEIGHTS)
    orders = tuple(_said_of_order(("output", "input")[axis], order) for axis, order in found.items())
    return Reordered(found.get(0), orders, mistake)


def orders_of(module: Any, layer: Any) -> dict[str, dict[int, Array]]:
    """By name and axis of PyTorch's tensors: the numbers there of the layer's channels, if these are in another order.

    Most channels of the layer must be equal to one of PyTorch's, and each of PyTorch's must stand for one.
    """
    weights, _ = _in_order(weights_of(module, layer))
    return {
        each.name: {axis: np.argsort(places) for axis, places in each.places.items()} for each in weights if each.places
    }


def _in_order(weights: list[_Weight]) -> tuple[list[_Weight], dict[int, Array]]:
    """The weights in PyTorch's order, and the order of Keras's output (0) and input (1) channels where it is another.

    A layer's order is known if half of its channels or more have their equals in PyTorch.
    """
    found: dict[int, Array] = {}
    outputs = _places_of_rows(weights)
    if outputs is not None:
        found[0] = np.argsort(outputs)
        weights = [each.in_order(0, outputs) for each in weights]
    kernels = [each for each in weights if each.expected.ndim > 1]
    inputs = _places([_rows(kernels[0].expected, 1)], [_rows(kernels[0].actual, 1)]) if len(kernels) == 1 else None
    if inputs is not None:
        found[1] = np.argsort(inputs)
        weights = [each.in_order(1, inputs) if each is kernels[0] else each for each in weights]
    return weights, found


def _places_of_rows(weights: list[_Weight]) -> Array | None:
    """The places in Keras of PyTorch's output channels, by all weights together; None if they are in order."""
    if len({each.expected.shape[:1] for each in weights}) != 1 or not weights[0].expected.ndim:
        return None
    theirs = [_rows(each.expected, 0) for each in weights]
    ours = [_rows(each.actual, 0) for each in weights]
    found = _places(theirs, ours)
    if found is not None:
        return found
    # The input channels may be in another order too.
    return _places([np.sort(each, axis=1) for each in theirs], [np.sort(each, axis=1) for each in ours])


def _rows(values: Array, axis: int) -> Array:
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _places(theirs: list[Array], ours: list[Array]) -> Array | None:
    """Where each row of PyTorch's is in Keras; None if most rows are in no other place, or are in none."""
    one, other = np.concatenate(theirs, axis=1), np.concatenate(ours, axis=1)
    count = len(one)
    held: dict[bytes, list[int]] = {}
    for index, row in enumerate(other):
        held.setdefault(row.tobytes(), []).append(index)
    places = np.full(count, -1)
    for index, row in enumerate(one):
        same = held.get(row.tobytes(), [])
        if index in same:
            same.remove(index)
            places[index] = index
        elif len(same) == 1:
            places[index] = same.pop()
    if np.unique(places[places >= 0]).size < max((places >= 0).sum(), count / 2):
        return None
    if (places[places >= 0] == np.flatnonzero(places >= 0)).all():
        return None
    left = [index for index in range(count) if index not in set(places.tolist())]
    if len(left) > _MOST_LEFT:
        return None
    for index in np.flatnonzero(places < 0).tolist():
        nearest = min(left, key=lambda each: float(np.square(one[index].astype(np.float64) - other[each]).sum()))
        left.remove(nearest)
        places[index] = nearest
    return places


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


def differing_weights(
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
    weights = weights_of(module, layer)
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
    left = [share_left(truth, found, each) for each in results if each.shape == found.shape]
    unexplained = min(left, default=math.inf)
    if unexplained > EXPLAINED:
        return None
    return Diagnosis(call, "; ".join(causes), unexplained, tuple(causes), basis=basis)


def share_left(truth: Tensor, found: Tensor, guess: Tensor) -> float:
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
    weights = weights_of(session.modules[without_number(call)], session.layer(node.name))
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


def owner_by_numbers(session: Session, call: str, values: Array) -> str:
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
    note = WITH_NORM if slack else ""
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
    said, note = [], WITH_NORM if slack else ""
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
        return _said_of_order(what, order)
    return ""


def _said_of_order(what: str, order: Iterable[int]) -> str:
    order = list(order)
    moved = [index for index, place in enumerate(order) if index != place]
    if len(moved) == 2:
        return f"its {what} channels {moved[0]} and {moved[1]} are exchanged"
    return f"its {what} channels are in another order: {len(moved)} of {len(order)} are in another's place"


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
