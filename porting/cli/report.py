"""`van-port report`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup

from porting.cli.groups import FILE, all_option, output_options
from porting.cli.overwriting import PortCommand

if TYPE_CHECKING:
    from rich.console import Console


@cloup.command(cls=PortCommand, short_help="Render a JSON report in another format.")
@click.argument("file", type=FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "html", "markdown", "junit", "json"]),
    help="Format to render.  [default: from the suffix of --out, else terminal]",
)
@click.option("--out", type=FILE, help="File to write.  [default: standard output]")
@output_options(all_option("--all-layers", "all_layers", help="Print every layer (terminal format only)."))
def report(file: Path, form: str | None, out: Path | None, all_layers: bool) -> None:
    """Render FILE, the JSON report of a check or an evaluation, in another format.

    The exit code says whether rendering worked, not whether the report passed.
    """
    from porting import reports
    from porting.cli.terminal import make_console, say
    from porting.errors import OutputError
    from porting.files.atomic import require_writable
    from porting.reports import evaluation
    from porting.reports.document import file_beside, read_report
    from porting.reports.terminal import print_report

    show: Callable[[Console], None]
    write: Callable[[Path, str], None]
    if evaluation.is_evaluation(file):
        found = evaluation.read_evaluation(file)
        forms, format_of = tuple(evaluation.FORMATS.values()), evaluation.format_of
        show, write = partial(evaluation.print_evaluation, found), partial(evaluation.write_evaluation, found)
    else:
        parity = read_report(file)
        if remark := file_beside(parity, file):
            say(remark, err=True)
        forms, format_of = reports.FORMATS, reports.format_of
        show, write = partial(print_report, parity, all_layers=all_layers), partial(reports.write_report, parity)
    out = out or Path("-")
    streamed = reports.is_stream(out)
    of_suffix = None
    with contextlib.suppress(OutputError):  # a suffix that says nothing
        of_suffix = None if streamed else format_of(out)
    if form is not None and of_suffix is not None and form not in {"terminal", of_suffix}:
        raise click.UsageError(f"--format {form} does not fit the suffix of {out}: leave --format out")
    form = form or ("terminal" if streamed else format_of(out))
    if form == "terminal":
        show(make_console())
        return
    if form not in forms:
        raise click.UsageError(f"an evaluation cannot be rendered as {form}; choose terminal, {', '.join(forms)}")
    if not streamed:
        require_writable(out)
    write(out, form)
    if not streamed:
        say(f"Wrote {out}")
