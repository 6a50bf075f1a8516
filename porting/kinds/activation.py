"""Activations without weights. Functions are compared by their values on a grid, not by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.base import Kind, Mistake, Settings, in_double
from porting.kinds.transforms import Array

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

# Dense around 0, where activations bend, with a few points far out for those that saturate late.
GRID = np.concatenate([np.linspace(-8.0, 8.0, 257), [-1e3, -100.0, -30.0, -12.0, 12.0, 30.0, 100.0, 1e3]])
_WITHOUT_ARGUMENT = {"ReLU", "LeakyReLU", "ELU"}
# Keras layers with an `activation` argument.
_WITH_ACTIVATION = {
    "Conv1D",
    "Conv2D",
    "Conv3D",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "Dense",
    "EinsumDense",
    "Conv2DTranspose",
    "Conv1DTranspose",
    "Conv3DTranspose",
    "SeparableConv1D",
    "SeparableConv2D",
}
LINEAR = "linear"
# An activation that may be one of more is not named.
_MOST_NAMED = 3
# These are not functions of one number, so values on a grid do not identify them.
_NOT_ELEMENTWISE = {"Softmax", "Softmax2d", "LogSoftmax", "Softmin", "GLU", "MultiheadAttention"}


class Activation(Kind):
    name = "activation"

    def is_module(self, module: nn.Module) -> bool:
        # timm and transformers define their own classes, in Python modules whose names begin with "activation".
        home = type(module).__module__.rpartition(".")[2]
        return home.startswith("activation") and not list(module.parameters()) and not list(module.children())

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.Activation) or type(layer).__name__ in _WITHOUT_ARGUMENT

    def module_settings(self, module: nn.Module) -> Settings:
        import torch

        if type(module).__name__ in _NOT_ELEMENTWISE:
            return {}
        try:
            with torch.no_grad():
                values: Array = copy.deepcopy(module)(torch.from_numpy(GRID.copy())).numpy()
        except Exception:  # a package's own class may raise anything on a tensor with one axis
            return {}
        return {"activation": values} if values.shape == GRID.shape else {}

    def layer_settings(self, layer: Any) -> Settings:
        return settings_of_function(layer if type(layer).__name__ in _WITHOUT_ARGUMENT else layer.activation)

    def fused_settings(self, layer: Any) -> Settings:
        function = self.inside(layer)
        return {} if function is None else settings_of_function(function)

    def inside(self, layer: Any) -> Callable[[Any], Any] | None:
        """The function of a layer with an `activation` argument."""
        function = getattr(layer, "activation", None)
        return function if callable(function) and type(layer).__name__ in _WITH_ACTIVATION else None

    def mistakes(self, module: nn.Module, inputs: list[Tensor]) -> Iterator[Mistake]:
        from torch import nn
        from torch.nn import functional as F

        def made(cause: str, compute: Callable[[Tensor], Tensor]) -> Mistake:
            return Mistake(cause, lambda: compute(in_double(inputs[0])))

        own = self.module_settings(module).get("activation")
        function = name_of_function(own) if own is not None else ""
        others = {LINEAR, "softmax"}
        if function == "GELU (tanh)":
            yield made("GELU by erf, where PyTorch uses the tanh approximation", F.gelu)
        elif isinstance(module, nn.GELU) or function == "GELU (erf)":
            for kind in ("tanh", "sigmoid"):
                others.add(f"GELU ({kind})")
                yield made(f"the {kind} approximation of GELU", functions()[f"GELU ({kind})"])
        known = {name: each for name, each in functions().items() if name not in others}
        known["Keras 2's hard sigmoid, 0.2 x + 0.5,"] = lambda x: (0.2 * x + 0.5).clamp(0, 1)
        known["softmax over the last axis"] = lambda x: x.softmax(-1)
        known["softmax over the channels"] = lambda x: x.softmax(1)
        x = in_double(inputs[0])
        right = copy.deepcopy(module)(x.clone())  # it may work in place
        for names, make in alike({**known, LINEAR: lambda x: x}, x, right):
            text = "no activation at all" if names == [LINEAR] else joined_names(names)
            yield Mistake(f"{text} instead of {type(module).__name__}", make)


def settings_of_function(function: Any) -> Settings:
    """The values of a Keras function on `GRID`; {} when it is not a function of one number."""
    import keras

    try:
        given = keras.ops.convert_to_tensor(GRID, dtype=keras.config.floatx())
        values = np.asarray(function(given)).astype(np.float64)
    except Exception:  # a function may raise anything on a tensor with one axis
        return {}
    if getattr(function, "__name__", "") in {"softmax", "log_softmax", "glu"} or values.shape != GRID.shape:
        return {}
    return {"activation": values}


def functions(rank: int = 1) -> dict[str, Callable[[Tensor], Tensor]]:
    """The activations that can be told from one another, by name, for tensors in Keras's order of axes."""
    import torch
    from torch.nn import functional as F

    return {
        "GELU (erf)": F.gelu,
        "GELU (tanh)": lambda x: F.gelu(x, approximate="tanh"),
        "GELU (sigmoid)": lambda x: x * torch.sigmoid(1.702 * x),
        "ReLU": F.relu,
        "ReLU6": F.relu6,
        "SiLU": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "hard tanh": F.hardtanh,
        "hard swish": F.hardswish,
        "hard sigmoid": F.hardsigmoid,
        "leaky ReLU with PyTorch's 0.01": F.leaky_relu,
        "leaky ReLU 0.2": lambda x: F.leaky_relu(x, 0.2),
        "leaky ReLU with Keras's 0.3": lambda x: F.leaky_relu(x, 0.3),
        "ELU": F.elu,
        "SELU": F.selu,
        "Mish": F.mish,
        "softplus": F.softplus,
        "softsign": F.softsign,
        "softmax": lambda x: x.softmax(-1),
        "log softmax": lambda x: x.log_softmax(-1),
        **{f"softmax over axis {axis}": partial(torch.softmax, dim=axis) for axis in range(1, rank - 1)},
        LINEAR: lambda x: x,
    }


def alike(
    known: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, right: Tensor
) -> Iterator[tuple[list[str], Callable[[], Tensor]]]:
    """Group functions that give the same numbers for a tensor, without those that give what is `right`.

    Yields the names of each group, and what gives its numbers.
    """
    import torch

    groups: dict[tuple[float, float], list[str]] = {}
    for name, function in known.items():
        try:
            made = function(x)
        except (RuntimeError, IndexError):  # a softmax over an axis that the tensor does not have
            continue
        if made.shape == right.shape and torch.allclose(made, right, rtol=1e-12, atol=0.0):
            continue
        groups.setdefault((float(made.sum()), float(made.square().sum())), []).append(name)
    for names in groups.values():
        yield names, partial(known[names[0]], x)


def joined_names(names: Sequence[str]) -> str:
    """Name one of several activations that cannot be told apart."""
    if len(names) > _MOST_NAMED:
        return "another activation"
    return " or ".join("no activation" if name == LINEAR else name for name in names)


def name_of_function(values: Array) -> str:
    """Name a function of one variable by its values on `GRID`."""
    import torch

    x = torch.from_numpy(GRID.copy())
    for name, function in functions().items():
        if np.allclose(values, function(x).numpy(), rtol=1e-5, atol=1e-5):
            return name
    return "another function"


KIND = Activation()
