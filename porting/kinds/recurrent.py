"""Recurrent layers: LSTM, GRU and simple RNN, in one direction or both."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError
from porting.kinds.activation import LINEAR, functions, name_of_function, settings_of_function
from porting.kinds.base import Kind, Leaf, Mistake, Settings, in_double, with_change
from porting.kinds.transforms import Gates, JoinedBiases

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

# By PyTorch class, the index in PyTorch of each gate in Keras's order.
ORDERS = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}
# The order in which PyTorch stacks the gates' weights.
GATES = {"LSTM": ("input", "forget", "cell", "output"), "GRU": ("reset", "update", "new")}


def _mode(module: Any) -> str:
    """LSTM, GRU or RNN, also for a class that derives from them."""
    return str(getattr(module, "mode", "")).partition("_")[0]


class Recurrent(Kind):
    name = "recurrent"

    def __init__(self, layer: int = 0) -> None:
        self.layer = layer  # the index in a stack, which is one module in PyTorch and several layers in Keras
        self.leaves = _leaves((0,), layer)  # only for their names: the order of gates depends on the module

    def with_details(self, details: str) -> Kind:
        """`l1`: the second layer of a stack, which PyTorch holds in one module."""
        if not re.fullmatch(r"l\d{1,3}", details):
            raise KeyMapError(
                f"the kind recurrent takes the layer of a stack: got {details!r}", hint="Such as recurrent:l1."
            )
        return Recurrent(int(details[1:]))

    def leaves_for(self, module: nn.Module) -> tuple[Leaf, ...]:
        order = ORDERS.get(_mode(module))
        return () if order is None else _leaves(order, self.layer)

    def variables(self, layer: Any) -> dict[str, keras.Variable]:
        if not hasattr(layer, "forward_layer"):
            return variables_of_cell(layer)
        return variables_of_cell(layer.forward_layer, "forward/") | variables_of_cell(layer.backward_layer, "backward/")

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.RNNBase)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        own = layer.forward_layer if isinstance(layer, layers.Bidirectional) else layer
        return isinstance(own, (layers.LSTM, layers.GRU, layers.SimpleRNN))

    def module_settings(self, module: Any) -> Settings:
        settings = {
            "hidden_size": module.hidden_size,
            "bidirectional": module.bidirectional,
            "activation": "ReLU" if module.mode == "RNN_RELU" else "tanh",
        }
        if _mode(module) in GATES:
            settings["recurrent_activation"] = "sigmoid"
        return {**settings, "reset_after": True} if _mode(module) == "GRU" else settings

    def layer_settings(self, layer: Any) -> Settings:
        own = getattr(layer, "forward_layer", layer)
        return {"bidirectional": own is not layer, **settings_of_units(own)}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from gate_mistakes(module, inputs, GATES.get(_mode(module), ()))
        biases = [name for name, _ in module.named_parameters() if name.startswith("bias")]
        if _mode(module) == "GRU" and biases:
            yield Mistake("its two biases are exchanged", with_change(module, inputs, _exchange_biases))
            yield Mistake(
                "its two biases are added up in the first, but one belongs inside the reset gate",
                with_change(module, inputs, _add_biases),
            )
        if module.bidirectional:
            yield Mistake("its two directions are exchanged", with_change(module, inputs, _exchange_directions))
        yield from _activation_mistakes(module, inputs)
        if _mode(module) == "GRU" and module.num_layers == 1 and not module.bidirectional:
            yield Mistake(
                "reset_after=False in Keras, where PyTorch resets after", partial(_reset_before, module, inputs)
            )
        sequence = inputs[0]
        if sequence.ndim == 3 and len(inputs) == 1:
            time = 1 if module.batch_first else 0
            backwards = with_change(module, [sequence.flip(time)], lambda _: None)
            yield Mistake("it goes backwards through the sequence", backwards)


def settings_of_units(layer: Any) -> Settings:
    """The settings that a recurrent layer of Keras in one direction and a cell have in common."""
    settings = {"hidden_size": layer.units}
    for name in ("activation", "recurrent_activation"):
        values = settings_of_function(getattr(layer, name, None)).get("activation")
        if values is not None:
            settings[name] = name_of_function(values)
    return {**settings, "reset_after": layer.reset_after} if hasattr(layer, "reset_after") else settings


def gate_mistakes(module: Any, inputs: list[Tensor], gates: tuple[str, ...]) -> Iterator[Mistake]:
    """Mistakes of recurrent layers and cells alike: gates that are exchanged, and biases that are lost."""
    names = [name for name, _ in module.named_parameters()]
    for one, other in itertools.combinations(range(len(gates)), 2):
        text = f"the {gates[one]} gate and the {gates[other]} gate are exchanged"
        exchange = partial(_exchanged, len(gates), one, other)
        yield _changed(module, inputs, text, names, exchange)
        for name in names:
            yield _changed(module, inputs, f"{text} in {name}", [name], exchange)
    biases = [name for name in names if name.startswith("bias")]
    for name in biases:
        yield _changed(module, inputs, f"{name} is lost", [name], lambda values: values * 0)
    yield _changed(module, inputs, "the biases are lost", biases, lambda values: values * 0)


def _leaves(order: tuple[int, ...], layer: int) -> tuple[Leaf, ...]:
    """The leaves of a layer in one direction, then those of a bidirectional layer."""
    places = (("", ""), ("forward/", ""), ("backward/", "_reverse"))
    return tuple(leaf for place, suffix in places for leaf in gate_leaves(order, place, f"_l{layer}{suffix}"))


def gate_leaves(order: tuple[int, ...], place: str = "", end: str = "") -> tuple[Leaf, ...]:
    """The leaves of one layer or cell. `end` is behind PyTorch's names, `place` before Keras's."""
    kernel, biases = Gates("gates", order), JoinedBiases("biases of gates", order)
    return (
        Leaf(f"weight_ih{end}", f"{place}kernel", kernel),
        Leaf(f"weight_hh{end}", f"{place}recurrent_kernel", kernel),
        Leaf((f"bias_ih{end}", f"bias_hh{end}"), f"{place}bias", biases, 0.0),
    )


def _pairs_of_biases(module: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for name, bias in module.named_parameters():
        if name.startswith("bias_ih"):
            yield bias, getattr(module, name.replace("_ih", "_hh"))


def _exchange_biases(module: Any) -> None:
    for one, other in _pairs_of_biases(module):
        one.data, other.data = other.data.clone(), one.data.clone()


def _add_biases(module: Any) -> None:
    for one, other in _pairs_of_biases(module):
        one.data, other.data = one.data + other.data, other.data * 0


def _activation_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    """Other functions inside a layer of one direction: of its gates, or of what it lets through them."""
    import torch

    if module.num_layers > 1 or module.bidirectional or getattr(module, "proj_size", 0) or len(inputs) > 1:
        return
    known = functions()
    own = "ReLU" if module.mode == "RNN_RELU" else "tanh"
    if _mode(module) in GATES:
        text = "its recurrent_activation is hard sigmoid in Keras, sigmoid in PyTorch"
        yield Mistake(text, partial(_by_hand, module, inputs[0], known["hard sigmoid"], torch.tanh))
    for name in ("tanh", "ReLU", "sigmoid", "hard sigmoid", LINEAR):
        if name != own:
            text = f"its activation is {name} in Keras, {own} in PyTorch"
            yield Mistake(text, partial(_by_hand, module, inputs[0], torch.sigmoid, known[name]))


def _by_hand(
    module: Any, x: Tensor, gate: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...] | None:
    """Run one layer step by step with other functions. Returns all steps, then the last one."""
    import torch

    if x.ndim != 3:
        return None
    steps = in_double(x if not module.batch_first else x.transpose(0, 1))
    weights = [getattr(module, f"{name}_l0").detach().double() for name in ("weight_ih", "weight_hh")]
    nothing = steps.new_zeros(len(weights[0]))
    biases = [
        getattr(module, f"{name}_l0").detach().double() if module.bias else nothing for name in ("bias_ih", "bias_hh")
    ]
    state = cell = steps.new_zeros(steps.shape[1], module.hidden_size)
    found = []
    for step in steps:
        given, held = step @ weights[0].T + biases[0], state @ weights[1].T + biases[1]
        if _mode(module) == "LSTM":
            first, forget, new, last = (given + held).chunk(4, 1)
            cell = gate(forget) * cell + gate(first) * activation(new)
            state = gate(last) * activation(cell)
        elif _mode(module) == "GRU":
            (reset, update, new), (reset_held, update_held, new_held) = given.chunk(3, 1), held.chunk(3, 1)
            share = gate(update + update_held)
            state = (1 - share) * activation(new + gate(reset + reset_held) * new_held) + share * state
        else:
            state = activation(given + held)
        found.append(state)
    made = torch.stack(found)
    return made.transpose(0, 1) if module.batch_first else made, state[None]


def variables_of_cell(layer: Any, prefix: str = "") -> dict[str, keras.Variable]:
    """The variables of a recurrent layer's cell, or of a cell, by their names behind the prefix."""
    cell = getattr(layer, "cell", layer)
    found = {name: getattr(cell, name, None) for name in ("kernel", "recurrent_kernel", "bias")}
    return {f"{prefix}{name}": variable for name, variable in found.items() if variable is not None}


def _changed(
    module: Any, inputs: list[Tensor], cause: str, names: list[str], change: Callable[[Tensor], Tensor]
) -> Mistake:
    def apply(changed: Any) -> None:
        for name in names:
            parameter = getattr(changed, name)
            parameter.data = change(parameter.data)

    return Mistake(cause, with_change(module, inputs, apply))


def _exchanged(count: int, one: int, other: int, values: Tensor) -> Tensor:
    import torch

    if values.shape[0] % count:
        return values  # an LSTM's projection has no gates
    parts = list(values.chunk(count))
    parts[one], parts[other] = parts[other], parts[one]
    return torch.cat(parts)


def _exchange_directions(module: Any) -> None:
    for name, parameter in list(module.named_parameters()):
        reverse = getattr(module, f"{name}_reverse", None)
        if reverse is not None:
            parameter.data, reverse.data = reverse.data, parameter.data


def _reset_before(module: Any, inputs: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Run a GRU that applies the reset gate before the matrix product, as in the first version of the paper.

    Returns None when the module has no biases or does not take one batch of sequences.
    """
    import torch

    if len(inputs) != 1 or inputs[0].ndim != 3 or not module.bias:
        return None
    with torch.no_grad():
        x = in_double(inputs[0]) if module.batch_first else in_double(inputs[0]).transpose(0, 1)
        given = x @ module.weight_ih_l0.double().T + module.bias_ih_l0.double()
        kernel, bias = module.weight_hh_l0.double(), module.bias_hh_l0.double()
        size = module.hidden_size
        state = x.new_zeros(x.shape[0], size)
        steps = []
        for step in given.unbind(1):
            reset, update = torch.sigmoid(step[:, : 2 * size] + state @ kernel[: 2 * size].T + bias[: 2 * size]).chunk(
                2, 1
            )
            new = torch.tanh(step[:, 2 * size :] + (reset * state) @ kernel[2 * size :].T + bias[2 * size :])
            state = update * state + (1 - update) * new
            steps.append(state)
        result = torch.stack(steps, 1)
        return (result if module.batch_first else result.transpose(0, 1)), state[None]


KIND = Recurrent()
