"""Download a file from the Hugging Face hub with the hub's own client and cache."""

from __future__ import annotations

import http.client
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

from porting.errors import SourceError
from porting.sources.download import shown
from porting.sources.table import Source

_REACH_TIMEOUT = 10.0  # seconds


def fetch_from_hub(source: Source) -> Path:
    try:
        import huggingface_hub
        import huggingface_hub.utils.logging
    except ValueError as error:  # from version 1 on it reads the address when it is imported
        endpoint = shown(os.environ.get("HF_ENDPOINT", ""))
        raise SourceError(
            f"cannot get {source.file} from the Hugging Face hub: HF_ENDPOINT is not an address: {endpoint}: {error}",
            hint="Unset HF_ENDPOINT, or give the file with --checkpoint.",
        ) from None
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
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the messages below replace its warnings
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
        except Exception as error:  # the client passes on any error of its HTTP library
            first_line = str(error).partition("\n")[0]
            reason = f"{type(error).__name__}: {shown(first_line)[:200]}"
    raise SourceError(
        f"cannot get {source.file} from {source.repo} on the Hugging Face hub: {reason}",
        hint=f"Download {source.file} on a machine with access and give it with --checkpoint {source.file}, "
        "or set HF_HOME to a cache that holds it.",
    )


def _why_unreachable(endpoint: str) -> str:
    """Why a server cannot be reached, or "" if it seems to be reachable.

    The hub's client would retry for half a minute first. Only failures that the client could not avoid either count: no
    name, no connection or no answer, through the proxies that the environment sets.
    """
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=_REACH_TIMEOUT).close()
    except urllib.error.HTTPError:
        return ""
    except ValueError:
        return f"HF_ENDPOINT is not an address: {shown(endpoint)}"
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, (socket.gaierror, ConnectionError, TimeoutError)):
            return f"it is not in the cache, and {shown(endpoint)} cannot be reached ({cause.strerror or cause})"
    return ""
