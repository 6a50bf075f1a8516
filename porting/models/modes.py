"""Puts a PyTorch model into training or evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model into this mode in this context, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.suppress(NotImplementedError):  # an exported module has no modes
        model.train(training)
    try:
        yield
    finally:
        for module, own in modes:
            module.training = own
