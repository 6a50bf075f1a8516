"""Which checkpoint belongs to a variant, and how to get it. The table itself is weights/sources.toml."""

from __future__ import annotations

import socket
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from porting.data import weights_folder
from porting.errors import SourceError
from porting.files.checkpoint import verify_container
from porting.progress import SILENT, Progress
from porting.sources.download import check_sha256, download, shown

_REACH_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Source:
    """One row of the table; `top1` in percent, as stated by the source, 0 where it states none.

    `sha256` may be no more than the beginning of the hash, as it stands in OpenMMLab's file names.
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

    @property
    def label(self) -> str:
        """What to call the file where provenance is shown."""
        if self.kind == "huggingface":
            return f"hf://{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")
        return shown(self.file) if self.kind == "url" else self.file


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
        return Source(family, variant, "url", text, license=unknown)
    if scheme == "hf":
        address, _, revision = rest.partition("@")
        parts = address.split("/", 2)
        if len(parts) == 3 and all(parts):
            repo = "/".join(parts[:2])
            return Source(family, variant, "huggingface", parts[2], repo, license=unknown, revision=revision)
        raise SourceError(f"{text}: not an address on the hub", hint="Its form is hf://owner/repo/file[@revision].")
    raise SourceError(
        f"{text}: no way to fetch {scheme}://", hint="A checkpoint is a path, https://... or hf://owner/repo/file."
    )


@cache
def load_sources() -> tuple[Source, ...]:
    table = tomllib.loads((weights_folder() / "sources.toml").read_text(encoding="utf-8"))
    return tuple(Source(**row) for row in table["source"])


def variants_of(family: str) -> tuple[str, ...]:
    """Every variant of a family, in the order of the table."""
    return tuple(source.variant for source in load_sources() if source.family == family)


def find_source(family: str, variant: str) -> Source:
    """The row of a variant; raises SourceError for one that the table lacks."""
    for source in load_sources():
        if (source.family, source.variant) == (family, variant):
            return source
    raise SourceError(
        f"{family} has no variant {variant!r}", hint=f"Its variants are {', '.join(variants_of(family))}."
    )


def fetch(source: Source, *, sha256: str | None = None, progress: Progress = SILENT) -> Path:
    """The checkpoint as a local file: embedded, from a cache, or downloaded there with progress.

    Raises SourceError, with what was wanted and how to give it by hand, when that is not possible, or the file has
    another hash than `sha256`.
    """
    sha256 = sha256 or source.sha256 or None
    if source.kind == "url":
        return download(source.file, sha256=sha256, verify=verify_container, progress=progress)
    with progress.paused():  # the hub's client draws a bar of its own
        path = _fetch_without_progress(source)
    check_sha256(source.label, path, sha256)
    return path


def _fetch_without_progress(source: Source) -> Path:
    if source.kind == "embedded":
        return weights_folder() / source.file
    if source.kind == "huggingface":
        return _fetch_from_hub(source)
    raise SourceError(
        f"no official checkpoint of {source.family} {source.variant} is known on the Hugging Face hub.\n"
        f"What is known: {source.note}.",
        hint="Give a checkpoint that you have with --checkpoint FILE.",
    )


def _fetch_from_hub(source: Source) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging

    revision = source.revision or None
    cached = huggingface_hub.try_to_load_from_cache(source.repo, source.file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it would warn of is said below, once
    reason = _why_unreachable(huggingface_hub.constants.ENDPOINT)
    if not reason:
        try:
            return Path(huggingface_hub.hf_hub_download(source.repo, source.file, revision=revision))
        except RevisionNotFoundError:
            reason = f"the repository has no revision {source.revision!r}"
        except RepositoryNotFoundError:
            reason = "the hub has no such repository, or asks for a login"
        except LocalEntryNotFoundError:
            reason = "it is not in the cache, and the hub does not answer"
        except EntryNotFoundError:
            reason = "the hub's repository has no such file"
        except Exception as error:  # the client lets through whatever its HTTP library raises
            first_line = str(error).partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line[:200]}"
    raise SourceError(
        f"cannot get {source.file} from {source.repo} on the Hugging Face hub: {reason}",
        hint=f"Fetch {source.file} on a machine with access and give it with --checkpoint {source.file}, "
        "or set HF_HOME to a cache that holds it.",
    )


def _why_unreachable(endpoint: str) -> str:
    """Why there is no way to a server, "" where there seems to be one.

    The hub's client tries for half a minute before it says so. Only what it could not get around either counts:
    no name, no connection, no answer, through the proxies that the environment names.
    """
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REACH_TIMEOUT).close()
    except urllib.error.HTTPError:
        return ""
    except (urllib.error.URLError, OSError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, (socket.gaierror, ConnectionError, TimeoutError)):
            return f"it is not in the cache, and {endpoint} cannot be reached ({cause.strerror or cause})"
    return ""
