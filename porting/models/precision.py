"""Rounds a PyTorch model to a lower precision, to show the rounding that a file of that precision must have.

A file in float16 or int8 is not at parity with float32 and need not be. It is judged like a float32 one, in units of
the rounding that its precision costs PyTorch itself. This module produces that rounding.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.kinds.transforms import Array
from porting.models.inputs import Inputs, image_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

PRECISIONS = ("float32", "float16", "int8")
# The types in which Keras computes under its mixed policies.
HALVES = ("float16", "bfloat16")


def in_precision(model: nn.Module, precision: str, inputs: Array | Inputs, *, results: bool = True) -> nn.Module:
    """Copy `model` in float32, with its numbers rounded to those that `precision` has.

    float16, bfloat16: weights and the result of every module are rounded. int8: kernels are rounded to 255 steps per
    output channel, and every result to 256 steps between its least and greatest value over `inputs`. These are images
    `(N, H, W, C)` or any `Inputs`. Without `results` only the weights are rounded.

    Raises ValueError for an unknown precision.
    """
    import torch

    known = dict.fromkeys((*PRECISIONS, *HALVES))
    if precision not in known:
        raise ValueError(f"precision is one of {', '.join(known)}: got {precision!r}")
    rounded = copy.deepcopy(model).eval()
    if precision == "float32":
        return rounded
    with torch.no_grad():
        for parameter in rounded.parameters():
            if precision in HALVES:
                parameter.copy_(parameter.to(getattr(torch, precision)).float())
            elif parameter.ndim > 1:
                parameter.copy_(_in_steps_a_channel(parameter))
    if not results:
        return rounded
    leaves = [module for module in rounded.modules() if not list(module.children())]
    if precision in HALVES:
        for module in leaves:
            module.register_forward_hook(partial(_in_half, getattr(torch, precision)))
        return rounded
    ranges = _ranges(model, inputs if isinstance(inputs, Inputs) else image_inputs(inputs))
    names = {id(module): name for name, module in rounded.named_modules()}
    for module in leaves:
        if names[id(module)] in ranges:
            low, high = ranges[names[id(module)]]
            module.register_forward_hook(lambda _, __, output, low=low, high=high: _in_steps(output, low, high))
    return rounded


def _in_half(dtype: Any, _: nn.Module, __: Any, output: Any) -> Any:
    return output.to(dtype).float() if hasattr(output, "to") and output.is_floating_point() else output


def _in_steps_a_channel(kernel: Tensor) -> Tensor:
    import torch

    greatest = kernel.abs().flatten(1).amax(1).clamp_min(1e-12)
    zeros = torch.zeros(len(kernel), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(kernel, greatest / 127, zeros, 0, -127, 127)


def _in_steps(tensor: Tensor, low: float, high: float) -> Tensor:
    import torch

    step = max(high - low, 1e-12) / 255
    return torch.fake_quantize_per_tensor_affine(tensor, step, round(-128 - low / step), -128, 127)


def _ranges(model: nn.Module, inputs: Inputs) -> dict[str, tuple[float, float]]:
    """The least and greatest value of every module's result over the inputs, extended to include zero."""
    import torch

    found: dict[str, tuple[float, float]] = {}
    handles = []
    for name, module in model.named_modules():
        if list(module.children()):
            continue

        def watch(_: Any, __: Any, output: Any, name: str = name) -> None:
            if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
                return
            low, high = found.get(name, (0.0, 0.0))
            found[name] = min(low, float(output.min())), max(high, float(output.max()))

        handles.append(module.register_forward_hook(watch))
    try:
        with torch.no_grad():
            for index in range(len(inputs)):
                inputs.batch(index, index + 1).call_reference(model, torch.float32)
    finally:
        for handle in handles:
            handle.remove()
    return found
