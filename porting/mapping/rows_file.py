"""Reads and writes the rows of a key map as a TOML file, which can be edited and kept with a model.

[[row]]
source = "layer{s}.{j}.conv1"
target = "conv{s+1}_block{j+1}_1_conv"
kind = "conv"
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path

from porting.errors import KeyMapError, SourceError
from porting.mapping.rules import KeyRule

_MAX_BYTES = 16 << 20
_ROW = "Each row: [[row]] source, target, kind."
_FIELDS = {"source", "target", "kind"}


def rows_text(rows: Iterable[KeyRule], notes: Iterable[str] = ()) -> str:
    """The text of a file of rows. `notes` become comments at the top."""
    # A JSON string is also a TOML string: both escape characters that cannot be printed.
    lines = [f"# {json.dumps(note)[1:-1]}" for note in notes]
    for row in rows:
        lines += ["", "[[row]]"]
        lines += [f"{name} = {json.dumps(getattr(row, name))}" for name in ("source", "target", "kind")]
    return "\n".join(lines).lstrip("\n") + "\n"


def read_rows(path: str | os.PathLike[str]) -> list[KeyRule]:
    """Read the rows of a file. Raises SourceError when it is missing, and KeyMapError when it is not a file of rows."""
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder, not a file of rows" if path.is_dir() else "no such file"
            raise SourceError(f"{path}: {what}", hint="`van-port map` writes a file of rows with --out.")
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
        tables = tomllib.loads(text.decode())
        rows = tables.get("row", [])
        if unknown := tables.keys() - {"row"}:
            raise ValueError(f"rows are called [[row]], and it has {', '.join(sorted(unknown))}")
        if not isinstance(rows, list) or not rows:
            raise ValueError("it has no [[row]]")
        for row in rows:
            if row.keys() != _FIELDS or not all(isinstance(value, str) for value in row.values()):
                raise ValueError(f"a row has source, target and kind, all of them text: got {row!r:.200}")
        return [KeyRule(**row) for row in rows]
    except UnicodeDecodeError:
        raise KeyMapError(f"{path}: not a text file", hint=_ROW) from None
    except KeyMapError as error:
        raise KeyMapError(f"{path}: {error.message}", hint=error.hint) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KeyMapError(f"{path}: not a file of rows: {error}", hint=_ROW) from None
