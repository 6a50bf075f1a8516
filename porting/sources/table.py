"""The table of checkpoints published for a family. It is a TOML file, such as weights/sources.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from porting.data import weights_folder
from porting.errors import SourceError
from porting.sources.download import shown

USUAL_CLASSES = 1000
# What stands for the licence of a checkpoint that is none of the table's.
GIVEN_BY_PATH = "unknown: the checkpoint was given by path"
GIVEN_BY_ADDRESS = "unknown: the checkpoint was given by address"


@dataclass(frozen=True)
class Source:
    """One row of a table.

    `top1` is in percent, as stated by the source, or 0 if it states none. `classes` is the number of classes of the
    published head. `sha256` may be only the beginning of the hash, as in OpenMMLab's file names. An embedded `file` is
    in `folder`.
    """

    family: str
    variant: str
    kind: str
    file: str = ""
    repo: str = ""
    license: str = "unknown"
    trained_on: str = ""
    top1: float = 0.0
    note: str = ""
    revision: str = ""
    sha256: str = ""
    classes: int = USUAL_CLASSES
    folder: Path = Path()

    @property
    def label(self) -> str:
        """The name of the file in provenance."""
        if self.kind == "huggingface":
            return shown(f"hf://{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else ""))
        return shown(self.file) if self.kind == "url" else self.file


def embedded_table() -> Path:
    """The path of the table that comes with this package."""
    return weights_folder() / "sources.toml"


@cache
def read_table(path: Path, family: str) -> tuple[Source, ...]:
    """Read a family's rows in the table at `path`; raises SourceError if it is not such a table."""
    try:
        rows: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["source"]
        known = {field.name for field in fields(Source)} - {"folder"}
        if unknown := sorted({key for row in rows for key in row} - known):
            raise ValueError(f"unknown keys: {', '.join(unknown)}")
        return tuple(Source(**row, folder=path.parent) for row in rows if row["family"] == family)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: not a table of sources: {error}") from None


def parse_location(family: str, variant: str, location: str | Path) -> Source | Path:
    """Parse a checkpoint location: a path, `https://...`, or `hf://owner/repo/file[@revision]`.

    Raises SourceError for an address in any other form.
    """
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return Path(location)
    scheme, _, rest = text.partition("://")
    if scheme in {"https", "http"}:
        try:
            split = urlsplit(text)
            whole = bool(split.hostname) and split.port != 0
        except ValueError:  # for bad brackets and ports
            whole = False
        if not whole or not text.isprintable():
            raise SourceError(f"{shown(text)}: not an address", hint="Use the form https://host/path/file.")
        return Source(family, variant, "url", text, license=GIVEN_BY_ADDRESS)
    if scheme == "hf":
        address, _, revision = rest.partition("@")
        parts = address.split("/", 2)
        if len(parts) == 3 and all(parts):
            repo = "/".join(parts[:2])
            return Source(family, variant, "huggingface", parts[2], repo, license=GIVEN_BY_ADDRESS, revision=revision)
        raise SourceError(
            f"{shown(text)}: not an address on the hub", hint="Use the form hf://owner/repo/file[@revision]."
        )
    raise SourceError(
        f"{shown(text)}: {scheme}:// is not supported",
        hint="A checkpoint is a path, https://... or hf://owner/repo/file.",
    )
