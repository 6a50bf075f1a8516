from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from porting.errors import OutputError, ReportError
from porting.parity.report import (
    INPUT,
    ISOLATED,
    Audit,
    Diagnosis,
    Difference,
    Distance,
    LayerComparison,
    Limits,
    LogitsComparison,
    ParityReport,
    SettingDifference,
    View,
)
from porting.reports import format_of, render
from porting.reports.document import from_json, read_report
from porting.reports.terminal import print_report


def view(ratio: float, problem: str = "") -> View:
    return View(Distance(3, 1.5), Distance(2e-6, 1e-6), Distance(2e-6 * ratio, 1e-6 * ratio), problem)


def layer(source: str, target: str, ratio: float, problem: str = "", *, isolated: float = 1.0) -> LayerComparison:
    views = {"accumulated": view(ratio, problem), ISOLATED: view(isolated), INPUT: view(0.5)}
    difference = Difference(1e-6, 1e-7, 2e-7, worst_index=(0, 3), ulp_histogram=(5, 3, 1))
    return LayerComparison(source, target, "Conv2d", (2, 4), "float32", "float32", views, difference)


def make(*layers: LayerComparison, **changes: object) -> ParityReport:
    settings: dict[str, object] = {
        "logits": LogitsComparison(2, 2, 1, 1e-6),
        "input_shapes": ((2, 64, 64, 3),),
        "context": {"family": "van", "variant": "b1", "source": {"name": "x.pth", "sha256": "ab"}},
    }
    return ParityReport(layers, (), ("pool",), **{**settings, **changes})  # type: ignore[arg-type]


GOOD = (layer("block1.0.attn", "block1.0/attn", 1.5), layer("block1.0", "block1.0", 1.25))
PASSED = make(*GOOD)
FAILED = make(
    *GOOD,
    layer("block2.0.mlp", "block2.0/mlp", 900, isolated=700),
    layer("head", "head", math.inf),
    diagnosis=Diagnosis("block2.0.mlp", "the <bias> is lost", 1e-6, ("the <bias> is lost",)),
    audit=Audit(3, 9, (SettingDifference("block1.0", "eps", "1e-05", "0.001"),)),
    stress=(make(*GOOD, name="small variances"),),
)


def on_terminal(report: ParityReport, *, all_layers: bool = False, width: int = 140) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width), all_layers=all_layers)
    return stream.getvalue()


def test_terminal_of_a_passed_report() -> None:
    text = on_terminal(PASSED)
    assert "AT PARITY: 2 layers, worst ratio 1.50 (block1.0.attn), limit 8; top-1 agrees on 2 of 2 samples" in text
    assert "NOT" not in text
    assert "1 more layers are not shown" in text
    assert "Keras only, not compared: pool" in text
    assert "1.25" in text
    assert "block1.0.attn " in on_terminal(PASSED, all_layers=True)


def test_terminal_of_a_failed_report() -> None:
    text = on_terminal(FAILED)
    assert "First divergence: block2.0.mlp: 700 times PyTorch's own rounding, 8 allowed (seen in the isolated" in text
    assert "Cause, certain: the <bias> is lost" in text
    assert "Setting: block1.0: eps is 0.001 in Keras, 1e-05 in PyTorch" in text
    assert "stress, small variances: AT PARITY" in text
    assert "NOT AT PARITY: 2 of 4 layers" in text


@pytest.mark.parametrize("width", [40, 60, 80])
def test_narrow_terminals(width: int) -> None:
    lines = on_terminal(FAILED, width=width).splitlines()
    assert max(map(len, lines)) <= width


def test_the_verdict_is_the_limits_and_nothing_else() -> None:
    assert not make().passed
    assert make(*GOOD).passed
    assert not make(*GOOD, limits=Limits(max_ratio=1.4)).passed
    assert make(*GOOD, limits=Limits(max_ratio=1.4, per_layer={"block1.0.attn": 2})).passed
    assert not make(*GOOD, limits=Limits(atol=1e-7)).passed
    assert not make(*GOOD, stress=(make(layer("a", "a", 9)),)).passed


@pytest.mark.parametrize(
    "report", [PASSED, FAILED, make(layer("a", "b", math.nan, "no such"))], ids=["passed", "failed", "nan"]
)
def test_json_is_strict_and_gives_the_report_back(report: ParityReport) -> None:
    text = render(report, "json")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = from_json(text)
    assert render(again, "json") == text
    assert again.passed == report.passed
    assert again.first_divergence == report.first_divergence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a parity report: JSONDecodeError"),
        ("[]", "not a parity report: TypeError"),
        ("{}", "not a parity report: KeyError: 'schema_version'"),
        ('{"schema_version": 99}', "a report of schema 99, this version reads 2"),
        ('{"schema_version": 2, "logits": 3}', "not a parity report"),
    ],
    ids=["empty", "list", "object", "version", "damaged"],
)
def test_other_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ReportError, match=message):
        read_report(tmp_path / "x.json")


def test_no_report(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no such file"):
        read_report(tmp_path / "x.json")


def test_markdown() -> None:
    assert render(PASSED, "markdown").startswith("## ✅ Parity of van b1\n")
    text = render(FAILED, "markdown")
    assert text.startswith("## ❌ Parity of van b1\n")
    assert "- Cause, certain: the &lt;bias> is lost" in text
    assert "| `block2.0.mlp` | 2x4 | 900 | 700 | 0.5 | **no** |" in text
    assert "| small variances | AT PARITY" in text


def test_junit_has_a_case_a_layer() -> None:
    root = ET.fromstring(render(FAILED, "junit"))
    suites = {suite.get("name"): suite for suite in root.iter("testsuite")}
    assert set(suites) == {"parity, as ported", "parity, small variances"}
    suite = suites["parity, as ported"]
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert [name for name, failure in cases.items() if failure is not None] == ["block2.0.mlp", "head", "settings"]
    assert (suite.get("tests"), suite.get("failures")) == ("5", "3")
    empty = ET.fromstring(render(make(), "junit"))
    assert empty.get("failures") == "1"


def test_html_holds_all_and_fetches_nothing() -> None:
    text = render(FAILED, "html")
    assert "NOT AT PARITY: 2 of 4 layers" in text
    assert "the &lt;bias&gt; is lost" in text
    assert text.count("<tr tabindex") == 4
    assert "<svg" in text
    assert "source: sha256" in text
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?((?!#)[^"')\s>]+)""", text)
    assert [address for address in fetched if "://" in address or address.startswith("//")] == []


def test_html_is_safe_from_names() -> None:
    name = "</script><img src=x onerror=alert(1)>"
    text = render(make(layer(name, name, 1.0), context={"variant": name}), "html")
    assert "<img" not in text


def test_formats_by_suffix() -> None:
    assert [format_of(Path(name)) for name in ("a.json", "a.html", "a.md", "a.xml")] == [
        "json",
        "html",
        "markdown",
        "junit",
    ]
    with pytest.raises(OutputError, match="does not say which report"):
        format_of(Path("a.pdf"))
    with pytest.raises(OutputError, match="no format 'pdf'"):
        render(PASSED, "pdf")
