"""Stacks of recurrent layers, which are one module in PyTorch and several layers in Keras."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, with the layers of stacks, such as `lstm.l0` and `lstm.l1` for `lstm`."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found[name] = module
        found |= {f"{name}.l{index}": layer for index, layer in enumerate(layers_of_stack(module))}
    return found


def layers_of_stack(module: nn.Module) -> list[nn.Module]:
    """The layers of a stack as modules of their own with the same parameters; empty for other modules.

    A weight that the stack computes, such as one under weight_norm, has the value that it has now.
    """
    import torch
    from torch import nn

    if not isinstance(module, nn.RNNBase) or module.num_layers < 2:
        return []
    weights: dict[str, Any] = {name: getattr(module, name, None) for name in module._flat_weights_names}
    if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        return []
    found: list[nn.Module] = []
    size = module.input_size
    for index in range(module.num_layers):
        more = {"proj_size": module.proj_size} if module.proj_size else {}
        more |= {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
        make: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(module.mode, nn.RNN)  # a subclass may have other arguments
        layer = make(
            size,
            module.hidden_size,
            bias=module.bias,
            batch_first=module.batch_first,
            bidirectional=module.bidirectional,
            device="meta",
            **more,
        )
        for name, _ in list(layer.named_parameters()):
            weight = weights[name.replace("_l0", f"_l{index}")]
            own = isinstance(weight, nn.Parameter)
            setattr(layer, name, weight if own else nn.Parameter(weight.detach(), requires_grad=False))
        layer.eval()
        found.append(layer)
        size = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    return found


def owner_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, int]:
    """The module that holds the tensors of `name`, and the index of its layer there: ("lstm", 0) for `lstm.l0`."""
    match = re.fullmatch(r"(.*)\.l(\d+)", name)
    owner = match and modules.get(match[1])
    if match is None or owner is None or not layers_of_stack(owner):
        return name, 0
    return match[1], int(match[2])


def last_layer(call: str, modules: dict[str, nn.Module], calls: Collection[str]) -> str:
    """The call of a stack's last layer, whose result is the stack's; any other call as it is."""
    name, _, number = call.partition("#")
    stack = layers_of_stack(modules[name]) if name in modules else []
    last = f"{name}.l{len(stack) - 1}" + (f"#{number}" if number else "")
    return last if stack and last in calls else call
