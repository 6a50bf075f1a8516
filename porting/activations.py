"""Intermediate results by layer name, from either framework, always channels last.

Both recorders call back with `(name, array)` as soon as a layer has run and keep nothing themselves. A layer that
runs more than once is told apart as `name`, `name#1`, `name#2`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from porting.layout import Array

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

Callback = Callable[[str, Array], None]


@contextlib.contextmanager
def record_modules(model: nn.Module, callback: Callback) -> Iterator[None]:
    """Calls back with the output of every submodule of `model`, in the order in which they finish.

    Names are those of `named_modules()`. Outputs that are not single tensors are left out.
    """
    import torch

    calls: Counter[str] = Counter()

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                callback(_numbered(calls, name), _channels_last(module, output))

        return hook

    handles = [
        module.register_forward_hook(hook_for(name), always_call=False)
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels_last(module: nn.Module, output: Tensor) -> Array:
    from torch import nn

    # A LayerNorm over one axis works on the last one, so its caller has put the channels there already.
    if output.ndim == 4 and not isinstance(module, nn.LayerNorm):
        output = output.permute(0, 2, 3, 1)
    array: Array = output.detach().contiguous().numpy()
    return array


@contextlib.contextmanager
def record_layers(model: keras.Model, callback: Callback) -> Iterator[None]:
    """Calls back with the output of every layer inside `model`, at any depth, in the order in which they finish.

    Names are the layers' paths. Holds only for eager calls, and for the whole process while the context is open:
    Keras has no hooks of its own, so the one method that every layer's call goes through is wrapped.
    """
    import keras

    layer_class = keras.layers.Layer
    original = layer_class.__call__
    calls: Counter[str] = Counter()

    def recording_call(self: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self is not model and hasattr(output, "numpy"):
            # A layer that needs no build has no path; at the top level its name would be the same.
            callback(_numbered(calls, self.path or self.name), output.numpy())
        return output

    layer_class.__call__ = recording_call
    try:
        yield
    finally:
        layer_class.__call__ = original


def _numbered(calls: Counter[str], name: str) -> str:
    calls[name] += 1
    return name if calls[name] == 1 else f"{name}#{calls[name] - 1}"
