from __future__ import annotations

import math

import pytest

from porting.errors import ReportError
from porting.parity.baseline import regressions
from porting.parity.report import FLOAT32, Difference, Distance, LayerComparison, ParityReport, View


def report(**errors: float) -> ParityReport:
    layers = tuple(
        LayerComparison(
            name, name, "Linear", (1,), "float32", "float32",
            {FLOAT32: View(Distance(1, 1), Distance(1e-7, 1e-7), Distance(error, error))}, Difference(),
            is_output=name == "output",
        )
        for name, error in errors.items()
    )  # fmt: skip
    return ParityReport(layers, (), (), None, ((1, 4),))


def test_equal_and_better_is_no_regression() -> None:
    assert regressions(report(a=1e-6, b=1e-6), report(a=1e-6, b=1e-5)) == []


def test_worse_by_more_than_the_factor() -> None:
    old = report(a=1e-6, b=1e-6)
    assert regressions(report(a=1.9e-6, b=2.1e-6), old, 2.0) == [
        "b (float32): relative error 2.1e-06, 1e-06 in the baseline"
    ]
    assert regressions(report(a=1.9e-6, b=2.1e-6), old, 3.0) == []


def test_below_one_rounding_nothing_counts() -> None:
    assert regressions(report(a=5e-8), report(a=0.0)) == []
    assert len(regressions(report(a=5e-7), report(a=0.0))) == 1


def test_a_layer_that_is_gone_or_not_finite() -> None:
    assert regressions(report(b=1e-6), report(a=1e-6, b=1e-6)) == ["a is in the baseline and is no longer compared"]
    assert len(regressions(report(a=math.nan), report(a=1e-6))) == 1


def test_a_baseline_of_another_model() -> None:
    with pytest.raises(ReportError, match="of another model: none of its 2 layers"):
        regressions(report(c=1e-6), report(a=1e-6, b=1e-6))
