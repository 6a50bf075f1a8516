"""When a report was made and by which command, for people who read it later."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

# Addresses may hold a password or a token.
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(://[^\s?#']+)\?[^\s']*")

_command = ""


def set_command(words: Sequence[str]) -> None:
    """Say which command line this process runs. Passwords and queries in addresses are left out."""
    global _command
    _command = _QUERY.sub(r"\1?...", _USER.sub("", shlex.join(["van-port", *words])))


def describe_run() -> dict[str, Any]:
    """The time in UTC, and the command line if there is one."""
    facts = {"created_utc": datetime.now(UTC).isoformat(timespec="seconds")}
    return {**facts, "command": _command} if _command else facts
