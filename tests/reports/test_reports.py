from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from porting.errors import OutputError, ReportError, SourceError
from porting.parity.report import (
    EXACT,
    FLOAT32,
    FLOAT64_ROUNDOFF,
    Audit,
    Culprit,
    Diagnosis,
    Difference,
    Distance,
    LayerComparison,
    Limits,
    LogitsComparison,
    Loud,
    ParityReport,
    SettingDifference,
    Verified,
    View,
)
from porting.reports import format_of, render
from porting.reports.document import from_json, read_report
from porting.reports.terminal import print_report


def view(ratio: float, problem: str = "") -> View:
    return View(Distance(3.0, 1.5), Distance(2e-6, 1e-6), Distance(2e-6 * ratio, 1e-6 * ratio), problem)


def exact(relative: float) -> View:
    return View(
        Distance(3.0, 1.5), Distance(0.0, 0.0), Distance(3 * relative, 1.5 * relative), roundoff=FLOAT64_ROUNDOFF
    )


def layer(
    source: str, target: str, ratio: float, problem: str = "", *, relative: float = 1e-15, rewritten: str = ""
) -> LayerComparison:
    views = {EXACT: exact(relative), FLOAT32: view(ratio, problem)}
    difference = Difference(1e-6, 1e-7, 2e-7, worst_index=(0, 3), ulp_histogram=(5, 3, 1))
    is_output = source.startswith("output")
    kinds = "Conv2d", (2, 4), "float32", "float32"
    return LayerComparison(source, target, *kinds, views, difference, rewritten, is_output)


def make(*layers: LayerComparison, **changes: object) -> ParityReport:
    settings: dict[str, object] = {
        "logits": LogitsComparison(2, 2, 1, 1e-6),
        "input_shapes": ((2, 64, 64, 3),),
        "context": {"family": "van", "variant": "b1", "source": {"name": "x.pth", "sha256": "ab"}},
        "exact_model": "turned to float64 in place",
        "verified": Verified(1000, 1000, compared_bits=7),
        "loud": Loud("loud random weights", 1e-15, 1e-9),
    }
    return ParityReport(layers, (), ("pool",), **{**settings, **changes})  # type: ignore[arg-type]


GOOD = (
    layer("block1.0.attn", "block1.0/attn", 1.5),
    layer("block1.0", "block1.0", 1.25),
    layer("flat", "flatten", 1.0, relative=0.5, rewritten="the same numbers in another order"),
    layer("output", "output", 1.0),
)
PASSED = make(*GOOD)
FAILED = make(
    *GOOD[:-1],
    layer("block2.0.mlp", "block2.0/mlp", 900, relative=0.125),
    layer("head", "head", math.inf, relative=0.25),
    layer("output", "output", 800, relative=0.25),
    culprits=(
        Culprit(
            "block2.0.mlp",
            "block2.0/mlp",
            "differs by 0.125 of its size in float64",
            0.125,
            diagnosis=Diagnosis("block2.0.mlp", "the <bias> is lost", 1e-9, ("the <bias> is lost",)),
        ),
        Culprit(
            "head",
            "head",
            "differs by 0.25 of its size in float64",
            0.25,
            diagnosis=Diagnosis("head", "a constant factor", 1e-9, ("a constant factor",), pattern=True),
        ),
    ),
    audit=Audit(
        3,
        9,
        (
            SettingDifference("block1.0", "eps", "1e-05", "0.001"),
            SettingDifference("block1.1", "eps", "1e-05", "0.001"),
            SettingDifference("block1.1", "momentum", "0.1", "0.01", "set 0.9", True, False),
        ),
    ),
    stress=(make(*GOOD, name="small variances"),),
)


def on_terminal(report: ParityReport, *, all_layers: bool = False, width: int = 140) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width), all_layers=all_layers)
    return stream.getvalue()


def test_terminal_of_a_passed_report() -> None:
    text = on_terminal(PASSED)
    assert "AT PARITY: 4 tensors, outputs exact to 1.0e-15 in float64, worst ratio in float32 1.50 " in text
    assert "(block1.0.attn), limit 64; top-1 agrees on 2 of 2 samples" in " ".join(text.split())
    assert "NOT" not in text
    assert "Keras only, not compared separately: pool" in text
    assert "During the exact view, the Keras model was turned to float64 in place; it is unchanged." in text
    assert "Implemented differently (1), the same numbers in another order: flat" in text
    assert "Weights observed in use: 100 % of 1,000; 7 tensors compared bit by bit" in text
    assert "1.25" in text


def test_terminal_of_a_failed_report() -> None:
    text = on_terminal(FAILED, width=200)
    assert "First divergence: block2.0.mlp: differs by 0.125 of its size in float64" in text
    assert "Cause, certain: the <bias> is lost" in text
    assert "Divergence 2: head: differs by 0.25 of its size in float64" in text
    assert "Looks like: a constant factor" in text
    assert "Setting: 2 layers (block1.0, block1.1): eps is 0.001 in Keras, 1e-05 in PyTorch" in text
    assert "Note: block1.1: momentum is 0.01 in Keras, 0.1 in PyTorch (set 0.9)" in text
    assert "stress, small variances: AT PARITY" in text
    assert "NOT AT PARITY: 1 output and 2 layers of 6 tensors compared" in text


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
    assert not make(*GOOD, limits=Limits(max_exact_ratio=1.0)).passed
    assert not make(*GOOD, stress=(make(layer("a", "a", 99)),)).passed


def test_in_the_exact_view_the_outputs_judge() -> None:
    inside = (layer("a", "a", 1.0, relative=1e-3), *GOOD)
    assert make(*inside).passed
    assert not make(*inside).failed(inside[0])
    outside = (*GOOD[:-1], layer("output", "output", 1.0, relative=1e-10))
    assert not make(*outside).passed
    assert make(*outside).objections == ("output: differs by 1e-10 in float64, 9.01e+05 times rounding",)


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"problem": "the Keras model cannot run"}, "the Keras model cannot run"),
        ({"loud": Loud("loud inputs", 0.5, 1e-9)}, "the outputs differ by 0.5 on loud inputs"),
        ({"verified": Verified(9, 9, differing=("a/kernel",))}, "1 weight not the checkpoint's: a/kernel"),
        ({"verified": Verified(9, 0)}, "no weight of the Keras model was observed in use"),
        (
            {"audit": Audit(1, 1, (SettingDifference("a", "eps", "1", "2"),))},
            "1 setting not equal, first a: eps is 2 in Keras, 1 in PyTorch",
        ),
    ],
)
def test_all_that_objects(changes: dict[str, object], objection: str) -> None:
    report = make(*GOOD, **changes)
    assert not report.passed
    assert report.objections == (objection,)
    assert "NOT AT PARITY" in on_terminal(report)
    assert make(*GOOD, audit=Audit(1, 1, (SettingDifference("a", "eps", "1", "2", counts=False),))).passed


def test_a_report_that_proves_nothing_is_not_parity() -> None:
    views: dict[str, View] = {}
    empty = LayerComparison("output", "output", "output", (), "float32", "float32", views, Difference(), "", True)
    assert make(empty).objections == ("output: nothing was compared",)


@pytest.mark.parametrize(
    "report", [PASSED, FAILED, make(layer("a", "b", math.nan, "no such"))], ids=["passed", "failed", "nan"]
)
def test_json_is_strict_and_gives_the_report_back(report: ParityReport) -> None:
    text = render(report, "json")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = from_json(text)
    assert render(again, "json") == text
    assert again.passed == report.passed
    assert str(again.first_divergence) == str(report.first_divergence)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a parity report: it is no JSON"),
        ('{"schema_version": 2}', "a report of schema 2; this version reads schema 3"),
        ("[]", "not a parity report: TypeError"),
        ("{}", "not a parity report: it has no 'schema_version'"),
        ('{"schema_version": 99}', "a report of schema 99; this version reads schema 3"),
        ('{"schema_version": 3, "logits": 3}', "not a parity report: ValidationError"),
    ],
    ids=["empty", "older", "list", "object", "version", "damaged"],
)
def test_other_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ReportError, match=message):
        read_report(tmp_path / "x.json")


def test_no_report(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_report(tmp_path / "x.json")


def test_markdown() -> None:
    assert render(PASSED, "markdown").startswith("## ✅ Parity of van b1\n")
    text = render(FAILED, "markdown")
    assert text.startswith("## ❌ Parity of van b1\n")
    assert "- Cause, certain: the &lt;bias&gt; is lost" in text
    assert "| <code>block2.0.mlp</code> | 2x4 | 1.2e-01 | 900.00 | **no** |" in text
    assert "| <code>flat</code> | 2x4 | 5.0e-01 | 1.00 | equivalent |" in text
    assert "| small variances | AT PARITY" in text


def test_junit_has_a_case_a_layer() -> None:
    root = ET.fromstring(render(FAILED, "junit"))
    suites = {suite.get("name"): suite for suite in root.iter("testsuite")}
    assert set(suites) == {"parity, as ported", "parity, small variances"}
    suite = suites["parity, as ported"]
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    failed = [name for name, failure in cases.items() if failure is not None]
    divergences = ["divergence 1: block2.0.mlp", "divergence 2: head"]
    assert failed == ["block2.0.mlp", "head", "output", "settings", *divergences]
    assert (suite.get("tests"), suite.get("failures")) == ("9", "6")
    empty = ET.fromstring(render(make(), "junit"))
    assert empty.get("failures") == "1"


def test_html_holds_all_and_fetches_nothing() -> None:
    text = render(FAILED, "html")
    assert "NOT AT PARITY: 1 output and 2 layers of 6" in text
    assert "the &lt;bias&gt; is lost" in text
    assert text.count("<tr tabindex") == 6
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
    with pytest.raises(OutputError, match="the suffix does not say which report"):
        format_of(Path("a.pdf"))
    with pytest.raises(OutputError, match="unknown format 'pdf'"):
        render(PASSED, "pdf")


def soundness() -> list[tuple[str, Callable[[dict[str, Any]], None]]]:
    """Changes after which a passed report proves nothing."""

    def no_views(document: dict[str, Any]) -> None:
        for layer in document["layers"]:
            layer["views"] = {}

    def no_outputs(document: dict[str, Any]) -> None:
        document["layers"] = [layer for layer in document["layers"] if not layer["source"].startswith("output")]

    def rewritten_outputs(document: dict[str, Any]) -> None:
        for layer in document["layers"]:
            layer["rewritten"] = "written so"

    def nothing(document: dict[str, Any]) -> None:
        document["layers"] = []

    def not_numbers(document: dict[str, Any]) -> None:
        for layer in document["layers"]:
            for view in layer["views"].values():
                view["actual_error"] = {"max": "NaN", "rms": "NaN"}

    def negative(document: dict[str, Any]) -> None:
        document["layers"][0]["views"]["float32"]["actual_error"] = {"max": -1.0, "rms": -1.0}

    def limits(document: dict[str, Any]) -> None:
        document["limits"]["max_ratio"] = "NaN"

    return [
        (each.__name__, each)
        for each in (no_views, no_outputs, rewritten_outputs, nothing, not_numbers, negative, limits)
    ]


@pytest.mark.parametrize(("name", "change"), soundness(), ids=[name for name, _ in soundness()])
def test_a_report_that_proves_nothing_is_never_parity(name: str, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(render(PASSED, "json"))
    change(document)
    try:
        report = from_json(json.dumps(document))
    except ReportError:
        return
    assert not report.passed


def test_a_report_prints_its_verdict_and_what_is_wrong() -> None:
    assert str(PASSED).startswith("AT PARITY: ")
    assert str(FAILED).startswith("NOT AT PARITY: ")
    assert "\n  First divergence: block2.0.mlp: differs by 0.125 of its size in float64" in str(FAILED)
