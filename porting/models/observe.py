"""Observes the calls inside a model, in either framework, and can replace their tensors.

An `Observer` is called before every call of a submodule or layer, with its inputs, and after it, with its outputs,
always as lists of torch tensors. It may return replacements. This gives a layer the reference's own input, and keeps
its error from the layers after it.

The calls of a module or layer that runs more than once are named `name`, `name#1`, `name#2`.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from porting.call_names import call_name, without_number
from porting.kinds.base import CallInputs
from porting.models.frameworks import eager_functions
from porting.models.stacks import layers_of_stack
from porting.models.traverse import named_layers

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

Replacement = Sequence["Tensor | None"] | None


class Observer(Protocol):
    """Callbacks for a call. A replacement has one entry per tensor, None to keep it; a plain None changes nothing.

    An observer that does not watch inputs gets an empty list instead, which saves the conversion.
    """

    watches_inputs: bool

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        """Take the inputs of a call."""
        ...

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        """Take the outputs of the same call."""
        ...


class _Calls:
    """Numbers the calls of each name, and keeps track of which one ends."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._open: list[str] = []

    def begin(self, name: str) -> str:
        self._seen[name] += 1
        numbered = call_name(name, self._seen[name] - 1)
        self._open.append(numbered)
        return numbered

    def end(self) -> str:
        return self._open.pop()

    def skip(self, names: Iterable[str]) -> None:
        """Count calls that are not made again."""
        self._seen.update(names)


@contextlib.contextmanager
def observe_modules(model: nn.Module, observer: Observer, *, stacks: bool = False) -> Iterator[None]:
    """Show the observer every call of a submodule of `model`, under its name in `named_modules()`.

    An observer with a method `keep_arguments` gets the arguments of each call as well, after the tensors in them. With
    `stacks`, the layers inside a stack of recurrent layers are shown too. They run once more for this.
    """
    import torch

    calls = _Calls()
    keep_arguments = getattr(observer, "keep_arguments", None)

    def run_layers(name: str, layers: list[nn.Module], given: list[Tensor]) -> None:
        tensor, *states = given
        # Packed sequences have fewer axes, and states have as many, with one for layers and directions.
        directions = 2 if layers[0].bidirectional else 1
        if tensor.ndim not in {2, 3} or any(len(each) != directions * len(layers) for each in states):
            return
        for index, layer in enumerate(layers):
            own = [each[directions * index : directions * (index + 1)] for each in states]
            observer.before(calls.begin(f"{name}.l{index}"), [tensor, *own])
            tensor, after = layer(tensor, tuple(own) if len(own) > 1 else own[0]) if own else layer(tensor)
            found: list[Tensor] = []
            _collect((tensor, after), found)
            observer.after(calls.end(), found)

    def hooks_for(name: str, module: nn.Module) -> tuple[Any, Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            found: list[Tensor] = []
            layers = layers_of_stack(module) if stacks else []  # now, since it may compute its weights for each call
            if observer.watches_inputs or layers:
                _collect((args, kwargs), found)
            if layers and found:
                run_layers(name, layers, found)
            numbered = calls.begin(name)
            replaced = observer.before(numbered, found)
            if keep_arguments is not None:
                keep_arguments(numbered, args, kwargs)
            return None if replaced is None else _replace((args, kwargs), iter(replaced))

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            found: list[Tensor] = []
            _collect(output, found)
            replaced = observer.after(calls.end(), found)
            return None if replaced is None else _replace(output, iter(replaced))

        return before, after

    handles = []
    for name, module in model.named_modules():
        # TorchScript takes no such hooks, so its submodules cannot be observed.
        if name and not isinstance(module, torch.jit.ScriptModule):
            before, after = hooks_for(name, module)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _collect(value: Any, found: list[Tensor]) -> None:
    """Append all tensors inside nested tuples, lists and dicts to `found`, in order."""
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
    """Rebuild a structure with its tensors replaced. A replacement of None keeps the tensor."""
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


def call_inputs(tensors: Iterable[Tensor], args: Any, kwargs: Any) -> CallInputs:
    """The tensors of a call together with the way in which they were given."""
    import torch

    found: list[Tensor] = []
    _collect(args, found)
    keywords = [""] * len(found)
    for name, value in kwargs.items():
        own = tensors_in(value)
        keywords += [name if value is each else "" for each in own]
    nothing = torch.empty(0)  # in the place of each tensor, which would otherwise be kept alive
    try:
        outline = _replace((args, kwargs), itertools.repeat(nothing))
    except Exception:  # a structure of its own, which cannot be built anew like its base class
        return CallInputs(tensors)

    def fill(tensors: Iterator[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled: tuple[tuple[Any, ...], dict[str, Any]] = _replace(outline, tensors)
        return filled

    return CallInputs(tensors, fill, keywords)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a module's result, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


class Replay:
    """Results of a recorded run of a Keras model, which stand for the calls that ended before a layer began."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self._recording = False
        self._begun: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._limit = 0

    def record(self) -> None:
        """Record the next run, and forget an earlier one."""
        self.clear()
        self._recording = True

    def until(self, layer: str) -> None:
        """From now on return the results of calls that ended before the first call of a layer began."""
        self._recording, self._limit = False, self._begun.get(layer, 0)

    def clear(self) -> None:
        """Forget the recorded run."""
        self.results, self._begun, self._ended = {}, {}, {}
        self._recording, self._limit = False, 0

    def has(self, call: str) -> bool:
        """Whether the result of a call is to be returned without making it."""
        return not self._recording and self._ended.get(call, self._limit) < self._limit

    def begin_again(self, call: str) -> list[str]:
        """The layers that were called inside a call, once for each time."""
        first, last = self._begun[call], self._ended[call]
        return [without_number(name) for name, place in self._begun.items() if first < place < last]

    def begin(self, call: str) -> None:
        if self._recording:
            self._begun[call] = len(self._begun) + len(self._ended)

    def end(self, call: str, result: Any) -> None:
        if self._recording:
            self._ended[call] = len(self._begun) + len(self._ended)
            self.results[call] = result


@contextlib.contextmanager
def observe_layers(
    model: keras.Model, observer: Observer, replay: Replay | None = None
) -> Iterator[Callable[[Any], Tensor]]:
    """Show the observer every eager call of a layer inside `model`, at any depth, under its name in `named_layers`.

    Yields a function that converts a Keras tensor to a torch tensor. For a tensor that the observer has seen, it
    returns the same object. `replay` records the run, or returns recorded results of calls that the observer then does
    not see.

    Keras has no hooks. Inside this context, the one method that every layer call goes through is wrapped, for the whole
    process.
    """
    import keras

    layer_class = keras.layers.Layer
    original = layer_class.__call__
    calls = _Calls()
    bridge = _Bridge()
    names = {id(layer): name for name, layer in named_layers(model).items()}

    def observed_call(self: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        if self is model or _is_being_compiled():
            return original(self, *args, **kwargs)
        # A layer that is created during a call has no name in the model.
        name = calls.begin(names.get(id(self)) or self.path or self.name)
        if replay is not None:
            if replay.has(name):
                calls.skip(replay.begin_again(name))
                calls.end()
                return replay.results[name]
            replay.begin(name)
        if observer.watches_inputs:
            args, kwargs = bridge.steer((args, kwargs), lambda found: observer.before(name, found))
        else:
            observer.before(name, [])
        output = original(self, *args, **kwargs)
        calls.end()
        output = bridge.steer(output, lambda found: observer.after(name, found))
        if replay is not None:
            replay.end(name, output)
        return output

    layer_class.__call__ = observed_call
    try:
        with eager_functions() if keras.backend.backend() == "tensorflow" else contextlib.nullcontext():
            yield bridge.to_torch
    finally:
        layer_class.__call__ = original


class _Bridge:
    """Converts Keras tensors to PyTorch and back. The same Keras tensor gives the same torch tensor each time."""

    def __init__(self) -> None:
        # By the id of the Keras tensor, which cannot be hashed; removed when it is freed.
        self._known: dict[int, tuple[weakref.ref[Any], Tensor]] = {}

    def steer(self, value: Any, ask: Callable[[list[Tensor]], Replacement]) -> Any:
        """Pass the Keras tensors of a structure to `ask`, and put its replacements in their place and types."""
        import keras

        leaves = keras.tree.flatten(value)
        positions = [index for index, leaf in enumerate(leaves) if keras.ops.is_tensor(leaf)]
        replaced = ask([self.to_torch(leaves[index]) for index in positions])
        if replaced is None or all(replacement is None for replacement in replaced):
            return value
        for index, replacement in zip(positions, replaced, strict=True):
            if replacement is not None:
                array = replacement.contiguous().numpy()
                # A float64 run continues in float64, even if the layer returned another type.
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
        tensor.keras_id = getattr(leaf, "_id", None)  # type: ignore[attr-defined]  # by it TensorFlow's own is known

        def forget(gone: weakref.ref[Any]) -> None:
            # The id may belong to another tensor by now.
            if known.get(identity, (None,))[0] is gone:
                del known[identity]

        known[identity] = weakref.ref(leaf, forget), tensor


def _is_being_compiled() -> bool:
    """Whether TensorFlow compiles the code that runs now, as `tf.vectorized_map` does: no tensor has numbers then."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def applied(function: Callable[[Any], Any], tensor: Tensor) -> Tensor:
    """What a function of Keras makes of a torch tensor."""
    import keras

    return to_torch(function(keras.ops.convert_to_tensor(tensor.contiguous().numpy())))


def to_torch(value: Any) -> Tensor:
    """Convert a Keras tensor to a torch tensor, half precision to float32. The result must not be written to."""
    tensor = _converted(value)
    tensor.keras_id = getattr(value, "_id", None)  # type: ignore[attr-defined]  # by it TensorFlow's own is known
    return tensor


def _converted(value: Any) -> Tensor:
    import torch

    if isinstance(value, torch.Tensor):  # Keras runs on the PyTorch backend
        own: Tensor = value.detach()
        own = own if own.layout == torch.strided else own.to_dense()
        return own.float() if own.dtype in {torch.bfloat16, torch.float16} else own
    dtype = getattr(value, "dtype", None)
    # DLPack ends the process for types that are not numbers, such as text.
    if hasattr(value, "__dlpack__") and (getattr(dtype, "is_floating", False) or getattr(dtype, "is_integer", False)):
        # Both share memory, which saves a copy of every activation.
        with contextlib.suppress(BufferError, RuntimeError, TypeError):
            shared: Tensor = torch.utils.dlpack.from_dlpack(value)
            return shared.float() if shared.dtype in {torch.bfloat16, torch.float16} else shared
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    if array.dtype == np.object_:
        raise TypeError(f"a {type(value).__name__} is no array of numbers and cannot be compared: return dense tensors")
    if array.dtype.name in {"bfloat16", "float16"}:
        array = array.astype(np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
