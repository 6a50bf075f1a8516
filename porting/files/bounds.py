"""Limit the size of a model built from a file, because a few bytes of description can request any amount of memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from porting.errors import WeightsFileError

# Weights hardly compress, so a file cannot hold the weights of a model that is larger than itself by this factor.
GREATEST_EXPANSION = 16
_ALWAYS_ALLOWED = 64 << 20


@contextlib.contextmanager
def bounded_building(path: Path) -> Iterator[None]:
    """Limit a model that is built from `path` or for its weights. Raises WeightsFileError if it gets too large.

    Each weight is counted before its memory is allocated.
    """
    import keras

    bound = GREATEST_EXPANSION * path.stat().st_size + _ALWAYS_ALLOWED
    used = 0
    exceeded: list[WeightsFileError] = []
    add_weight = keras.layers.Layer.add_weight

    def counting(layer: Any, shape: Any = None, *args: Any, **options: Any) -> Any:
        nonlocal used
        sides = (shape,) if isinstance(shape, int) else tuple(shape or ())
        dtype = options.get("dtype") or getattr(layer, "variable_dtype", None) or "float32"
        used += math.prod(sides) * _item_size(str(dtype))
        if used > bound:
            exceeded.append(
                WeightsFileError(
                    f"{path}: describes a model of more than {bound / 2**20:,.0f} MiB, but has only "
                    f"{path.stat().st_size:,} bytes, so it cannot hold the weights",
                    hint="The file is damaged, or its description was changed. Get it again from its source.",
                )
            )
            raise exceeded[0]
        return add_weight(layer, shape, *args, **options)

    try:
        with mock.patch.object(keras.layers.Layer, "add_weight", counting):
            yield
    except Exception:
        if exceeded:  # Keras wraps it in an error of its own
            raise exceeded[0] from None
        raise


def _item_size(dtype: str) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError:  # bfloat16 and other types that NumPy lacks
        return 4
