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

_REACH_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Source:
    """One row of the table; `top1` in percent, as stated by the source, 0 where it states none."""

    family: str
    variant: str
    kind: str
    file: str = ""
    repo: str = ""
    license: str = "unknown"
    trained_on: str = ""
    top1: float = 0.0
    note: str = ""

    @property
    def label(self) -> str:
        """What to call the file where provenance is shown."""
        return f"hf://{self.repo}/{self.file}" if self.kind == "huggingface" else self.file


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


def fetch(source: Source) -> Path:
    """The checkpoint as a local file: embedded, from the hub's cache, or downloaded there with progress.

    Raises SourceError, with what was wanted and how to give it by hand, when that is not possible.
    """
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
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import logging

    cached = huggingface_hub.try_to_load_from_cache(source.repo, source.file)
    if isinstance(cached, str):
        return Path(cached)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it would warn of is said below, once
    reason = _why_unreachable(huggingface_hub.constants.ENDPOINT)
    if not reason:
        try:
            return Path(huggingface_hub.hf_hub_download(source.repo, source.file))
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
