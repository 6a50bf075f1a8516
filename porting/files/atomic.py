"""Atomic file writes: a file is written under a temporary name beside its final one, then moved into place."""

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
# The name of a temporary file's lock. The process that writes the file holds it until it ends.
_LOCK = re.compile(r"\..*\.[0-9a-f]{8}\.lock")
# File systems allow 255 bytes per name, including the token and the suffix.
_LONGEST_STEM = 200


def require_writable(path: Path) -> None:
    """Raise OutputError if `path` cannot be created. Call this before hours of work.

    Only regular files are ever replaced, because replacing a device or a pipe would break the system.
    """
    with output_errors(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder, not a file", hint="Give a file name, or move the folder.")
        if path.exists() and not path.is_file():
            raise OutputError(
                f"{path}: is a device, a pipe or a socket, not a regular file",
                hint="Choose another name. To stream a report, use --report -, which writes JSON to standard output.",
            )
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")
        with temporary_file(path) as temporary:
            temporary.touch(exist_ok=False)


def refuse_clashes(outputs: Mapping[str, Iterable[Path]], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise ClashError if an output is the same file as an input or another output, even under another path.

    Both are keyed by the names that the user knows, such as `--out`.
    """
    written = [(label, path) for label, paths in outputs.items() for path in paths]
    read = [(label, path) for label, paths in inputs.items() for path in paths]
    for position, (label, path) in enumerate(written):
        for other_label, other in read:
            if _is_same_file(path, other):
                raise ClashError(
                    f"{label} {path} is also the file that {other_label} reads, and would overwrite it",
                    hint=f"Give {label} another name.",
                )
        for other_label, other in written[:position]:
            if _is_same_file(path, other):
                raise ClashError(
                    f"{label} {path} is also the file that {other_label} writes", hint=f"Give {label} another name."
                )


def refuse_existing(path: Path) -> None:
    """Raise ClashError if the file exists: a person may have changed it."""
    if path.exists() or path.is_symlink():
        raise ClashError(f"{path} exists already", hint="Move it away, or use another name.")


def _is_same_file(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        if one.exists() and other.exists():
            return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def reserve(path: Path, size: int) -> None:
    """Raise OSError if the disk has no space for `size` bytes beside `path`.

    Some libraries react to a full disk with other errors, or even end the process, so call this before they write.
    """
    reserved = path.with_name(f"{path.name}.room")
    try:
        with reserved.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(path.parent).free < size:  # macOS and Windows cannot reserve space
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        reserved.unlink(missing_ok=True)


@contextlib.contextmanager
def interrupt_later() -> Iterator[None]:
    """Delay Ctrl-C until the block ends, for library code that an exception in the middle would break."""
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
    """Create a folder and its missing parents; raises OutputError."""
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def report_path_of(out: Path) -> Path:
    """The path of the JSON report beside `out`."""
    return out.with_name(f"{out.name}{REPORT_SUFFIX}")


@contextlib.contextmanager
def temporary_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A free hidden name in the folder of `path` that ends in `suffix`. The file is removed at the end if it exists.

    A lock beside it, held until then, distinguishes a file being written from a leftover of a killed run.
    """
    stem = f".{os.fsdecode(os.fsencode(path.name)[:_LONGEST_STEM])}.{secrets.token_hex(4)}"
    lock = filelock.FileLock(path.with_name(f"{stem}.lock"))
    try:
        # Some network file systems have no locks. Leftovers stay there.
        with contextlib.suppress(OSError, NotImplementedError):
            lock.acquire(blocking=False)
        yield path.with_name(f"{stem}{suffix}")
    finally:
        try:
            _clean_up(lock, path.parent, stem)
        except KeyboardInterrupt:  # Ctrl-C interrupted the cleanup
            _clean_up(lock, path.parent, stem)
            raise


def _clean_up(lock: filelock.BaseFileLock, folder: Path, stem: str) -> None:
    _remove_all(folder, stem)
    with contextlib.suppress(OSError):
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed runs, which are those whose lock nobody holds."""
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
    """Make the written bytes durable and move the file to `path` atomically, replacing an existing file.

    The file gets the mode of the one that it replaces, or the default of the umask, because some writers restrict it to
    the owner.
    """
    with output_errors(path):
        temporary.chmod(_mode_for(path, temporary))
        with temporary.open("r+b") as file:  # Windows syncs only files that are open for writing
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
    """Write a text file atomically; raises OutputError."""
    with temporary_file(path) as temporary:
        with output_errors(path):
            # A file name in the text may contain bytes that are not valid text.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        move_into_place(temporary, path)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="Choose another place, or free space there. Nothing was left behind.",
        ) from None


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; raises OSError for anything else, because a pipe may block or never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is a device, a pipe, a socket or a folder, not a regular file")
    return path.open("rb")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, or of the names and hashes of all files in a folder."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()}\0{sha256_of(file_path)}\n".encode())
    return digest.hexdigest()
