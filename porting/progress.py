"""How long work tells its caller where it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Progress:
    """Called with the present step, and how much of how much is done where that is known. This one stays silent."""

    def __call__(self, description: str, done: int = 0, total: int = 0) -> None:
        pass

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Held open while something else draws on the terminal."""
        yield


SILENT = Progress()
