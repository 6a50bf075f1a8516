"""How an axis order in PyTorch becomes one in Keras. A row of the key map names its layout; none is ever guessed."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Layout(Enum):
    """A permutation of axes from PyTorch's order to Keras's.

    O and I are output and input channels, H and W the kernel's height and width. A depthwise kernel is
    (channels, 1, H, W) in PyTorch and (H, W, channels, 1) in Keras; with a plain convolution's permutation a
    square one would keep its values in the wrong places.
    """

    IDENTITY = "identity"
    OIHW_TO_HWIO = "OIHW to HWIO"
    DEPTHWISE_OIHW_TO_HWIO = "depthwise OIHW to HWIO"
    OI_TO_IO = "OI to IO"

    @property
    def axes(self) -> tuple[int, ...] | None:
        """Arguments for `numpy.transpose`; None leaves every array as it is."""
        return _AXES[self]

    def accepts(self, rank: int) -> bool:
        return self.axes is None or len(self.axes) == rank

    def apply(self, array: Array) -> Array:
        """PyTorch's order to Keras's, as a view; raises ValueError for another number of axes."""
        return _permute(array, self.axes, self)

    def invert(self, array: Array) -> Array:
        """Keras's order back to PyTorch's, as a view; raises ValueError for another number of axes."""
        axes = None if self.axes is None else tuple(int(i) for i in np.argsort(self.axes))
        return _permute(array, axes, self)

    def source_shape(self, target_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in PyTorch of what has `target_shape` in Keras."""
        if self.axes is None:
            return target_shape
        return tuple(target_shape[self.axes.index(i)] for i in range(len(target_shape)))


_AXES: dict[Layout, tuple[int, ...] | None] = {
    Layout.IDENTITY: None,
    Layout.OIHW_TO_HWIO: (2, 3, 1, 0),
    Layout.DEPTHWISE_OIHW_TO_HWIO: (2, 3, 0, 1),
    Layout.OI_TO_IO: (1, 0),
}


def _permute(array: Array, axes: tuple[int, ...] | None, layout: Layout) -> Array:
    if axes is None:
        return array
    if array.ndim != len(axes):
        raise ValueError(f"layout {layout.value} needs {len(axes)} axes, the array has shape {array.shape}")
    return array.transpose(axes)
