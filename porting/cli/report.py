"""`van-port report`."""

from __future__ import annotations

from pathlib import Path

import click

from porting.cli.groups import FILE


@click.command(short_help="Render a JSON report in another format.")
@click.argument("file", type=FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "html", "markdown", "junit", "json"]),
    help="What to render.  [default: as --out ends, else terminal]",
)
@click.option("--out", type=FILE, help="File to write.  [default: standard output]")
@click.option("--all-layers", is_flag=True, help="On the terminal, print every layer.")
def report(file: Path, form: str | None, out: Path | None, all_layers: bool) -> None:
    """Render the JSON report FILE of a check or an evaluation again, in any format.

    The exit code says only whether that worked.
    """
    from porting.cli.terminal import make_console, say
    from porting.files.atomic import refuse_clashes, require_writable
    from porting.reports import format_of, is_stream, write_report
    from porting.reports.document import file_beside, read_report
    from porting.reports.evaluation import is_evaluation
    from porting.reports.terminal import print_report

    if is_evaluation(file):
        _render_evaluation(file, form, out)
        return
    parity = read_report(file)
    if remark := file_beside(parity, file):
        say(remark, err=True)
    form = form or ("terminal" if out is None or is_stream(out) else format_of(out))
    if form == "terminal":
        print_report(parity, make_console(), all_layers=all_layers)
        return
    out = out or Path("-")
    if not is_stream(out):
        refuse_clashes({"--out": [out]}, {"FILE": [file]})
        require_writable(out)
    write_report(parity, out, form)
    if not is_stream(out):
        say(f"Wrote {out}")


def _render_evaluation(file: Path, form: str | None, out: Path | None) -> None:
    from porting.cli.terminal import make_console, say
    from porting.files.atomic import refuse_clashes, require_writable
    from porting.reports import is_stream
    from porting.reports.evaluation import FORMATS, format_of, print_evaluation, read_evaluation, write_evaluation

    form = form or ("terminal" if out is None or is_stream(out) else format_of(out))
    if form not in {"terminal", *FORMATS.values()}:
        raise click.UsageError(f"an evaluation has no {form} form; it has terminal, {', '.join(FORMATS.values())}")
    found = read_evaluation(file)
    if form == "terminal":
        print_evaluation(found, make_console())
        return
    out = out or Path("-")
    if not is_stream(out):
        refuse_clashes({"--out": [out]}, {"FILE": [file]})
        require_writable(out)
    write_evaluation(found, out, form)
    if not is_stream(out):
        say(f"Wrote {out}")
