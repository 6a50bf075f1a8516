"""Content of untrusted files reaches the terminal only as plain text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from porting.cli.terminal import make_console, printable
from porting.reports.document import to_json
from tests.reports.test_reports import FAILED, PASSED

RunCli = Callable[..., Result]
NASTY = (
    "[/x]",
    "[red]a",
    "[bold",
    "\x1b[2J\x1b]0;title\x07",
    "a\rb",
    "\x9b31m",
    "\u202eabc",
    "a\x00b",
    "\udc80",
    "{0}%s",
)


@pytest.mark.parametrize("text", NASTY)
def test_printable(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    console = make_console()
    console.print(text)
    assert capsys.readouterr().out.rstrip("\n") == shown


@pytest.mark.parametrize(("value", "coloured"), [("", True), ("1", False)])
def test_no_color_is_honoured_on_a_terminal(tmp_path: Path, value: str, coloured: bool) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "porting.cli.main", "inspect", "nowhere.pth"]
    environment = {**os.environ, "NO_COLOR": value, "TERM": "xterm"}
    subprocess.run(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs, timeout=60, check=False)
    os.close(theirs)
    printed = os.read(ours, 10_000)
    os.close(ours)
    assert b"nowhere.pth: no such file" in printed
    assert (b"\x1b[31m" in printed) is coloured


def test_lines_stay_lines() -> None:
    assert printable("one\ntwo\tthree") == "one\ntwo\tthree"
    assert printable("Größe ✓ 模型") == "Größe ✓ 模型"


@pytest.mark.parametrize("text", NASTY)
def test_names_in_a_checkpoint(run_cli: RunCli, tmp_path: Path, text: str) -> None:
    if "\udc80" in text:
        pytest.skip("a pickle cannot hold it")
    path = tmp_path / "x.pth"
    torch.save({f"{text}.weight": torch.ones(2, 2)}, path)
    for command in (
        ("inspect", path),
        ("--variant", "nano", "--checkpoint", path, "--no-check", "--out", tmp_path / "x.h5"),
    ):
        result = run_cli(*command)
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert not set(result.output) & set("\x1b\x07\x00\r\x9b\u202e"), result.output
        assert printable(f"{text}.weight") in result.output.replace("\n", "")


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("form", ["terminal", "html", "markdown", "junit", "json"])
def test_names_in_a_report(run_cli: RunCli, tmp_path: Path, text: str, form: str) -> None:
    report = replace(
        FAILED,
        name=text,
        layers=tuple(replace(layer, source=f"{text}{layer.source}", kind=text) for layer in FAILED.layers),
        unpaired_source=(text,),
        notes=(text,),
    )
    path = tmp_path / "r.json"
    path.write_text(to_json(report), encoding="utf-8")
    out = tmp_path / "out"
    options = () if form == "terminal" else ("--out", out)
    result = run_cli("report", path, "--format", form, "--all-layers", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    if form == "terminal":
        assert not set(result.output) & set("\x1b\x07\x00\r\x9b\u202e")
    else:
        assert out.read_text(encoding="utf-8")


def test_file_names_of_any_kind(run_cli: RunCli, tmp_path: Path) -> None:
    for name in (b"\xff\xfe.json", b"[bold]x.json", b"a\x1b[31m.json", b"x" * 243 + b".json"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.write_text(to_json(PASSED))
        result = run_cli("report", path)
        assert result.exit_code == 0, result.output
        missing = path.with_name(f"{path.name[:-6]}n")
        result = run_cli("report", missing)
        assert result.exit_code == 5
        assert "\x1b" not in result.output


def test_an_error_with_markup(run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("inspect", tmp_path / "[/red].pth")
    assert result.exit_code == 5
    assert "[/red].pth: no such file" in result.output


def mutations(document: object) -> list[tuple[str, object]]:
    """List copies of a report, each with one value of another type."""
    found: list[tuple[str, object]] = []

    def visit(path: str, value: object, put: Callable[[object], None]) -> None:
        others: tuple[Any, ...] = (None, [], {}, "x", -1, 1e308, True, "\ud800", "NaN", [None], {"a": []})
        for other in others:
            if type(other) is not type(value):
                put(other)
                found.append((f"{path} as {other!r}", json.loads(json.dumps(document))))
        put(value)
        if isinstance(value, dict):
            for key in list(value)[:40]:
                visit(f"{path}.{key}", value[key], partial(value.__setitem__, key))
        if isinstance(value, list) and value:
            visit(f"{path}[0]", value[0], partial(value.__setitem__, 0))

    holder = {"root": document}
    visit("", document, lambda new: holder.__setitem__("root", new))
    return found


@pytest.mark.slow
def test_every_mutation_of_types_is_read_or_refused(tmp_path: Path) -> None:
    """Every report that can be read can be shown in every form, and no form shows a failed report as passed."""
    import io

    from rich.console import Console

    from porting.errors import ReportError
    from porting.reports import FORMATS, render
    from porting.reports.document import from_json
    from porting.reports.terminal import print_report

    shown = 0
    for what, document in mutations(json.loads(to_json(FAILED))):
        try:
            report = from_json(json.dumps(document))
        except ReportError:
            continue
        for form in FORMATS:
            if form == "terminal":
                print_report(report, Console(file=io.StringIO(), markup=False), all_layers=True)
            else:
                render(report, form).encode("utf-8")
        shown += 1
        assert not report.passed or "layers" in what or "views" in what or "limits" in what, what
    assert shown > 20
