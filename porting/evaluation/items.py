"""One sample of a data set, where its bytes lie, and the blocks that models take at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.errors import SourceError
from porting.files.atomic import open_regular

# No photo of a data set is larger; a size that a file states is not believed.
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Item:
    """One sample: `name` for people; `label`, a class's number or None; and where its bytes are.

    That is the file at `address`, a path or an address of fsspec, or `size` bytes of it from `start`; or `data`, where
    a reader had to read them. `tokens` are those of a text.
    """

    name: str
    label: int | None = None
    address: str = ""
    start: int = 0
    size: int | None = None
    data: bytes | None = None
    tokens: tuple[int, ...] | None = None

    def read(self) -> bytes:
        """Its bytes; raises OverflowError for more of them than `MAX_BYTES`, or what the storage's client raises."""
        if self.data is not None:
            return self.data
        with _opened(self.address) as file:
            if self.start:
                file.seek(self.start)
            found: bytes = file.read(MAX_BYTES + 1 if self.size is None else min(self.size, MAX_BYTES + 1))
        if len(found) > MAX_BYTES:
            raise OverflowError(f"larger than {MAX_BYTES >> 20} MiB")
        return found


def _opened(address: str) -> Any:
    """A path as it is, whatever characters it has; an address by fsspec."""
    if "://" not in address:
        return open_regular(Path(address))
    import fsspec

    return fsspec.open(address, "rb")


@dataclass(frozen=True)
class Block:
    """Samples that both models take in one batch, always the same ones, whatever the engine."""

    number: int
    start: int
    items: tuple[Item, ...]


def blocks_of(items: Iterable[Item], size: int, *, limit: int | None = None) -> Iterator[Block]:
    """The samples in order, `size` a block, at most `limit` of them; raises SourceError where there are none."""
    rest = itertools.islice(items, limit)
    number = 0
    while found := tuple(itertools.islice(rest, size)):
        yield Block(number, number * size, found)
        number += 1
    if not number:
        raise SourceError("the data set holds no samples", hint="--data takes a folder of class folders, among others.")
