"""`van-port inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import cloup

from porting.cli.groups import EMA, FILE, JSON, KEY, PREFIX, output_options, titled
from porting.cli.overwriting import PortCommand
from porting.wording import counted

_LONGEST = 200  # characters of a text


@cloup.command(cls=PortCommand, short_help="Print the origin and the tensors of a file.")
@click.argument("file", type=FILE)
@titled("Checkpoint", EMA, KEY, PREFIX)
@output_options(JSON)
def inspect(file: Path, ema: bool, key: str | None, prefix: str | None, as_json: bool) -> None:
    """Print the provenance and the tensors of FILE.

    FILE is a checkpoint, a file of Keras weights, or what `van-port export` wrote, with what that says of itself.
    """
    from porting.cli.terminal import ProgressBar, make_console, say_json
    from porting.files.atomic import report_path_of
    from porting.files.inspection import inspect_file

    with ProgressBar() as progress:
        progress(f"reading {file.name}")
        inspection = inspect_file(file, ema=ema, key=key, prefix=prefix)
    if as_json:
        tensors = [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in inspection.tensors]
        facts = {**inspection.facts, "provenance": inspection.provenance, "tensors": tensors}
        say_json(facts)
        return
    from rich.table import Table

    console = make_console()
    for name, value in inspection.facts.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    if inspection.provenance is not None:
        console.print("provenance:")
        shown = {name: _shortened(value) for name, value in inspection.provenance.items()}
        console.print(json.dumps(shown, indent=1), soft_wrap=True)
    elif "wrapper" not in inspection.facts:  # not a checkpoint
        console.print("provenance: none; this file was not written by van-port")
    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("type")
    for name, shape, dtype in inspection.tensors:
        table.add_row(name, "x".join(map(str, shape)) or "scalar", dtype)
    console.print(table)
    if (report := report_path_of(file)).is_file():
        console.print(f"{report.name}: {_standing(report)}", soft_wrap=True)
    console.print(f"{counted(len(inspection.tensors), 'tensor')}, {counted(inspection.parameters, 'value')}")


def _shortened(value: Any) -> Any:
    """A value as it is, or the beginning of a long text, such as a list of classes."""
    is_long = isinstance(value, str) and len(value) > _LONGEST
    return f"{value[:_LONGEST]}... (--json shows all)" if is_long else value


def _standing(path: Path) -> str:
    """The verdict of the report beside a file, or why that report does not apply."""
    from porting.errors import ReportError
    from porting.reports.document import file_beside, read_report
    from porting.reports.terminal import verdict

    try:
        report = read_report(path)
        remark = file_beside(report, path)
    except ReportError as error:
        return f"cannot be used: {error.message}"
    return f"{verdict(report)}. {remark}".strip()
