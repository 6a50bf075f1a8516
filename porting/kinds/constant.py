"""A tensor that PyTorch keeps with its weights and Keras has in its code, such as a mean or a mask.

Its row has no target: nothing is written.
"""

from __future__ import annotations

from porting.kinds.base import Kind


class Constant(Kind):
    name = "constant"
    drops = ("",)
    has_target = False


KIND = Constant()
