"""Counts, sums and lists whose merge gives exactly the same result in any order and grouping.

Counts are integers. Sums are stored as integer multiples of 2^-80, so that addition is associative. Lists keep the
first entries of an order that depends only on the samples.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from porting.kinds.transforms import Array

_SCALE = 80
# The number of samples that each list keeps.
KEPT = 200


class Tally:
    """Statistics of some samples. `merge` adds those of other samples.

    `counts` and sums are by name. `lists` holds `(order, sample, record)` by name: the `KEPT` entries with the smallest
    order, then the smallest sample number. `hashes` holds 64 bits of the hash of each sample's bytes.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self.lists: dict[str, list[tuple[float, int, dict[str, Any]]]] = {}
        self.seconds: Counter[str] = Counter()
        self._hashes: list[tuple[int, bytes]] = []

    def add(self, name: str, value: float) -> None:
        """Add a value to a sum. Non-finite values are counted separately."""
        if not math.isfinite(value):
            self.counts[f"{name}.not_finite"] += 1
            return
        mantissa, exponent = math.frexp(value)
        whole = int(mantissa * 2.0**53)
        shift = exponent - 53 + _SCALE
        self._sums[name] += whole << shift if shift >= 0 else whole >> -shift

    def mean(self, name: str, count: int) -> float | None:
        """The mean of `count` added values: infinite if any was non-finite, None if there are none."""
        if self.counts[f"{name}.not_finite"]:
            return math.inf
        return self.sum(name) / count if count else None

    def sum(self, name: str) -> float:
        total = self._sums[name]
        return math.ldexp(total, -_SCALE) if abs(total) < 2**53 else total / (1 << _SCALE)

    def keep(self, name: str, order: float, sample: int, record: Mapping[str, Any]) -> None:
        """Add a record to a list, which keeps only its first entries."""
        found = self.lists.setdefault(name, [])
        found.append((order, sample, dict(record)))
        if len(found) > 2 * KEPT:
            self._shorten(name)

    def first(self, name: str, count: int = KEPT) -> list[dict[str, Any]]:
        """The first records of a list, in order."""
        self._shorten(name)
        return [record for _, _, record in self.lists.get(name, [])[:count]]

    def _shorten(self, name: str) -> None:
        if name in self.lists:
            self.lists[name] = sorted(self.lists[name], key=lambda entry: entry[:2])[:KEPT]

    def remember(self, block: int, hashes: Array) -> None:
        """Store the hashes of all samples of a block, uint64."""
        self._hashes.append((block, np.ascontiguousarray(hashes, "<u8").tobytes()))

    @property
    def hashes(self) -> Array:
        """The hashes of all samples, in the order of the data set."""
        return np.frombuffer(b"".join(data for _, data in sorted(self._hashes)), "<u8")

    def merge(self, other: Tally) -> None:
        self.counts += other.counts
        for name, value in other._sums.items():  # `+=` would drop values that are not positive
            self._sums[name] += value
        self.seconds.update(other.seconds)
        for name, entries in other.lists.items():
            self.lists.setdefault(name, []).extend(entries)
            self._shorten(name)
        self._hashes += other._hashes

    def to_document(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return {
            "counts": dict(self.counts),
            "sums": {name: str(value) for name, value in self._sums.items()},
            "lists": self.lists,
            "seconds": dict(self.seconds),
            "hashes": [[block, base64.b64encode(data).decode()] for block, data in self._hashes],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Tally:
        """Restore a tally; raises ValueError, TypeError, KeyError or AttributeError if the document is invalid."""
        made = cls()
        made.counts.update({str(name): int(value) for name, value in document["counts"].items()})
        for name, value in document["sums"].items():
            if len(value) > 400:
                raise ValueError(f"the sum {name} has {len(value)} digits")
            made._sums[str(name)] = int(value)
        made.lists = {
            str(name): [(float(order), int(sample), dict(record)) for order, sample, record in entries]
            for name, entries in document["lists"].items()
        }
        made.seconds.update({str(name): float(value) for name, value in document["seconds"].items()})
        made._hashes = [(int(block), base64.b64decode(data)) for block, data in document["hashes"]]
        return made
