"""Runs a Keras model in double precision.

Inside a context the model itself is switched to float64: its variables and the dtype policies of all its layers.
Nothing is rebuilt, so the exact run includes changes made to a layer after it was built, such as another method or
activation. A model that cannot be switched is cloned from its config, with every dtype in it replaced.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.exact_functions import exact_functions
from porting.models.float32_trace import Float32Trace
from porting.models.frameworks import silence_retracing
from porting.models.traverse import named_layers, named_variables

if TYPE_CHECKING:
    import keras

IN_PLACE, CLONED, BUILT = "turned to float64 in place", "cloned from its config", "built by the caller"


class Float64Model:
    """A model that is in float64 inside `active` and unchanged outside, with the same weights bit for bit.

    `build` makes a fresh model, which gets the same weights and is used instead. `how` says which way is used. With
    `saving_memory`, weights stay in float32, and each layer casts its own while it runs.
    """

    def __init__(
        self, model: keras.Model, build: Callable[[], keras.Model] | None = None, *, saving_memory: bool = False
    ) -> None:
        silence_retracing()
        self.model, self.how = model, IN_PLACE
        self._casts = saving_memory
        # Whether code that casts to float32 stays in float64. Not all code runs so: TensorFlow mixes no types.
        self.stays = True
        self.trace: Float32Trace | None = None
        self._origin, self._substitutes = model, dict[str, Any]()
        self._turned = build is None
        if build is not None:
            with float64_defaults():
                self.model, self.how = _filled(build(), model), BUILT
        self._doubles: list[tuple[Any, Any]] = []
        self._is_overwritten = False

    def clone(self) -> None:
        """Use a clone from now on. Raises whatever Keras raises when the model cannot be cloned."""
        self.model, self.how, self._turned = clone_in_float64(self.model), CLONED, False

    @contextlib.contextmanager
    def active(self) -> Iterator[keras.Model]:
        """Yield the model, which computes in float64 inside this context."""
        if self._is_overwritten:
            self._reset()
        turned = _turned(self.model, self._doubles, self._casts) if self._turned else contextlib.nullcontext()
        traced = contextlib.nullcontext() if self.trace is None else self.trace.active()
        with float64_defaults(), exact_functions(staying=self.stays), turned, traced:
            yield self.model

    def weights(self, without: Collection[str] = ()) -> dict[str, Array]:
        """All weights by name, but for some. They hold the numbers of float64, though not always in that type."""
        with self.active() as model:
            variables = named_variables(model).items()
            return {name: np.asarray(variable) for name, variable in variables if name not in without}

    def substitute(self, find: Callable[[str, Any], Any]) -> int:
        """Replace float64 weights by what `find` returns for a name and values, unless None.

        Returns how many changed.
        """
        with self.active() as model:
            variables = named_variables(model)
            values = ((name, find(name, np.asarray(each).astype(np.float64))) for name, each in variables.items())
            found = {name: other for name, other in values if other is not None}
            if not self._casts_now:
                for name, other in found.items():
                    variables[name].assign(other)
        if self._casts_now:
            replaced = {id(variables[name]) for name in found}
            self._doubles = [pair for pair in self._doubles if id(pair[0]) not in replaced]
            self._doubles += [(variables[name], _double(np.asarray(other))) for name, other in found.items()]
        self._substitutes |= found
        return len(found)

    @property
    def _casts_now(self) -> bool:
        return self._casts and self._turned

    @contextlib.contextmanager
    def overwritten(self, own: Callable[[], Iterable[tuple[str, Array]]] | None = None) -> Iterator[dict[str, Any]]:
        """Let the caller assign other weights inside `active`, in float32 if the model saves memory.

        Yields the variables by name. All weights have their own values again afterwards. Those that `own` yields, by
        name and with their values, are not copied for this.
        """
        variables = named_variables(self.model)
        if not self._casts_now:
            try:
                yield variables
            finally:
                self._is_overwritten = True  # the next run resets it, if there is one
            return
        known = {name for name, _ in own()} if own is not None else set()
        before = {name: np.array(variable) for name, variable in variables.items() if name not in known}
        doubles, self._doubles = self._doubles, []
        try:
            yield variables
        finally:
            self._doubles = doubles
            for name, values in itertools.chain(before.items(), own() if own is not None else ()):
                variables[name].assign(values)

    def _reset(self) -> None:
        """Give all weights the values of the model that the caller gave, and the substitutes."""
        self._is_overwritten = False
        with float64_defaults():
            self._doubles = [(variable, _doubled(variable)) for variable, _ in self._doubles]
            if not self._turned:
                _filled(self.model, self._origin)
        substitutes = dict(self._substitutes)
        self.substitute(lambda name, _: substitutes.get(name))


def clone_in_float64(model: keras.Model) -> keras.Model:
    """Clone a model from its config in float64, with the same weights. Raises whatever Keras raises."""
    import keras

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.Model):
            return keras.models.clone_model(layer, clone_function=clone)
        return layer.__class__.from_config(_with_float64(layer.get_config()))

    with float64_defaults():
        return _filled(keras.models.clone_model(model, clone_function=clone), model)


@contextlib.contextmanager
def float64_defaults() -> Iterator[None]:
    """Make float64 the default type of everything that Keras builds and computes in this context."""
    import keras
    from keras.src.backend.common import dtypes

    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        # On backends other than TensorFlow, Keras's type promotion turns float64 into float32.
        stack.enter_context(_item_set(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64"))
        floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        try:
            yield
        finally:
            keras.config.set_floatx(floatx)
            keras.config.set_dtype_policy(policy)


@contextlib.contextmanager
def _item_set(table: dict[str, str], key: str, value: str) -> Iterator[None]:
    own = table[key]
    table[key] = value
    try:
        yield
    finally:
        table[key] = own


@contextlib.contextmanager
def _turned(model: keras.Model, doubles: list[tuple[Any, Any]], casts: bool) -> Iterator[None]:
    """Switch all policies and variables to float64. `doubles` keeps the values from one use to the next.

    If it `casts`, only the variables in `doubles` are switched, and layers cast all others as under a mixed policy.
    """
    import keras

    policy = keras.dtype_policies.DTypePolicy("float64")
    if casts:
        policy._variable_dtype = "float32"
    layers = [model, *named_layers(model).values()]
    # A Sequential holds a functional model, which is not among its layers.
    layers += [inner for layer in layers if (inner := getattr(layer, "_functional", None)) is not None]
    policies = [(layer, layer._dtype_policy) for layer in layers if hasattr(layer, "_dtype_policy")]
    if not doubles and not casts:
        for variable in _all_variables(layers):
            if keras.backend.is_float_dtype(variable.dtype) and variable.dtype != "float64":
                doubles.append((variable, _doubled(variable)))
    held = [(variable, variable._value, variable._dtype) for variable, _ in doubles]
    # A functional model casts its inputs to the types that it was built for, and so does a nested one.
    inputs: list[Any] = [
        tensor
        for layer in layers
        for tensor in getattr(layer, "_inputs", None) or ()
        if isinstance(tensor, keras.KerasTensor) and keras.backend.is_float_dtype(tensor.dtype)
    ]
    # A Sequential uses the type of its input layer, which its list of layers leaves out.
    inputs += [
        each
        for layer in layers
        for each in getattr(layer, "_layers", ())
        if isinstance(each, keras.layers.InputLayer) and keras.backend.is_float_dtype(each.dtype)
    ]
    dtypes = [(tensor, tensor._dtype) for tensor in inputs]
    try:
        for layer, _ in policies:
            _set_policy(layer, policy)
        for tensor in inputs:
            tensor._dtype = "float64"
        for variable, double in doubles:
            variable._value, variable._dtype = double, "float64"
        yield
    finally:
        for layer, own in policies:
            _set_policy(layer, own)
        for tensor, own in dtypes:
            tensor._dtype = own
        # A backend may have put another object in the variable's place when it was assigned.
        doubles[:] = [(variable, variable._value) for variable, _ in doubles]
        for variable, value, dtype in held:
            variable._value, variable._dtype = value, dtype


def _doubled(variable: Any) -> Any:
    """What a Keras variable with the numbers of another one holds on this backend, in float64."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return _double(tf.cast(variable._value, tf.float64))
    return _double(np.asarray(variable).astype(np.float64))


def _double(values: Any) -> Any:
    """What a Keras variable holds on this backend, in float64."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.Variable(values, trainable=False)  # a Keras variable takes seven times as long to make
    return keras.Variable(values, dtype="float64", trainable=False)._value


def _set_policy(layer: Any, policy: Any) -> None:
    # Not by assignment, for which Keras looks through all that it tracks.
    object.__setattr__(layer, "_dtype_policy", policy)


def _all_variables(layers: list[Any]) -> list[Any]:
    """Every variable of the layers, each once, including those that are not weights."""
    found: dict[int, Any] = {}
    for layer in layers:
        for variable in (*getattr(layer, "_trainable_variables", ()), *getattr(layer, "_non_trainable_variables", ())):
            found[id(variable)] = variable
    return list(found.values())


def _filled(fresh: keras.Model, model: keras.Model) -> keras.Model:
    """Copy the weights of `model` into `fresh`, by name if both have the same names, otherwise in order.

    Raises ValueError when the weights do not fit.
    """
    given, wanted = named_variables(model), named_variables(fresh)
    if given.keys() != wanted.keys():
        given = dict(zip(wanted, given.values(), strict=True))
    for name, variable in wanted.items():
        variable.assign(np.asarray(given[name]).astype(np.float64))
    return fresh


def _with_float64(value: Any) -> Any:
    """Copy a config with every dtype in it replaced by float64."""
    if isinstance(value, dict):
        replaced = {key: _with_float64(item) for key, item in value.items()}
        if replaced.get("class_name") == "DTypePolicy":
            replaced["config"] = {"name": "float64"}
        return replaced
    if isinstance(value, (list, tuple)):
        return type(value)(_with_float64(item) for item in value)
    return "float64" if isinstance(value, str) and value in {"float32", "mixed_float16", "mixed_bfloat16"} else value
