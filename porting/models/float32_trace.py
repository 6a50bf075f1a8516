"""Follows float32 through a Keras run in float64: which tensors depend on numbers that were computed in it."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.exact_functions import as_written
from porting.models.frameworks import replaced

# Operations that only move numbers or choose among them: the result is as exact as what they take.
_MOVING = frozenset(
    [
        "Abs",
        "BroadcastTo",
        "Ceil",
        "ConcatV2",
        "Const",
        "EnsureShape",
        "ExpandDims",
        "Fill",
        "Floor",
        "Gather",
        "GatherNd",
        "GatherV2",
        "Identity",
        "MatrixBandPart",
        "Max",
        "MaxPool",
        "Maximum",
        "Min",
        "Minimum",
        "MirrorPad",
        "Neg",
        "OneHot",
        "OnesLike",
        "Pack",
        "Pad",
        "PadV2",
        "Range",
        "ReadVariableOp",
        "Relu",
        "Reshape",
        "ReverseV2",
        "Round",
        "Select",
        "SelectV2",
        "Sign",
        "Slice",
        "Snapshot",
        "Split",
        "SplitV",
        "Squeeze",
        "StopGradient",
        "StridedSlice",
        "Tile",
        "Transpose",
        "Unpack",
        "Where",
        "ZerosLike",
    ]
)


# A variable is compared with PyTorch's tensors elsewhere.
_READING = "ReadVariableOp"
# How far a constant that was computed in float32 may be from the same in float64, relative to its greatest number: a
# few roundings, such as those of an angle and of its sine.
_ROUNDINGS = 2.0**-20
_ROUNDING = 2.0**-24
_GREATEST = 1e4
# Numbers of so many parts of one are taken for exact.
_FRACTIONS = 4096.0


class Float32Trace:
    """Names the tensors of a run that depend on arithmetic in float32 or half precision.

    A layer may compute in float32 whatever its dtype is, such as the angles of a rotary embedding. The trace tells such
    rounding from a mistake, whatever module comes next. It slows a run down, so it is only used where outputs differ by
    about as much as float32 rounds. Only TensorFlow can be followed.

    `constants` are numbers that PyTorch holds in float32, such as a table of sines. Where Keras computes the same in
    float64, PyTorch's side is the one that was rounded. `created` are numbers that PyTorch's code makes in float64,
    which Keras may hold in float32.
    """

    def __init__(self, constants: Iterable[Array] = (), created: Iterable[Array] = ()) -> None:
        self._touched: set[int] = set()
        # A mask's great numbers would allow for anything beside them. Many layers hold the same table.
        self._constants: list[tuple[Array, Array]] = []
        constants, created = list(constants), list(created)
        alike = (each.flat[0] for each in (*constants, *created) if each.size and (each == each.flat[0]).all())
        self._numbers = sorted({float(each) for each in alike if each and math.isfinite(each)})
        # A sine near zero has the rounding of its angle. What the code wrote has that of each number.
        for arrays, roundings, floor in ((constants, _ROUNDINGS, 0.5), (created, _ROUNDING, 0.0)):
            flat = (np.ravel(array) for array in arrays)
            useful = [each for each in flat if np.unique(each[:64]).size > 1 and np.abs(each).max() < _GREATEST]
            distinct = {(each.size, each.tobytes()): each for each in useful}
            for each in distinct.values():
                sizes = np.abs(each)
                least = floor * min(float(sizes.max()), 1.0)
                self._constants.append((each, roundings * np.maximum(sizes, least)))

    def __bool__(self) -> bool:
        """Whether any such tensor was seen."""
        return bool(self._touched)

    def has(self, tensor: Any) -> bool:
        """Whether a tensor that an observer got depends on float32."""
        return getattr(tensor, "keras_id", None) in self._touched

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Follow the operations of this context."""
        import tensorflow as tf
        from tensorflow.python.framework import op_callbacks
        from tensorflow.python.framework import override_binary_operator as operators

        op_callbacks.add_op_callback(self._follow)
        try:
            # Numbers that NumPy computed come in by these, and not by an operation.
            with (
                replaced(
                    tf,
                    cast=self._converting(tf.cast),
                    constant=self._converting(tf.constant),
                    convert_to_tensor=self._converting(tf.convert_to_tensor),
                ),
                replaced(operators, maybe_promote_tensors=self._promoting(operators.maybe_promote_tensors)),
            ):
                yield
        finally:
            op_callbacks.remove_op_callback(self._follow)

    def _follow(
        self,
        operation: str | bytes,
        inputs: tuple[Any, ...],
        attributes: Any,
        outputs: tuple[Any, ...],
        op_name: str | None = None,
        graph: Any = None,
    ) -> None:
        if graph is not None:
            return  # a function is being compiled: nothing is computed yet
        name = operation.decode() if isinstance(operation, bytes) else operation
        touched = any(getattr(each, "_id", None) in self._touched for each in inputs) or (
            name not in _MOVING
            and any(_is_single(each.dtype) for each in outputs)
            and any(_has_fractions(each.dtype) for each in inputs)
        )
        for each in outputs:
            if _has_fractions(each.dtype) and (touched or (name != _READING and self._is_constant(each))):
                self._touched.add(each._id)

    def _converting(self, own: Callable[..., Any]) -> Callable[..., Any]:
        import tensorflow as tf

        @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
        def convert(value: Any, *args: Any, **kwargs: Any) -> Any:
            made = own(value, *args, **kwargs)
            if not tf.executing_eagerly():
                return made  # a function is being compiled
            if (
                _is_rounded(value)
                or self._is_number(value)
                or (isinstance(value, (np.ndarray, list, tuple)) and self._is_constant(made))
            ):
                self._touched.add(made._id)
            return made

        converting: Callable[..., Any] = convert
        return converting

    def _promoting(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Follow numbers in float32 that an operator takes beside a tensor."""
        import tensorflow as tf

        def promote(*tensors: Any, **how: Any) -> Any:
            given = list(tensors)
            for place, each in enumerate(tensors):
                if _is_rounded(each) or self._is_number(each):
                    given[place] = tf.raw_ops.Identity(input=np.asarray(each, np.float64))
                    self._touched.add(given[place]._id)
            return own(*given, **how)

        return promote

    def _is_number(self, value: Any) -> bool:
        """Whether PyTorch holds this number of the code rounded to float32."""
        if isinstance(value, (np.ndarray, np.generic)) and np.size(value) == 1:
            value = np.ravel(as_written(value)).astype(float).item()
        if not isinstance(value, float) or not value:
            return False
        place = bisect.bisect_left(self._numbers, value)
        near = self._numbers[max(0, place - 1) : place + 1]
        return any(each != value and abs(each - value) <= _ROUNDING * abs(each) for each in near)

    def _is_constant(self, output: Any) -> bool:
        """Whether PyTorch holds these numbers rounded to float32."""
        import tensorflow as tf

        if not self._constants or output.dtype != tf.float64:
            return False
        count = int(np.prod(output.shape))
        # Code may use the first rows of a table.
        fitting = [(each[:count], limit[:count]) for each, limit in self._constants if each.size >= count > 1]
        if not fitting:
            return False
        values = output.numpy().ravel()
        for each, limit in fitting:
            if abs(values[-1] - each[-1]) > limit[-1]:
                continue
            distances = np.abs(values - each)
            if distances.any() and bool((distances <= limit).all()):
                return True
        return False


def _has_fractions(dtype: Any) -> bool:
    return bool(dtype.is_floating or dtype.is_complex)


def _is_single(dtype: Any) -> bool:
    """Whether numbers of this type are rounded to float32 or more."""
    return bool(dtype.real_dtype.is_floating and dtype.real_dtype.size <= 4)  # bytes


def _is_rounded(value: Any) -> bool:
    """Whether NumPy numbers of the code were rounded to float32, and are not as a person writes them."""
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype != np.float32 or not np.isfinite(value).all():
        return False
    if as_written(value).dtype != np.float32:
        return False
    scaled = np.asarray(value, np.float64) * _FRACTIONS
    return bool((scaled != np.floor(scaled)).any())
