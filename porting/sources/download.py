"""Download a file by URL into a cache: resumable, atomic, and only once for all processes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from porting.errors import SourceError
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    import httpx

CACHE_VARIABLE = "VAN_PORT_CACHE"
_ATTEMPTS = 5  # consecutive failures without a byte of progress
_CONNECT_TIMEOUT = 10.0  # seconds
_STALL_TIMEOUT = 30.0  # seconds without a byte
_LONGEST_WAIT = 60.0  # seconds, even if a server asks for more
# The limit for a file whose length the server does not state, so that it cannot fill the disk.
_GREATEST_UNKNOWN = 32 << 30
# A strong validator according to RFC 9110. Only these can be sent back in If-Range.
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_USER = re.compile(r"//[^/?#\s]*@")
_SECRET = re.compile(r"(://[^?#\s]*)[?#]\S*")
_GONE = {401: "asks for a login", 403: "refuses access", 404: "has no such file", 410: "has the file no longer"}


class _TryAgainError(Exception):
    """A temporary failure. `wait` is in seconds, or None for the default."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def cache_folder() -> Path:
    """The folder for downloads: `VAN_PORT_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_path("van-port", appauthor=False))


def shown(url: str) -> str:
    """Remove possible secrets from a URL or from URLs in a text: user name, password, query and fragment."""
    return _SECRET.sub(r"\1", _USER.sub("//", url))


def download(
    url: str,
    *,
    sha256: str | None = None,
    verify: Callable[[Path], None] = lambda _: None,
    stall_timeout: float = _STALL_TIMEOUT,
    progress: Progress = SILENT,
) -> Path:
    """Return the file at `url` as a local path. If it is in the cache, the server is not contacted.

    An interrupted download resumes, in this run or the next, if the server supports it. `verify` raises a PortingError
    for wrong contents. A file that fails it, or whose hash is not `sha256`, is deleted. Concurrent processes download
    the file once.

    Raises SourceError with the reason and a hint.
    """
    import filelock

    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:20]
    target = folder / (Path(unquote(urlsplit(url).path)).name or "download")
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        progress("waiting for another download of the same file")
        with filelock.FileLock(folder / "lock"):
            if not target.is_file():
                part = folder / "part"
                _fetch(url, part, stall_timeout, progress)
                try:
                    require_sha256(shown(url), part, sha256)
                    verify(part)
                except BaseException:
                    _forget(part)
                    raise
                part.replace(target)
                _etag_of(part).unlink(missing_ok=True)
            else:
                require_sha256(shown(url), target, sha256)
    return target


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"the cache {folder} cannot be used: {error.strerror or error}",
            hint=f"Set {CACHE_VARIABLE} to a writable folder with free space.",
        ) from None


def _fetch(url: str, part: Path, stall_timeout: float, progress: Progress) -> None:
    """Complete `part`, with as many requests as necessary."""
    import httpx

    failures = 0
    timeout = httpx.Timeout(stall_timeout, connect=_CONNECT_TIMEOUT)
    with httpx.Client(follow_redirects=True, timeout=timeout) as client:
        while True:
            before = _size(part)
            try:
                return _request(client, url, part, progress)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise SourceError(f"{shown(url)}: not a URL that can be downloaded: {shown(str(error))}") from None
            except (_TryAgainError, httpx.TransportError, httpx.DecodingError) as error:
                failures = 0 if _size(part) > before else failures + 1
                reason = shown(str(error)) or type(error).__name__
                if failures >= _ATTEMPTS or (failures and isinstance(error, httpx.ConnectError)):
                    kept = f"; the {_size(part):,} bytes received so far are kept" if _size(part) else ""
                    raise SourceError(
                        f"cannot fetch {shown(url)}: {reason}{kept}",
                        hint="Try again later, or download the file by other means and give it with --checkpoint FILE.",
                    ) from None
                wait = getattr(error, "wait", None)
                time.sleep(min(2.0**failures / 2 if wait is None else wait, _LONGEST_WAIT))
            except httpx.HTTPError as error:
                raise SourceError(f"cannot fetch {shown(url)}: {shown(str(error))}") from None


def _request(client: httpx.Client, url: str, part: Path, progress: Progress) -> None:
    """Send one request for the rest of `part`; return once it is complete."""
    begin, etag = _size(part), _etag_of(part)
    headers = {"Accept-Encoding": "identity"}
    tag = etag.read_text(encoding="latin-1") if begin and etag.is_file() else ""
    if _STRONG_ETAG.fullmatch(tag):
        headers |= {"Range": f"bytes={begin}-", "If-Range": tag}
    else:
        begin = 0
    with client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        if status in _GONE:
            raise SourceError(
                f"cannot fetch {shown(url)}: the server {_GONE[status]} (HTTP {status})",
                hint="Check the address, or give a local file with --checkpoint FILE.",
            )
        if status == 416:  # the bytes received so far no longer fit the file
            _forget(part)
            raise _TryAgainError("the file has changed on the server")
        if status == 429 or status >= 500:
            raise _TryAgainError(f"the server answers HTTP {status}", _retry_after(response))
        if status not in {200, 206}:
            raise SourceError(f"cannot fetch {shown(url)}: the server answers HTTP {status}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise SourceError(
                f"{shown(url)} is a web page, not a file",
                hint="Perhaps it asks for a login, or links to the file. Use the direct link.",
            )
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
            _forget(part)
            raise _TryAgainError("the server sent a different part of the file than requested")
        if status == 200:
            begin = 0
            etag.unlink(missing_ok=True)
            # Only a strong validator guarantees that two responses have the same bytes.
            if _STRONG_ETAG.fullmatch(tag := response.headers.get("ETag", "")):
                etag.write_text(tag, encoding="ascii")
        length = response.headers.get("Content-Length")
        total = begin + int(length) if length is not None and length.isdigit() else 0
        if total - begin > (free := shutil.disk_usage(part.parent).free):
            raise SourceError(
                f"cannot fetch {shown(url)}: it has {total:,} bytes, but {part.parent} has only {free:,} free",
                hint=f"Free space there, or set {CACHE_VARIABLE} to a folder with more space.",
            )
        done = begin
        with part.open("ab" if begin else "wb") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                done += len(chunk)
                if not total and done > _GREATEST_UNKNOWN:
                    _forget(part)
                    raise SourceError(
                        f"{shown(url)} states no length and exceeds {_GREATEST_UNKNOWN >> 30} GiB",
                        hint="Download it by other means and give the file with --checkpoint.",
                    )
                progress(f"fetching {done / 2**20:,.0f} MiB", done, total)
    if total and done != total:
        raise _TryAgainError(f"received only {done:,} of {total:,} bytes")


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def require_sha256(name: str, found: str | Path, sha256: str | None) -> None:
    """Raise SourceError unless the hash of a file, given as a path or as its hash, starts with `sha256`, if any."""
    if sha256 is None:
        return
    if isinstance(found, Path):
        with found.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256.lower()):
        raise SourceError(
            f"{name} has the sha256 {found}, but {sha256.lower()} was expected",
            hint="This is the wrong file, or it was changed in transit. Do not use it.",
        )


def _etag_of(part: Path) -> Path:
    return part.with_name("etag")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _etag_of(part).unlink(missing_ok=True)
