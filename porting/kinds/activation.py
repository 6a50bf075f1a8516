"""Activations without weights. What counts is the function, told by its values, not its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.base import Kind, Mistake, Settings, in_double
from porting.kinds.transforms import Array

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

GRID = np.linspace(-6.0, 6.0, 97, dtype=np.float64)
_WITHOUT_ARGUMENT = {"ReLU", "LeakyReLU", "ELU", "Softmax"}


class Activation(Kind):
    name = "activation"

    def is_module(self, module: nn.Module) -> bool:
        return type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters())

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.Activation) or type(layer).__name__ in _WITHOUT_ARGUMENT

    def module_settings(self, module: nn.Module) -> Settings:
        import torch

        with torch.no_grad():
            values: Array = module(torch.from_numpy(GRID.copy()[None])).numpy()[0]
        return {"activation": values}

    def layer_settings(self, layer: Any) -> Settings:
        function = layer if type(layer).__name__ in _WITHOUT_ARGUMENT else layer.activation
        return {"activation": np.asarray(function(GRID.astype(np.float32)[None]))[0]}

    def mistakes(self, module: nn.Module, inputs: list[Tensor]) -> Iterator[Mistake]:
        import torch
        from torch import nn
        from torch.nn import functional as F

        def made(cause: str, compute: Callable[[Tensor], Tensor]) -> Mistake:
            return Mistake(cause, lambda: compute(in_double(inputs[0])))

        if isinstance(module, nn.GELU):
            yield made("the tanh approximation of GELU", lambda x: F.gelu(x, approximate="tanh"))
            yield made("the sigmoid approximation of GELU", lambda x: x * torch.sigmoid(1.702 * x))
        others: dict[str, Callable[[Tensor], Tensor]] = {
            "ReLU": F.relu,
            "SiLU": F.silu,
            "GELU": F.gelu,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
        }
        for name, compute in others.items():
            if type(module).__name__.lower() != name.lower():
                yield made(f"{name} instead of {type(module).__name__}", compute)
        yield made("no activation at all", lambda x: x)


def name_of_function(values: Array) -> str:
    """The name of a function of one variable, by its values on `GRID`."""
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(GRID.copy())
    known = {
        "GELU (erf)": F.gelu(x),
        "GELU (tanh)": F.gelu(x, approximate="tanh"),
        "ReLU": F.relu(x),
        "ReLU6": F.relu6(x),
        "SiLU": F.silu(x),
        "sigmoid": torch.sigmoid(x),
        "tanh": torch.tanh(x),
        "hard swish": F.hardswish(x),
        "leaky ReLU 0.01": F.leaky_relu(x),
        "ELU": F.elu(x),
        "Mish": F.mish(x),
        "linear": x,
    }
    for name, expected in known.items():
        if np.abs(values - expected.numpy()).max() < 1e-5:
            return name
    return "another function"


KIND = Activation()
