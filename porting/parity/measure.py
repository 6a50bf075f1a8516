"""Measures how far two tensors are apart, summed over batches that come one after another.

Works on torch tensors, because PyTorch computes on all cores. The caller has already imported torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from porting.kinds.transforms import Array
from porting.parity.report import Difference, Distance

if TYPE_CHECKING:
    from torch import Tensor

# Distances in units in the last place use at most this many elements per tensor and batch, evenly spread.
ULP_SAMPLE = 4_096
# The number of elements that each of PyTorch's threads processes at once: few enough to stay in its core's cache.
CHUNK = 65_536


class DistanceSum:
    """Accumulates a Distance over batches."""

    def __init__(self) -> None:
        self.max = 0.0
        self.sum_of_squares = 0.0
        self.count = 0

    @classmethod
    def zeros(cls, count: int) -> DistanceSum:
        """A sum that has taken `count` zeros."""
        sums = cls()
        sums.count = count
        return sums

    def add_chunk(self, chunk: Tensor) -> None:
        """Add a one-dimensional chunk of values."""
        self._take(_greatest(chunk), _power(chunk), chunk.numel())

    def add_size(self, chunk: Tensor) -> None:
        """Add a one-dimensional chunk of values without those that are infinite, such as scores behind a mask."""
        greatest = _greatest(chunk)
        if math.isinf(greatest):
            chunk = chunk.masked_fill(chunk.isinf(), 0.0)
            greatest = _greatest(chunk)
        self._take(greatest, _power(chunk), chunk.numel())

    def add_difference(self, one: Tensor, other: Tensor) -> None:
        """Add the difference of two one-dimensional chunks. Equal infinities do not differ."""
        difference = _minus(one, other)
        greatest = _greatest(difference)
        if math.isnan(greatest):
            difference = _minus(*without_equal_infinities(one, other))
            greatest = _greatest(difference)
        self._take(greatest, _power(difference), difference.numel())

    def include(self, other: DistanceSum) -> None:
        """Add all values of another sum."""
        if other.count:
            self._take(other.max, other.sum_of_squares, other.count)

    def _take(self, greatest: float, sum_of_squares: float, count: int) -> None:
        # Keep a NaN: max() would lose it as the second argument.
        self.max = greatest if math.isnan(greatest) else max(self.max, greatest)
        self.sum_of_squares += sum_of_squares
        self.count += count

    def total(self) -> Distance:
        return Distance(self.max, math.sqrt(self.sum_of_squares / self.count) if self.count else 0.0)


def measure_truth(expected: Tensor, truth: Tensor) -> tuple[Tensor, DistanceSum, DistanceSum]:
    """Return PyTorch's float32 values minus the truth, as float32, then their distance and the size of the truth."""
    import torch

    # After a permutation, PyTorch continues with channels last.
    order = _memory_order(expected)
    error = torch.empty_like(expected.permute(order), dtype=torch.float32, memory_format=torch.contiguous_format)
    size, scale = DistanceSum(), DistanceSum()
    for mine, exact, out in _chunks(expected.permute(order), truth.permute(order), error):
        if mine.is_floating_point():
            out.copy_(exact.sub(mine).neg_())
        else:
            out.copy_(exact != mine)
        size.add_chunk(out)
        scale.add_chunk(exact)
    return error.permute([order.index(axis) for axis in range(expected.ndim)]), size, scale


def measure_size(tensor: Tensor) -> DistanceSum:
    """Measure the size of a tensor as its distance to zero. Infinities are left out: no scale could contain them."""
    size = DistanceSum()
    for (chunk,) in _chunks(in_memory_order(tensor)):
        size.add_size(chunk)
    return size


def measure_distance(actual: Tensor, truth: Tensor) -> DistanceSum:
    """Measure the distance of two tensors of one shape in float64, in the memory order of `truth`."""
    order = _memory_order(truth)
    size = DistanceSum()
    for mine, exact in _chunks(actual.permute(order), truth.permute(order)):
        size.add_difference(exact, mine)
    return size


def rms(values: Tensor) -> float:
    """The root mean square of a tensor, in its own precision."""
    return float(values.square().mean().sqrt())


def mean_square_distance(one: Tensor, other: Tensor) -> float:
    """The mean square of the difference of two tensors; infinite if it is not a number."""
    return float((one - other).square().mean().nan_to_num(float("inf")))


def without_equal_infinities(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape with zeros where both have the same infinity."""
    same = (one == other) & one.isinf()
    return one.masked_fill(same, 0.0), other.masked_fill(same, 0.0)


def in_memory_order(tensor: Tensor) -> Tensor:
    """The tensor with its axes in the order of its memory, so that it can be made flat without a copy."""
    return tensor.permute(_memory_order(tensor))


def _memory_order(tensor: Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda axis: -strides[axis])


class DifferenceSum:
    """Accumulates a Difference over batches. `samples_before` is added to the sample's number in `worst_index`."""

    def __init__(self, samples_before: int = 0) -> None:
        self.samples_before = samples_before
        self.distance = DistanceSum()
        self.expected_power = self.actual_power = 0.0
        self.sum_of_absolutes = 0.0
        self.over = 0
        self.nonfinite = [0, 0]
        self.ulps: list[Array] = []
        self.worst: tuple[float, tuple[int, ...], float, float] = (-1.0, (), 0.0, 0.0)

    def include(self, other: DifferenceSum) -> None:
        """Add all values of another sum."""
        self.distance.include(other.distance)
        self.expected_power += other.expected_power
        self.actual_power += other.actual_power
        self.sum_of_absolutes += other.sum_of_absolutes
        self.over += other.over
        self.nonfinite = [one + more for one, more in zip(self.nonfinite, other.nonfinite, strict=True)]
        self.ulps += other.ulps
        self.worst = max(self.worst, other.worst, key=lambda worst: worst[0])

    def add(
        self,
        actual: Tensor,
        expected: Tensor,
        expected_error: Tensor | None,
        limit: float,
        expected_power: float | None = None,
    ) -> DistanceSum:
        """Add one batch and return the distance of `actual` to the truth. Elements over `limit` are counted.

        `expected_error` is `expected` minus the truth; None if it is zero. All tensors are in Keras's order of axes.
        """
        distance = DistanceSum()
        if not actual.numel():
            return distance
        sides = [actual, expected] if expected_error is None else [actual, expected, expected_error]
        flat = [(side if side.is_floating_point() else side.float()).reshape(-1) for side in sides]
        worst, worst_error, begin, done = -1.0, flat[0], 0, 0
        for mine, theirs, *rest in _chunks(*flat):
            difference = _minus(mine, theirs)
            error = difference + rest[0] if rest else difference
            power = _power(error)
            if math.isnan(power):
                same = (mine == theirs) & mine.isinf()
                mine, theirs, difference, error = (
                    each.masked_fill(same, 0.0) for each in (mine, theirs, difference, error)
                )
                power = _power(error)
            size = error.abs()
            greatest = float(size.amax())
            distance._take(greatest, power, error.numel())
            if rest:
                self.distance.add_chunk(difference)
            else:
                self.distance._take(greatest, power, error.numel())
            self.sum_of_absolutes += float((difference.abs() if rest else size).sum())
            if expected_power is None:
                self.expected_power += _power(theirs)
            self.actual_power += _power(mine)
            if not greatest <= limit:
                self.over += int((~(size <= limit)).sum())
            if not math.isfinite(greatest):
                self.nonfinite[0] += int((~theirs.isfinite()).sum())
                self.nonfinite[1] += int((~mine.isfinite()).sum())
                greatest = math.inf
            if greatest > worst:
                worst, worst_error, begin = greatest, size, done
            done += mine.numel()
        self.expected_power += expected_power or 0.0
        step = -(-actual.numel() // ULP_SAMPLE)
        self.ulps.append(_ulp_distance(flat[0][::step], flat[1][::step]))
        if worst > self.worst[0]:
            place = begin + int(np.argmax(~(worst_error < worst).numpy()))
            index = [int(each) for each in np.unravel_index(place, tuple(actual.shape))]
            index[:1] = [index[0] + self.samples_before] if index else []
            self.worst = (worst, tuple(index), float(flat[1][place]), float(flat[0][place]))
        return distance

    def total(self) -> Difference:
        count = self.distance.count
        if not count:
            return Difference()
        power, error_power = self.expected_power, self.distance.sum_of_squares
        lengths = math.sqrt(power), math.sqrt(self.actual_power)
        product = lengths[0] * lengths[1]
        # The law of cosines, in a form without cancellation when the two are nearly equal.
        cosine = 1.0 - (error_power - (lengths[0] - lengths[1]) ** 2) / (2 * product) if product else 1.0
        ranked = np.sort(np.concatenate(self.ulps))
        sampled = len(ranked)
        middle, late = sampled // 2, min(int(sampled * 0.999), sampled - 1)
        distance = self.distance.total()
        return Difference(
            max=distance.max,
            mean=self.sum_of_absolutes / count,
            rms=distance.rms,
            relative=math.sqrt(error_power / power) if power else (math.inf if error_power else 0.0),
            cosine=cosine,
            sqnr_db=_decibels(power, error_power),
            ulp_median=float(ranked[middle]),
            ulp_p999=float(ranked[late]),
            ulp_max=float(ranked[-1]),
            nonfinite_expected=self.nonfinite[0],
            nonfinite_actual=self.nonfinite[1],
            worst_index=self.worst[1],
            worst_expected=self.worst[2],
            worst_actual=self.worst[3],
            share_over=self.over / count,
            ulp_histogram=_doubling_histogram(ranked),
        )


def _decibels(power: float, error_power: float) -> float:
    if not power or not error_power:
        return math.inf
    quotient = power / error_power
    return 10 * math.log10(quotient) if quotient else -math.inf  # an infinite error


def _doubling_histogram(ranked: Array) -> tuple[int, ...]:
    """Count the values 0, 1, 2 to 3, 4 to 7 and so on, up to the last bucket that is not empty."""
    ends = 2 ** np.arange(int(ranked[-1]).bit_length() + 1)
    return tuple(np.diff(np.searchsorted(ranked, ends), prepend=0).tolist())


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors side by side, in pieces small enough to stay in the processor's cache between passes."""
    import torch

    count = CHUNK * torch.get_num_threads()
    yield from zip(*(torch.split(tensor.reshape(-1), count) for tensor in tensors), strict=True)


def _minus(one: Tensor, other: Tensor) -> Tensor:
    """The difference, in the wider type. PyTorch itself takes twice as long if the types are not the same."""
    if one.is_floating_point() and other.is_floating_point() and one.element_size() < other.element_size():
        return one.to(other.dtype).sub_(other)
    return one - other


def _greatest(chunk: Tensor) -> float:
    """The greatest absolute value; NaN if the chunk has one. torch's infinity norm takes ten times as long."""
    if not chunk.numel():
        return 0.0
    if not chunk.is_floating_point():
        chunk = chunk.double()
    lowest, highest = float(chunk.amin()), float(chunk.amax())  # twice as fast as aminmax
    return highest if math.isnan(highest) else max(-lowest, highest)


def _power(chunk: Tensor) -> float:
    """The sum of squares in the chunk's own precision, which is exact enough to judge errors."""
    import torch

    if not chunk.is_floating_point():
        chunk = chunk.double()
    return float(torch.dot(chunk, chunk))


def _ulp_distance(actual: Tensor, expected: Tensor) -> Array:
    """The number of float32 steps between two tensors, element by element."""
    import torch

    bits: Array = torch.stack([actual.float(), expected.float()]).numpy().view(np.int32)
    # The bits of negative floats count downwards. After this, the integers have the order of the floats.
    ordered: Array = np.where(bits < 0, -(bits & 0x7FFFFFFF).astype(np.int64), bits)
    distance: Array = np.abs(ordered[0] - ordered[1])
    return distance
