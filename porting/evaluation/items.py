"""Samples of a data set, where their bytes are, and the blocks that models take as batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.errors import SourceError
from porting.files.atomic import open_regular

# No photo of a data set is larger. A size that a file states is not trusted.
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Item:
    """One sample.

    `name` is for people, and `label` is the number of a class or None. The bytes are the file at `address`, a path or
    an fsspec address, or `size` bytes of it from `start`; or `data`, if the reader has already read them. `tokens` are
    the token ids of a text.
    """

    name: str
    label: int | None = None
    address: str = ""
    start: int = 0
    size: int | None = None
    data: bytes | None = None
    tokens: tuple[int, ...] | None = None

    def read(self) -> bytes:
        """Read the bytes; raises OverflowError beyond `MAX_BYTES`, and passes on errors of the storage client."""
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
    """Open a path unchanged, with any characters; open an address with fsspec."""
    if "://" not in address:
        return open_regular(Path(address))
    import fsspec

    return fsspec.open(address, "rb")


@dataclass(frozen=True)
class Block:
    """Samples that both models take in one batch. The division into blocks does not depend on the engine."""

    number: int
    start: int
    items: tuple[Item, ...]


def blocks_of(items: Iterable[Item], size: int, *, limit: int | None = None) -> Iterator[Block]:
    """Yield blocks of `size` samples, in order, up to `limit` samples; raises SourceError if there are none."""
    rest = itertools.islice(items, limit)
    number = 0
    while found := tuple(itertools.islice(rest, size)):
        yield Block(number, number * size, found)
        number += 1
    if not number:
        raise SourceError(
            "the data set contains no samples", hint="Check --data, for example a folder of class folders."
        )
