"""Traces a run of the Keras model: keeps every tensor, and puts in the truth where told to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from porting.models.observe import Replacement
from porting.parity.content import (
    SAME,
    Library,
    Match,
    Place,
    as_real,
)
from porting.parity.measure import rms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Node:
    """A call of a Keras layer: its inputs, its outputs and the calls inside it."""

    name: str
    parent: Node | None
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    began: int = 0


@dataclass(frozen=True)
class Gap:
    """A wrong tensor that no layer made: an input of `node`, or the result `key` if `node` is None."""

    node: Node | None
    index: int
    key: str = ""


# The axes of a map, with that of the samples, whose orders behind a Flatten are tried.
_MOST_SIDES = 5


class Tracer:
    """Keeps every tensor of a Keras run, and puts in the truth at the places in `fixes`."""

    watches_inputs = True

    def __init__(
        self,
        library: Library,
        fixes: dict[Place, Tensor],
        tolerance: float,
        in_code: Library,
        inside_float32: Callable[[Library, str, Sequence[Tensor], Tensor], tuple[list[Match], bool]],
    ) -> None:
        self.library, self.fixes, self.tolerance, self._in_code = library, fixes, tolerance, in_code
        self._inside_float32 = inside_float32
        # Set once a tensor is nearly right: what differs after it need not be the rounding of float32.
        self.is_doubtful = False
        self.nodes: list[Node] = []
        # The PyTorch call for a Keras call of a module that runs several times.
        self.same_calls: dict[tuple[str, str], str] = {}
        self._stack: list[Node] = []
        self._producers: dict[int, Node] = {}
        self._exact: dict[int, tuple[Tensor, Match | None, bool]] = {}
        # Tensors that were put in or assumed are right at any tolerance.
        self._given: set[int] = set()
        # Keeps all tensors alive: freed memory goes to another tensor, which would be taken for the first.
        self._alive: list[Tensor] = []

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self._alive += inputs
        parent = self._stack[-1] if self._stack else None
        node = Node(name, parent, list(inputs), began=len(self.nodes))
        self._stack.append(node)
        return self._fixed(name, False, node.inputs)

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        node = self._stack.pop()
        self._alive += outputs
        node.outputs = list(outputs)
        self.nodes.append(node)
        if node.parent is not None:
            node.parent.children.append(node)
        for output in outputs:
            self._producers.setdefault(key_of(output), node)
        replaced = self._fixed(name, True, node.outputs)
        if replaced is not None:
            return replaced
        inside = [self._inside(name, node.inputs, output) for output in outputs]
        for index, each in enumerate(inside):
            if each is not None:
                node.outputs[index] = each
        return inside if any(each is not None for each in inside) else None

    def _fixed(self, name: str, is_output: bool, tensors: list[Tensor]) -> Replacement:
        found = [self.fixes.get((name, is_output, index)) for index in range(len(tensors))]
        if all(each is None for each in found):
            return None
        for index, each in enumerate(found):
            if each is not None:
                tensors[index] = each
                self._give(each, None)
        return found

    def _inside(self, name: str, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
        """The truth to put in place of a result that was computed in float32; None if it was not."""
        if self.is_exact(output):
            return None
        inside, has_mistake = self._inside_float32(self.library, name, inputs, output)
        self.is_doubtful |= has_mistake
        if self.is_doubtful or not inside:
            return None
        expected = inside[0].expected(as_real(output)).contiguous()
        self._give(expected, inside[0])
        return expected

    def refine(self, tolerance: float) -> None:
        """Use a finer tolerance from now on, and forget the answers that the library gave with the coarser one."""
        if tolerance < self.tolerance:
            self.tolerance = tolerance
            self._exact = {key: each for key, each in self._exact.items() if key in self._given}

    def assume(self, tensor: Tensor) -> None:
        """Treat a tensor as right when nothing is known about it."""
        self._give(tensor, None)

    def _give(self, tensor: Tensor, match: Match | None) -> None:
        self._exact[key_of(tensor)] = tensor, match, True
        self._given.add(key_of(tensor))

    def producer(self, tensor: Tensor) -> Node | None:
        return self._producers.get(key_of(tensor))

    def match(self, tensor: Tensor) -> Match | None:
        self.is_exact(tensor)
        return self._exact[key_of(tensor)][1]

    def is_exact(self, tensor: Tensor) -> bool:
        """Whether the PyTorch model has this tensor, or one that contains it. Always True for a single number."""
        key = key_of(tensor)
        if key not in self._exact:
            actual = as_real(tensor)
            matches = self.library.find(actual, self.tolerance) if actual.numel() > 1 else []
            matches = [each for each in matches if not each.reordered or self._may_be_flattened(tensor, each)]
            exact = (
                actual.numel() < 2
                or bool(matches)
                or self.library.find_part(actual) is not None
                or bool(self._in_code.find(actual, self.tolerance))
            )
            self._exact[key] = tensor, next(iter(matches), None), exact
        return self._exact[key][2]

    def map_before(self, tensor: Tensor) -> Tensor | None:
        """The map that a Flatten made into this tensor; None if no layer did so."""
        producer = self.producer(tensor)
        if producer is None or tensor.ndim != 2:
            return None
        # A Flatten does not move the numbers, so the layer before it counts as what made them.
        near = [*producer.outputs, *(producer.inputs if len(producer.inputs) == 1 and not producer.children else ())]
        return next((each for each in near if each.ndim > 2 and each.numel() == tensor.numel()), None)

    def _may_be_flattened(self, tensor: Tensor, match: Match) -> bool:
        """Whether a Flatten of a Keras map, maybe of this tensor, may give PyTorch's order.

        True if there is no map, unless a layer made the tensor from others that are in PyTorch's order.
        """
        given = self._map_of(tensor)
        if given is not None:
            return self._is_order_of(as_real(given), match.truth.tensor)
        producer = self.producer(tensor)
        if producer is None or not producer.inputs:
            return True
        near = [*producer.inputs, *(output for child in producer.children for output in child.outputs)]
        if any(each.ndim > 2 or key_of(each) == key_of(tensor) for each in near):
            return True
        return any((found := self.match(each)) is None or found.reordered for each in producer.inputs)

    def is_flattened(self, tensor: Tensor, truth: Tensor) -> bool:
        """Whether two tensors have the numbers of one map, with its axes in different orders."""
        given = self._map_of(tensor)
        if given is not None:
            return self._is_order_of(as_real(given), truth)
        return any(self._is_order_of(each, as_real(tensor)) for each in self.library.maps_in_order(truth))

    def _map_of(self, tensor: Tensor) -> Tensor | None:
        given = tensor if tensor.ndim > 2 else self.map_before(tensor)
        return None if given is None or given.ndim > _MOST_SIDES else given

    def _is_order_of(self, given: Tensor, flat: Tensor) -> bool:
        """Whether a map, with its axes in some order, has the numbers of another tensor in their order."""
        if len(given) != len(flat):
            return True
        limit = max(self.tolerance, SAME) * rms(flat)
        return any(
            rms(given.permute(0, *axes).reshape(flat.shape) - flat) <= limit
            for axes in itertools.permutations(range(1, given.ndim))
        )


def key_of(tensor: Tensor) -> int:
    """Identify a tensor by its memory, since Keras tensors are converted without a copy."""
    return int(tensor.data_ptr()) or id(tensor)
