"""Compares the weights of a Keras model with those of a PyTorch model bit by bit, as a key map pairs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array, Shifted
from porting.mapping.key_map import KeyMap
from porting.models.observe import to_torch

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Bits:
    """The Keras variables that were compared, how each that differs does so, and which hold one tensor unchanged."""

    compared: frozenset[str] = frozenset()
    differing: dict[str, str] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()


def compare_bits(reference: nn.Module, variables: Mapping[str, Any], key_map: KeyMap) -> Bits:
    """Compare the Keras variables with what the key map makes of the tensors of PyTorch's state_dict, in float32."""
    state = reference.state_dict()
    differing: dict[str, str] = {}
    compared: set[str] = set()
    copies: set[str] = set()
    for entry in key_map.entries:
        if not entry.is_in(state, variables):
            continue
        arrays = {name: state[name].detach().float().numpy() for name in entry.sources}
        compared |= set(entry.targets)
        try:
            made = entry.to_keras(arrays, {name: tuple(variables[name].shape) for name in entry.targets})
        except ValueError as error:
            differing |= {name: f"{name}: {error}" for name in entry.targets}
            continue
        for name, expected in made.items():
            held = tuple(variables[name].shape)
            if expected.shape != held:
                differing[name] = f"{name} has the shape {held} and should have {expected.shape}"
            elif not _are_equal(expected, variables[name]):
                differing[name] = _first_difference(name, expected, np.asarray(variables[name]))
            elif len(arrays) == 1 and not isinstance(entry.transform, Shifted):
                copies.add(name)
    return Bits(frozenset(compared), differing, frozenset(copies))


def _are_equal(expected: Array, variable: Any) -> bool:
    """Whether a Keras variable holds these numbers; NaN is the same as NaN."""
    import keras
    import torch

    # What PyTorch takes without a copy.
    is_plain = expected.dtype == np.float32 and expected.flags.writeable and min(expected.strides, default=0) >= 0
    if is_plain and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # PyTorch compares on all cores, and TensorFlow's numbers need no copy. To PyTorch, NaN is never the same.
        held = to_torch(tf.convert_to_tensor(variable.value))
        if held.dtype == torch.float32 and torch.equal(torch.from_numpy(expected), held):
            return True
    actual = np.asarray(variable)
    return np.array_equal(expected, actual) or np.array_equal(expected, actual, equal_nan=True)


def _first_difference(name: str, expected: Array, actual: Array) -> str:
    places = np.argwhere((expected != actual) & ~(np.isnan(expected) & np.isnan(actual)))
    first = tuple(int(each) for each in places[0])
    more = f" ({len(places):,} of {expected.size:,} numbers differ)" if len(places) > 1 else ""
    place = f"[{', '.join(map(str, first))}]" if first else ""
    return f"{name}{place} is {float(actual[first]) + 0.0:.9g} and should be {float(expected[first]) + 0.0:.9g}{more}"
