"""Get a published checkpoint as a local file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from porting.errors import SourceError
from porting.progress import SILENT, Progress
from porting.sources.download import download, require_sha256
from porting.sources.hub import fetch_from_hub
from porting.sources.table import Source


def fetch(
    source: Source,
    *,
    verify: Callable[[Path], None],
    sha256: str | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Return the checkpoint as a local file: embedded, from a cache, or downloaded to it with progress.

    `verify` raises a PortingError if the download is not a complete checkpoint.

    Raises SourceError if the file cannot be obtained or its hash is not `sha256`. The message names the file and how to
    provide it manually.
    """
    sha256 = sha256 or source.sha256 or None
    if source.kind == "url":
        return download(source.file, sha256=sha256, verify=verify, progress=progress)
    with progress.paused():  # the hub's client draws its own progress bar
        path = _fetch_without_progress(source)
    require_sha256(source.label, path, sha256)
    return path


def _fetch_without_progress(source: Source) -> Path:
    if source.kind == "embedded":
        return source.folder / source.file
    if source.kind == "huggingface":
        return fetch_from_hub(source)
    raise SourceError(
        f"no official checkpoint of {source.family} {source.variant} is known on the Hugging Face hub.\n"
        f"What is known: {source.note}.",
        hint="Give your own checkpoint with --checkpoint FILE.",
    )
