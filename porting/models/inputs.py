"""The inputs and results of both models: trees of arrays, and the order of their axes on each side.

An order of axes is never chosen because it fits best. It follows from what the PyTorch model does with an input. The
report names it, and a caller can state it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.float64 import computing_in_float64
from porting.models.modes import in_mode

if TYPE_CHECKING:
    import keras
    from torch import nn

Axes = tuple[int, ...]
# Modules that take channels right after the samples, and modules that take features last. These are names of classes or
# of base classes.
_CHANNELS_FIRST = frozenset(
    [
        "_ConvNd",
        "_BatchNorm",
        "_MaxPoolNd",
        "_AvgPoolNd",
        "_AdaptiveAvgPoolNd",
        "_AdaptiveMaxPoolNd",
        "Upsample",
        "PixelShuffle",
        "PixelUnshuffle",
        "GroupNorm",
        "_InstanceNorm",
        "Softmax2d",
        "_ConstantPadNd",
        "_ReflectionPadNd",
        "_ReplicationPadNd",
        "LocalResponseNorm",
    ]
)
_FEATURES_LAST = frozenset(
    [
        "Linear",
        "RNNBase",
        "RNNCellBase",
        "MultiheadAttention",
        "LayerNorm",
        "RMSNorm",
        "Transformer",
        "TransformerEncoder",
        "TransformerEncoderLayer",
        "Embedding",
        "Bilinear",
    ]
)


def moved(rank: int) -> Axes:
    """PyTorch's axes in Keras's order when channels move from right after the samples to the end."""
    return (0, *range(2, rank), 1)


def inverse(axes: Axes) -> Axes:
    """The inverse of a permutation."""
    return tuple(axes.index(axis) for axis in range(len(axes)))


@dataclass(frozen=True)
class Inputs:
    """The same inputs for both models, in order.

    `names` are the keys of a dict of inputs, None for inputs given by position. `reference_names` are the names of
    PyTorch's arguments. `axes` are, for each input, PyTorch's axes in Keras's order; None if neither array is a
    permutation of the other.
    """

    candidate: tuple[Array, ...]
    reference: tuple[Array, ...]
    axes: tuple[Axes | None, ...]
    names: tuple[str, ...] | None = None
    reference_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.candidate[0])

    def batch(self, start: int, stop: int) -> Inputs:
        return Inputs(
            tuple(array[start:stop] for array in self.candidate),
            tuple(_slice(array, axes, start, stop) for array, axes in zip(self.reference, self.axes, strict=True)),
            self.axes,
            self.names,
            self.reference_names,
        )

    def output_axes(self, rank: int) -> Axes:
        """PyTorch's axes in Keras's order for a result of this rank: those of an input of the same rank."""
        for axes in self.axes:
            if axes is not None and len(axes) == rank and axes != tuple(range(rank)):
                return axes
        return tuple(range(rank))

    def described(self) -> tuple[str, ...]:
        """Describe, in one line each, the inputs that differ between the two sides."""
        lines = []
        for index, (axes, array) in enumerate(zip(self.axes, self.candidate, strict=True)):
            label = self.names[index] if self.names else f"input {index}"
            if axes is None:
                lines.append(f"{label}: given for each side")
            elif axes != tuple(range(array.ndim)):
                lines.append(f"{label} and results of {array.ndim} axes: PyTorch's axes in Keras's order are {axes}")
        return tuple(lines)

    def not_finite(self) -> str:
        """Describe the first input that holds NaN or infinity; "" if there is none."""
        for index, array in enumerate(self.candidate):
            count = int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0
            if count:
                return (
                    f"{self.names[index] if self.names else f'input {index}'} holds {count} numbers that are not finite"
                )
        return ""

    def for_candidate(self, model: keras.Model, *, exact: bool = False) -> Any:
        """The structure that the Keras model takes, with floats in float64 for an exact run."""
        doubles = (array.astype(np.float64) if array.dtype.kind == "f" else array for array in self.candidate)
        return self.structured(model, tuple(doubles) if exact else self.candidate)

    def structured(self, model: keras.Model, values: Sequence[Any]) -> Any:
        """Values in the order of these inputs, in the structure that the Keras model takes."""
        structure = getattr(model, "_inputs_struct", None)
        if self.names is not None:
            named = dict(zip(self.names, values, strict=True))
            if structure is None or isinstance(structure, Mapping):
                return named
            # Keras warns of a dict where the model was made of one input or a list.
            order = [tensor.name for tensor in model.inputs]
            if set(order) != set(named):
                return named
            return named[order[0]] if len(order) == 1 else [named[name] for name in order]
        if isinstance(structure, Mapping) and len(structure) == len(values):
            return dict(zip(structure, values, strict=True))
        return values[0] if len(values) == 1 else list(values)

    def for_reference(self) -> Any:
        """The inputs of the PyTorch model, as `make_inputs` takes them."""
        names = self.reference_names or self.names
        return list(self.reference) if names is None else dict(zip(names, self.reference, strict=True))

    def call_reference(self, model: nn.Module, dtype: Any) -> Any:
        """Run the PyTorch model on copies of the arrays, with floats in `dtype`."""
        import torch

        tensors = [torch.from_numpy(np.array(array, order="C")) for array in self.reference]
        tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        names = self.reference_names or self.names
        with computing_in_float64(model) if dtype == torch.float64 else contextlib.nullcontext():
            if names is not None:
                return model(**dict(zip(names, tensors, strict=True)))
            return model(*tensors)


def equal_inputs(inputs: Any) -> Inputs:
    """Make inputs of two models of one framework, which take the same. Raises ValueError when there are none."""
    names = tuple(map(str, inputs)) if isinstance(inputs, Mapping) else None
    arrays = tuple(_array(each) for each in _listed(inputs))
    if not arrays or not all(len(array) if array.ndim else 0 for array in arrays):
        raise ValueError("at least one input is needed")
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"inputs need the same number of samples: got {[len(array) for array in arrays]}")
    return Inputs(arrays, arrays, tuple(tuple(range(array.ndim)) for array in arrays), names, names)


def image_inputs(images: Array) -> Inputs:
    """Make inputs of images, `(N, H, W, C)` for Keras and `(N, C, H, W)` for PyTorch."""
    return Inputs((images,), (np.moveaxis(images, -1, 1),), (moved(images.ndim),))


def _slice(array: Array, axes: Axes | None, start: int, stop: int) -> Array:
    """Slice the samples of an array in which the axis of samples may not be the first."""
    axis = axes[0] if axes is not None else 0
    return array[(slice(None),) * axis + (slice(start, stop),)]


def make_inputs(
    reference: nn.Module,
    candidate: keras.Model,
    inputs: Any,
    reference_inputs: Any = None,
    input_axes: Sequence[Axes | None] | None = None,
) -> Inputs:
    """Make `Inputs` of what a caller passed.

    Inputs are one array, several, or a dict; arrays may be NumPy's, PyTorch's or Keras's. `reference_inputs` are the
    inputs for PyTorch. By default they are the same, with channels moved if the PyTorch model takes them first.
    `input_axes` states, for each input, PyTorch's axes in Keras's order.

    Raises ValueError when there are no inputs or they do not fit each other.
    """
    names = tuple(map(str, inputs)) if isinstance(inputs, Mapping) else None
    theirs_named = isinstance(reference_inputs, Mapping)
    theirs_names = tuple(map(str, reference_inputs)) if theirs_named else names_in_reference(reference, names)
    if (
        names is not None
        and theirs_named
        and not (set(reference_inputs) == set(names) or set(reference_inputs) <= set(_arguments(reference)))
    ):
        raise ValueError(f"reference_inputs has the keys {sorted(reference_inputs)}, inputs {sorted(names)}")
    ours = [_array(each) for each in _listed(inputs)]
    if not ours or not all(len(array) if array.ndim else 0 for array in ours):
        raise ValueError("at least one input is needed for a parity check")
    ours = [_fitting(array, shape) for array, shape in zip(ours, _expected_shapes(candidate, len(ours)), strict=True)]
    ours = [_as_pixels(array, dtype) for array, dtype in zip(ours, _expected_dtypes(candidate, len(ours)), strict=True)]
    if len({len(array) for array in ours}) > 1:
        raise ValueError(f"inputs need the same number of samples: got {[len(array) for array in ours]}")
    if input_axes is not None and len(input_axes) != len(ours):
        raise ValueError(f"input_axes has {len(input_axes)} entries for {len(ours)} inputs")
    if reference_inputs is None:
        stated = list(input_axes) if input_axes is not None else [None] * len(ours)
        axes = _axes_that_reference_takes(reference, ours, stated, theirs_names)
        theirs = [array.transpose(inverse(order)) for array, order in zip(ours, axes, strict=True)]
        return Inputs(tuple(ours), tuple(theirs), tuple(axes), names, theirs_names)
    if theirs_named and names and set(reference_inputs) == set(names):
        theirs_names = names
        given = [reference_inputs[name] for name in names]
    else:  # under PyTorch's own names, in the same order
        given = _listed(reference_inputs)
    theirs = [_array(each) for each in given]
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} reference_inputs for {len(ours)} inputs")
    theirs = [
        their.astype(np.float32) if our.dtype.kind == "f" and their.dtype.kind in "iu" and their.ndim > 2 else their
        for our, their in zip(ours, theirs, strict=True)
    ]
    found = [
        stated if stated is not None else _permutation(our, their)
        for our, their, stated in zip(ours, theirs, input_axes or [None] * len(ours), strict=True)
    ]
    return Inputs(tuple(ours), tuple(theirs), tuple(found), names, theirs_names)


# The names of keras-hub and of transformers for the same inputs.
_KNOWN_NAMES = {
    "token_ids": "input_ids",
    "padding_mask": "attention_mask",
    "segment_ids": "token_type_ids",
    "encoder_token_ids": "input_ids",
    "encoder_padding_mask": "attention_mask",
    "decoder_token_ids": "decoder_input_ids",
    "decoder_padding_mask": "decoder_attention_mask",
    "encoder_features": "input_features",
}


def names_in_reference(reference: nn.Module, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The PyTorch arguments that Keras inputs go to. A name stays as it is if the PyTorch model takes it."""
    if names is None:
        return None
    taken = _arguments(reference)
    found = tuple(
        _KNOWN_NAMES[name] if name not in taken and _KNOWN_NAMES.get(name) in taken else name for name in names
    )
    if not taken or not _takes_only_named(reference) or set(found) <= set(taken):
        return found
    if len(found) == 1:
        return (taken[0],)
    unknown = ", ".join(name for name in found if name not in taken)
    raise ValueError(
        f"PyTorch's model takes {', '.join(taken)}, and not {unknown}: give its inputs as "
        "reference_inputs={...} by its own names"
    )


def _takes_only_named(reference: nn.Module) -> bool:
    """Whether PyTorch's forward takes no other arguments than those that it names."""
    kinds = {each.kind for each in inspect.signature(reference.forward).parameters.values()}
    return not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def _arguments(reference: nn.Module) -> list[str]:
    """The names of a PyTorch model's arguments; none for TorchScript, which does not state them."""
    try:
        return list(inspect.signature(reference.forward).parameters)
    except (TypeError, ValueError):
        return []


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def _array(value: Any) -> Array:
    """Convert a value to a NumPy array. All floats become float32, the type that a Keras model takes."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.dtype.is_floating_point else value
    array = np.asarray(value)
    if array.dtype.kind not in "fiubcV" or array.ndim == 0:
        got = f"an array of {array.dtype.name}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"inputs are arrays of numbers, with the samples first: got {got}")
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array


def _expected_shapes(candidate: keras.Model, count: int) -> list[tuple[int | None, ...] | None]:
    """The input shapes that a functional model states, in order; None for each input if it states none."""
    tensors = getattr(candidate, "inputs", None) or ()
    shapes = [tuple(tensor.shape) for tensor in tensors]
    return list(shapes) if len(shapes) == count else [None] * count


def _expected_dtypes(candidate: keras.Model, count: int) -> list[str]:
    tensors = getattr(candidate, "inputs", None) or ()
    dtypes = [str(tensor.dtype) for tensor in tensors]
    return dtypes if len(dtypes) == count else [""] * count


def _as_pixels(array: Array, dtype: str) -> Array:
    """Convert images of integers to float32. Keras casts them itself, PyTorch does not."""
    is_image = array.dtype.kind in "iu" and array.ndim > 2
    return array.astype(np.float32) if is_image and (dtype.startswith("float") or array.dtype == np.uint8) else array


def _fitting(array: Array, shape: tuple[int | None, ...] | None) -> Array:
    """Fit an array to a shape if there is only one way: add an axis for a single sample, or move channels last."""
    if shape is None:
        return array
    if array.ndim == len(shape) - 1 and _fits(array[None], shape):
        return array[None]
    if (
        array.ndim == len(shape)
        and array.ndim > 2
        and not _fits(array, shape)
        and _fits(np.moveaxis(array, 1, -1), shape)
    ):
        return np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return array


def _fits(array: Array, shape: tuple[int | None, ...]) -> bool:
    return array.ndim == len(shape) and all(
        side is None or side == given for side, given in zip(shape, array.shape, strict=True)
    )


def _permutation(ours: Array, theirs: Array) -> Axes | None:
    """PyTorch's axes in Keras's order, found by comparing the numbers of both arrays; None if no order fits."""
    if ours.ndim != theirs.ndim:
        return None
    orders = sorted(itertools.permutations(range(ours.ndim)), key=lambda order: order != tuple(range(ours.ndim)))
    for order in orders:
        if tuple(theirs.shape[axis] for axis in order) == ours.shape and np.array_equal(theirs.transpose(order), ours):
            return tuple(order)
    return None


def _axes_that_reference_takes(
    reference: nn.Module, arrays: list[Array], stated: Sequence[Axes | None], names: tuple[str, ...] | None
) -> list[Axes]:
    """The order of axes that the PyTorch model takes, for each input.

    Two axes or fewer stay. Otherwise the first module that takes the input decides: a convolution takes channels right
    after the samples, a dense layer takes features last. If no module takes the input unchanged, the channels of images
    and volumes move.
    """
    found = []
    usual = [axes if axes is not None else _usual(array.ndim) for axes, array in zip(stated, arrays, strict=True)]
    for index, array in enumerate(arrays):
        if stated[index] is not None or array.ndim < 3:
            found.append(usual[index])
            continue
        takers = []
        for axes in (moved(array.ndim), tuple(range(array.ndim))):
            tried = [*found, axes, *usual[index + 1 :]]
            theirs = [each.transpose(inverse(order)) for each, order in zip(arrays, tried, strict=True)]
            takers.append(_first_taker(reference, theirs, index, names))
            if takers[0].ran and (takers[0].first or (array.ndim > 3 and not takers[0].last)):
                break
        found.append(_chosen(array.ndim, *takers))
    return found


def _chosen(rank: int, channels: _Taker, same: _Taker | None = None) -> Axes:
    """Choose between moved channels and the given order, by the first module that took each and by which one ran."""
    if same is None:
        return moved(rank)
    if channels.last or same.last:
        moves = channels.ran and not same.ran
    elif channels.first or same.first:
        moves = channels.ran or not same.ran
    elif channels.ran != same.ran:
        moves = channels.ran
    else:
        moves = rank > 3
    return moved(rank) if moves else tuple(range(rank))


def _usual(rank: int) -> Axes:
    return moved(rank) if rank > 3 else tuple(range(rank))


@dataclass(frozen=True)
class _Taker:
    """Whether the model ran, and whether the first module that took an input takes channels first or features last."""

    ran: bool
    first: bool
    last: bool


def _first_taker(reference: nn.Module, arrays: list[Array], index: int, names: tuple[str, ...] | None) -> _Taker:
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(array[:1] if array.ndim else array)) for array in arrays]
    parameter = next((each for each in reference.parameters() if each.is_floating_point()), None)
    if parameter is not None:
        tensors = [tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    wanted = tensors[index]
    taker: list[nn.Module] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not taker and not list(module.children()) and any(each is wanted for each in (*args, *kwargs.values())):
            taker.append(module)

    with _watched(reference, before), torch.no_grad():
        try:
            reference(**dict(zip(names, tensors, strict=True))) if names is not None else reference(*tensors)
            ran = True
        except Exception:  # a model may raise anything on axes that it does not take
            ran = False
    bases = {base.__name__ for base in type(taker[0]).__mro__} if taker else set()
    return _Taker(ran, bool(bases & _CHANNELS_FIRST), bool(bases & _FEATURES_LAST))


@contextlib.contextmanager
def _watched(model: nn.Module, before: Callable[..., None]) -> Iterator[None]:
    """Put the model into evaluation mode in this context, with a pre-forward hook on every module."""
    with in_mode(model, training=False), contextlib.ExitStack() as hooks:
        for module in model.modules():
            try:
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            except (RuntimeError, TypeError):  # a TorchScript module takes no such hook
                continue
            hooks.callback(handle.remove)
        yield


def leaves_by_key(value: Any) -> dict[str, Any]:
    """The tensors and numbers in a result, by their place: keys for dicts and dataclasses, indices for sequences.

    A single tensor has the key "".
    """
    found: dict[str, Any] = {}

    def walk(item: Any, key: str) -> None:
        if item is None:
            return
        if isinstance(item, Mapping):
            for name, each in item.items():
                walk(each, f"{key}.{name}" if key else str(name))
        elif is_dataclass(item) and not isinstance(item, type):
            for each in fields(item):
                walk(getattr(item, each.name), f"{key}.{each.name}" if key else each.name)
        elif isinstance(item, (list, tuple)):
            for place, each in enumerate(item):
                walk(each, f"{key}[{place}]")
        elif hasattr(item, "shape") and hasattr(item, "dtype"):
            found[key] = item
        elif isinstance(item, (bool, int, float)):
            found[key] = np.asarray(item)

    walk(value, "")
    return found
