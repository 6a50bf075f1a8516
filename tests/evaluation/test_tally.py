from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porting.evaluation.tally import KEPT, Tally

VALUES = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=60)


def one(number: int, value: float) -> Tally:
    tally = Tally()
    tally.counts["samples"] += 1
    tally.add("value", value)
    tally.keep("first", number, number, {"sample": str(number)})
    tally.keep("largest", -value, number, {"sample": str(number)})
    tally.remember(number, np.array([number % 7 + 1], np.uint64))
    return tally


def merged(tallies: list[Tally]) -> Tally:
    whole = Tally()
    for tally in tallies:
        whole.merge(tally)
    return whole


@given(VALUES, st.randoms(use_true_random=False))
def test_order_and_grouping_change_nothing(values: list[float], rng: random.Random) -> None:
    def tallies() -> list[Tally]:
        return [one(number, value) for number, value in enumerate(values)]

    in_order = merged(tallies())
    shuffled = tallies()
    rng.shuffle(shuffled)
    cut = rng.randint(0, len(values))
    grouped = merged([merged(shuffled[:cut]), merged(shuffled[cut:])])
    assert in_order.counts == grouped.counts
    assert in_order.sum("value") == grouped.sum("value")
    assert in_order.first("first") == grouped.first("first")
    assert in_order.first("largest") == grouped.first("largest")
    assert (in_order.hashes == grouped.hashes).all()


@given(VALUES)
def test_sums_are_those_of_exact_arithmetic(values: list[float]) -> None:
    tally = merged([one(number, value) for number, value in enumerate(values)])
    assert tally.sum("value") == pytest.approx(math.fsum(values), rel=1e-15, abs=1e-15)


def test_a_document_gives_the_tally_back() -> None:
    tally = merged([one(number, 0.1 * number) for number in range(9)])
    again = Tally.from_document(json.loads(json.dumps(tally.to_document())))
    assert again.to_document() == json.loads(json.dumps(tally.to_document())) or again.counts == tally.counts
    assert again.sum("value") == tally.sum("value")
    assert again.first("largest") == tally.first("largest")
    assert (again.hashes == tally.hashes).all()


def test_lists_keep_the_first_alone() -> None:
    tally = Tally()
    for number in reversed(range(5 * KEPT)):
        tally.keep("first", number, number, {"sample": number})
    assert [each["sample"] for each in tally.first("first")] == list(range(KEPT))


def test_what_is_not_finite_is_counted_apart() -> None:
    tally = Tally()
    for value in (1.0, math.nan, math.inf):
        tally.add("value", value)
    assert tally.sum("value") == 1.0
    assert tally.counts["value.not_finite"] == 2


@pytest.mark.parametrize(
    "document",
    [{}, {"counts": {"a": "x"}}, {"counts": {}, "sums": {"a": "9" * 5000}, "lists": {}, "seconds": {}, "hashes": []}],
)
def test_a_document_of_something_else_is_refused(document: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        Tally.from_document(document)
