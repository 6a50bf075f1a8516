"""Pairs tensors of the two models by their content.

In float64, and up to an order of axes, a tensor of one model either equals one of the other to about twelve digits or
it does not. Root mean square and mean find candidates among all tensors with as many elements; then every element is
compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from porting.models.inputs import Axes, inverse, moved
from porting.parity.measure import DistanceSum, in_memory_order, measure_distance, measure_size, rms

if TYPE_CHECKING:
    from torch import Tensor

# Two tensors are the same if their RMS distance is at most this share of their RMS. Correct ports stay below 1e-13 at
# any depth. A mistake that matters in float32 is above 1e-10.
SAME = 1e-11
# What float64 alone never reaches. The rounding of a constant may have so small an effect, such as before a norm.
ROUNDED = 2e-14
# The same for a layer that always computes in float32: some roundings of 6e-8.
SAME_IN_FLOAT32 = 1e-5
# A match that is so many times as far as the nearest is another tensor, such as a norm's that hardly changes its input.
_BESIDE = 4.0
# The number of elements on which an order of axes is tried before all are compared.
_TRIED = 64
MOST_AXES = 5
# How many times the RMS distance a single element may be apart.
_FAR = 1e3


# Where a run has a tensor: the call, whether the call returns it, and its number among what the call takes or returns.
Place = tuple[str, bool, int]


def place_of_result(key: str) -> Place:
    """The place of a result of the model. Its call begins with a dot, as no module's name does."""
    return f".{key}", True, 0


def is_result(place: Place) -> bool:
    """Whether this is the place of a result of the model."""
    return place[0].startswith(".")


@dataclass(eq=False)
class Truth:
    """A tensor of the PyTorch model's float64 run, kept once however many calls take or return it.

    `places` are in the order of execution. `noise` is PyTorch's own float32 distance to
    it; None if not measured.
    """

    tensor: Tensor
    places: list[Place] = field(default_factory=list)
    noise: DistanceSum | None = None
    _size: DistanceSum | None = None
    _mean: float | None = None

    @property
    def size(self) -> DistanceSum:
        """The size of its values, as their distance to zero."""
        if self._size is None:
            self._size = measure_size(self.tensor)
        return self._size

    @property
    def rms(self) -> float:
        return self.size.total().rms

    @property
    def mean(self) -> float:
        if self._mean is None:
            self._mean = _mean(self.tensor)
        return self._mean

    @property
    def in_float32(self) -> bool:
        return is_in_float32(self.tensor)

    @property
    def is_whole(self) -> bool:
        """Whether no number has a fraction."""
        return self.size.max.is_integer() and is_whole(self.tensor)


@dataclass(frozen=True)
class Match:
    """A match for a Keras tensor: the PyTorch tensor, PyTorch's axes in Keras's order, and the distance.

    `reshaped` means that axes were also joined or split. `reordered` means that the numbers are the same in another
    order, and `axes` has no meaning.
    """

    truth: Truth
    axes: Axes
    distance: DistanceSum
    reshaped: bool = False
    reordered: bool = False
    in_float32: bool = False

    def expected(self, like: Tensor) -> Tensor:
        """The truth in Keras's order of axes and in the shape of `like`."""
        return self.truth.tensor.permute(self.axes).reshape(like.shape)


class Library:
    """Finds tensors of the PyTorch model's float64 run by their content."""

    def __init__(self, truths: list[Truth], usual: dict[int, Axes]) -> None:
        self._by_count: dict[int, list[Truth]] = {}
        for truth in truths:
            self._by_count.setdefault(truth.tensor.numel(), []).append(truth)
        self._usual = usual

    def match(self, actual: Tensor, truth: Truth, tolerance: float = SAME, *, likely: bool = False) -> Match | None:
        """Match a Keras tensor with one truth, in some order of axes. `likely` skips the test of a few elements."""
        if actual.numel() != truth.tensor.numel():
            return None
        actual = actual.double()
        limit = tolerance * truth.rms
        for axes in self._orders(truth.tensor, actual):
            scale = tolerance * max(truth.rms, 1e-300)
            if not likely and not _agrees_here_and_there(actual, truth.tensor, axes, scale):
                continue
            likely = False
            expected = truth.tensor.permute(axes)
            reshaped = expected.shape != actual.shape
            if not expected.is_contiguous():
                # It is compared again in float32, and is then in Keras's order already.
                truth.tensor = expected.contiguous().permute(inverse(axes))
                expected = truth.tensor.permute(axes)
            distance = measure_distance(actual, expected.reshape(actual.shape))
            if distance.total().rms <= limit:
                return Match(truth, axes, distance, reshaped)
        return None

    def find(self, actual: Tensor, tolerance: float = SAME) -> list[Match]:
        """Find all tensors that a Keras tensor equals, in PyTorch's order of execution, reordered ones last."""
        actual = actual.double()  # sums in float32 would be too inexact to find the match
        rms, mean = measure_size(actual).total().rms, None
        found: list[Match] = []
        coarse = max(tolerance, SAME)  # sums round too
        for truth in self._by_count.get(actual.numel(), ()):
            if not math.isclose(truth.rms, rms, rel_tol=coarse, abs_tol=1e-300):
                continue
            mean = _mean(actual) if mean is None else mean
            if abs(truth.mean - mean) > coarse * max(rms, 1e-300):
                continue
            match = self.match(actual, truth, tolerance) or _reordered(actual, truth, tolerance)
            if match is not None:
                found.append(match)
        return sorted(found, key=lambda match: match.reordered)

    def find_near(self, actual: Tensor) -> list[Match]:
        """Find what a tensor equals up to the rounding of float32, the nearest first, without those far behind it."""
        near = sorted(self.find(actual, SAME_IN_FLOAT32), key=lambda match: match.distance.total().rms)
        return [each for each in near if each.distance.total().rms <= _BESIDE * near[0].distance.total().rms]

    def maps_in_order(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield the maps that PyTorch flattened into a tensor."""
        for truth in self._by_count.get(flat.numel(), ()):
            sides = truth.tensor.shape
            if (
                2 < len(sides) <= MOST_AXES
                and len(sides) > flat.ndim
                and bool((truth.tensor.reshape(flat.shape) == flat).all())
            ):
                yield truth.tensor

    def find_part(self, actual: Tensor) -> tuple[Truth, int, int] | None:
        """Find a tensor of which Keras's is a part, such as q in qkv: the tensor, the part's index, and the count."""
        if actual.ndim < 2 or actual.numel() < 2:
            return None
        actual = actual.double()
        size = measure_size(actual).total().rms
        for count, truths in self._by_count.items():
            parts, rest = divmod(count, actual.numel())
            if rest or not 2 <= parts <= 16:
                continue
            for truth in truths:
                for axis in {1, truth.tensor.ndim - 1}:
                    if axis >= truth.tensor.ndim or truth.tensor.shape[axis] % parts:
                        continue
                    for index, part in enumerate(truth.tensor.chunk(parts, axis)):
                        if not math.isclose(rms(part), size, rel_tol=SAME):
                            continue
                        if self.match(actual, Truth(part.contiguous())) is not None:
                            return truth, index, parts
        return None

    def _orders(self, expected: Tensor, actual: Tensor) -> Iterator[Axes]:
        """Yield orders of PyTorch's axes that may give Keras's shape: usual, unchanged, channels last, then others."""
        rank = expected.ndim
        same, channels = tuple(range(rank)), moved(rank) if rank > 1 else tuple(range(rank))
        known = dict.fromkeys((self._usual.get(rank, same), same, channels))
        sides = actual.shape
        for axes in known:
            yield axes
        if rank > MOST_AXES or rank < 2:
            return
        for axes in itertools.permutations(range(rank)):
            if axes in known:
                continue
            permuted = tuple(expected.shape[axis] for axis in axes)
            if permuted == tuple(sides) or rank != actual.ndim:
                yield axes


def _agrees_here_and_there(actual: Tensor, expected: Tensor, axes: Axes, limit: float) -> bool:
    """Whether some elements, evenly spread, differ by at most `_FAR` times `limit`, a limit of the RMS distance."""
    import torch

    count = actual.numel()
    if not count:
        return True
    places = torch.linspace(0, count - 1, min(_TRIED, count), dtype=torch.float64).long()
    shape = tuple(expected.shape[axis] for axis in axes)
    index: list[Tensor | None] = [None] * expected.ndim
    rest = places
    for axis, side in zip(reversed(axes), reversed(shape), strict=True):
        index[axis] = rest % side
        rest = rest // side
    theirs = expected[tuple(index)] if expected.ndim else expected.expand(len(places))
    ours = actual.reshape(-1)[places] if actual.ndim else actual.expand(len(places))
    near = (ours - theirs).abs() <= _FAR * limit
    return bool((near | ((ours == theirs) & ours.isinf())).all())


def _mean(tensor: Tensor) -> float:
    """The mean of the numbers that are not infinite, such as scores behind a mask."""
    values = tensor.double()
    mean = float(values.mean())
    return mean if math.isfinite(mean) else float(values.masked_fill(values.isinf(), 0.0).mean())


def _reordered(actual: Tensor, truth: Truth, tolerance: float) -> Match | None:
    """Match the same numbers in another order within each sample, as after a Flatten. One tensor must not be a map.

    Between two maps, another order is a mistake, such as a pixel shuffle in TensorFlow's order.
    """
    if actual.ndim > 2 and truth.tensor.ndim > 2:
        return None
    if actual.ndim < 1 or truth.tensor.ndim < 1 or len(actual) != len(truth.tensor) or truth.rms == 0.0:
        return None
    ours, theirs = (side.reshape(len(side), -1).sort(dim=1).values for side in (actual, truth.tensor))
    distance = measure_distance(ours, theirs)
    if distance.total().rms > tolerance * truth.rms:
        return None
    return Match(truth, tuple(range(truth.tensor.ndim)), distance, reordered=True)


def is_in_float32(tensor: Tensor) -> bool:
    """Whether every number is exact in float32, which the results of float64 arithmetic are not."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() < 2:
        return False
    if tensor.dtype != torch.float64:
        return True
    some = _some_of(tensor)
    if not bool((some.float().double() == some).all()):
        return False
    return bool((tensor.float().double() == tensor).all())


def is_whole(tensor: Tensor) -> bool:
    """Whether no number has a fraction."""
    some = _some_of(tensor)  # which settles it for nearly every tensor
    return bool((some == some.round()).all()) and bool((tensor == tensor.round()).all())


def _some_of(tensor: Tensor) -> Tensor:
    return in_memory_order(tensor).reshape(-1)[: 4 * _TRIED]


def computes_in_float32(output: Tensor, match: Match) -> bool:
    """Whether one side computes a tensor in float32 internally, so that only a loose match is possible.

    The numbers of that side are then exact in float32, and those of the other are not. If both are, as in a row of an
    embedding, nothing was computed and they must be equal, unless the type itself is float32.
    """
    import torch

    if match.reordered:
        return False
    if output.dtype in {torch.float32, torch.complex64}:
        return True
    return is_in_float32(as_real(output)) != match.truth.in_float32


def as_real(tensor: Tensor) -> Tensor:
    """Convert complex numbers to pairs of real ones, and integers and booleans to float64. Floats stay as they are."""
    import torch

    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor if tensor.is_floating_point() else tensor.double()
