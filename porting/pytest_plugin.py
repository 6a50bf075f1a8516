"""A pytest fixture that gates a port of one's own.

    def test_port(assert_parity):
        assert_parity(torch_model, keras_model, images)

Installed with the package; nothing is imported until a test uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from porting.parity.report import ParityReport


@pytest.fixture(scope="session")
def assert_parity() -> Callable[..., ParityReport]:
    """`assert_parity(reference, candidate, inputs, ...)`: as `porting.check_parity`, and fails the test when not at
    parity, with the verdict, the first divergence and its cause. Returns the report.
    """

    def check(reference: Any, candidate: Any, inputs: Any, **arguments: Any) -> ParityReport:
        __tracebackhide__ = True
        from porting.parity.compare import check_parity
        from porting.reports.terminal import findings, verdict

        report = check_parity(reference, candidate, inputs, **arguments)
        if not report.passed:
            pytest.fail("\n".join([verdict(report), *findings(report)]), pytrace=False)
        return report

    return check
