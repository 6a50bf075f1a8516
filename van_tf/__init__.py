"""Visual Attention Network (arXiv 2202.09741) for Keras 3 and TensorFlow.

    import van_tf

    model = van_tf.van_b1()
    model.load_weights("van_b1.h5")

Keras and TensorFlow are imported when the first model is built, not by `import van_tf`, so the table of
variants can be read in a moment and environment variables that TensorFlow reads can still be set.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from van_tf.config import VARIANTS, VanConfig

if TYPE_CHECKING:
    from van_tf.model import (
        preprocess_input,
        van,
        van_b0,
        van_b1,
        van_b2,
        van_b3,
        van_b4,
        van_b5,
        van_b6,
        van_nano,
    )

__all__ = [
    "VARIANTS",
    "VanConfig",
    "preprocess_input",
    "van",
    "van_b0",
    "van_b1",
    "van_b2",
    "van_b3",
    "van_b4",
    "van_b5",
    "van_b6",
    "van_nano",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("van_tf.model"), name)
    raise AttributeError(f"module 'van_tf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
