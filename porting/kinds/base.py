"""The interface of a kind of layer, and helpers that reproduce its known porting mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError
from porting.kinds.transforms import IDENTITY, Transform

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

    # A module's result: one tensor or several. None when a mistake cannot be made.
    Made = Tensor | tuple[Tensor, ...] | None

Settings = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One tensor of a kind, or several that are converted together.

    `source` and `target` are the last parts of the names in PyTorch and in Keras; "" stands for the row's own name.
    `default` is the value to assume when one side has no such tensor, such as 0 for a bias; None when there is no such
    value.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    transform: Transform = IDENTITY
    default: float | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclass(frozen=True)
class Mistake:
    """A known porting mistake: `cause` describes it, and `make` computes PyTorch's result with the mistake made.

    `make` returns all tensors of a module with several results, and None when the mistake cannot be made with these
    shapes.
    """

    cause: str
    make: Callable[[], Made]


class Kind:
    """One kind of layer: its tensors, settings and known mistakes. A subclass overrides what applies to it.

    `leaves` are the tensors. `drops` are the last names of PyTorch tensors that Keras does not keep.
    `training_settings` names the settings that have no effect at inference. `fills` is the kind of the Keras layers
    that modules of this kind become, if it is another one.
    """

    name: str
    fills: str = ""
    leaves: tuple[Leaf, ...] = ()
    drops: tuple[str, ...] = ()
    # Whether rows of this kind have a layer or a variable in Keras.
    has_target = True
    training_settings: frozenset[str] = frozenset()

    def with_details(self, details: str) -> Kind:
        """Return the kind with the details that a row gives after the colon, such as `512x7x7` in `dense:512x7x7`.

        Raises KeyMapError when the kind takes no details or these are invalid.
        """
        raise KeyMapError(f"the kind {self.name} takes no details: got {details!r}")

    def is_module(self, module: nn.Module) -> bool:
        """Whether a PyTorch module is of this kind."""
        return False

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        """Whether a Keras layer is of this kind."""
        return False

    def leaves_for(self, module: nn.Module) -> tuple[Leaf, ...]:
        """The leaves of one module. Several may name the same tensor, for different Keras layers."""
        return self.leaves

    def variables(self, layer: keras.layers.Layer) -> dict[str, keras.Variable]:
        """The variables of a layer of this kind, by the target names in `leaves`. Missing variables are left out."""
        names = (name for leaf in self.leaves for name in leaf.targets)
        found = {name: attribute(layer, name) for name in names if name}
        return {name: variable for name, variable in found.items() if hasattr(variable, "assign")}

    def module_settings(self, module: nn.Module) -> Settings:
        """The settings of a module of this kind, under PyTorch's names."""
        return {}

    def layer_settings(self, layer: keras.layers.Layer) -> Settings:
        """The settings of a layer of this kind, under PyTorch's names and in PyTorch's conventions."""
        return {}

    def fused_settings(self, layer: keras.layers.Layer) -> Settings:
        """This kind's settings in a layer of another kind that has it fused in, such as a Dense with an activation."""
        return {}

    def in_keras(self, setting: str, value: Any) -> str:
        """How Keras states the value of a setting if its convention differs from PyTorch's; "" if it does not."""
        return ""

    def advice(self, setting: str, expected: Any) -> str:
        """What to set in Keras when its convention differs from PyTorch's; "" when it does not."""
        stated = self.in_keras(setting, expected)
        return f"set {stated} in Keras" if stated else ""

    def mistakes(self, module: nn.Module, inputs: list[Tensor]) -> Iterator[Mistake]:
        """Known porting mistakes of this kind, made on the inputs that `module` took. Specific ones come first."""
        return iter(())


def attribute(owner: Any, name: str) -> Any:
    """Look up a nested attribute by a name with `/` or `.` between the parts; None when a part is missing."""
    for part in name.replace("/", ".").split("."):
        owner = getattr(owner, part, None)
    return owner


class CallInputs(list[Any]):
    """The tensors that a call of a module took, and how it took them.

    `fill` makes positional and keyword arguments of as many tensors. `keywords` are the names of those that have one,
    "" for others.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        fill: Callable[[Iterator[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        keywords: Sequence[str] = (),
    ) -> None:
        super().__init__(tensors)
        self.fill, self.keywords = fill, tuple(keywords)

    def with_other(self, tensors: Iterable[Tensor]) -> CallInputs:
        """Take other tensors in the same way."""
        return CallInputs(tensors, self.fill, self.keywords)

    def without(self, *keywords: str) -> CallInputs:
        """Leave out what the call took by these names."""
        fill = self.fill
        assert fill is not None  # it has keywords

        def filled(tensors: Iterator[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments, named = fill(tensors)
            left_out = {name: False if isinstance(named[name], bool) else None for name in keywords if name in named}
            return arguments, named | left_out

        return CallInputs(self, filled, self.keywords)

    def change(self, keyword: str, change: Callable[[Tensor], Tensor]) -> CallInputs:
        """Change the tensor that the call took by this name."""
        pairs = zip(self, self.keywords, strict=True)
        return self.with_other(change(tensor) if name == keyword else tensor for tensor, name in pairs)


def call(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Call a module in float64 as a recorded call did; with tensors alone, by their places."""
    doubles = [in_double(tensor) for tensor in inputs]
    if not isinstance(inputs, CallInputs) or inputs.fill is None:
        return module(*doubles)
    arguments, named = inputs.fill(iter(doubles))
    return module(*arguments, **named)


def with_change(module: nn.Module, inputs: list[Tensor], change: Callable[[Any], object]) -> Callable[[], Made]:
    """Return a function that computes the float64 result of a copy of the module after one change.

    The function returns one tensor, or all tensors of a result that is not a single tensor. It returns None when the
    change is not possible with these shapes.
    """

    def make() -> Made:
        import torch

        changed = copy.deepcopy(module).double().eval()
        with torch.no_grad():
            try:
                change(changed)
                result = call(changed, inputs)
            except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError):
                return None  # the mistake cannot be made with these shapes
        return result if isinstance(result, torch.Tensor) else _tensors(result)

    return make


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors in a module's result, such as the sequence and states of a recurrent layer."""
    import torch

    if isinstance(result, torch.Tensor):
        return (result,)
    inner = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return tuple(tensor for each in inner for tensor in _tensors(each))


def same_pads(sides: Iterable[int], reaches: Iterable[int], strides: Iterable[int]) -> list[int]:
    """What TensorFlow's "same" pads in front and behind for windows of these reaches, the last axis first."""
    pads: list[int] = []
    for side, reach, stride in zip(sides, reaches, strides, strict=True):
        total = max((-(-side // stride) - 1) * stride + reach - side, 0)
        pads = [total // 2, total - total // 2, *pads]
    return pads


def with_value(module: nn.Module, inputs: list[Tensor], name: str, value: Callable[[Any], Any]) -> Callable[[], Made]:
    """Like `with_change`, where the change gives one tensor or attribute the value that `value` computes."""

    def change(changed: Any) -> None:
        new = value(changed)
        current = getattr(changed, name)
        if hasattr(current, "data") and hasattr(new, "shape"):
            current.data = new
        else:
            setattr(changed, name, new)

    return with_change(module, inputs, change)


def with_forward(module: nn.Module, inputs: list[Tensor], forward: Callable[..., Any]) -> Callable[[], Made]:
    """Like `with_change`, where `forward`, which gets the module and its inputs, computes the result."""
    return with_change(module, inputs, lambda changed: setattr(changed, "forward", partial(forward, changed)))


def in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
