"""Building a model that a file describes, within a bound: a description of a few bytes can ask for any memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from porting.errors import WeightsFileError

# Weights hardly compress: a file that describes a model of more bytes than this for each of its own holds other things.
GREATEST_EXPANSION = 16
_ALWAYS_ALLOWED = 64 << 20


@contextlib.contextmanager
def bounded_building(path: Path) -> Iterator[None]:
    """While a model is built from `path`, or for its weights; raises WeightsFileError where it gets too large.

    Each weight counts before it has memory.
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
                    f"{path}: describes a model of more than {bound / 2**20:,.0f} MiB, and has "
                    f"{path.stat().st_size:,} bytes: it cannot hold its weights",
                    hint="The file is damaged, or its description was changed; get it again from where it was made.",
                )
            )
            raise exceeded[0]
        return add_weight(layer, shape, *args, **options)

    try:
        with mock.patch.object(keras.layers.Layer, "add_weight", counting):
            yield
    except Exception:
        if exceeded:  # Keras puts an error of its own around it
            raise exceeded[0] from None
        raise


def _item_size(dtype: str) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError:  # bfloat16 and other types that NumPy does not know
        return 4
