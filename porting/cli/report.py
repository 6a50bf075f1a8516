"""`van-port report`."""

from __future__ import annotations

from pathlib import Path

import click

from porting.cli.groups import FILE


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "html", "markdown", "junit", "json"]),
    default="terminal",
    show_default=True,
)
@click.option("--out", type=FILE, help="File to write.  [default: standard output]")
@click.option("--all-layers", is_flag=True, help="On the terminal, print every layer.")
def report(file: Path, form: str, out: Path | None, all_layers: bool) -> None:
    """Render the JSON report FILE again, in any format. The exit code says only whether that worked."""
    from porting.cli.terminal import make_console, say
    from porting.files.atomic import refuse_clashes, require_writable
    from porting.reports import is_stream, write_report
    from porting.reports.document import file_beside, read_report
    from porting.reports.terminal import print_report

    parity = read_report(file)
    if remark := file_beside(parity, file):
        say(remark, err=True)
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
