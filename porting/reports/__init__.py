"""Parity reports in five formats: JSON, which is the report, and terminal, HTML, Markdown and JUnit, made from it."""

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
    """Render the report as text in any of `FORMATS` except terminal; raises OutputError for others."""
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
    raise OutputError(f"unknown format {form!r}", hint=f"Choose from {', '.join(FORMATS)}.")


def is_stream(path: Path) -> bool:
    """Whether the path of a report means standard output: `-` or `/dev/stdout`."""
    return str(path) in {"-", "/dev/stdout"}


def write_report(report: ParityReport, path: Path, form: str | None = None) -> None:
    """Write a report to a file, in the format of its suffix, or to standard output; raises OutputError."""
    write_rendered(partial(render, report), path, form, format_of)


def write_rendered(
    render: Callable[[str], str], path: Path, form: str | None, format_of: Callable[[Path], str]
) -> None:
    """Write the result of `render`. The default format is that of the suffix, or JSON on standard output."""
    from porting.files.atomic import write_text

    if is_stream(path):
        sys.stdout.write(render(form or "json"))
        return
    write_text(path, render(form or format_of(path)))


def format_of(path: Path) -> str:
    """The format of a file's suffix; raises OutputError if there is none."""
    return format_among(_FORMATS_BY_SUFFIX, path, "which report to write")


def format_among(forms: Mapping[str, str], path: Path, what: str) -> str:
    """Look up a file's suffix in `forms`; raises OutputError, which mentions `what`, if it is not there."""
    if path.suffix not in forms:
        raise OutputError(f"{path}: the suffix does not say {what}", hint=f"Use one of {', '.join(forms)}.")
    return forms[path.suffix]


def save_report(report: ParityReport, path: Path) -> None:
    """Write a report for the first time. Raises OutputError, also for a folder that does not exist."""
    from porting.files.atomic import require_writable

    format_of(path)
    require_writable(path)
    write_report(report, path)


def as_text(report: ParityReport) -> str:
    """The verdict, and each finding on a line of its own."""
    from porting.reports.terminal import findings, verdict

    return "\n".join([verdict(report), *(f"  {line}" for line in findings(report))])
