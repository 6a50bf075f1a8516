"""A parity report in five forms: JSON, which is the report, and terminal, HTML, Markdown and JUnit, made from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from porting.errors import OutputError
from porting.parity.report import ParityReport

FORMATS = ("terminal", "json", "html", "markdown", "junit")
_FORMATS_BY_SUFFIX = {".json": "json", ".html": "html", ".md": "markdown", ".xml": "junit"}


def render(report: ParityReport, form: str) -> str:
    """The report as text in one of `FORMATS` but terminal; raises OutputError for another."""
    if form == "json":
        from porting.reports.document import to_json

        return to_json(report)
    if form == "html":
        from porting.reports.html import to_html

        return to_html(report)
    if form == "markdown":
        from porting.reports.markdown import to_markdown

        return to_markdown(report)
    if form == "junit":
        from porting.reports.junit import to_junit

        return to_junit(report)
    raise OutputError(f"no format {form!r}", hint=f"The formats are {', '.join(FORMATS)}.")


def is_stream(path: Path) -> bool:
    """Whether a report's name means standard output: `-`, or `/dev/stdout`."""
    return str(path) in {"-", "/dev/stdout"}


def write_report(report: ParityReport, path: Path, form: str | None = None) -> None:
    """Writes a report to a file, in the format that its suffix names, or to standard output; raises OutputError."""
    write_rendered(partial(render, report), path, form, format_of)


def write_rendered(
    render: Callable[[str], str], path: Path, form: str | None, format_of: Callable[[Path], str]
) -> None:
    """Writes what `render` gives for a format, by default that of the file's name, or JSON on standard output."""
    from porting.files.atomic import write_text

    if is_stream(path):
        sys.stdout.write(render(form or "json"))
        return
    write_text(path, render(form or format_of(path)))


def format_of(path: Path) -> str:
    """The format that a file's suffix names; raises OutputError for one that names none."""
    return format_among(_FORMATS_BY_SUFFIX, path, "which report to write")


def format_among(forms: Mapping[str, str], path: Path, what: str) -> str:
    """The one of `forms`, by suffix, that a file's name says; raises OutputError where it does not say `what`."""
    if path.suffix not in forms:
        raise OutputError(f"{path}: the name does not say {what}", hint=f"End it in {', '.join(forms)}.")
    return forms[path.suffix]
