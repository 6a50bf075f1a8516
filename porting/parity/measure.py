"""Measures how far two tensors are apart, summed over batches that come one after another.

Works on torch tensors, because PyTorch computes on all cores. The caller has already imported torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from porting.parity.report import Difference, Distance

if TYPE_CHECKING:
    from torch import Tensor

# Distances in units in the last place use at most this many elements per tensor and batch, evenly spread.
ULP_SAMPLE = 4_096
# The number of elements to process at once: enough for PyTorch to use all cores, few enough to stay in their caches.
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
        difference = one - other
        greatest = _greatest(difference)
        if math.isnan(greatest):
            one, other = without_equal_infinities(one, other)
            difference = one - other
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
        self.ulps: list[Tensor] = []
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
        actual, expected = (side if side.is_floating_point() else side.float() for side in (actual, expected))
        worst, worst_error, begin = -1.0, None, 0
        step = -(-actual.numel() // ULP_SAMPLE)
        samples: list[tuple[Tensor, Tensor]] = []
        done = 0
        tensors = (actual, expected) if expected_error is None else (actual, expected, expected_error)
        for mine, theirs, *rest in _chunks(*tensors):
            difference = mine - theirs
            error = difference + rest[0] if rest else difference
            greatest = _greatest(error)
            if math.isnan(greatest):
                same = (mine == theirs) & mine.isinf()
                mine, theirs, difference, error = (
                    each.masked_fill(same, 0.0) for each in (mine, theirs, difference, error)
                )
                greatest = _greatest(error)
            power = _power(error)
            distance._take(greatest, power, error.numel())
            if rest:
                self.distance.add_chunk(difference)
            else:
                self.distance._take(greatest, power, error.numel())
            if expected_power is None:
                self.expected_power += _power(theirs)
            self.actual_power += _power(mine)
            self.sum_of_absolutes += float(difference.abs().sum())
            if not greatest <= limit:
                self.over += int((~(error.abs() <= limit)).sum())
            if not math.isfinite(greatest):
                self.nonfinite[0] += int((~theirs.isfinite()).sum())
                self.nonfinite[1] += int((~mine.isfinite()).sum())
                greatest = math.inf
            if greatest > worst:
                worst, worst_error, begin = greatest, error, done
            # Every step-th element of the whole tensor, wherever its chunks begin.
            samples.append((mine[-done % step :: step], theirs[-done % step :: step]))
            done += mine.numel()
        self.expected_power += expected_power or 0.0
        self.ulps.append(_ulp_distance(*(_joined(side) for side in zip(*samples, strict=True))))
        if worst > self.worst[0] and worst_error is not None:
            place = begin + int(worst_error.abs().nan_to_num(math.inf, math.inf).argmax())
            index = [int(each) for each in np.unravel_index(place, tuple(actual.shape))]
            index[:1] = [index[0] + self.samples_before] if index else []
            self.worst = (worst, tuple(index), _value_at(expected, place), _value_at(actual, place))
        return distance

    def total(self) -> Difference:
        import torch

        count = self.distance.count
        if not count:
            return Difference()
        power, error_power = self.expected_power, self.distance.sum_of_squares
        lengths = math.sqrt(power), math.sqrt(self.actual_power)
        product = lengths[0] * lengths[1]
        # The law of cosines, in a form without cancellation when the two are nearly equal.
        cosine = 1.0 - (error_power - (lengths[0] - lengths[1]) ** 2) / (2 * product) if product else 1.0
        ulps = torch.cat(self.ulps)
        sampled = len(ulps)
        middle, late = sampled // 2, min(int(sampled * 0.999), sampled - 1)
        ranked = np.partition(ulps.numpy(), (middle, late))
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
            ulp_max=float(ranked[late:].max()),
            nonfinite_expected=self.nonfinite[0],
            nonfinite_actual=self.nonfinite[1],
            worst_index=self.worst[1],
            worst_expected=self.worst[2],
            worst_actual=self.worst[3],
            share_over=self.over / count,
            ulp_histogram=_doubling_histogram(ulps),
        )


def _decibels(power: float, error_power: float) -> float:
    if not power or not error_power:
        return math.inf
    quotient = power / error_power
    return 10 * math.log10(quotient) if quotient else -math.inf  # an infinite error


def _doubling_histogram(ulps: Tensor) -> tuple[int, ...]:
    """Count the values 0, 1, 2 to 3, 4 to 7 and so on, up to the last bucket that is not empty."""
    import torch

    # frexp's exponent of a whole number is its number of bits, which is the bucket.
    buckets = torch.frexp(ulps.double()).exponent.long()
    return tuple(torch.bincount(buckets).tolist())


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors side by side, in pieces small enough to stay in the processor's cache between passes."""
    import torch

    yield from zip(*(torch.split(tensor.reshape(-1), CHUNK) for tensor in tensors), strict=True)


def _greatest(chunk: Tensor) -> float:
    """The greatest absolute value; NaN if the chunk has one. torch's infinity norm takes ten times as long."""
    import torch

    if chunk.dtype == torch.bool:
        chunk = chunk.byte()
    if not chunk.numel():
        return 0.0
    low, high = torch.aminmax(chunk)
    lowest, highest = float(low), float(high)
    return highest if math.isnan(highest) else max(-lowest, highest)


def _power(chunk: Tensor) -> float:
    """The sum of squares in the chunk's own precision, which is exact enough to judge errors."""
    import torch

    if not chunk.is_floating_point():
        chunk = chunk.double()
    return float(torch.dot(chunk, chunk))


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(pieces))


def _value_at(tensor: Tensor, place: int) -> float:
    return float(tensor.reshape(-1)[place])


def _ulp_distance(actual: Tensor, expected: Tensor) -> Tensor:
    """The number of float32 steps between two tensors, element by element."""
    import torch

    def ordered(values: Tensor) -> Tensor:
        bits = values.float().contiguous().view(torch.int32).long()
        # The bits of negative floats count downwards. After this, the integers have the order of the floats.
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (ordered(actual) - ordered(expected)).abs()
