"""Instance normalisation, which Keras writes as a group normalisation with one channel per group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from porting.kinds.base import Kind, Leaf, Mistake, Settings
from porting.kinds.batch_norm import norm_mistakes

if TYPE_CHECKING:
    from torch import Tensor, nn


class InstanceNorm(Kind):
    name = "instance_norm"
    leaves = (Leaf("weight", "gamma", default=1.0), Leaf("bias", "beta", default=0.0))
    drops = ("num_batches_tracked",)

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.modules.instancenorm._InstanceNorm)

    def module_settings(self, module: Any) -> Settings:
        return {"eps": module.eps}

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        return norm_mistakes(module, inputs)


KIND = InstanceNorm()
