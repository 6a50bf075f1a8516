"""Cells of recurrent layers, which compute one step: LSTM, GRU and simple RNN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings
from porting.kinds.recurrent import GATES, ORDERS, gate_leaves, gate_mistakes, settings_of_units, variables_of_cell

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


def _mode(module: Any) -> str:
    """LSTM, GRU or RNN, also for a class that derives from them."""
    from torch import nn

    cells = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}
    return next(name for name, cell in cells.items() if isinstance(module, cell))


class RecurrentCell(Kind):
    name = "recurrent_cell"
    leaves = gate_leaves((0,))  # only for their names: the order of gates depends on the module

    def leaves_for(self, module: nn.Module) -> tuple[Leaf, ...]:
        return gate_leaves(ORDERS[_mode(module)])

    def variables(self, layer: Any) -> dict[str, keras.Variable]:
        return variables_of_cell(layer)

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, (nn.LSTMCell, nn.GRUCell, nn.RNNCell))

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell))

    def module_settings(self, module: Any) -> Settings:
        activation = "ReLU" if getattr(module, "nonlinearity", "") == "relu" else "tanh"
        settings: Settings = {"hidden_size": module.hidden_size, "activation": activation}
        if _mode(module) in GATES:
            settings = {**settings, "recurrent_activation": "sigmoid"}
        return {**settings, "reset_after": True} if _mode(module) == "GRU" else settings

    def layer_settings(self, layer: Any) -> Settings:
        return settings_of_units(layer)

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        yield from gate_mistakes(module, inputs, GATES.get(_mode(module), ()))


KIND = RecurrentCell()
