"""Watching the calls inside a model, in either framework, and steering them.

An `Observer` is told of every call of a submodule or layer: before it runs, with its inputs, and after, with its
outputs, always as lists of torch tensors. It may put others in their place: that is how a layer is given the
reference's own input, and how its error is kept from those behind it.

A module or layer that runs more than once is told apart as `name`, `name#1`, `name#2`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from porting.models.traverse import named_layers

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

Replacement = Sequence["Tensor | None"] | None


class Observer(Protocol):
    """What to do at a call. A replacement has one entry a tensor, None where the tensor stays; None changes nothing.

    An observer that does not watch inputs is told of them as an empty list, which saves bringing them over.
    """

    watches_inputs: bool

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        """Called with the inputs of a call."""
        ...

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        """Called with the outputs of the same call."""
        ...


class _Calls:
    """Numbers the calls of each name, and knows which one is ending."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._open: list[str] = []

    def begin(self, name: str) -> str:
        self._seen[name] += 1
        numbered = name if self._seen[name] == 1 else f"{name}#{self._seen[name] - 1}"
        self._open.append(numbered)
        return numbered

    def end(self) -> str:
        return self._open.pop()


@contextlib.contextmanager
def observe_modules(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Shows the observer every call of a submodule of `model`, by its name in `named_modules()`."""
    import torch

    calls = _Calls()

    def hooks_for(name: str) -> tuple[Any, Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            found: list[Tensor] = []
            if observer.watches_inputs:
                _collect((args, kwargs), found)
            replaced = observer.before(calls.begin(name), found)
            return None if replaced is None else _replace((args, kwargs), iter(replaced))

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            found: list[Tensor] = []
            _collect(output, found)
            replaced = observer.after(calls.end(), found)
            return None if replaced is None else _replace(output, iter(replaced))

        return before, after

    handles = []
    for name, module in model.named_modules():
        # TorchScript takes no such hooks: what runs inside it cannot be seen.
        if name and not isinstance(module, torch.jit.ScriptModule):
            before, after = hooks_for(name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _collect(value: Any, found: list[Tensor]) -> None:
    """All tensors inside nested tuples, lists and dicts, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)


def _replace(value: Any, replacements: Iterator[Tensor | None]) -> Any:
    """The same structure with each tensor replaced where there is something to replace it with."""
    import torch

    if isinstance(value, torch.Tensor):
        replacement = next(replacements)
        return value if replacement is None else replacement
    if isinstance(value, Mapping):
        return type(value)((key, _replace(item, replacements)) for key, item in value.items())  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        items = [_replace(item, replacements) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a module's result, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


@contextlib.contextmanager
def observe_layers(model: keras.Model, observer: Observer) -> Iterator[Callable[[Any], Tensor]]:
    """Shows the observer every eager call of a layer inside `model`, at any depth, by its name in `named_layers`.

    Gives a function that brings a Keras tensor over as the observer has seen it: the same one, where it has.

    Keras has no hooks of its own, so the one method that every layer's call goes through is wrapped, for the whole
    process, while the context is open.
    """
    import keras

    layer_class = keras.layers.Layer
    original = layer_class.__call__
    calls = _Calls()
    bridge = _Bridge()
    names = {id(layer): name for name, layer in named_layers(model).items()}

    def observed_call(self: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        if self is model:
            return original(self, *args, **kwargs)
        # A layer that is made in the midst of a call hangs nowhere.
        name = calls.begin(names.get(id(self)) or self.path or self.name)
        if observer.watches_inputs:
            args, kwargs = bridge.steer((args, kwargs), lambda found: observer.before(name, found))
        else:
            observer.before(name, [])
        output = original(self, *args, **kwargs)
        calls.end()
        return bridge.steer(output, lambda found: observer.after(name, found))

    layer_class.__call__ = observed_call
    try:
        yield bridge.to_torch
    finally:
        layer_class.__call__ = original


class _Bridge:
    """Brings Keras tensors over to PyTorch and back; the same Keras tensor is the same torch tensor each time."""

    def __init__(self) -> None:
        # By the Keras tensor's identity, until it is freed: it cannot be hashed.
        self._known: dict[int, tuple[weakref.ref[Any], Tensor]] = {}

    def steer(self, value: Any, ask: Callable[[list[Tensor]], Replacement]) -> Any:
        """Asks about the Keras tensors in a structure and puts the answers in their place, in their own types."""
        import keras

        leaves = keras.tree.flatten(value)
        positions = [index for index, leaf in enumerate(leaves) if keras.ops.is_tensor(leaf)]
        replaced = ask([self.to_torch(leaves[index]) for index in positions])
        if replaced is None or all(replacement is None for replacement in replaced):
            return value
        for index, replacement in zip(positions, replaced, strict=True):
            if replacement is not None:
                array = replacement.contiguous().numpy()
                # A float64 run goes on in float64, whatever the layer made.
                wide = array.dtype in (np.float64, np.complex128)
                leaves[index] = keras.ops.convert_to_tensor(array, dtype=None if wide else leaves[index].dtype)
                self._remember(leaves[index], replacement)
        return keras.tree.pack_sequence_as(value, leaves)

    def to_torch(self, leaf: Any) -> Tensor:
        """The Keras tensor as a torch tensor."""
        known = self._known.get(id(leaf))
        if known is not None and known[0]() is leaf:
            return known[1]
        tensor = to_torch(leaf)
        self._remember(leaf, tensor)
        return tensor

    def _remember(self, leaf: Any, tensor: Tensor) -> None:
        identity, known = id(leaf), self._known

        def forget(gone: weakref.ref[Any]) -> None:
            # By then the identity may be another tensor's.
            if known.get(identity, (None,))[0] is gone:
                del known[identity]

        known[identity] = weakref.ref(leaf, forget), tensor


def keras_tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a Keras model's result, in order, as torch tensors."""
    import keras

    return [to_torch(leaf) for leaf in keras.tree.flatten(value) if keras.ops.is_tensor(leaf)]


def to_torch(value: Any) -> Tensor:
    """A Keras tensor as a torch tensor, only to be read, half precision as float32."""
    import torch

    if isinstance(value, torch.Tensor):  # of Keras on PyTorch
        own: Tensor = value.detach()
        return own.float() if own.dtype in {torch.bfloat16, torch.float16} else own
    dtype = getattr(value, "dtype", None)
    # Other types than numbers, text say, would end the process there.
    if hasattr(value, "__dlpack__") and (getattr(dtype, "is_floating", False) or getattr(dtype, "is_integer", False)):
        # The two share memory, which saves a copy of every activation.
        with contextlib.suppress(BufferError, RuntimeError, TypeError):
            shared: Tensor = torch.utils.dlpack.from_dlpack(value)
            return shared.float() if shared.dtype in {torch.bfloat16, torch.float16} else shared
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    if array.dtype.name in {"bfloat16", "float16"}:
        array = array.astype(np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
