"""Transforms between PyTorch tensors and Keras variables. The kind of a row states its transforms; none is guessed.

A transform moves one tensor's axes, or joins or splits tensors: the two biases of an LSTM are one in Keras, and the
input projection of an attention layer is three kernels. `shapes` are always those of the side that the result is for: a
transform that splits axes needs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Transform:
    """Converts PyTorch tensors to Keras variables and back. Raises ValueError for shapes that do not fit together."""

    name: str

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """The values of Keras variables of these shapes."""
        raise NotImplementedError

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """The values of PyTorch tensors of these shapes. If they are not unique, the class states a convention."""
        raise NotImplementedError

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape] | None:
        """The PyTorch shapes of variables with these Keras shapes; None when they are not unique."""
        return None

    def accepts(self, sources: Sequence[Shape], targets: Sequence[Shape]) -> bool:
        """Whether tensors of the shapes `sources` convert to variables of the shapes `targets`."""
        blanks = [np.broadcast_to(np.float32(0), shape) for shape in sources]
        try:
            made = self.to_keras(blanks, targets)
        except ValueError:
            return False
        return [array.shape for array in made] == list(targets)


@dataclass(frozen=True)
class Permutation(Transform):
    """Permutes the axes of one tensor.

    `last` are PyTorch's axes that come last in Keras, in Keras's order; all others come first, in their own order.
    `ranks` are the accepted numbers of axes. Without `last` every array stays as it is. `reshapes` allows Keras to
    split or join axes, as in a bias per head or a 1x1 kernel.
    """

    name: str
    last: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    reshapes: bool = False

    def takes(self, rank: int) -> bool:
        return not self.last or rank in self.ranks

    def apply(self, array: Array) -> Array:
        """Permute from PyTorch's order to Keras's, as a view. Raises ValueError for another number of axes."""
        return array.transpose(self._axes(array.shape))

    def invert(self, array: Array) -> Array:
        """Permute from Keras's order back to PyTorch's, as a view. Raises ValueError for another number of axes."""
        return array.transpose(np.argsort(self._axes(array.shape)))

    def source_shape(self, target_shape: Shape) -> Shape:
        """The PyTorch shape of a variable of this Keras shape. Raises ValueError for another number of axes."""
        return tuple(target_shape[axis] for axis in np.argsort(self._axes(target_shape)))

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape] | None:
        return [self.source_shape(shape) for shape in targets] if all(self.takes(len(s)) for s in targets) else None

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        moved = self.apply(array)
        if not shapes or not self.reshapes or moved.shape == shapes[0]:
            return [moved]
        if not _regroups(moved.shape, shapes[0]):
            raise ValueError(f"{self.name}: {moved.shape} cannot be split or joined to {shapes[0]}")
        return [moved.reshape(shapes[0])]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        if shapes and self.reshapes:
            array = array.reshape([shapes[0][axis] for axis in self._axes(shapes[0])])
        return [self.invert(array)]

    def _axes(self, shape: Shape) -> tuple[int, ...]:
        if not self.takes(len(shape)):
            needed = " or ".join(map(str, self.ranks))
            raise ValueError(f"transform {self.name} needs {needed} axes, the array has shape {shape}")
        return tuple(axis for axis in range(len(shape)) if axis not in self.last) + self.last


@dataclass(frozen=True)
class Multiplied(Transform):
    """Converts a depthwise kernel, `(channels * m, 1, *spatial)`, to `(*spatial, channels, m)`."""

    name: str = "depthwise kernel"

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape] | None:
        return [(shape[-2] * shape[-1], 1, *shape[:-2]) for shape in targets] if len(targets[0]) > 2 else None

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        if array.ndim < 3 or array.shape[1] != 1:
            raise ValueError(f"{self.name}: one input channel for each output was expected, not {array.shape}")
        *_, channels, times = shapes[0] if shapes else (len(array), 1)
        split = array.reshape(channels, times, *array.shape[2:])
        return [np.moveaxis(split, (0, 1), (-2, -1))]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        first = np.moveaxis(array, (-2, -1), (0, 1))
        return [first.reshape(-1, 1, *first.shape[2:])]


@dataclass(frozen=True)
class Gates(Transform):
    """Converts a recurrent kernel, `(gates * units, in)`, to `(in, gates * units)` with the gates in Keras's order.

    `order` gives the index in PyTorch of each gate in Keras's order.
    """

    name: str
    order: tuple[int, ...]

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [_reordered(arrays[0], self.order).T]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [_reordered(np.ascontiguousarray(arrays[0].T), tuple(np.argsort(self.order)))]


@dataclass(frozen=True)
class JoinedBiases(Transform):
    """Converts the two biases of a recurrent layer, `(gates * units)` each, to their sum or to `(2, gates * units)`.

    On the way back a sum becomes the first bias, and the second is zero.
    """

    name: str
    order: tuple[int, ...]

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        one, other = (_reordered(array, self.order) for array in arrays)
        both = bool(shapes) and len(shapes[0]) == 2
        return [np.stack([one, other]) if both else one + other]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        parts = list(array) if array.ndim == 2 else [array, np.zeros_like(array)]
        back = tuple(np.argsort(self.order))
        return [_reordered(part, back) for part in parts]


@dataclass(frozen=True)
class HeadsInFront(Transform):
    """Splits the joined input projection of attention, `(3 * size, in)`, into three `(in, heads, head size)`.

    Biases are split the same way. `in_first` is for a joined kernel of shape `(in, 3 * size)`.
    """

    name: str = "projections in front of attention"
    in_first: bool = False

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        array = arrays[0].T if self.in_first else arrays[0]
        sizes = [math.prod(shape[-2:]) for shape in shapes]
        if sum(sizes) != len(array):
            raise ValueError(f"{self.name}: {len(array)} rows for heads of {sizes}")
        parts = np.split(array, np.cumsum(sizes)[:-1])
        return [part.T.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        flat = [array.reshape(*array.shape[:-2], -1) for array in arrays]
        joined = np.concatenate([part.T for part in flat])
        return [joined.T if self.in_first else joined]


@dataclass(frozen=True)
class Shifted(Transform):
    """Adds the difference of two epsilons to a running variance, so that variance plus epsilon stays the same."""

    name: str
    offset: float

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [self._plus(arrays[0], self.offset)]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [self._plus(arrays[0], -self.offset)]

    def accepts(self, sources: Sequence[Shape], targets: Sequence[Shape]) -> bool:
        return list(sources) == list(targets)

    def _plus(self, array: Array, offset: float) -> Array:
        moved: Array = (array.astype(np.float64) + offset).astype(array.dtype)
        if (moved < 0).any():
            raise ValueError(f"a variance of {array.min():g} is too small for an epsilon that is {-offset:g} greater")
        return moved


@dataclass(frozen=True)
class Flattened(Transform):
    """Converts a dense kernel behind a Flatten, `(out, C * H * W)`, to `(H * W * C, out)`; `sides` are C, H, W."""

    name: str
    sides: tuple[int, ...]

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        split = array.reshape(len(array), *self.sides)
        return [np.moveaxis(split, 1, -1).reshape(len(array), -1).T]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        split = np.ascontiguousarray(array.T).reshape(array.shape[1], *self.sides[1:], self.sides[0])
        return [np.moveaxis(split, -1, 1).reshape(array.shape[1], -1)]


@dataclass(frozen=True)
class RowsBehind(Transform):
    """Leaves out the first rows of a table, which PyTorch never reads. On the way back these rows are zero."""

    name: str
    first: int

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [arrays[0][self.first :]]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        return [np.concatenate([np.zeros((self.first, *array.shape[1:]), array.dtype), array])]

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape] | None:
        return [(shape[0] + self.first, *shape[1:]) for shape in targets]


@dataclass(frozen=True)
class Slopes(Transform):
    """Converts the slopes of a PReLU: one number per channel, or one for all, which Keras may repeat."""

    name: str = "slopes"

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        if array.size == 1 and shapes:
            return [np.broadcast_to(array.reshape(()), shapes[0])]
        # Channels come last, and all other axes are shared.
        return [array.reshape(shapes[0]) if shapes and shapes[0][-1] == array.size else array]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        if shapes and math.prod(shapes[0]) == 1:
            if (array != array.flat[0]).any():
                raise ValueError(f"{self.name}: several numbers for PyTorch's single one")
            return [array.reshape(-1)[:1].reshape(shapes[0])]
        return [array.reshape(-1)]


@dataclass(frozen=True)
class Constant(Transform):
    """Fills a tensor that only one side has with a constant, such as a bias of zeros or a scale of ones.

    Raises ValueError when a tensor to leave out holds any other number, since that number would be lost.
    """

    value: float
    name: str = "constant"

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        self._refuse_others(arrays)
        return [np.full(shape, self.value, np.float32) for shape in shapes]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        self._refuse_others(arrays)
        return [np.full(shape, self.value, np.float32) for shape in shapes]

    def accepts(self, sources: Sequence[Shape], targets: Sequence[Shape]) -> bool:
        return True

    def _refuse_others(self, arrays: Sequence[Array]) -> None:
        if any((array != self.value).any() for array in arrays):
            raise ValueError(f"it holds numbers other than {self.value:g}, and the other side has no place for them")


def _regroups(one: Shape, other: Shape) -> bool:
    """Whether splitting and joining axes turns one shape into the other, leaving axes of size 1 aside."""
    rest, others = ([side for side in shape if side != 1] for shape in (one, other))
    while rest and others:
        few, many = (rest, others) if rest[0] >= others[0] else (others, rest)
        side, product = few.pop(0), 1
        while many and product < side:
            product *= many.pop(0)
        if product != side:
            return False
    return not rest and not others


def _reordered(array: Array, order: tuple[int, ...]) -> Array:
    """Reorder equal blocks of rows, one block per gate."""
    if len(array) % len(order):
        raise ValueError(f"{len(array)} rows are not {len(order)} gates")
    blocks = array.reshape(len(order), -1, *array.shape[1:])
    return blocks[list(order)].reshape(array.shape)


IDENTITY = Permutation("identity", reshapes=False)
# Numbers that keep their order, and that Keras may hold in other axes, such as a bias per head.
VECTOR = Permutation("vector", reshapes=True)
# (out, in, *spatial) to (*spatial, in, out). In Keras a 1x1 kernel may have no spatial axes.
CONVOLUTION = Permutation("convolution kernel", (1, 0), (3, 4, 5), reshapes=True)
# (channels, 1, *spatial) to (*spatial, channels, 1).
DEPTHWISE = Permutation("depthwise kernel", (0, 1), (3, 4))
MULTIPLIED = Multiplied()
# (out, in) to (in, out). Keras may split these axes, for heads or for the positions of a 1x1 kernel.
DENSE = Permutation("dense kernel", (1, 0), (2,), reshapes=True)
