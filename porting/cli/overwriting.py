"""Refuses a command that would write over a file that it reads, whichever of its options name the two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import cloup

# The parameters by which commands write files. All other paths are read.
_OUTPUTS = frozenset({"out", "report_files", "keep_failed", "resume"})
_STREAM = "-"
# The parameter whose folder is read whatever its files are called. Other folders hold images or samples.
_CHECKPOINT = "checkpoint"


class PortCommand(cloup.Command):
    """A command that overwrites nothing that it reads."""

    def invoke(self, ctx: click.Context) -> Any:
        refuse_overwriting(ctx)
        return super().invoke(ctx)


def refuse_overwriting(ctx: click.Context) -> None:
    """Raise ClashError if an output is a file that the command reads, or is in the checkpoint's folder."""
    from porting.files.atomic import refuse_clashes, report_path_of

    outputs: dict[str, list[Path]] = {}
    inputs: dict[str, list[Path]] = {}
    for parameter in ctx.command.params:
        name = parameter.name or ""
        label = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else name.upper()
        if name in _OUTPUTS:
            paths = [path for path in _each(ctx.params.get(name)) if str(path) != _STREAM]
            outputs[label] = [Path(path) for path in paths]
            if name == "out":
                outputs[f"the report of {label}"] = [report_path_of(path) for path in outputs[label]]
        else:
            inputs[label] = [found for value in _each(ctx.params.get(name)) for found in _files_in(value)]
    written = [path for paths in outputs.values() for path in paths if path.exists()]
    folders = [path for path in inputs.get(f"--{_CHECKPOINT}", ()) if path.is_dir()]
    inputs |= {label: [path for path in paths if path.is_file()] for label, paths in inputs.items()}
    inputs.setdefault(f"--{_CHECKPOINT}", []).extend(
        path for path in written for folder in folders if _is_inside(path, folder)
    )
    for label, paths in outputs.items():  # where two outputs are one file, the commands say so
        refuse_clashes({label: paths}, inputs)


def _each(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _files_in(value: Any) -> Iterator[Path]:
    """Yield the existing file or folder that a value names: a path, FILE.py:FUNCTION, or transformers:CLASS:FILE."""
    if isinstance(value, Path):
        yield from [value] if value.exists() else []
    elif isinstance(value, str) and value and "://" not in value and "\0" not in value:
        head, _, tail = value.rpartition(":")
        yield from (path for path in map(Path, filter(None, {value, head, tail})) if _exists(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that is too long for a path
        return False


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents
