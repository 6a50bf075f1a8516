from __future__ import annotations

import io

import pytest
from rich.console import Console

from porting.parity import Distance, LogitsComparison, ParityReport, TensorComparison
from porting.report import print_report


def comparison(source: str, target: str, ratio: float, problem: str = "") -> TensorComparison:
    passed = ratio <= 8
    return TensorComparison(
        source, target, (2, 4), Distance(3, 1.5), Distance(2e-6, 1e-7), Distance(3e-6, 2e-7), Distance(), ratio, passed,
        problem,
    )  # fmt: skip


def render(*comparisons: TensorComparison, all_layers: bool = False, width: int = 140) -> str:
    report = ParityReport(comparisons, (), ("pool",), LogitsComparison(2, 2, 1e-6), 8.0, (2, 64, 64, 3))
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width), all_layers=all_layers)
    return stream.getvalue()


GOOD = [comparison("block1.0.attn", "block1.0/attn", 1.5), comparison("block1.0", "block1.0", 1.25)]


def test_a_passed_report() -> None:
    text = render(*GOOD)
    assert "AT PARITY: 2 layers, worst ratio 1.50 (block1.0.attn), limit 8; top-1 agrees on 2 of 2 images" in text
    assert "NOT" not in text
    assert "1 inner layers at parity are not shown" in text
    assert "Keras only, not compared: pool" in text
    assert "1.25" in text
    assert "2.0e-07" in text


def test_all_layers() -> None:
    text = render(*GOOD, all_layers=True)
    assert "block1.0.attn " in text
    assert "not shown" not in text


def test_a_failed_report_names_the_first_layer_and_shows_every_failure() -> None:
    text = render(*GOOD, comparison("block2.0.mlp", "block2.0/mlp", 900), comparison("head", "head", 50))
    assert "NOT AT PARITY from block2.0.mlp on: 2 of 4 layers" in text
    assert "900.00" in text


def test_a_problem_takes_the_place_of_a_number() -> None:
    text = render(comparison("head", "head", float("inf"), "shape (2, 5) instead of (2, 4)"))
    assert "shape (2, 5) instead of (2, 4)" in text
    assert "inf" not in text


@pytest.mark.parametrize("width", [40, 60, 80])
def test_narrow_terminals(width: int) -> None:
    lines = render(*GOOD, width=width).splitlines()
    assert max(map(len, lines)) <= width
