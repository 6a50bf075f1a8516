"""How tensors in PyTorch become variables in Keras, and back. A row's kind states its transforms; none is guessed.

A transform moves one tensor, or joins and splits several: an LSTM's two biases are one in Keras, attention's one kernel
in front is three. `shapes` are always those of the other side: a tensor that splits its axes there needs them.
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
    """Some tensors of PyTorch to some variables of Keras. Raises ValueError for shapes that do not go together."""

    name: str

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """What variables of these shapes hold."""
        raise NotImplementedError

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """What tensors of these shapes hold; where several would do, by the convention that the class states."""
        raise NotImplementedError

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape] | None:
        """The shapes in PyTorch of what has these in Keras; None where several would do."""
        return None

    def accepts(self, sources: Sequence[Shape], targets: Sequence[Shape]) -> bool:
        """Whether tensors of these shapes become variables of those."""
        blanks = [np.broadcast_to(np.float32(0), shape) for shape in sources]
        try:
            made = self.to_keras(blanks, targets)
        except ValueError:
            return False
        return [array.shape for array in made] == list(targets)


@dataclass(frozen=True)
class Permutation(Transform):
    """One tensor's axes in another order.

    `last` are PyTorch's axes that come last in Keras, in Keras's order; all others come first, in their own order.
    `ranks` are the numbers of axes that it takes. Without `last` every array stays as it is.
    `reshapes` is whether Keras may have the same numbers in other axes: a bias for each head, a kernel of 1x1.
    """

    name: str
    last: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    reshapes: bool = False

    def takes(self, rank: int) -> bool:
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
    """A depthwise kernel, `(channels * m, 1, *spatial)`, to `(*spatial, channels, m)`."""

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
    """A recurrent layer's kernel, `(gates * units, in)`, to `(in, gates * units)`, the gates in Keras's order.

    `order` has PyTorch's place of each of Keras's gates.
    """

    name: str
    order: tuple[int, ...]

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [_reordered(arrays[0], self.order).T]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [_reordered(np.ascontiguousarray(arrays[0].T), tuple(np.argsort(self.order)))]


@dataclass(frozen=True)
class JoinedBiases(Transform):
    """A recurrent layer's two biases, `(gates * units)` each: one sum in Keras, or both, `(2, gates * units)`.

    A sum comes back as the first bias, and the second is zero.
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
    """Attention's projections in one tensor: `(3 * size, in)` to three `(in, heads, head size)`, or their biases.

    `in_first` is for a tensor of `(in, 3 * size)`.
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
    """A running variance plus a number: what two epsilons differ by, so that their sums are the same."""

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
            raise ValueError(f"a variance of {array.min():g} has no room for an epsilon that is {-offset:g} greater")
        return moved


@dataclass(frozen=True)
class Flattened(Transform):
    """Rows of a dense kernel behind a Flatten: `(out, C * H * W)` to `(H * W * C, out)`; `sides` are C, H, W."""

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
    """A table without its first rows, which nothing reads in PyTorch; on the way back these are zero."""

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
    """What a PReLU multiplies by: one number for each channel, or one for all, which Keras may repeat."""

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
    """What one side has and the other lacks: a bias of zeros, a scale of ones.

    From PyTorch, the tensor must hold nothing else. Raises ValueError where it does: its numbers would be lost.
    """

    value: float
    name: str = "constant"

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        self._refuse_others(arrays)
        return [np.full(shape, self.value, np.float32) for shape in shapes]

    def to_torch(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        self._refuse_others(arrays)
        return [np.full(shape, self.value, np.float32) for shape in shapes]

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape] | None:
        """The shapes in PyTorch of what has these in Keras; None where several would do."""
        return None

    def accepts(self, sources: Sequence[Shape], targets: Sequence[Shape]) -> bool:
        return True

    def _refuse_others(self, arrays: Sequence[Array]) -> None:
        if any((array != self.value).any() for array in arrays):
            raise ValueError(f"it holds numbers other than {self.value:g}, and the other side has no place for them")


def _regroups(one: Shape, other: Shape) -> bool:
    """Whether the axes of one shape are those of the other, split or joined, sides of 1 aside."""
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
    """Blocks of rows in another order."""
    if len(array) % len(order):
        raise ValueError(f"{len(array)} rows are not {len(order)} gates")
    blocks = array.reshape(len(order), -1, *array.shape[1:])
    return blocks[list(order)].reshape(array.shape)


IDENTITY = Permutation("identity", reshapes=False)
# A vector that Keras may hold in other axes: a bias for each head, the slopes of a PReLU.
VECTOR = Permutation("vector", reshapes=True)
# (out, in, *spatial) to (*spatial, in, out); a kernel of one position may have no spatial axes in Keras.
CONVOLUTION = Permutation("convolution kernel", (1, 0), (3, 4, 5), reshapes=True)
# (channels, 1, *spatial) to (*spatial, channels, 1). With a plain convolution's transform a square kernel would keep
# its shape and have its values in the wrong places.
DEPTHWISE = Permutation("depthwise kernel", (0, 1), (3, 4))
MULTIPLIED = Multiplied()
# (out, in) to (in, out), or to any axes that these are split into: heads, positions of a kernel of 1x1.
DENSE = Permutation("dense kernel", (1, 0), (2,), reshapes=True)
