"""The kinds of layers, one file each: their tensors, their settings and common porting mistakes.

To add a kind, add a file to this folder that defines `KIND`, or several kinds in `KINDS`, and list it in `_FILES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from porting.errors import KeyMapError
from porting.kinds.base import Kind

if TYPE_CHECKING:
    import keras
    from torch import nn

# The order matters: the first kind that matches a module counts. A depthwise convolution is also a grouped one.
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
    "recurrent_cell",
    "attention",
    "parameter",
    "constant",
    "activation",
    "prelu",
    "pooling",
    "resampling",
    "dropout",
)


def _kinds_in(file: str) -> tuple[Kind, ...]:
    module = import_module(f"{__name__}.{file}")
    return module.KINDS if hasattr(module, "KINDS") else (module.KIND,)


KINDS: dict[str, Kind] = {kind.name: kind for file in _FILES for kind in _kinds_in(file)}


def kind_called(name: str) -> Kind:
    """Return the kind of a name. Details may follow a colon: `dense:512x7x7` is a dense layer behind a Flatten.

    Raises KeyMapError for an unknown kind or invalid details.
    """
    base, _, more = name.partition(":")
    kind = KINDS.get(base)
    if kind is None:
        raise KeyMapError(f"there is no kind {base!r}", hint=f"The kinds are {', '.join(KINDS)}.")
    return kind.with_details(more) if more else kind


def kind_of_module(module: nn.Module) -> Kind | None:
    """The kind of a PyTorch module; None for an unknown one."""
    return next((kind for kind in KINDS.values() if kind.is_module(module)), None)


def becomes(module: nn.Module, layer: keras.layers.Layer) -> bool:
    """Whether a module may become a Keras layer.

    Both are of one kind, or the module's kind fills the layer's, or one is a dense layer and the other a convolution
    with one tap.
    """
    kind, own = kind_of_module(module), kind_of_layer(layer)
    if kind is None or own is None:
        return False
    conv = {("conv", "dense"): module, ("dense", "conv"): layer}.get((kind.name, own.name))
    has_one_tap = conv is not None and set(getattr(conv, "kernel_size", ())) == {1}
    return kind is own or kind.fills == own.name or has_one_tap


def kind_of_layer(layer: keras.layers.Layer) -> Kind | None:
    """The kind of a Keras layer; None for an unknown one."""
    return next((kind for kind in KINDS.values() if kind.is_layer(layer)), None)
