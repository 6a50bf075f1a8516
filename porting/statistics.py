"""How far two tensors are apart, summed up over batches that come one after another.

Works on torch tensors, because PyTorch computes on all cores; torch itself is imported by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Distances in units in the last place are taken on at most so many elements a tensor and batch, evenly spread.
ULP_SAMPLE = 65_536


@dataclass(frozen=True)
class Distance:
    """Greatest absolute and root mean square value, over all elements."""

    max: float = 0.0
    rms: float = 0.0


@dataclass(frozen=True)
class Difference:
    """`actual` (Keras) against `expected` (PyTorch), both float32, over all elements of all batches.

    `relative` is the RMS difference over the RMS of `expected`; `sqnr_db` the same as a ratio of powers. ULP
    distances are counted in float32's units in the last place. `worst_index` is in Keras's axis order, with the
    image's number first. `share_over` is the share of elements whose distance to the truth is over the limit.
    `ulp_histogram` counts the sampled elements that are 0, 1, 2 to 3, 4 to 7, ... units apart.
    """

    max: float = 0.0
    mean: float = 0.0
    rms: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    sqnr_db: float = math.inf
    ulp_median: float = 0.0
    ulp_p999: float = 0.0
    ulp_max: float = 0.0
    nonfinite_expected: int = 0
    nonfinite_actual: int = 0
    worst_index: tuple[int, ...] = ()
    worst_expected: float = 0.0
    worst_actual: float = 0.0
    share_over: float = 0.0
    ulp_histogram: tuple[int, ...] = ()


class DistanceSum:
    """A Distance over batches."""

    def __init__(self) -> None:
        self.max = 0.0
        self.sum_of_squares = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        if values.numel():
            greatest = norm(values, math.inf)
            # A NaN must stay one: max() would lose it when it comes second.
            self.max = greatest if math.isnan(greatest) else max(self.max, greatest)
            self.sum_of_squares += norm(values, 2) ** 2
            self.count += values.numel()

    def total(self) -> Distance:
        return Distance(self.max, math.sqrt(self.sum_of_squares / self.count) if self.count else 0.0)


class DifferenceSum:
    """A Difference over batches; `samples_before` shifts the image's number in `worst_index`."""

    def __init__(self) -> None:
        self.distance = DistanceSum()
        self.expected_power = self.actual_power = 0.0
        self.sum_of_absolutes = 0.0
        self.over = 0
        self.nonfinite = [0, 0]
        self.ulps: list[Tensor] = []
        self.worst: tuple[float, tuple[int, ...], float, float] = (-1.0, (), 0.0, 0.0)

    def add(self, actual: Tensor, expected: Tensor, error: Tensor, limit: float, samples_before: int) -> None:
        """Takes one batch; `error` is actual minus the truth, and `limit` what it may be at most."""
        import torch

        if not actual.numel():
            return
        difference = actual - expected
        self.distance.add(difference)
        self.expected_power += norm(expected, 2) ** 2
        self.actual_power += norm(actual, 2) ** 2
        self.sum_of_absolutes += norm(difference, 1)
        absolute = error.abs().flatten()
        greatest, position = (float(each) for each in absolute.max(0))
        if not greatest <= limit:
            self.over += int((~(absolute <= limit)).sum())
        if not math.isfinite(self.distance.max):
            self.nonfinite[0] += int((~expected.isfinite()).sum())
            self.nonfinite[1] += int((~actual.isfinite()).sum())
        self.ulps.append(_ulp_distance(actual, expected))
        if math.isnan(greatest):
            greatest = math.inf
        if greatest > self.worst[0]:
            place = int(position)
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), error.shape)]
            index[:1] = [index[0] + samples_before] if index else []
            values = float(expected.flatten()[place]), float(actual.flatten()[place])
            self.worst = (greatest, tuple(index), *values)

    def total(self) -> Difference:
        import torch

        count = self.distance.count
        if not count:
            return Difference()
        power, error_power = self.expected_power, self.distance.sum_of_squares
        lengths = math.sqrt(power), math.sqrt(self.actual_power)
        product = lengths[0] * lengths[1]
        # The law of cosines in the form that does not cancel where the two are nearly equal.
        cosine = 1.0 - (error_power - (lengths[0] - lengths[1]) ** 2) / (2 * product) if product else 1.0
        ulps = torch.cat(self.ulps).sort().values
        distance = self.distance.total()
        return Difference(
            max=distance.max,
            mean=self.sum_of_absolutes / count,
            rms=distance.rms,
            relative=math.sqrt(error_power / power) if power else (math.inf if error_power else 0.0),
            cosine=cosine,
            sqnr_db=10 * math.log10(power / error_power) if power and error_power else math.inf,
            ulp_median=float(ulps[len(ulps) // 2]),
            ulp_p999=float(ulps[min(int(len(ulps) * 0.999), len(ulps) - 1)]),
            ulp_max=float(ulps[-1]),
            nonfinite_expected=self.nonfinite[0],
            nonfinite_actual=self.nonfinite[1],
            worst_index=self.worst[1],
            worst_expected=self.worst[2],
            worst_actual=self.worst[3],
            share_over=self.over / count,
            ulp_histogram=_doubling_histogram(ulps),
        )


def _doubling_histogram(ulps: Tensor) -> tuple[int, ...]:
    """Counts of 0, of 1, of 2 to 3, of 4 to 7 and so on, up to the last that is not empty."""
    import torch

    # frexp's exponent of a whole number is its count of bits, which is the bucket.
    buckets = torch.frexp(ulps.double()).exponent.long()
    return tuple(int(count) for count in torch.bincount(buckets))


def norm(values: Tensor, order: float) -> float:
    """The vector norm over all elements, without a copy: float32 sums are exact enough to judge errors by."""
    import torch

    if not values.is_floating_point():
        values = values.double()
    return float(torch.linalg.vector_norm(values, order))


def _ulp_distance(actual: Tensor, expected: Tensor) -> Tensor:
    """Numbers of float32 values between the two, on an even sample."""
    import torch

    def ordered(values: Tensor) -> Tensor:
        flat = values.flatten()
        step = max(1, flat.numel() // ULP_SAMPLE)
        bits = flat[::step].float().contiguous().view(torch.int32).long()
        # Negative floats count downwards in their bits; after this the integers are in the floats' order.
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (ordered(actual) - ordered(expected)).abs()
