"""State that the passes of one check share: the models, their inputs, and the pairs of tensors found so far."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.call_names import without_number
from porting.kinds import becomes, kind_of_layer
from porting.kinds.base import Kind
from porting.kinds.transforms import Array
from porting.models.clamps import Bound, watching_clamps
from porting.models.float64 import collecting_constants, in_float64, is_double
from porting.models.frameworks import return_free_memory
from porting.models.inputs import Axes, Inputs
from porting.models.keras_float64 import Float64Model
from porting.models.stacks import modules_of
from porting.models.traverse import named_layers
from porting.parity.bits import Bits
from porting.parity.code import tensors_of_code
from porting.parity.content import Library, Match, Place, Truth, as_real, computes_in_float32, is_result
from porting.parity.derived import rounds_to
from porting.parity.measure import DifferenceSum, DistanceSum
from porting.parity.pairing import Names
from porting.parity.record import Recording, record
from porting.parity.report import (
    EXACT,
    FLOAT32,
    FLOAT32_ROUNDOFF,
    FLOAT64_ROUNDOFF,
    LayerComparison,
    View,
)
from porting.parity.rounded_weights import differs_as_rounded

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

# Scales an error of float32 to the same error in float64.
_FINER = FLOAT64_ROUNDOFF / FLOAT32_ROUNDOFF


@dataclass
class Sums:
    """The sums of one view of a pair over all batches."""

    scale: DistanceSum = field(default_factory=DistanceSum)
    expected_error: DistanceSum = field(default_factory=DistanceSum)
    actual_error: DistanceSum = field(default_factory=DistanceSum)
    problem: str = ""


@dataclass
class Pair:
    """A Keras tensor and the PyTorch tensor that it equals, which `place` identifies.

    `order` is its place in PyTorch's order of execution. `named` means that the two pair by name only, and their
    numbers differ. `is_whole` means that they have no fractions. `axes` are PyTorch's axes in Keras's order, found by
    content.
    """

    target: str
    index: int
    source: str
    place: Place
    order: float
    named: bool = False
    in_float32: bool = False
    reordered: bool = False
    is_whole: bool = False
    axes: Axes | None = None
    exact: Sums = field(default_factory=Sums)
    float32: Sums = field(default_factory=Sums)
    difference: DifferenceSum = field(default_factory=DifferenceSum)
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    measured: bool = False

    def truth(self, recording: Recording) -> Truth | None:
        """The PyTorch tensor in this recording; None if it has none at that place."""
        call, is_output, index = self.place
        if is_result(self.place):
            return recording.outputs.get(call.removeprefix("."))
        found = recording.calls.get(call)
        tensors = [] if found is None else found.outputs if is_output else found.inputs
        return tensors[index] if index < len(tensors) else None

    def total(self, kinds: Mapping[str, str], *, exact: bool) -> LayerComparison:
        views = {}
        if exact:
            # A layer that computes in float32 internally is judged by the rounding of float32.
            finer = 1.0 if self.in_float32 else _FINER
            noise = self.exact.expected_error.total()
            unit = replace(noise, max=noise.max * finer, rms=noise.rms * finer)
            roundoff = FLOAT32_ROUNDOFF if self.in_float32 else FLOAT64_ROUNDOFF
            distance = self.exact.actual_error.total()
            views[EXACT] = View(self.exact.scale.total(), unit, distance, self.exact.problem, 0.0, roundoff)
        if self.measured or self.float32.problem:
            sums = self.float32
            views[FLOAT32] = View(
                sums.scale.total(), sums.expected_error.total(), sums.actual_error.total(), sums.problem
            )
        kind = kinds.get(without_number(self.place[0]), "output")
        source = self.source
        return LayerComparison(
            source,
            self.target,
            kind,
            self.shape,
            "float32",
            self.dtype,
            views,
            self.difference.total(),
            is_output=is_result(self.place),
        )


Found = tuple[dict[tuple[str, int], Pair], dict[str, Pair], dict[str, None], set[Any], dict[str, str], dict[str, None]]


class Session:
    """Two models, their inputs, and what the passes over all batches have measured."""

    def __init__(
        self,
        reference: nn.Module,
        candidate: keras.Model,
        inputs: Inputs,
        names: Names,
        output_axes: Mapping[str, Axes],
        float64: Float64Model,
        rounded: nn.Module,
        *,
        large: bool,
    ) -> None:
        self.reference, self.candidate, self.inputs, self.names = reference, candidate, inputs, names
        self.output_axes, self.float64, self.rounded = output_axes, float64, rounded
        self.is_large = large  # copies in float64 would take too much memory
        self.truth_model = reference if large else in_float64(reference)
        self.modules = modules_of(reference)
        self.pairs: dict[tuple[str, int], Pair] = {}
        self.results: dict[str, Pair] = {}
        self.lone: dict[str, None] = {}
        self.called: dict[str, None] = {}
        self.unseen: dict[str, None] = {}
        self.written: dict[str, str] = {}
        self.notes: dict[str, None] = {}
        self.caveats: dict[str, None] = {}
        self.logits: list[tuple[Array, Array]] = []
        self.halved: list[Array] = []
        self.bits = Bits()
        self._result_keys: list[str] = []
        # The numbers of samples that the models have run with.
        self.sizes: set[int] = set()
        # Weights that a port may have derived, such as folded norms, with exact numbers.
        self.derived: list[Array] = []
        # What PyTorch's code makes of its own numbers, in float64. Keras may hold it in float32.
        self.created: list[Array] = []
        # Where PyTorch's code clamps numbers, and which of these bounds were reached.
        self.bounds: dict[Bound, None] = {}
        self.reached: set[Bound] = set()
        # Whether results of Keras's layers, which are computed in float32, are replaced by exact ones.
        self.replaces_results = False
        # Whether float32 was followed in one of the passes, as far as the backend allows.
        self.was_followed = False
        # Whether no result has fractions, so that most mistakes do not show.
        self.has_whole_results = True
        self.used: set[Place] = set()
        # The layers whose weights a port computed, known once a pass has shown differences as small as rounding, and
        # whether one of them has such differences.
        self.computed: set[str] = set()
        self.has_rounded_weights = False

    def found(self) -> Found:
        """What the passes have found so far, to return to it if a pass has to be made again."""
        return (
            dict(self.pairs),
            dict(self.results),
            dict(self.lone),
            set(self.used),
            dict(self.written),
            dict(self.notes),
        )

    def forget(self, before: Found) -> None:
        """Return to what was found before a pass. The pass must have been the first to measure anything."""
        pairs, results, lone, used, written, notes = before
        self.pairs, self.results, self.lone = dict(pairs), dict(results), dict(lone)
        self.used, self.written, self.notes = set(used), dict(written), dict(notes)
        self.has_whole_results = True
        self.has_rounded_weights = False

    @property
    def is_plain(self) -> bool:
        """Whether all results of Keras's layers stay as they are, so that the model need not wait for comparisons."""
        return not (self.replaces_results or self.computed) and self.float64.trace is None

    @property
    def double_model(self) -> nn.Module:
        """The truth model with weights in float64, which a large one gets only when they are needed."""
        if not is_double(self.truth_model):
            self.truth_model = in_float64(self.truth_model)
        return self.truth_model

    @contextlib.contextmanager
    def overwritten(self) -> Iterator[nn.Module]:
        """A truth model whose weights the caller may overwrite. A large one stays in float32."""
        if not self.is_large:
            try:
                yield self.truth_model
            finally:
                self.truth_model.load_state_dict(self.reference.state_dict())
                self.truth_model.eval()
            return
        return_free_memory()
        self.truth_model = copy.deepcopy(self.reference).float()
        try:
            yield self.truth_model
        finally:
            self.truth_model = self.reference

    def record_truth(self, batch: Inputs) -> Recording:
        import torch

        def run(model: nn.Module) -> Any:
            return batch.call_reference(model, torch.float64)

        try:
            with collecting_constants() as created, self.noting_clamps():
                recording = record(self.truth_model, run)
            self.created = self.created or [tensor.numpy() for tensor in created]
        except Exception:
            if is_double(self.truth_model):
                raise
            # Its code may write into its tensors, or may be compiled in part: then it needs a copy all the same.
            self.is_large = False
            recording = record(self.double_model, run)
        self._result_keys = list(recording.outputs)
        self.sizes.add(len(batch))
        return recording

    @contextlib.contextmanager
    def noting_clamps(self) -> Iterator[None]:
        """Note which bounds the code of PyTorch clamps at in this context, and which of them were reached."""
        with watching_clamps() as found:
            yield
        self.bounds |= found.bounds
        self.reached |= found.reached

    def tensors_of_code(self, inputs: Inputs, recording: Recording) -> list[Tensor]:
        """What PyTorch computes in its code for these inputs, and shows to no module; nothing for a large model."""
        return [] if self.is_large else tensors_of_code(self.truth_model, inputs, recording.truths)

    def few(self, count: int) -> Inputs:
        """The first `count` samples, or as many as have run if a model takes only batches of a fixed size."""
        import torch

        some = self.inputs.batch(0, count)
        if len(some) in self.sizes:
            return some
        if any(
            tensor.shape and tensor.shape[0] is not None for tensor in getattr(self.candidate, "inputs", None) or ()
        ):
            return self.inputs.batch(0, min(self.sizes, default=len(self.inputs)))  # Keras takes such batches alone
        try:
            with torch.no_grad():
                some.call_reference(self.truth_model, torch.float64)
        except Exception:  # an exported model may have a guard on the size
            return self.inputs
        return some

    @contextlib.contextmanager
    def as_precise_as_reference(self) -> Iterator[None]:
        """Give the Keras model, in this context, the half-precision weights of the reference that its own round to."""
        held = []
        for variable in self.candidate.weights if self.halved else ():
            values = np.array(variable)
            other = rounds_to(values.astype(np.float64), self.halved)
            if other is not None:
                held.append((variable, values))
                variable.assign(other.astype(np.float32))
        try:
            yield
        finally:
            for variable, values in held:
                variable.assign(values)

    def computes_in_float32(self, output: Tensor, match: Match) -> bool:
        """Whether a tensor was computed in float32 internally, so that only a loose match is possible."""
        trace = self.float64.trace
        return computes_in_float32(output, match) or (trace is not None and trace.has(output) and not match.reordered)

    def inside_float32(
        self, library: Library, name: str, inputs: Sequence[Tensor], output: Tensor
    ) -> tuple[list[Match], bool]:
        """What the result of a layer equals up to the rounding of float32, if something rounds in it, or its weights.

        Also whether it has a mistake instead: then what differs after it need not be rounding either.
        """
        near = library.find_near(as_real(output))
        inside = [
            replace(each, in_float32=True)
            for each in near
            if self.computes_in_float32(output, each) or self._has_rounded_weights(library, name, inputs, output, each)
        ]
        return inside, not inside and self._is_nearly_right(name, output, near)

    def _has_rounded_weights(
        self, library: Library, name: str, inputs: Sequence[Tensor], output: Tensor, match: Match
    ) -> bool:
        """Whether a layer with weights that the port computed gives PyTorch's tensor up to their rounding.

        What it takes must be PyTorch's: otherwise its own rounding would hide a mistake before it.
        """
        if without_number(name) not in self.computed or match.reordered:
            return False
        layer = named_layers(self.float64.model).get(without_number(name))
        actual = as_real(output)
        if layer is None or not all(library.find(as_real(each)) for each in inputs):
            return False
        if not differs_as_rounded(layer, inputs, actual, match.expected(actual)):
            return False
        self.has_rounded_weights = True
        self.notes[f"{name} computes with numbers that the port rounded to float32, and PyTorch does not hold"] = None
        return True

    def _is_nearly_right(self, name: str, output: Tensor, near: Sequence[Match]) -> bool:
        """Whether a layer gives nearly PyTorch's tensor where nothing rounds in float32, so that it has a mistake.

        A layer without weights may have its reasons, such as a small number that it adds before a root.
        """
        trace = self.float64.trace
        if (trace is not None and trace.has(output)) or all(each.reordered for each in near):
            return False
        layer = self.layer(name)
        partners = (place[0] for each in near for place in each.truth.places if place[1])
        return bool(getattr(layer, "weights", None)) or any(self.kind_matches(call, name) for call in partners)

    def library(self, recording: Recording, others: Sequence[Tensor] = ()) -> Library:
        """All tensors of a run, and others that are no module's."""
        ranks = {each.ndim for each in (*(truth.tensor for truth in recording.truths), *others)}
        truths = [*recording.truths, *(Truth(tensor.double()) for tensor in others)]
        return Library(truths, {rank: self.inputs.output_axes(rank) for rank in ranks})

    def axes_of_result(self, key: str, rank: int) -> Axes:
        """PyTorch's axes in Keras's order for a result: as the caller stated, or by convention."""
        stated = self.output_axes.get(key)
        if stated is None and key in self._result_keys:  # the axes of a list are those of the results in order
            stated = self.output_axes.get(f"[{self._result_keys.index(key)}]")
        return self.inputs.output_axes(rank) if stated is None else stated

    def axes_in_keras(self, expected: Tensor, actual: Tensor) -> Axes | None:
        """PyTorch's axes in Keras's order: the first order that fits the shape, beginning with the convention.

        None if the two tensors have different numbers of elements.
        """
        return next(iter(self.orders_in_keras(expected, actual)), None)

    def orders_in_keras(self, expected: Tensor, actual: Tensor) -> list[Axes]:
        """All orders that fit the shape, as in `axes_in_keras`; the convention's if none does."""
        rank = expected.ndim
        if expected.numel() != actual.numel():
            return []
        same = tuple(range(rank))
        orders = dict.fromkeys((self.inputs.output_axes(rank), same, (0, *range(2, rank), 1) if rank > 2 else same))
        fitting = [axes for axes in orders if tuple(expected.shape[axis] for axis in axes) == tuple(actual.shape)]
        return fitting or [self.inputs.output_axes(rank)]

    def kind_matches(self, call: str, layer_name: str) -> bool:
        module, layer = self.modules.get(without_number(call)), self.layer(layer_name)
        return module is not None and layer is not None and becomes(module, layer)

    @property
    def layer_of_module(self) -> dict[str, str]:
        """The Keras layer whose result pairs with that of a module, by the module's name."""
        return {
            without_number(pair.place[0]): without_number(pair.target)
            for pair in self.pairs.values()
            if pair.place[1] and pair.index == 0
        }

    def layer(self, name: str) -> Any:
        """The Keras layer of a call; None if the model has no such layer."""
        return self.names.layers.get(without_number(name))

    def layer_kind(self, name: str) -> Kind | None:
        layer = self.layer(name)
        return None if layer is None else kind_of_layer(layer)
