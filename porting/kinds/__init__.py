"""What is known of each kind of layer, one file a kind: its tensors, its settings and the mistakes people make.

A new kind is a file in this folder, with a `Kind` called `KIND` or several in `KINDS`, and a line in `_FILES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from porting.errors import KeyMapError
from porting.kinds.base import Kind

if TYPE_CHECKING:
    import keras
    from torch import nn

# Where a module is of two kinds, the earlier one counts: a depthwise convolution is also a grouped one.
_FILES = (
    "depthwise",
    "convolution",
    "conv_transpose",
    "separable",
    "dense",
    "dense_in_first",
    "embedding",
    "batch_norm",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "instance_norm",
    "recurrent",
    "attention",
    "parameter",
    "activation",
    "prelu",
    "resampling",
    "dropout",
)


def _kinds_in(file: str) -> tuple[Kind, ...]:
    module = import_module(f"{__name__}.{file}")
    return module.KINDS if hasattr(module, "KINDS") else (module.KIND,)


KINDS: dict[str, Kind] = {kind.name: kind for file in _FILES for kind in _kinds_in(file)}


def kind_called(name: str) -> Kind:
    """The kind of that name, which may say more behind a colon: `dense:512x7x7` has its rows behind a Flatten.

    Raises KeyMapError for a name that is none.
    """
    base, _, more = name.partition(":")
    kind = KINDS.get(base)
    if kind is None:
        raise KeyMapError(f"there is no kind {base!r}", hint=f"The kinds are {', '.join(KINDS)}.")
    return kind.with_details(more) if more else kind


def kind_of_module(module: nn.Module) -> Kind | None:
    """The kind of a PyTorch module; None for one that is not known."""
    return next((kind for kind in KINDS.values() if kind.is_module(module)), None)


def kind_of_layer(layer: keras.layers.Layer) -> Kind | None:
    """The kind of a Keras layer; None for one that is not known."""
    return next((kind for kind in KINDS.values() if kind.is_layer(layer)), None)
