"""What the formats share: the protocol of a runtime, and finding a layer's tensor by its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from porting.kinds.transforms import Array

# Operations that are also made of weights, and that change nothing where they are not.
OF_WEIGHTS = {"DEQUANTIZE", "DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape"}


class Runtime(Protocol):
    """One loaded artifact."""

    def run(self, image: Array) -> Mapping[str, Array]:
        """`(1, H, W, 3)` to the result, under `OUTPUT`, and to the layers' results by the Keras layers' names."""
        ...

    def operators(self) -> Counter[str]:
        """How many operations of each kind the file has."""
        ...


def last_of_each_layer(names: Sequence[str], layers: Sequence[str]) -> dict[str, int]:
    """Where the last tensor of each layer is among `names`, which are paths with the layer's own somewhere in them.

    Keras numbers the calls of a layer: `model_1/head_1/Add` is of `head`. A sublayer's tensor is the outer layer's.
    """
    wanted = set(layers)
    found: dict[str, int] = {}
    for position, name in enumerate(names):
        parts = [layer for part in name.split("/")[:-1] for layer in (part, re.sub(r"_\d+$", "", part))]
        outermost = next((layer for layer in parts if layer in wanted), None)
        if outermost is not None:
            found[outermost] = position
    return found
