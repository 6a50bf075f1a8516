"""Files that are whole or absent: written under a temporary name beside the final one, then moved into place."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from porting.errors import OutputError


def check_writable(path: Path) -> None:
    """Raises OutputError when `path` could not be created, so that hours of work do not end in that."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; a file name was expected", hint="Give --out the name of a file.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")
    with temporary_file(path) as temporary, output_errors(path):
        temporary.touch(exist_ok=False)


def report_path_of(out: Path) -> Path:
    """Where the JSON report of the check of `out` lies."""
    return out.with_name(f"{out.name}.parity.json")


@contextlib.contextmanager
def temporary_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A free name in the folder of `path`, hidden and ending in `suffix`; removed at the end if still there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Makes the written bytes durable and gives them their name in one step, replacing what had it."""
    with output_errors(path):
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file or none; raises OutputError."""
    with temporary_file(path) as temporary:
        with output_errors(path):
            temporary.write_text(text, encoding="utf-8")
        move_into_place(temporary, path)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="Choose another place with --out, or free space there; nothing was left behind.",
        ) from None
