"""Files that are whole or absent: written under a temporary name beside the final one, then moved into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path

import filelock

from porting.errors import ClashError, OutputError

REPORT_SUFFIX = ".parity.json"
# Of a temporary file's name; its lock is named so too, and held as long as the process lives that writes the file.
_LOCK = re.compile(r"\..*\.[0-9a-f]{8}\.lock")
# A file system allows 255 bytes, of which token and suffix need some.
_LONGEST_STEM = 200


def require_writable(path: Path) -> None:
    """Raises OutputError when `path` could not be created, so that hours of work do not end in that.

    Only a regular file is ever replaced: to put one in the place of a device or a pipe would break the system.
    """
    with output_errors(path):
        if path.is_dir():
            raise OutputError(
                f"{path}: is a folder; a file name was expected", hint="Give the name of a file, or move the folder."
            )
        if path.exists() and not path.is_file():
            raise OutputError(
                f"{path}: is a device, a pipe or a socket; a regular file was expected",
                hint="Give another name. A report can be streamed: --report - writes JSON to standard output.",
            )
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")
        with temporary_file(path) as temporary:
            temporary.touch(exist_ok=False)


def refuse_clashes(outputs: Mapping[str, Iterable[Path]], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raises ClashError where an output is one of the inputs or another output, whatever the spelling of their paths.

    Both are by what the user calls them, such as `--out`.
    """
    written = [(label, path) for label, paths in outputs.items() for path in paths]
    read = [(label, path) for label, paths in inputs.items() for path in paths]
    for position, (label, path) in enumerate(written):
        for other_label, other in read:
            if _is_same_file(path, other):
                raise ClashError(
                    f"{label} {path} is the file that {other_label} reads: it would be overwritten",
                    hint=f"Give {label} another name.",
                )
        for other_label, other in written[:position]:
            if _is_same_file(path, other):
                raise ClashError(
                    f"{label} {path} is the file that {other_label} writes", hint=f"Give {label} another name."
                )


def refuse_existing(path: Path) -> None:
    """Raises ClashError for a file that is there: a person may have changed it."""
    if path.exists() or path.is_symlink():
        raise ClashError(f"{path} exists already", hint="Move it away, or use another name.")


def _is_same_file(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        if one.exists() and other.exists():
            return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


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
    return out.with_name(f"{out.name}{REPORT_SUFFIX}")


@contextlib.contextmanager
def temporary_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A free name in the folder of `path`, hidden and ending in `suffix`; removed at the end if still there.

    A lock beside it, held until then, tells a file that is being written from what a killed run has left.
    """
    stem = f".{os.fsdecode(os.fsencode(path.name)[:_LONGEST_STEM])}.{secrets.token_hex(4)}"
    lock = filelock.FileLock(path.with_name(f"{stem}.lock"))
    try:
        # Some network file systems have no locks; there, leftovers stay.
        with contextlib.suppress(OSError, NotImplementedError):
            lock.acquire(blocking=False)
        yield path.with_name(f"{stem}{suffix}")
    finally:
        try:
            _clean_up(lock, path.parent, stem)
        except KeyboardInterrupt:  # in the midst of it
            _clean_up(lock, path.parent, stem)
            raise


def _clean_up(lock: filelock.BaseFileLock, folder: Path, stem: str) -> None:
    _remove_all(folder, stem)
    with contextlib.suppress(OSError):
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of runs that were killed: those whose lock nobody holds."""
    try:
        locks = [Path(entry.path) for entry in os.scandir(folder) if _LOCK.fullmatch(entry.name)]
    except OSError:
        return
    for path in locks:
        lock = filelock.FileLock(path)
        with contextlib.suppress(OSError, NotImplementedError, filelock.Timeout), lock.acquire(blocking=False):
            _remove_all(folder, path.name.removesuffix(".lock"))
            path.unlink(missing_ok=True)


def _remove_all(folder: Path, stem: str) -> None:
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if not entry.name.startswith(f"{stem}.") or entry.name.endswith(".lock"):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Makes the written bytes durable and gives them their name in one step, replacing what had it.

    The file has the mode of the one that it replaces, or what the umask gives: some writers allow the owner alone.
    """
    with output_errors(path):
        temporary.chmod(_mode_for(path, temporary))
        with temporary.open("r+b") as file:  # Windows makes nothing durable that is open for reading alone
            os.fsync(file.fileno())
        temporary.replace(path)


def _mode_for(path: Path, temporary: Path) -> int:
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    probe = temporary.with_name(f"{temporary.name}.mode")
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file or none; raises OutputError."""
    with temporary_file(path) as temporary:
        with output_errors(path):
            # The name of a file may hold bytes that are no text.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        move_into_place(temporary, path)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="Choose another place, or free space there; nothing was left behind.",
        ) from None


def open_regular(path: Path) -> BufferedReader:
    """The file, open to read; raises OSError for anything but a regular file: a pipe may block, or never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is a device, a pipe, a socket or a folder; a regular file was expected")
    return path.open("rb")


def sha256_of(path: Path) -> str:
    """Of a file's bytes; of a folder, over the names and the hashes of all files in it."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()}\0{sha256_of(file_path)}\n".encode())
    return digest.hexdigest()
