"""Keras layers that are several modules in PyTorch, such as a convolution with a folded norm or an activation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_of_layer, kind_of_module
from porting.kinds.activation import GRID
from porting.kinds.activation import KIND as ACTIVATION
from porting.models.observe import to_torch
from porting.parity.content import as_real
from porting.parity.derived import fold
from porting.parity.record import Recording
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
        module = session.modules[behind.partition("#")[0]]
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if _is_taken_by_a(tracer, node, kind_of_module(module), session):
                break
        elif not (ACTIVATION.is_module(module) and _has_activation(session.layer(node.name))):
            break
        current = behind
    return current if current != call else _nearest(session, recording, node, call)


def activation_in_both(
    session: Session, node: Node, call: str, expected: Tensor, actual: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """The activation inside a Keras layer, if PyTorch's code calls the same as a function behind the module `call`.

    No module returns its result, so this is told by what is nearer to Keras's result: the module's own or, without
    being equal to it, what the activation makes of that. If they are equal, the activation itself may be the mistake.
    """
    import keras

    layer = session.layer(node.name)
    if layer is None or not session.kind_matches(call, node.name) or not _has_activation(layer):
        return None

    def activation(tensor: Tensor) -> Tensor:
        with session.float64.active():
            return to_torch(layer.activation(keras.ops.convert_to_tensor(tensor.numpy())))

    def distance(tensor: Tensor) -> float:
        return float((actual - tensor).square().mean().sqrt())

    own = distance(expected)
    return activation if 1e-12 * own < distance(activation(expected)) < own else None


def core_of(session: Session, recording: Recording, call: str, layer: Any) -> Core | None:
    """The module of the layer's kind that comes before `call`; None if the layer is `call` itself."""
    from torch import nn

    kind = kind_of_layer(layer) if layer is not None else None
    if kind is None:
        return None
    modules = dict(session.double_model.named_modules())
    made_by = {
        id(truth): name
        for name, each in recording.calls.items()
        for truth in each.outputs
        if name.partition("#")[0] in modules and not list(modules[name.partition("#")[0]].children())
    }
    tail: list[nn.Module] = []
    current = call
    while kind_of_module(modules[current.partition("#")[0]]) is not kind:
        inputs = recording.calls[current].inputs
        before = made_by.get(id(inputs[0])) if len(inputs) == 1 else None
        if before is None or len(tail) == _MOST_BEHIND:
            return None
        tail.insert(0, modules[current.partition("#")[0]])
        current = before
    if not tail:
        return None
    name = current.partition("#")[0]
    module = modules[name]
    norm = tail[0]
    is_folded = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        folded = fold(module, norm)
        if folded is None:
            return None
        module, tail = copy.deepcopy(module), tail[1:]
        module.weight, module.bias = nn.Parameter(folded[0]), nn.Parameter(folded[1])
    taken = [truth.tensor for truth in recording.calls[current].inputs]
    return Core(name, module, taken, tuple(tail), is_folded)


def _behind(session: Session, recording: Recording, call: str) -> Iterator[str]:
    """Yield the modules without submodules whose only input is the result of this call."""
    mine = recording.calls[call].outputs
    for name, each in recording.calls.items():
        if mine and name != call and len(each.inputs) == 1 and each.inputs[0] is mine[0]:
            module = session.modules.get(name.partition("#")[0])
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
        return float((actual - expected).square().mean().nan_to_num(float("inf")))

    nearest = min((call, *_behind(session, recording, call)), key=distance)
    return nearest if distance(nearest) < 0.01 * distance(call) else call
