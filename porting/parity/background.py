"""Compares tensors on a thread of their own while Keras goes on to its next layer.

Keras runs one operation at a time, most of them on one core.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

# The size of the tensors that may wait, which would otherwise be freed.
MOST_BYTES = 2**25

T = TypeVar("T")


class Background:
    """Makes calls in order, one at a time, on one thread."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._waiting: deque[tuple[Future[Any], int]] = deque()
        self._bytes = 0

    def submit(self, call: Callable[[], T], tensor: Tensor) -> Future[T]:
        """Have a call made, which keeps a tensor until then. Waits first if too many others are kept already."""
        while self._waiting and (self._bytes + tensor.nbytes > MOST_BYTES or self._waiting[0][0].done()):
            self._wait_for_first()
        future = self._executor.submit(call)
        self._waiting.append((future, tensor.nbytes))
        self._bytes += tensor.nbytes
        return future

    def wait(self) -> None:
        """Wait until all calls are made."""
        while self._waiting:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        future, size = self._waiting.popleft()
        future.exception()  # whoever asks for the result raises it
        self._bytes -= size


@contextlib.contextmanager
def in_background() -> Iterator[Background | None]:
    """Yield what makes calls in the background.

    None where Keras computes with PyTorch: its code may overwrite the tensors before they are compared.
    """
    import keras

    if keras.backend.backend() == "torch":
        yield None
        return
    with ThreadPoolExecutor(1) as executor:
        try:
            yield Background(executor)
        finally:
            executor.shutdown(cancel_futures=True)
