"""A pytest fixture that fails a test if your own port is not at parity.

    def test_port(assert_parity):
        assert_parity(torch_model, keras_model, images)

The fixture is installed with the package. It imports nothing until a test uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from porting.parity.report import ParityReport


@pytest.fixture(scope="session")
def assert_parity() -> Callable[..., ParityReport]:
    """A function `assert_parity(reference, candidate, inputs, ...)` with the arguments of `porting.check_parity`.

    It returns the report. If the models are not at parity, it fails the test with the verdict, the first divergence
    and its cause.
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
