"""Dense layers whose kernel is `(in, out)` in PyTorch too, such as the Conv1D of transformers, which GPT-2 uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.kinds.base import Kind, Leaf
from porting.kinds.transforms import VECTOR

if TYPE_CHECKING:
    from torch import nn


class DenseInFirst(Kind):
    name = "dense_in_first"
    fills = "dense"
    leaves = (Leaf("weight", "kernel", VECTOR), Leaf("bias", "bias", VECTOR, 0.0))

    def is_module(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


KIND = DenseInFirst()
