"""Compressed rows are fewer, and stand for exactly the same layers."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from porting.mapping.compress import compress_rows
from porting.mapping.key_map import expand
from porting.mapping.rules import KeyRule


def conv(source: str, target: str) -> KeyRule:
    return KeyRule(source, target, "conv")


def names_of(rows: list[KeyRule]) -> set[str]:
    return {f"{row.source}.weight" for row in rows}


def expanded(rules: list[KeyRule], names: set[str]) -> Counter[tuple[str, str, str]]:
    return Counter((pair.source, pair.target, pair.kind) for _, pair in expand(rules, names))


def plain(rows: list[KeyRule]) -> Counter[tuple[str, str, str]]:
    return Counter((row.source, row.target, row.kind) for row in rows)


def test_numbers_that_go_along_become_placeholders() -> None:
    rows = [
        conv(f"layer{s}.{j}.conv{n}", f"conv{s + 1}_block{j + 1}_{n}_conv")
        for s in (1, 2)
        for j in (0, 1)
        for n in (1, 2)
    ]
    assert compress_rows(rows, names_of(rows)) == [conv("layer{s}.{j}.conv{k}", "conv{s+1}_block{j+1}_{k}_conv")]


def test_letters_and_numbers_counted_straight_through() -> None:
    rows = [conv(f"blocks.{s}.{j}.pw", f"block{s + 1}{'abc'[j]}_expand") for s in range(2) for j in range(s + 1)]
    assert compress_rows(rows, names_of(rows)) == [conv("blocks.{s}.{j}.pw", "block{s+1}{j:letter}_expand")]
    places = [(s, j) for s in range(3) for j in range(s + 1)]
    rows = [conv(f"blocks.{s}.{j}.pw", f"expand_{place}") for place, (s, j) in enumerate(places)]
    assert compress_rows(rows, names_of(rows)) == [conv("blocks.{s}.{j}.pw", "expand_{s.j}")]


def test_one_that_is_otherwise_is_an_exception() -> None:
    rows = [conv("blocks.0.0.pw", "first"), *(conv(f"blocks.{s}.{j}.pw", f"b{s}_{j}") for s in (1, 2) for j in (0, 1))]
    short = compress_rows(rows, names_of(rows))
    assert short == [conv("blocks.0.0.pw", "first"), conv("blocks.{s}.{j}.pw", "b{s}_{j}")]
    assert expanded(short, names_of(rows)) == plain(rows)


def test_a_placeholder_never_takes_in_another_layer() -> None:
    """`features.2` is a norm with the same tensor names, and has no row."""
    rows = [conv("features.0", "conv1"), conv("features.1", "conv2")]
    assert compress_rows(rows, {*names_of(rows), "features.2.weight"}) == rows


def test_what_follows_no_rule_stays_as_it_is() -> None:
    rows = [conv("features.0", "block1_conv1"), conv("features.2", "block1_conv2"), conv("features.5", "block2_conv1")]
    assert compress_rows(rows, names_of(rows)) == rows


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["a", "b", "c1", "c2"]), st.integers(0, 5)),
        min_size=1,
        max_size=25,
        unique_by=lambda each: each[:3],
    )
)
def test_the_short_rows_are_always_the_same_layers(layers: list[tuple[int, int, str, int]]) -> None:
    rows = [conv(f"s{s}.{j}.{name}", f"t{place}/{s + j}_{name}_{s}_{j}") for s, j, name, place in layers]
    short = compress_rows(rows, names_of(rows))
    assert expanded(short, names_of(rows)) == plain(rows)
    assert len(short) <= len(rows)
