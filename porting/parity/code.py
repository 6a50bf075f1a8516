"""Records what PyTorch computes in code, and shows to no module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from porting.models.inputs import Inputs
from porting.models.observe import tensors_in
from porting.parity.content import Truth

if TYPE_CHECKING:
    from torch import Tensor, nn


# Only diagnoses use these tensors, so a model of large maps need not show them all.
_MOST_BYTES = 2**30


def tensors_of_code(
    model: nn.Module, inputs: Inputs, known: Iterable[Truth] = (), wanted: Callable[[int], bool] = lambda size: True
) -> list[Tensor]:
    """Every floating-point tensor that a function returns while a model in float64 runs, in order.

    Leaves out single numbers, sparse tensors, tensors of other sizes than `wanted`, and those that are `known`; and all
    behind the first gibibyte.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    seen = {_signature(truth.tensor) for truth in known}
    found: list[Tensor] = []
    taken = 0

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal taken
            result = func(*args, **(kwargs or {}))
            for each in tensors_in(result):
                is_plain = each.layout == torch.strided and not each.is_meta and each.is_floating_point()
                if is_plain and each.numel() > 1 and wanted(each.numel()) and taken < _MOST_BYTES:
                    signature = _signature(each)
                    if signature not in seen:
                        seen.add(signature)
                        found.append(each.detach().clone())  # it may be overwritten later
                        taken += each.nbytes
            return result

    with torch.no_grad(), Watching():
        inputs.call_reference(model, torch.float64)
    return found


def _signature(tensor: Tensor) -> tuple[int, float, float]:
    """What is the same for tensors of the same numbers, whatever their axes."""
    values = tensor.double()
    return values.numel(), float(values.sum()), float(values.abs().max()) if values.numel() else 0.0
