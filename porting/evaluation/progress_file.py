"""The progress of an evaluation in a file, from which an interrupted evaluation resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porting.errors import ReportError
from porting.evaluation.tally import Tally
from porting.files.atomic import open_regular, write_text

_MAX_BYTES = 4 << 30
_SECONDS_BETWEEN = 10.0
_MOST_BLOCKS = 50_000_000


class ProgressFile:
    """The finished blocks and their tally, written every ten seconds and at the end, or never if the path is None.

    `identity` must be unchanged for a run to resume. Raises ReportError if the file belongs to another evaluation, or
    is not a progress file.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self._written = time.monotonic()
        self.tally = Tally()
        self.done: set[int] = set()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        hint = "Delete the file to start again, or give --resume another file."
        try:
            with open_regular(path) as file:
                document = json.loads(file.read(_MAX_BYTES))
            identity = document["identity"]
            different = [name for name, value in self._identity.items() if identity.get(name) != value]
            done = {number for first, last in document["done"] for number in _range(first, last)}
            tally = Tally.from_document(document["tally"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ReportError(f"{path}: not the progress of an evaluation: {error}", hint=hint) from None
        if different:
            raise ReportError(f"{path}: belongs to an evaluation with a different {', '.join(different)}", hint=hint)
        self.tally, self.done = tally, done

    def add(self, block: int, tally: Tally) -> None:
        self.tally.merge(tally)
        self.done.add(block)
        if time.monotonic() - self._written > _SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        """Write the file; raises OutputError."""
        if self._path is None or not self.done:
            return
        document = {"identity": self._identity, "done": _ranges(self.done), "tally": self.tally.to_document()}
        write_text(self._path, json.dumps(document))
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete the file once the evaluation is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _range(first: int, last: int) -> range:
    if not 0 <= first <= last < _MOST_BLOCKS:
        raise ValueError(f"blocks {first} to {last}")
    return range(first, last + 1)


def _ranges(numbers: set[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as their first and last."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found
