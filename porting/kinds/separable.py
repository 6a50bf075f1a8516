"""Separable convolutions: two modules in PyTorch and one layer in Keras. Each module has its own row."""

from __future__ import annotations

from porting.kinds.base import Kind, Leaf
from porting.kinds.transforms import CONVOLUTION, MULTIPLIED, VECTOR


class SeparableDepthwise(Kind):
    name = "separable_depthwise"
    leaves = (Leaf("weight", "depthwise_kernel", MULTIPLIED),)


class SeparablePointwise(Kind):
    name = "separable_pointwise"
    leaves = (Leaf("weight", "pointwise_kernel", CONVOLUTION), Leaf("bias", "bias", VECTOR, 0.0))


KINDS = (SeparableDepthwise(), SeparablePointwise())
