"""Keras layers that are several modules in PyTorch, such as a convolution with a folded norm or an activation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.call_names import without_number
from porting.kinds import becomes, kind_of_layer, kind_of_module
from porting.kinds.activation import GRID, LINEAR, functions, joined_names
from porting.kinds.activation import KIND as ACTIVATION
from porting.models.inputs import Axes, inverse
from porting.models.observe import applied
from porting.models.stacks import modules_of
from porting.parity.content import as_real
from porting.parity.derived import fold
from porting.parity.measure import mean_square_distance, rms
from porting.parity.record import Recording
from porting.parity.report import Diagnosis
from porting.parity.trace import Node, Tracer, key_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from porting.parity.session import Session

# A norm and an activation.
_MOST_BEHIND = 2


@dataclass(frozen=True)
class Core:
    """The module that holds the weights of a fused Keras layer, and the modules after it that the layer includes.

    `module` is in float64. With `is_folded`, the norm after it is folded in.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    tail: tuple[Callable[[Tensor], Tensor], ...]
    is_folded: bool

    def behind(self, result: Tensor) -> Tensor:
        for module in self.tail:
            result = module(result)
        return result


def last_of_fused(session: Session, recording: Recording, tracer: Tracer, node: Node, call: str) -> str:
    """The PyTorch call whose result a Keras layer returns, if the layer's own module is `call`."""
    from torch import nn

    if not session.kind_matches(call, node.name):
        return _nearest(session, recording, node, call)
    current = call
    for _ in range(_MOST_BEHIND):
        behind = next(_behind(session, recording, current), None)
        if behind is None:
            break
        module = session.modules[without_number(behind)]
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if _is_taken_by_a(tracer, node, kind_of_module(module), session):
                break
        elif not (ACTIVATION.is_module(module) and _has_activation(session.layer(node.name))):
            break
        current = behind
    return current if current != call else _nearest(session, recording, node, call)


@dataclass(frozen=True)
class Activations:
    """The activation inside a Keras layer, and what PyTorch's code does with the result of the layer's module.

    Both take tensors in Keras's order of axes. `theirs` is None if that is not known. The names are those that
    `joined_names` gives to functions.
    """

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor] | None
    our_name: str
    their_name: str
    axes: Axes

    def behind(self, result: Tensor) -> Tensor:
        """What Keras makes of a result of the module in PyTorch's order of axes, in that order."""
        if result.ndim != len(self.axes):
            return self.ours(result)
        return self.ours(result.permute(self.axes)).permute(inverse(self.axes))

    def another(self, call: str, expected: Tensor, actual: Tensor) -> Diagnosis | None:
        """Diagnose a Keras activation that is not PyTorch's, behind weights that are right."""
        if self.theirs is None or self.our_name == self.their_name or not same(self.ours(expected), actual):
            return None
        cause = f"its activation is {self.our_name} in Keras, and PyTorch applies {self.their_name} to its result"
        return Diagnosis.certain(call, cause)

    def expected(self, truth: Tensor, actual: Tensor) -> Tensor:
        """What Keras should return, if the module returns `truth`."""
        if self.theirs is not None:
            return self.theirs(truth)
        activated = self.ours(truth)
        return min(activated, truth, key=lambda tensor: mean_square_distance(actual, tensor))


def activations_of(
    session: Session, recording: Recording, node: Node, call: str, truth: Tensor, axes: Axes, actual: Tensor
) -> Activations | None:
    """The activation inside a Keras layer and the function that PyTorch's code calls behind the module `call`.

    No module returns that function's result, but a later one takes it. `truth` is the module's result, and `axes` puts
    it into Keras's order. None if the layer has no activation inside, or PyTorch has a module for it.
    """
    import torch

    layer = session.layer(node.name)
    function = ACTIVATION.inside(layer)
    if function is None or ACTIVATION.is_module(session.modules[without_number(call)]):
        return None

    def ours(tensor: Tensor) -> Tensor:
        with session.float64.active():
            return applied(function, tensor)

    def in_keras(tensor: Tensor) -> Tensor:
        return tensor.permute(axes).reshape(actual.shape)

    expected, known = in_keras(truth), functions(actual.ndim)
    taken = [in_keras(each) for each in _taken_behind(session, recording, call, truth)]
    their_names = [name for name in known if any(same(known[name](expected), each) for each in taken)]
    # A function may compute what it says by another formula, such as a polynomial: only the same results are the same.
    results = [(expected, ours(expected))]
    with contextlib.suppress(Exception):  # a layer as the activation may take tensors of one shape
        # More numbers than those of this run, for which several functions may do the same.
        grid = torch.from_numpy(GRID.copy()).reshape(*(1,) * (actual.ndim - 1), -1)
        results.append((grid, ours(grid)))
    our_name = next((name for name in known if all(same(known[name](x), made) for x, made in results)), "")
    if our_name == LINEAR:
        return None
    our_name = our_name or getattr(function, "__name__", type(function).__name__)
    if our_name in their_names:
        return Activations(ours, ours, our_name, our_name, axes)
    theirs = known[their_names[0]] if their_names else None
    return Activations(ours, theirs, our_name, joined_names(their_names), axes)


def _taken_behind(session: Session, recording: Recording, call: str, truth: Tensor) -> list[Tensor]:
    """The tensors of this size that later modules take, and results.

    The result itself counts as taken only by modules with weights: dropouts and the like do nothing to it, and modules
    of other kinds may begin with an activation.
    """
    order, found = recording.order.get(call, -1), []
    for name in recording.order:
        if recording.order[name] > order:
            module = session.modules.get(without_number(name))
            kind = None if module is None else kind_of_module(module)
            takes = kind is not None and bool(kind.leaves)
            tensors = (given.tensor for given in recording.calls[name].inputs)
            found += [each for each in tensors if takes or each is not truth]
    found += [each.tensor for each in recording.outputs.values()]
    return [each for each in found if each.shape == truth.shape]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of float64 agree up to rounding."""
    return bool(other.isfinite().all()) and rms(one - other) <= 1e-12 * rms(other)


def core_of(session: Session, recording: Recording, call: str, layer: Any) -> Core | None:
    """The module of the layer's kind that comes before `call`; None if the layer is `call` itself."""
    from torch import nn

    if layer is None or kind_of_layer(layer) is None:
        return None
    modules = modules_of(session.double_model)
    made_by = {
        id(truth): name
        for name, each in recording.calls.items()
        for truth in each.outputs
        if without_number(name) in modules and not list(modules[without_number(name)].children())
    }
    tail: list[nn.Module] = []
    current = call
    while not becomes(modules[without_number(current)], layer):
        inputs = recording.calls[current].inputs
        before = made_by.get(id(inputs[0])) if len(inputs) == 1 else None
        if before is None or len(tail) == _MOST_BEHIND:
            return None
        tail.insert(0, modules[without_number(current)])
        current = before
    if not tail:
        return None
    name = without_number(current)
    module = modules[name]
    norm = tail[0]
    is_folded = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        folded = fold(module, norm)
        if folded is None:
            return None
        module, tail = copy.deepcopy(module), tail[1:]
        module.weight, module.bias = nn.Parameter(folded[0]), nn.Parameter(folded[1])
    return Core(name, module, recording.calls[current].taken(), tuple(tail), is_folded)


def _behind(session: Session, recording: Recording, call: str) -> Iterator[str]:
    """Yield the modules without submodules whose only input is the result of this call."""
    mine = recording.calls[call].outputs
    for name, each in recording.calls.items():
        if mine and name != call and len(each.inputs) == 1 and each.inputs[0] is mine[0]:
            module = session.modules.get(without_number(name))
            if module is not None and not list(module.children()):
                yield name


def _is_taken_by_a(tracer: Tracer, node: Node, kind: Any, session: Session) -> bool:
    given = {key_of(output) for output in node.outputs}
    return any(
        session.layer_kind(other.name) is kind and any(key_of(taken) in given for taken in other.inputs)
        for other in tracer.nodes
    )


def _has_activation(layer: Any) -> bool:
    values = ACTIVATION.fused_settings(layer).get("activation")
    return values is not None and not np.array_equal(values, GRID.astype(np.float32))


def _nearest(session: Session, recording: Recording, node: Node, call: str) -> str:
    """The call itself, or one directly after it whose result is much nearer to Keras's."""

    def distance(name: str) -> float:
        outputs = recording.calls[name].outputs
        actual = as_real(node.outputs[0])
        axes = session.axes_in_keras(outputs[0].tensor, actual) if outputs else None
        if axes is None:
            return float("inf")
        expected = outputs[0].tensor.permute(axes).reshape(actual.shape)
        return mean_square_distance(actual, expected)

    nearest = min((call, *_behind(session, recording, call)), key=distance)
    return nearest if distance(nearest) < 0.01 * distance(call) else call
