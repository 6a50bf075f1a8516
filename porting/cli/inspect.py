"""`van-port inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from porting.cli.groups import EMA, FILE


@click.command()
@click.argument("file", type=FILE)
@EMA
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, ema: bool, as_json: bool) -> None:
    """Print the provenance and the tensors of FILE, a checkpoint or a file of Keras weights."""
    from porting.cli.terminal import make_console
    from porting.files.inspection import inspect_file

    inspection = inspect_file(file, ema=ema)
    if as_json:
        tensors = [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in inspection.tensors]
        facts = {**inspection.facts, "provenance": inspection.provenance, "tensors": tensors}
        click.echo(json.dumps(facts, indent=1))
        return
    from rich.table import Table

    console = make_console()
    for name, value in inspection.facts.items():
        console.print(f"{name}: {value}", soft_wrap=True, markup=False)
    if inspection.provenance is not None:
        console.print("provenance:")
        click.echo(json.dumps(inspection.provenance, indent=2))
    elif inspection.facts["format"] == "Keras weights":
        console.print("provenance: none; this file was not written by van-port")
    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("type")
    for name, shape, dtype in inspection.tensors:
        table.add_row(name, "x".join(map(str, shape)) or "scalar", dtype)
    console.print(table)
    console.print(f"{len(inspection.tensors)} tensors, {inspection.parameters:,} values")
