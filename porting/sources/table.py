"""Which checkpoints are published for a family. The table is a TOML file, such as weights/sources.toml."""

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


@dataclass(frozen=True)
class Source:
    """One row of a table; `top1` in percent, as stated by the source, 0 where it states none.

    `classes` is how many the published head has. `sha256` may be no more than the beginning of the hash, as it stands
    in OpenMMLab's file names. An embedded `file` lies in `folder`.
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
        """What to call the file where provenance is shown."""
        if self.kind == "huggingface":
            return shown(f"hf://{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else ""))
        return shown(self.file) if self.kind == "url" else self.file


def embedded_table() -> Path:
    """The table that comes with this package."""
    return weights_folder() / "sources.toml"


@cache
def read_table(path: Path, family: str) -> tuple[Source, ...]:
    """A family's rows in the table at `path`; raises SourceError where that is no such table."""
    try:
        rows: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["source"]
        known = {field.name for field in fields(Source)} - {"folder"}
        if unknown := sorted({key for row in rows for key in row} - known):
            raise ValueError(f"unknown keys: {', '.join(unknown)}")
        return tuple(Source(**row, folder=path.parent) for row in rows if row["family"] == family)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: not a table of sources: {error}") from None


def parse_location(family: str, variant: str, location: str | Path) -> Source | Path:
    """What a user gave for a checkpoint: a path, `https://...`, or `hf://owner/repo/file[@revision]`.

    Raises SourceError for an address of another form.
    """
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return Path(location)
    scheme, _, rest = text.partition("://")
    unknown = "unknown: the checkpoint was given by address"
    if scheme in {"https", "http"}:
        try:
            split = urlsplit(text)
            whole = bool(split.hostname) and split.port != 0
        except ValueError:  # of brackets and ports
            whole = False
        if not whole or not text.isprintable():
            raise SourceError(f"{shown(text)}: not an address", hint="Its form is https://host/path/file.")
        return Source(family, variant, "url", text, license=unknown)
    if scheme == "hf":
        address, _, revision = rest.partition("@")
        parts = address.split("/", 2)
        if len(parts) == 3 and all(parts):
            repo = "/".join(parts[:2])
            return Source(family, variant, "huggingface", parts[2], repo, license=unknown, revision=revision)
        raise SourceError(
            f"{shown(text)}: not an address on the hub", hint="Its form is hf://owner/repo/file[@revision]."
        )
    raise SourceError(
        f"{shown(text)}: no way to fetch {scheme}://",
        hint="A checkpoint is a path, https://... or hf://owner/repo/file.",
    )
