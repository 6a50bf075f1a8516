"""One model of a proposal, in either framework: its layers, its tensors, and a run in float64 that can be observed.

Every side has the same methods, so that the search for a key map does not depend on the frameworks of the two models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from porting.errors import KeyMapError
from porting.kinds import KINDS, kind_of_layer, kind_of_module
from porting.kinds.base import Kind, Leaf, attribute
from porting.kinds.transforms import Array, Shape
from porting.mapping.rules import join_name
from porting.models.float64 import in_float64
from porting.models.frameworks import torch_on_one_thread
from porting.models.inputs import Axes, Inputs, equal_inputs, leaves_by_key, make_inputs
from porting.models.keras_float64 import Float64Model
from porting.models.live import assign_tensors, effective_tensors
from porting.models.observe import Observer, Replay, applied, observe_layers, observe_modules, to_torch
from porting.models.synthetic import fill_with_synthetic_weights
from porting.models.traverse import named_layers, named_variables, owned_names, variable_names
from porting.wording import typed_reason_of

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


class Side(Protocol):
    """One model.

    `layers` are its modules or layers by name, `separator` stands between the parts of a name, and `shapes` are those
    of its tensors. `owned` has the tensors that each layer holds directly.
    """

    separator: str
    given: Inputs
    layers: dict[str, Any]
    shapes: dict[str, Shape]
    owned: dict[str, list[str]]
    # Where a run can begin in the middle; None where it cannot.
    replay: Replay | None

    def kind(self, layer: str) -> Kind | None:
        """The kind of a layer; None for an unknown one."""
        ...

    def tensors_of(self, layer: str) -> list[str]:
        """The tensors that a layer is filled with, including those of sublayers that its kind covers."""
        ...

    def holds_tensors(self, layer: str) -> bool:
        """Whether a layer or anything inside it holds tensors."""
        ...

    def tensors(self) -> dict[str, Array]:
        """All tensors by name, in float64."""
        ...

    def aliases(self) -> dict[str, str]:
        """Names under which a tensor is found a second time, as tied weights are, and its first name."""
        ...

    def whole_numbers(self) -> set[str]:
        """The names of tensors that hold whole numbers or booleans, which are no weights."""
        ...

    def constants(self) -> set[str]:
        """The names of buffers of no kind of layer, such as a mask or a window, which code may compute instead."""
        ...

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set tensors of the float64 model. The caller's model is not changed."""
        ...

    def running(self, observer: Observer) -> contextlib.AbstractContextManager[Callable[[], dict[str, Tensor]]]:
        """Yield a function that runs the float64 model under the eyes of `observer` and returns its results by key."""
        ...

    def replace(self, values: Mapping[str, Array]) -> None:
        """Give tensors of the float64 model other values."""
        ...

    def fill_with_synthetic_weights(self, defaults: Mapping[str, Sequence[Leaf]] | None = None) -> None:
        """Give every tensor of the float64 model values that reveal errors."""
        ...

    def activated(self, layer: str, tensor: Tensor) -> Tensor | None:
        """What the activation fused into a layer makes of a tensor; None if it has none."""
        ...

    def result_of(self, layer: str, tensor: Tensor) -> Tensor | None:
        """What a layer makes of a tensor, inside `running`; None if this side cannot call it alone."""
        ...


class TorchSide:
    """A PyTorch model, copied to float64."""

    separator = "."
    replay: Replay | None = None

    def __init__(self, model: nn.Module, given: Inputs) -> None:
        self.model, self.given = in_float64(model).eval(), given
        self.layers = {name: module for name, module in self.model.named_modules() if name}
        self._refresh()

    def _refresh(self) -> None:
        self._tensors = effective_tensors(self.model, in_float32=False)
        self.shapes = {name: array.shape for name, array in self._tensors.items()}
        self.owned: dict[str, list[str]] = {name: [] for name in ("", *self.layers)}
        for name in self._tensors:
            self.owned.setdefault(name.rpartition(".")[0], []).append(name)

    def kind(self, layer: str) -> Kind | None:
        return kind_of_module(self.layers[layer]) if layer else None

    def holds_tensors(self, layer: str) -> bool:
        return bool(self.owned[layer]) or any(name.startswith(f"{layer}.") for name in self._tensors)

    def tensors_of(self, layer: str) -> list[str]:
        kind = self.kind(layer)
        leaves = () if kind is None else kind.leaves_for(self.layers[layer])
        named = [join_name(layer, ".", name) for leaf in leaves for name in leaf.sources]
        return list(dict.fromkeys([*self.owned[layer], *(name for name in named if name in self._tensors)]))

    def tensors(self) -> dict[str, Array]:
        return self._tensors

    def aliases(self) -> dict[str, str]:
        first: dict[int, str] = {}
        tensors = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        found = {name: first.setdefault(id(tensor), name) for name, tensor in tensors}
        return {name: own for name, own in found.items() if name != own}

    def whole_numbers(self) -> set[str]:
        return {name for name, array in self._tensors.items() if array.dtype.kind in "iub"}

    def constants(self) -> set[str]:
        owners = {name: self.layers.get(name.rpartition(".")[0], self.model) for name, _ in self.model.named_buffers()}
        return {name for name, owner in owners.items() if kind_of_module(owner) is None}

    def assign(self, values: Mapping[str, Array]) -> None:
        assign_tensors(self.model, values)

    def call(self, model: nn.Module) -> Any:
        """Run a model on the inputs of this side."""
        import torch

        return self.given.call_reference(model, torch.float64)

    @contextlib.contextmanager
    def running(self, observer: Observer) -> Iterator[Callable[[], dict[str, Tensor]]]:
        import torch

        def run() -> dict[str, Tensor]:
            found = leaves_by_key(self.call(self.model))
            return {key: leaf for key, leaf in found.items() if isinstance(leaf, torch.Tensor)}

        with torch.no_grad(), observe_modules(self.model, observer):
            yield run

    def replace(self, values: Mapping[str, Array]) -> None:
        self.assign(values)
        self._refresh()

    def fill_with_synthetic_weights(self, defaults: Mapping[str, Sequence[Leaf]] | None = None) -> None:
        """Fill the model with weights that show mistakes.

        `defaults` are tensors, by kind, that no layer of the target holds: the scale of norms without one. They get
        their default, which the published weights must have too if they fit the target.
        """
        import torch

        fill_with_synthetic_weights(self.model, 0, run=self.call)
        for module in self.model.modules():
            kind = kind_of_module(module)
            for leaf in (defaults or {}).get(kind.name, ()) if kind is not None else ():
                for name in leaf.sources:
                    tensor = attribute(module, name)
                    if tensor is not None:
                        tensor.data.fill_(leaf.default)
        self.model.eval()
        generator = torch.Generator().manual_seed(1)
        for module in self.model.modules():
            if kind_of_module(module) is None:  # a buffer that a model uses, in zeros as it may be, would not show
                for buffer in module.buffers(recurse=False):
                    if buffer.is_floating_point() and not buffer.any():
                        buffer.uniform_(0.1, 0.5, generator=generator)
        self._refresh()

    def activated(self, layer: str, tensor: Tensor) -> Tensor | None:
        return None

    def result_of(self, layer: str, tensor: Tensor) -> Tensor | None:
        return None


class KerasSide:
    """A Keras model, switched to float64 while it runs."""

    separator = "/"

    def __init__(self, model: keras.Model, given: Inputs) -> None:
        if not all(layer.built for layer in (model, *named_layers(model).values())):
            # It has no weights before its first call, which makes them in its own type.
            model(given.for_candidate(model), training=False)
        self._float64, self.given = Float64Model(model), given
        self._try_out()
        self.replay: Replay | None = Replay()
        self.layers = named_layers(model)
        self._variables = named_variables(model)
        self.shapes = {name: tuple(variable.shape) for name, variable in self._variables.items()}
        self.names, self.owned = variable_names(model), owned_names(model)

    def _try_out(self) -> None:
        """Run the model once, with casts to float32 if it does not run without. Raises KeyMapError if it never does."""
        for stays in (True, False):
            self._float64.stays = stays
            try:
                with torch_on_one_thread(), self._float64.active() as model:
                    model(self.given.for_candidate(model), training=False)
            except Exception as error:  # a model may raise anything
                reason = typed_reason_of(error)
            else:
                return
        raise KeyMapError(
            f"the Keras model cannot run in float64: {reason}",
            hint="The search compares numbers in float64. Rows of your own, in port_weights, need no search.",
        )

    def kind(self, layer: str) -> Kind | None:
        return kind_of_layer(self.layers[layer]) if layer else None

    def lacking(self) -> dict[str, list[Leaf]]:
        """The leaves that are 1 by default, such as the scale of a norm, and that no layer of their kind has."""
        held: dict[str, set[str]] = {}
        for layer in self.layers.values():
            if (kind := kind_of_layer(layer)) is not None:
                held.setdefault(kind.name, set()).update(kind.variables(layer))
        return {
            name: [leaf for leaf in KINDS[name].leaves if leaf.default == 1.0 and own.isdisjoint(leaf.targets)]
            for name, own in held.items()
        }

    def holds_tensors(self, layer: str) -> bool:
        return bool(self.layers[layer].weights)

    def tensors_of(self, layer: str) -> list[str]:
        kind = self.kind(layer)
        found = () if kind is None else kind.variables(self.layers[layer]).values()
        return list(dict.fromkeys([*self.owned.get(layer, ()), *(self.names.get(id(each), "") for each in found)]))

    def aliases(self) -> dict[str, str]:
        return {}

    def tensors(self) -> dict[str, Array]:
        return {name: np.array(values) for name, values in self._float64.weights().items()}

    def whole_numbers(self) -> set[str]:
        return {name for name, own in self._variables.items() if str(own.dtype).startswith(("int", "uint", "bool"))}

    def constants(self) -> set[str]:
        return set()

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set variables. Only inside `running`, where the model is in float64."""
        for name, array in values.items():
            self._variables[name].assign(array)

    @contextlib.contextmanager
    def running(self, observer: Observer) -> Iterator[Callable[[], dict[str, Tensor]]]:
        with torch_on_one_thread(), self._float64.active() as model, observe_layers(model, observer, self.replay):

            def run() -> dict[str, Tensor]:
                result = model(self.given.for_candidate(model), training=False)
                return {key: to_torch(leaf) for key, leaf in leaves_by_key(result).items()}

            yield run

    def replace(self, values: Mapping[str, Array]) -> None:
        self._float64.substitute(lambda name, _: values.get(name))

    def fill_with_synthetic_weights(self, defaults: Mapping[str, Sequence[Leaf]] | None = None) -> None:
        rng = np.random.default_rng(0)

        def drawn(name: str, values: Array) -> Array:
            if values.ndim > 1:
                return rng.normal(0.0, max(1, values.size // values.shape[-1]) ** -0.5, values.shape)
            # Scales and variances have to be positive.
            low, high = (-0.3, 0.3) if name.rpartition("/")[2] in {"bias", "beta", "moving_mean"} else (0.6, 1.4)
            return rng.uniform(low, high, values.shape)

        self._float64.substitute(drawn)

    def activated(self, layer: str, tensor: Tensor) -> Tensor | None:
        activation = getattr(self.layers[layer], "activation", None)
        return applied(activation, tensor) if callable(activation) else None

    def result_of(self, layer: str, tensor: Tensor) -> Tensor | None:
        import keras

        if list(self.layers[layer]._flatten_layers(include_self=False)):
            return None  # the observer would see the layers inside
        with contextlib.suppress(Exception):  # a layer may raise anything
            result = self.layers[layer].call(keras.ops.convert_to_tensor(tensor.numpy()))  # past the observer
            return to_torch(result) if keras.ops.is_tensor(result) else None
        return None


# This many numbers per sample identify tensors. If inputs have fewer, a second sample is used.
_ENOUGH = 1000


def make_sides(
    reference: Any, candidate: Any, inputs: Any, reference_inputs: Any, input_axes: Sequence[Axes | None] | None
) -> tuple[TorchSide | KerasSide, TorchSide | KerasSide]:
    """The two sides of a proposal. Raises ValueError for inputs that do not fit, and for Keras to PyTorch."""
    from torch import nn

    theirs, ours = isinstance(reference, nn.Module), isinstance(candidate, nn.Module)
    if ours and not theirs:
        raise ValueError(
            "propose_map goes from a PyTorch model to a Keras model, or between two models of one framework"
        )
    if theirs != ours:
        given = make_inputs(reference, candidate, inputs, reference_inputs, input_axes)
        theirs_given = given
    else:
        given = equal_inputs(inputs)
        theirs_given = given if reference_inputs is None else equal_inputs(reference_inputs)
    count = 1 if max(array[0].size for array in given.candidate) >= _ENOUGH else 2
    given, theirs_given = given.batch(0, count), theirs_given.batch(0, count)
    source = TorchSide(reference, theirs_given) if theirs else KerasSide(reference, theirs_given)
    return source, TorchSide(candidate, given) if ours else KerasSide(candidate, given)
