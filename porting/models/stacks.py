"""Stacks of recurrent layers, which are one module in PyTorch and several layers in Keras."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, with the layers of a stack but for the last, such as `lstm.l0` for `lstm`.

    The last one's results are those of the stack.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found[name] = module
        found |= {f"{name}.l{index}": layer for index, layer in enumerate(layers_of_stack(module)[:-1])}
    return found


def layers_of_stack(module: nn.Module) -> list[nn.Module]:
    """The layers of a stack as modules of their own with the same parameters; empty for other modules."""
    from torch import nn

    if not isinstance(module, nn.RNNBase) or module.num_layers < 2:
        return []
    found: list[nn.Module] = []
    size = module.input_size
    for index in range(module.num_layers):
        more = {"proj_size": module.proj_size} if module.proj_size else {}
        more |= {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
        make: Any = type(module)
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
            setattr(layer, name, getattr(module, name.replace("_l0", f"_l{index}")))
        layer.eval()
        found.append(layer)
        size = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    return found


def owner_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, int]:
    """The module that holds the tensors of `name`, and the index of its layer there: ("lstm", 0) for `lstm.l0`."""
    match = re.fullmatch(r"(.*)\.l(\d+)", name)
    owner = match and modules.get(match[1])
    if match is not None and owner is not None and layers_of_stack(owner):
        return match[1], int(match[2])
    return name, max(len(layers_of_stack(modules[name])) - 1, 0) if name in modules else 0
