"""Files that are whole or absent: written under a temporary name beside the final one, then moved into place."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from porting.errors import OutputError


def require_writable(path: Path) -> None:
    """Raises OutputError when `path` could not be created, so that hours of work do not end in that."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; a file name was expected", hint="Give --out the name of a file.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")
    with temporary_file(path) as temporary, output_errors(path):
        temporary.touch(exist_ok=False)


def reserve(path: Path, size: int) -> None:
    """Raises OSError where there is no room for so many bytes beside `path`.

    For writers of other libraries that answer a full disk with anything but an OSError, up to the end of the process.
    """
    reserved = path.with_name(f"{path.name}.room")
    try:
        with reserved.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(path.parent).free < size:  # macOS and Windows can only be asked
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        reserved.unlink(missing_ok=True)


@contextlib.contextmanager
def interrupt_later() -> Iterator[None]:
    """Puts off Ctrl-C until the end: for code of other libraries that an exception in its midst would bring down."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came = []
    usual = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            raise KeyboardInterrupt


def make_folder(path: Path) -> None:
    """Makes a folder and those above it where they are missing; raises OutputError."""
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)


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
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Makes the written bytes durable and gives them their name in one step, replacing what had it."""
    with output_errors(path):
        with temporary.open("r+b") as file:  # Windows makes nothing durable that is open for reading alone
            os.fsync(file.fileno())
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
