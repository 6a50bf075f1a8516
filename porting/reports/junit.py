"""The report as JUnit XML, with one test case per layer, for CI servers."""

from __future__ import annotations

from porting.parity.report import OUTPUT, ParityReport
from porting.reports.terminal import verdict


def to_junit(report: ParityReport) -> str:
    """Render one suite for the port, with a case for each layer and for the settings, and one for each stress run."""
    from junitparser import JUnitXml

    xml = JUnitXml("parity")
    for run in (report, *report.stress):
        xml.add_testsuite(_suite(run))
    xml.update_statistics()
    text: bytes = xml.tostring()
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text.decode("utf-8")}\n'


def _suite(report: ParityReport) -> object:
    from junitparser import Failure, TestCase, TestSuite

    suite = TestSuite(f"parity, {report.name}")
    for layer in report.layers:
        case = TestCase(layer.source, classname=f"parity.{layer.kind}", time=0)
        reasons = [f"{view}: {reason}" for view in layer.views if (reason := report.limits.objection(layer, view))]
        if reasons and report.failed(layer):
            case.result = [Failure("; ".join(reasons), "not at parity")]
        suite.add_testcase(case)
    if report.audit is not None:
        case = TestCase("settings", classname="parity.audit", time=0)
        if report.audit.failures:
            case.result = [Failure("; ".join(map(str, report.audit.failures)), "settings differ")]
        suite.add_testcase(case)
    for number, culprit in enumerate(report.culprits, start=1):
        case = TestCase(f"divergence {number}: {culprit.culprit or OUTPUT}", classname="parity.culprit", time=0)
        cause = f"; cause, {culprit.diagnosis.confidence}: {culprit.diagnosis.cause}" if culprit.diagnosis else ""
        case.result = [Failure(f"{culprit}{cause}", "the models diverge here")]
        suite.add_testcase(case)
    if not report.passed and not any(case.result for case in suite):
        case = TestCase("verdict", classname="parity", time=0)
        case.result = [Failure("; ".join(report.objections) or verdict(report), "not at parity")]
        suite.add_testcase(case)
    return suite
