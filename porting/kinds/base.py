"""What the engine asks of a kind of layer, and how a kind makes its known mistakes on purpose."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError
from porting.kinds.transforms import IDENTITY, Transform

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

    # What a module gives: one tensor or several; None where a mistake cannot be made.
    Made = Tensor | tuple[Tensor, ...] | None

Settings = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """A tensor of a kind, or several that go together: last names in PyTorch and in Keras, and how they move.

    "" stands for the row's own name. `default` is what it holds where one side lacks it, such as 0 for a bias; None
    where that cannot be.
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
    """A porting mistake: `cause` in plain words, and `make`, which computes what PyTorch would give with it.

    `make` returns all tensors where a module gives several, None where the mistake cannot be made with these shapes.
    """

    cause: str
    make: Callable[[], Made]


class Kind:
    """What is known of one kind of layer. A subclass overrides what applies to it.

    `leaves` are its tensors and `drops` the last names of those that Keras does not keep. A setting in
    `training_settings` changes nothing at inference.
    """

    name: str
    leaves: tuple[Leaf, ...] = ()
    drops: tuple[str, ...] = ()
    training_settings: frozenset[str] = frozenset()

    def with_details(self, details: str) -> Kind:
        """The kind as a row states it further; raises KeyMapError where there is nothing to state, or not so."""
        raise KeyMapError(f"the kind {self.name} takes no details: got {details!r}")

    def is_module(self, module: nn.Module) -> bool:
        """Whether a PyTorch module is of this kind."""
        return False

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        """Whether a Keras layer is of this kind."""
        return False

    def leaves_for(self, module: nn.Module) -> tuple[Leaf, ...]:
        """The leaves that one module may have; several may have the same tensors, for layers written otherwise."""
        return self.leaves

    def variables(self, layer: keras.layers.Layer) -> dict[str, keras.Variable]:
        """The variables of a layer of this kind by the last names in `leaves`; without those that it does not have."""
        names = (name for leaf in self.leaves for name in leaf.targets)
        found = {name: attribute(layer, name) for name in names if name}
        return {name: variable for name, variable in found.items() if hasattr(variable, "assign")}

    def module_settings(self, module: nn.Module) -> Settings:
        """What a module of this kind is set to, under PyTorch's names."""
        return {}

    def layer_settings(self, layer: keras.layers.Layer) -> Settings:
        """What a layer of this kind is set to, under PyTorch's names and in PyTorch's conventions."""
        return {}

    def fused_settings(self, layer: keras.layers.Layer) -> Settings:
        """What a layer of another kind is set to in this kind's sense, where it has one fused into it."""
        return {}

    def advice(self, setting: str, expected: Any) -> str:
        """What to set in Keras, where its convention is another."""
        return ""

    def mistakes(self, module: nn.Module, inputs: list[Tensor]) -> Iterator[Mistake]:
        """Known porting mistakes of this kind, made on what `module` took, the specific before the general."""
        return iter(())


def attribute(owner: Any, name: str) -> Any:
    """An attribute of an attribute, `/` or `.` between them; None where there is none."""
    for part in name.replace("/", ".").split("."):
        owner = getattr(owner, part, None)
    return owner


def with_change(module: nn.Module, inputs: list[Tensor], change: Callable[[Any], object]) -> Callable[[], Made]:
    """The module's float64 result after one change to a copy of it; all tensors of it where it is no single one."""

    def make() -> Made:
        import torch

        changed = copy.deepcopy(module).double().eval()
        with torch.no_grad():
            try:
                change(changed)
                result = changed(*[in_double(tensor) for tensor in inputs])
            except (RuntimeError, ValueError, TypeError, AttributeError):
                return None  # the mistake cannot be made with these shapes
        return result if isinstance(result, torch.Tensor) else _tensors(result)

    return make


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors in what a module gives, such as a recurrent layer's sequence and states."""
    import torch

    if isinstance(result, torch.Tensor):
        return (result,)
    inner = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return tuple(tensor for each in inner for tensor in _tensors(each))


def with_value(module: nn.Module, inputs: list[Tensor], name: str, value: Callable[[Any], Any]) -> Callable[[], Made]:
    """The module's float64 result with another value for one tensor or attribute."""

    def change(changed: Any) -> None:
        new = value(changed)
        current = getattr(changed, name)
        if hasattr(current, "data") and hasattr(new, "shape"):
            current.data = new
        else:
            setattr(changed, name, new)

    return with_change(module, inputs, change)


def in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
