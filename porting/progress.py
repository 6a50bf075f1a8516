"""How long-running work reports its progress to the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Progress:
    """A callback for the current step and, if known, `done` out of `total`. This base class does nothing."""

    def __call__(self, description: str, done: int = 0, total: int = 0) -> None:
        pass

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the display while something else writes to the terminal."""
        yield


SILENT = Progress()
