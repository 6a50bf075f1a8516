"""How the axes of a tensor in PyTorch become those in Keras. A row's kind states its transforms; none is guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A permutation of axes from PyTorch's order to Keras's.

    `last` are PyTorch's axes that come last in Keras, in Keras's order; all others come first, in their own order.
    `ranks` are the numbers of axes that it takes. Without `last` every array stays as it is.
    """

    name: str
    last: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    def accepts(self, rank: int) -> bool:
        return not self.last or rank in self.ranks

    def apply(self, array: Array) -> Array:
        """PyTorch's order to Keras's, as a view; raises ValueError for another number of axes."""
        return array.transpose(self._axes(array.shape))

    def invert(self, array: Array) -> Array:
        """Keras's order back to PyTorch's, as a view; raises ValueError for another number of axes."""
        return array.transpose(np.argsort(self._axes(array.shape)))

    def source_shape(self, target_shape: Shape) -> Shape:
        """The shape in PyTorch of what has `target_shape` in Keras; raises ValueError for another number of axes."""
        return tuple(target_shape[axis] for axis in np.argsort(self._axes(target_shape)))

    def _axes(self, shape: Shape) -> tuple[int, ...]:
        if not self.accepts(len(shape)):
            needed = " or ".join(map(str, self.ranks))
            raise ValueError(f"transform {self.name} needs {needed} axes, the array has shape {shape}")
        return tuple(axis for axis in range(len(shape)) if axis not in self.last) + self.last


IDENTITY = Transform("identity")
# (out, in, *spatial) to (*spatial, in, out).
CONVOLUTION = Transform("convolution kernel", (1, 0), (3, 4, 5))
# (channels, 1, *spatial) to (*spatial, channels, 1). With a plain convolution's transform a square kernel would keep
# its shape and have its values in the wrong places.
DEPTHWISE = Transform("depthwise kernel", (0, 1), (3, 4))
# (out, in) to (in, out).
DENSE = Transform("dense kernel", (1, 0), (2,))
