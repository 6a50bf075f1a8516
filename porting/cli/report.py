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
    from porting.cli.terminal import make_console
    from porting.files.atomic import require_writable, write_text
    from porting.reports import render
    from porting.reports.document import read_report
    from porting.reports.terminal import print_report

    parity = read_report(file)
    if form == "terminal":
        print_report(parity, make_console(), all_layers=all_layers)
        return
    text = render(parity, form)
    if out is None:
        click.echo(text, nl=False)
        return
    require_writable(out)
    write_text(out, text)
    click.echo(f"Wrote {out}")
