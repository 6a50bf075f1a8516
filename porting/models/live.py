"""Reads the tensors of a live PyTorch model for a port, and writes them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from porting.kinds.transforms import Array

if TYPE_CHECKING:
    from torch import nn

_OLD_STYLE = {"WeightNorm": ("_g", "_v"), "SpectralNorm": ("_orig", "_u", "_v")}


def require_models(reference: object, candidate: object) -> None:
    """Raise TypeError unless the reference is a PyTorch model and the candidate a Keras model."""
    import keras
    from torch import nn

    for name, model, wanted, what in (
        ("reference", reference, nn.Module, "a torch.nn.Module"),
        ("candidate", candidate, keras.layers.Layer, "a keras.Model"),
    ):
        if not isinstance(model, wanted):
            swapped = isinstance(reference, keras.layers.Layer) and isinstance(candidate, nn.Module)
            advice = ". The two models are swapped." if swapped else ""
            raise TypeError(f"{name} must be {what}, but is a {type(model).__name__}{advice}")


def effective_tensors(model: nn.Module, *, in_float32: bool = True) -> dict[str, Array]:
    """The model's state_dict by name, with each computed weight in place of the tensors that it is computed from.

    Under weight_norm or spectral_norm, old style or new, this is the weight that the module multiplies by. Floats are
    converted to float32, unless `in_float32` is False; then NumPy must know their type.
    """
    import torch

    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    with torch.no_grad():
        for prefix, name, parts in _parametrized(model):
            for part in parts:
                state.pop(part, None)
            module = model.get_submodule(prefix) if prefix else model
            state[f"{prefix}.{name}" if prefix else name] = getattr(module, name).detach()
    return {
        name: np.asarray((tensor.float() if in_float32 and tensor.is_floating_point() else tensor).cpu().numpy())
        for name, tensor in state.items()
    }


def _parametrized(model: nn.Module) -> Iterable[tuple[str, str, list[str]]]:
    """Yield, for each computed weight, the names of its module, of itself and of the tensors it is computed from."""
    from torch.nn.utils import parametrize

    names = list(model.state_dict())
    for prefix, module in model.named_modules():
        stem = f"{prefix}." if prefix else ""
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                start = f"{stem}parametrizations.{name}."
                yield prefix, name, [each for each in names if each.startswith(start)]
        for hook in module._forward_pre_hooks.values():
            if ends := _OLD_STYLE.get(type(hook).__name__):
                hook(module, ())  # this computes the weight, as the next call would
                yield prefix, hook.name, [f"{stem}{hook.name}{end}" for end in ends]


def effective_names(model: nn.Module) -> set[str]:
    """The names in `effective_tensors`. The model's tensors may be on the meta device."""
    import torch

    names = set(model.state_dict())
    with torch.no_grad():  # a computed weight with a gradient would make the model impossible to copy
        for prefix, name, parts in _parametrized(model):
            names -= set(parts)
            names.add(f"{prefix}.{name}" if prefix else name)
    return names


def shapes_of(tensors: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in tensors.items()}


def assign_tensors(model: nn.Module, values: Mapping[str, Array]) -> None:
    """Write values into a live model's tensors, in the types that these have.

    A computed weight is set through its parametrization. Raises ValueError, before anything is changed, for a weight
    under spectral_norm or an old-style weight_norm, which cannot be set.
    """
    import torch
    from torch.nn.utils import parametrize

    computed = {f"{prefix}.{name}" if prefix else name: (prefix, name) for prefix, name, _ in _parametrized(model)}
    settable = {}
    for full in values.keys() & computed.keys():
        prefix, name = computed[full]
        module = model.get_submodule(prefix) if prefix else model
        if not parametrize.is_parametrized(module, name) or not all(
            hasattr(each, "right_inverse") and type(each).__name__ == "_WeightNorm"
            for each in module.parametrizations[name]  # type: ignore[index]
        ):
            raise ValueError(f"{full} is computed by the module, and cannot be set: remove its parametrization first")
        settable[full] = (module, name)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for full, array in values.items():
            tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
            if full in settable:
                setattr(*settable[full], tensor)
            else:
                own[full].copy_(tensor)
