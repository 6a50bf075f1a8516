"""Runs two models and compares them: the check of any two. What the results mean is in `porting.parity.report`.

Each batch goes through four passes. PyTorch in float64 is kept: it is the truth. Keras in float64 is compared with it,
tensor by tensor, paired by content. PyTorch in float32 says what rounding does, and Keras in float32 whether it rounds
about as well. Only where the outputs differ does anything else run: see `porting.parity.locate`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_of_layer, kind_of_module
from porting.kinds.transforms import Array
from porting.mapping.key_map import KeyMap
from porting.models.float64 import in_float64
from porting.models.inputs import Axes, Inputs, leaves_by_key, make_inputs
from porting.models.keras_float64 import Float64Model
from porting.models.observe import Replacement, observe_layers, observe_modules, to_torch
from porting.models.precision import in_precision
from porting.models.synthetic import fill_with_synthetic_weights
from porting.models.traverse import named_layers, named_variables, owned_variables
from porting.parity.content import SAME, SAME_IN_FLOAT32, Library, Match, Truth, as_real, computes_in_float32
from porting.parity.derived import derived_weights, halved_weights, has_derived, in_all_orders, rounds_to, substitutes
from porting.parity.locate import locate
from porting.parity.measure import DifferenceSum, DistanceSum
from porting.parity.pairing import Names, refuse_unknown_layers
from porting.parity.record import NoiseObserver, Recording, kinds_of, output_name, record
from porting.parity.report import (
    EXACT,
    FEW_ELEMENTS,
    FLOAT32,
    FLOAT32_ROUNDOFF,
    FLOAT64_ROUNDOFF,
    OUTPUT,
    Culprit,
    Diagnosis,
    LayerComparison,
    Limits,
    LogitsComparison,
    Loud,
    ParityReport,
    Verified,
    View,
)
from porting.parity.results import pair_results
from porting.parity.settings import compare_settings
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

# So many of them tell a small tensor what rounding has come to.
_LAYERS_BEFORE = 16
# What float64 makes of an error that float32 makes.
_FINER = FLOAT64_ROUNDOFF / FLOAT32_ROUNDOFF
# On loud weights and inputs rounding grows too; a mistake that they are for is above a hundredth.
LOUD_LIMIT = 1e-9
LOUD_INPUTS = 16.0
MAX_CULPRITS = 10


@dataclass
class _Sums:
    """One view of a pair, summed up over batches."""

    scale: DistanceSum = field(default_factory=DistanceSum)
    expected_error: DistanceSum = field(default_factory=DistanceSum)
    actual_error: DistanceSum = field(default_factory=DistanceSum)
    problem: str = ""


@dataclass
class Pair:
    """A Keras tensor and the PyTorch tensor that it is, by the place where that stands.

    `order` is PyTorch's order of execution. `named` is whether only the names say so: the numbers differ.
    """

    target: str
    index: int
    source: str
    place: tuple[str, bool, int]
    order: float
    named: bool = False
    in_float32: bool = False
    reordered: bool = False
    exact: _Sums = field(default_factory=_Sums)
    float32: _Sums = field(default_factory=_Sums)
    difference: DifferenceSum = field(default_factory=DifferenceSum)
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    measured: bool = False

    def truth(self, recording: Recording) -> Truth | None:
        """The tensor at its place in this recording."""
        call, is_output, index = self.place
        if call.partition("[")[0] == OUTPUT and call not in recording.calls:
            return next((each for key, each in recording.outputs.items() if output_name(key) == call), None)
        found = recording.calls.get(call)
        tensors = [] if found is None else found.outputs if is_output else found.inputs
        return tensors[index] if index < len(tensors) else None

    def total(self, kinds: Mapping[str, str], *, exact: bool) -> LayerComparison:
        views = {}
        if exact:
            # A layer that computes in float32 inside is judged by float32's rounding.
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
        kind = kinds.get(self.place[0].partition("#")[0], "output")
        source = self.source
        return LayerComparison(
            source, self.target, kind, self.shape, "float32", self.dtype, views, self.difference.total()
        )


class Session:
    """Two models, their inputs, and what the passes over all batches have shown."""

    def __init__(
        self,
        reference: nn.Module,
        candidate: keras.Model,
        inputs: Inputs,
        names: Names,
        output_axes: Mapping[str, Axes],
        float64: Float64Model,
        rounded: nn.Module,
    ) -> None:
        self.reference, self.candidate, self.inputs, self.names = reference, candidate, inputs, names
        self.output_axes, self.float64, self.rounded = output_axes, float64, rounded
        self.truth_model = in_float64(reference)
        self.modules = dict(reference.named_modules())
        self.pairs: dict[tuple[str, int], Pair] = {}
        self.results: dict[str, Pair] = {}
        self.lone: dict[str, None] = {}
        self.called: dict[str, None] = {}
        self.unseen: dict[str, None] = {}
        self.written: dict[str, str] = {}
        self.notes: dict[str, None] = {}
        self.logits: list[tuple[Array, Array]] = []
        self.halved: list[Array] = []
        self.used: set[tuple[str, bool, int]] = set()

    def record_truth(self, batch: Inputs) -> Recording:
        import torch

        return record(self.truth_model, lambda model: batch.call_reference(model, torch.float64))

    def few(self, count: int) -> Inputs:
        """The first samples; all of them where the PyTorch model takes only batches of a fixed size."""
        import torch

        some = self.inputs.batch(0, count)
        try:
            with torch.no_grad():
                some.call_reference(self.truth_model, torch.float64)
        except Exception:  # an exported model may have a guard on the size
            return self.inputs
        return some

    @contextlib.contextmanager
    def as_precise_as_reference(self) -> Iterator[None]:
        """The Keras model with the weights of a reference in half precision, where its own round to them."""
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

    def library(self, recording: Recording) -> Library:
        ranks = {truth.tensor.ndim for truth in recording.truths}
        return Library(recording.truths, {rank: self.inputs.output_axes(rank) for rank in ranks})

    def axes_of_result(self, key: str, rank: int) -> Axes:
        """PyTorch's axes in Keras's order for a result: as stated, or by the convention."""
        return self.output_axes.get(key, self.inputs.output_axes(rank))

    def kind_matches(self, call: str, layer_name: str) -> bool:
        module = self.modules.get(call.partition("#")[0])
        layer = self.names.layers.get(layer_name.partition("#")[0])
        if module is None or layer is None:
            return False
        kind = kind_of_module(module)
        return kind is not None and kind is kind_of_layer(layer)


class _ExactObserver:
    """Compares every Keras layer in float64 as it runs, and finds the partner of its result by content."""

    watches_inputs = False

    def __init__(self, session: Session, recording: Recording, samples_before: int) -> None:
        self.session, self.recording = session, recording
        self.samples_before = samples_before
        self.library = session.library(recording)
        self.wanted: set[int] = set()
        self.matched: set[int] = set()
        self._known: dict[int, tuple[weakref.ref[Any], list[Match]]] = {}

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        self.session.called[name] = None
        replacements: list[Tensor | None] = [self._compare(name, *pair) for pair in enumerate(outputs)]
        return replacements if any(each is not None for each in replacements) else None

    def _compare(self, name: str, index: int, output: Tensor) -> Tensor | None:
        session, actual = self.session, as_real(output)
        if actual.numel() < 2:
            return None
        pair = session.pairs.get((name, index))
        if pair is not None and not pair.named:
            truth = pair.truth(self.recording)
            found = None if truth is None else self._match(actual, truth, pair)
            if found is not None:
                self._include(pair, found, actual)
                return _steered(found, output) if pair.in_float32 else None
        matches = self._matches(name, index, output, actual)
        if not matches:
            self._without_partner(name, index, actual)
            return None
        place = self._choose(name, index, matches)
        for match in matches:
            self.matched.add(id(match.truth))
        if place is None:
            return _steered(matches[0], output) if matches[0].in_float32 else None
        match = next(match for match in matches if place in match.truth.places)
        if pair is None or pair.named:
            pair = self._new_pair(name, index, place, match)
        self._include(pair, match, actual)
        return _steered(match, output) if match.in_float32 else None

    def _match(self, actual: Tensor, truth: Truth, pair: Pair) -> Match | None:
        tolerance = SAME_IN_FLOAT32 if pair.in_float32 else SAME
        found = self.library.match(actual, truth, tolerance, likely=True)
        if found is None and pair.reordered:
            found = next((each for each in self.library.find(actual) if each.truth is truth), None)
        return found if found is None or not pair.in_float32 else replace(found, in_float32=True)

    def _matches(self, name: str, index: int, output: Tensor, actual: Tensor) -> list[Match]:
        """All partners by content; the one by name, where its content agrees, is enough."""
        known = self._known.get(id(output))
        if known is not None and known[0]() is output:
            return known[1]
        named = self._named_truth(name, index)
        match = None if named is None else self.library.match(actual, named, likely=True)
        matches = [match] if match is not None else self.library.find(actual)
        if not matches:
            # Some layers compute in float32 whatever they are told.
            matches += [
                replace(each, in_float32=True)
                for each in self.library.find(actual, SAME_IN_FLOAT32)
                if computes_in_float32(output, each)
            ]
        self._known[id(output)] = weakref.ref(output), matches
        return matches

    def _named_truth(self, name: str, index: int) -> Truth | None:
        source = self.session.names.source(name, self.recording.calls)
        if source is None:
            return None
        outputs = self.recording.calls[source].outputs
        return outputs[index] if index < len(outputs) else None

    def _choose(self, name: str, index: int, matches: list[Match]) -> tuple[str, bool, int] | None:
        """The place that this tensor stands for: by name, else the first of the same kind that is still free."""
        session = self.session
        source = session.names.source(name, self.recording.calls)
        places = [place for match in matches for place in match.truth.places if place[0].partition("[")[0] != OUTPUT]
        if (source, True, index) in places:
            return source, True, index  # type: ignore[return-value]  # in `places`, so not None
        free = [place for place in places if place not in session.used]
        results = [place for place in free if place[1]]
        own_kind = [place for place in results if session.kind_matches(place[0], name)]
        return next(iter((*own_kind, *results, *free)), None)

    def _new_pair(self, name: str, index: int, place: tuple[str, bool, int], match: Match) -> Pair:
        session, (call, is_output, number) = self.session, place
        label = call if is_output else f"input of {call}"
        source = label if number == 0 else f"{label}[{number}]"
        order = self.recording.order.get(call, len(self.recording.order)) - (0.0 if is_output else 0.5)
        pair = Pair(name, index, source, place, order, in_float32=match.in_float32, reordered=match.reordered)
        session.pairs[name, index] = pair
        session.used.add(place)
        if match.reordered:
            session.written[source] = "the same numbers in another order"
        named = session.names.source(name, self.recording.calls)
        if named is not None and is_output and named != call and index == 0:
            session.notes[f"{name} in Keras gives what {source} gives in PyTorch"] = None
        return pair

    def _without_partner(self, name: str, index: int, actual: Tensor) -> None:
        """By name it may have one all the same: then the difference is measured, and the outputs say what it means."""
        session = self.session
        source = session.names.source(name, self.recording.calls)
        truth = self._named_truth(name, index)
        if source is None or truth is None:
            session.lone[name] = None
            return
        pair = session.pairs.get((name, index))
        if pair is None:
            label = source if index == 0 else f"{source}[{index}]"
            pair = Pair(name, index, label, (source, True, index), self.recording.order[source], named=True)
            session.pairs[name, index] = pair
        expected = _in_shape(truth.tensor, actual, session.inputs)
        pair.shape = tuple(actual.shape)
        self.wanted.add(id(truth))
        if expected is None:
            pair.exact.problem = f"shape {tuple(actual.shape)} for PyTorch's {tuple(truth.tensor.shape)}"
            return
        from porting.parity.measure import measure_candidate

        pair.exact.scale.include(truth.size)
        pair.exact.actual_error.include(measure_candidate(actual, expected, None))

    def _include(self, pair: Pair, match: Match, actual: Tensor) -> None:
        pair.exact.scale.include(match.truth.size)
        pair.exact.actual_error.include(match.distance)
        pair.shape = (self.samples_before + actual.shape[0], *actual.shape[1:]) if actual.ndim else ()
        self.wanted.add(id(match.truth))
        self.matched.add(id(match.truth))

    def results(self, result: Any) -> dict[str, Any]:
        """Compares the model's own results; axes lie as the convention says, never as they fit."""
        from porting.parity.measure import measure_candidate

        session = self.session
        found = {key: to_torch(leaf) for key, leaf in leaves_by_key(result).items()}
        partners, notes = pair_results(self.recording.outputs, found)
        session.notes.update(dict.fromkeys(notes))
        for theirs, ours in partners.items():
            truth, actual = self.recording.outputs[theirs], as_real(found[ours])
            source = output_name(theirs)
            pair = session.results.get(theirs)
            if pair is None:
                target = output_name(ours)
                pair = session.results[theirs] = Pair(target, 0, source, (source, True, 0), math.inf)
            axes = session.axes_of_result(theirs, truth.tensor.ndim)
            expected = truth.tensor.permute(axes) if len(axes) == truth.tensor.ndim else truth.tensor
            pair.shape = (self.samples_before + actual.shape[0], *actual.shape[1:]) if actual.ndim else ()
            self.wanted.add(id(truth))
            if expected.shape != actual.shape:
                pair.exact.problem = f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
                continue
            distance = measure_candidate(actual, expected, None)
            in_float32 = computes_in_float32(found[ours], Match(truth, axes, distance))
            pair.in_float32 |= in_float32 and not distance.total().rms <= SAME * truth.rms
            pair.exact.scale.include(truth.size)
            pair.exact.actual_error.include(distance)
        return found


def _steered(match: Match, output: Tensor) -> Tensor:
    """The truth in the place of a result that was computed in float32."""
    import torch

    expected = match.expected(as_real(output))
    return torch.view_as_complex(expected.contiguous()) if output.is_complex() else expected


def _in_shape(expected: Tensor, actual: Tensor, inputs: Inputs) -> Tensor | None:
    """PyTorch's tensor in Keras's shape: by the convention, as it is, or the one other order that fits."""
    rank = expected.ndim
    orders = [inputs.output_axes(rank), tuple(range(rank))]
    orders += [(0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))] if rank > 2 else []
    for axes in orders:
        if tuple(expected.shape[axis] for axis in axes) == tuple(actual.shape):
            return expected.permute(axes)
    return expected.permute(orders[0]).reshape(actual.shape) if expected.numel() == actual.numel() else None


class _RoundingObserver:
    """Compares every paired Keras layer in float32."""

    watches_inputs = False

    def __init__(self, session: Session, recording: Recording, limits: Limits, samples_before: int) -> None:
        self.session, self.recording, self.limits = session, recording, limits
        self.samples_before = samples_before
        self._known: dict[tuple[int, int], tuple[weakref.ref[Any], DifferenceSum, DistanceSum]] = {}

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        for index, output in enumerate(outputs):
            pair = self.session.pairs.get((name, index))
            if pair is not None and not pair.named and not pair.reordered:
                self._compare(pair, output, None)
        return None

    def results(self, found: Mapping[str, Any], partners: Mapping[str, str]) -> None:
        for theirs, ours in partners.items():
            pair, output = self.session.results.get(theirs), found.get(ours)
            if pair is not None and output is not None:
                truth = self.recording.outputs[theirs]
                self._compare(pair, output, self.session.axes_of_result(theirs, truth.tensor.ndim))

    def _compare(self, pair: Pair, output: Tensor, axes: Axes | None) -> None:
        truth = pair.truth(self.recording)
        if truth is None or truth.noise is None:
            return
        actual = as_real(output)
        if axes is None:
            expected = _in_shape(truth.tensor, actual, self.session.inputs)
        else:
            expected = truth.tensor.permute(axes)
            expected = expected if expected.shape == actual.shape else None
        if expected is None:
            pair.float32.problem = f"shape {tuple(actual.shape)} for PyTorch's {tuple(truth.tensor.shape)}"
            return
        sums = pair.float32
        sums.scale.include(truth.size)
        sums.expected_error.include(truth.noise)
        pair.exact.expected_error.include(truth.noise)
        known = self._known.get((id(output), id(truth)))
        if known is not None and known[0]() is output:
            difference, size = known[1:]
        else:
            total = truth.noise.total()
            limit = self.limits.of(pair.source) * max(total.max, FLOAT32_ROUNDOFF * truth.size.total().max)
            difference = DifferenceSum(self.samples_before)
            size = difference.add(actual, expected.contiguous(), None, limit)
            self._known[id(output), id(truth)] = weakref.ref(output), difference, size
        sums.actual_error.include(size)
        pair.difference.include(difference)
        pair.dtype = str(output.dtype).removeprefix("torch.")
        pair.measured = True


def check_parity(
    reference: nn.Module,
    candidate: keras.Model,
    inputs: Any,
    *,
    reference_inputs: Any = None,
    pairs: Mapping[str, Any] | None = None,
    key_map: KeyMap | None = None,
    input_axes: Sequence[Axes | None] | None = None,
    output_axes: Mapping[str, Axes] | Sequence[Axes] | Axes | None = None,
    limits: Limits | None = None,
    batch_size: int | None = None,
    strict_settings: bool = True,
    waive: Sequence[str] = (),
    precision: str | None = None,
    build_float64: Callable[[], keras.Model] | None = None,
    loud: bool = True,
    locate_culprits: bool = True,
    name: str = "as ported",
    progress: Progress = SILENT,
) -> ParityReport:
    """Runs both models on the same inputs, in float64 and in float32, and says whether they compute the same.

    `inputs` are an array, several or a dict: float32 images `(N, H, W, C)`, tokens, whatever the Keras model takes.
    PyTorch is given `reference_inputs`, by default the same with channels moved behind the samples where its first
    module takes them so. `input_axes` and `output_axes` state PyTorch's axes in Keras's order, for each input, and for
    each result (a dict by key, a sequence, or one for all).

    Tensors pair by content. `pairs` says which layer stands for which module where names do not, `{"torch.name":
    "keras/path"}`, with "-" for none; `key_map` also says which weights must be the same bit by bit.
    `strict_settings=False` makes settings that matter only in training, such as a momentum, a note. `waive` names
    modules whose settings may differ, or settings, `"name"` or `"name:setting"`. `precision` states that the Keras
    model computes in float16 or bfloat16 on purpose. `build_float64` makes the Keras model for the exact view; by
    default the model itself is turned to float64 meanwhile. `loud=False` leaves out the outputs on loud weights (on
    loud inputs, where no key map brings weights over), on which hidden mistakes show. `locate_culprits=False` leaves
    out the search for the layers where the two part.

    Both models are left exactly as they were. One batch of activations is in memory at a time.

    Raises ValueError where there are no inputs, or a name is none of the models'.
    """
    from torch.nn.parameter import is_lazy

    limits = limits or Limits()
    reference = _unwrapped(reference)
    refuse_unknown_layers("limits", limits.per_layer, reference, [OUTPUT])
    refuse_unknown_layers("waive", [each.partition(":")[0] for each in waive], reference)
    if any(is_lazy(tensor) or tensor.is_meta for tensor in (*reference.parameters(), *reference.buffers())):
        return _without_result("the PyTorch model has weights without values: lazy ones, or on meta", limits, name)
    with _evaluating(reference):
        try:
            given = make_inputs(reference, candidate, inputs, reference_inputs, input_axes)
            names = Names(reference, candidate, pairs)
        except (RuntimeError, TypeError, AttributeError) as error:
            return _without_result(f"the inputs cannot be brought into order: {_first_line(error)}", limits, name)
        if problem := given.not_finite():
            return _without_result(problem, limits, name)
        axes = _stated_axes(output_axes)
        try:
            plain = _in_float32(reference)
            rounded = plain if precision is None else in_precision(plain, precision, given.candidate[0])
            session = Session(reference, candidate, given, names, axes, _float64(candidate, build_float64), rounded)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            return _without_result(f"the PyTorch model cannot be run in float64: {_first_line(error)}", limits, name)
        try:
            _run_batches(session, limits, batch_size, progress)
        except CannotRunError as error:
            return _without_result(str(error), limits, name)
        report = _report(session, limits, key_map, name, strict_settings, waive)
        if loud:
            progress("loud inputs" if key_map is None else "loud weights")
            found, on_loud = _loud(session, key_map, limits, locate_culprits and not report.divergences)
            report = replace(report, loud=found, culprits=on_loud)
        if locate_culprits and report.divergences:
            progress("looking for the cause")
            report = replace(report, culprits=_culprits(session, report))
        progress("done", 1, 1)
        return report


class CannotRunError(Exception):
    """One of the models cannot be run on these inputs."""


def _run_batches(session: Session, limits: Limits, batch_size: int | None, progress: Progress) -> None:
    import torch

    given = session.inputs
    size = batch_size or len(given)
    starts = range(0, len(given), size)
    for number, start in enumerate(starts):
        batch = given.batch(start, start + size)

        def step(passed: int, what: str, number: int = number) -> None:
            progress(what, 4 * number + passed, 4 * len(starts))

        step(0, "PyTorch, float64")
        try:
            recording = session.record_truth(batch)
        except Exception as error:  # a model may raise anything on inputs that it does not take
            raise CannotRunError(
                f"the PyTorch model cannot run in float64 on these inputs: {_first_line(error)}"
            ) from None
        step(1, "Keras, float64")
        if start == 0:
            _build(session, batch)
            _substitute_derived(session, recording)
        exact = _run_exact(session, recording, batch, start)
        step(2, "PyTorch, float32")
        if exact is None:
            continue
        noise = NoiseObserver(recording, exact.wanted)
        with torch.no_grad(), observe_modules(session.rounded, noise):
            noise.results(batch.call_reference(session.rounded, torch.float32))
        step(3, "Keras, float32")
        rounding = _RoundingObserver(session, recording, limits, start)
        with session.as_precise_as_reference(), observe_layers(session.candidate, rounding):
            result = session.candidate(batch.for_candidate(session.candidate), training=False)
        found = {key: to_torch(leaf) for key, leaf in leaves_by_key(result).items()}
        partners, _ = pair_results(recording.outputs, found)
        rounding.results(found, partners)
        session.unseen = {
            call: None
            for call in recording.order
            if not any(id(truth) in exact.matched for truth in recording.calls[call].outputs)
        }
        if len(partners) == 1:
            ((theirs, ours),) = partners.items()
            truth = recording.outputs[theirs].tensor
            if truth.ndim == 2:
                session.logits.append((truth.numpy(), found[ours].numpy()))


def _build(session: Session, batch: Inputs) -> None:
    """A model that was never called has no weights yet; its first call makes them, in its own precision."""
    layers = [session.candidate, *session.names.layers.values()]
    if all(layer.built for layer in layers):
        return
    try:
        session.candidate(batch.for_candidate(session.candidate), training=False)
    except Exception as error:  # whatever a model raises on inputs that it does not take
        raise CannotRunError(f"the Keras model cannot run on these inputs: {_first_line(error)}") from None
    session.names.layers.update(named_layers(session.candidate))


def _substitute_derived(session: Session, recording: Recording) -> None:
    halved = halved_weights(session.reference)
    if halved and session.float64.substitute(lambda values: rounds_to(values, halved)):
        session.notes["PyTorch's weights are in half precision, and Keras's are numbers that round to them"] = None
        session.halved = halved
    if not has_derived(session.truth_model):
        return
    derived = derived_weights(session.truth_model, recording)
    stored = {
        np.ascontiguousarray(each).tobytes()
        for tensor in session.reference.state_dict().values()
        if tensor.is_floating_point()
        for each in in_all_orders(tensor.detach().float().numpy())
    }
    count = session.float64.substitute(lambda values: substitutes(values, stored, derived))
    if count:
        session.notes[f"{count} weights are computed from several tensors of PyTorch's, exactly but for float32"] = None


def _run_exact(session: Session, recording: Recording, batch: Inputs, start: int) -> _ExactObserver | None:
    """The Keras model in float64: turned in place, else a clone; raises CannotRunError where it does not run at all."""
    kept = dict(session.pairs), dict(session.lone), set(session.used)
    for attempt in ("in place", "clone"):
        observer = _ExactObserver(session, recording, start)
        try:
            with session.float64.active() as model, observe_layers(model, observer):
                observer.results(model(batch.for_candidate(model), training=False))
            return observer
        except Exception as error:
            session.pairs, session.lone, session.used = kept[0].copy(), kept[1].copy(), kept[2].copy()
            if attempt == "in place" and start == 0:
                with contextlib.suppress(Exception):
                    session.float64.clone()
                    continue
            where = "in float64" if _runs(session, batch) else "on these inputs"
            raise CannotRunError(f"the Keras model cannot run {where}: {_first_line(error)}") from None
    return None


def _runs(session: Session, batch: Inputs) -> bool:
    try:
        session.candidate(batch.for_candidate(session.candidate), training=False)
    except Exception:  # whatever a model raises on inputs that it does not take
        return False
    return True


def _float64(candidate: keras.Model, build: Callable[[], keras.Model] | None) -> Float64Model:
    return Float64Model(candidate, build)


def _report(
    session: Session,
    limits: Limits,
    key_map: KeyMap | None,
    name: str,
    strict_settings: bool,
    waive: Sequence[str],
) -> ParityReport:
    kinds = kinds_of(session.reference)
    results = [pair.total(kinds, exact=True) for pair in session.results.values()]
    ordered = sorted(session.pairs.values(), key=lambda pair: pair.order)
    layers = [pair.total(kinds, exact=True) for pair in ordered]
    everything = list(with_usual_rounding([*layers, *results], session.reference))
    report = ParityReport(
        layers=tuple(everything),
        unpaired_source=tuple(session.unseen),
        unpaired_target=tuple(each for each in session.lone),
        logits=compare_logits(session.logits),
        input_shapes=tuple(tuple(array.shape) for array in session.inputs.candidate),
        limits=limits,
        name=name,
        exact_model=session.float64.how,
        float32_inside=tuple(pair.source for pair in ordered if pair.in_float32),
        axes=session.inputs.described(),
        precision=_precision(session.candidate),
        notes=tuple(session.notes),
    )
    agreed = not any(divergence.view == EXACT for divergence in report.divergences)
    if agreed:
        report = replace(report, layers=tuple(_written(layer, session) for layer in report.layers))
    targets = {
        pair.place[0].partition("#")[0]: pair.target.partition("#")[0]
        for pair in session.pairs.values()
        if pair.place[1] and pair.index == 0
    }
    with session.float64.active() as model:
        audit = compare_settings(session.reference, model, targets, strict=strict_settings, waive=waive)
    return replace(report, audit=audit, verified=_verified(session, agreed, key_map))


def _written(layer: LayerComparison, session: Session) -> LayerComparison:
    """Marks a layer whose own result differs though the outputs agree: it was written in another way."""
    how = session.written.get(layer.source, "")
    pair = next((each for each in session.pairs.values() if each.source == layer.source and each.named), None)
    if pair is not None and not layer.is_output and pair.target == layer.target:
        how = how or "its result differs, and what follows agrees again"
    return replace(layer, rewritten=how)


def _verified(session: Session, agreed: bool, key_map: KeyMap | None) -> Verified:
    variables = named_variables(session.candidate)
    called = {name.partition("#")[0] for name in session.called}
    if not agreed:
        called = {pair.target.partition("#")[0] for pair in session.pairs.values() if not pair.named}
    seen: set[int] = set()
    for layer_name, own in owned_variables(session.candidate).items():
        # The model itself runs whenever anything does.
        if layer_name in called or (agreed and not layer_name):
            seen |= {id(variable) for variable in own}
    sizes = {name: math.prod(variable.shape) for name, variable in variables.items()}
    unverified = tuple(name for name, variable in variables.items() if id(variable) not in seen)
    differing, compared = _other_bits(session.reference, variables, key_map)
    through = any(not pair.named for pair in session.pairs.values())
    total = sum(sizes.values())
    verified = total - sum(sizes[name] for name in unverified)
    return Verified(total, verified, unverified, differing, through, compared)


def _other_bits(
    reference: nn.Module, variables: Mapping[str, Any], key_map: KeyMap | None
) -> tuple[tuple[str, ...], int]:
    """Keras variables that are not the checkpoint's tensor bit by bit, and how many were compared."""
    if key_map is None:
        return (), 0
    state = reference.state_dict()
    differing, compared = [], 0
    for entry in key_map.entries:
        if entry.source in state and entry.target in variables:
            compared += 1
            expected = entry.transform.apply(state[entry.source].detach().float().numpy())
            actual = np.asarray(variables[entry.target])
            if not (expected.shape == actual.shape and np.array_equal(expected, actual, equal_nan=True)):
                differing.append(entry.target)
    return tuple(differing), compared


def _loud(
    session: Session, key_map: KeyMap | None, limits: Limits, locates: bool
) -> tuple[Loud | None, tuple[Culprit, ...]]:
    """One sample's outputs on loud weights, where a key map brings them over, else on loud inputs.

    Where they differ and `locates` says so, also where the two part there.
    """
    one = session.few(1)
    if key_map is not None:
        return _on_loud_weights(session, one, key_map, limits, locates)
    if not any(array.dtype.kind == "f" for array in one.candidate):
        return None, ()
    inputs = replace(one, candidate=_louder(one.candidate), reference=_louder(one.reference))
    return _judged_loud(session, inputs, f"inputs {LOUD_INPUTS:g} times as large", limits, locates)


def _judged_loud(
    session: Session, inputs: Inputs, what: str, limits: Limits, locates: bool
) -> tuple[Loud | None, tuple[Culprit, ...]]:
    relative = _relative_on(session, inputs)
    if relative is None:
        return None, ()
    found = Loud(what, relative, LOUD_LIMIT)
    if found.passed or not locates:
        return found, ()
    return found, tuple(locate(session, inputs, limits, MAX_CULPRITS))


def _louder(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(array * np.float32(LOUD_INPUTS) if array.dtype.kind == "f" else array for array in arrays)


def _on_loud_weights(
    session: Session, one: Inputs, key_map: KeyMap, limits: Limits, locates: bool
) -> tuple[Loud | None, tuple[Culprit, ...]]:
    import torch

    kept = {name: tensor.clone() for name, tensor in session.truth_model.state_dict().items()}
    with session.float64.active() as model:
        variables = named_variables(model)
        before = {name: np.array(variable) for name, variable in variables.items()}
    try:
        run = partial(_call, one, torch.float64)
        fill_with_synthetic_weights(session.truth_model, 0, run=run)
        session.truth_model.eval()
        state = session.truth_model.state_dict()
        with session.float64.active():
            for entry in key_map.entries:
                if entry.source in state and entry.target in variables:
                    variables[entry.target].assign(np.array(entry.transform.apply(state[entry.source].numpy())))
        return _judged_loud(session, one, "loud random weights", limits, locates)
    except (RuntimeError, ValueError):  # a model that cannot be filled so has no loud weights
        return None, ()
    finally:
        session.truth_model.load_state_dict(kept)
        with session.float64.active():
            for name, variable in variables.items():
                variable.assign(before[name])


def _call(inputs: Inputs, dtype: Any, model: nn.Module) -> Any:
    return inputs.call_reference(model, dtype)


def _relative_on(session: Session, inputs: Inputs) -> float | None:
    """How far the outputs are apart in float64, the worst of them; None where PyTorch's are not finite."""
    import torch

    with torch.no_grad():
        theirs = {
            key: as_real(leaf)
            for key, leaf in leaves_by_key(inputs.call_reference(session.truth_model, torch.float64)).items()
            if hasattr(leaf, "detach")
        }
    with session.float64.active() as model:
        result = model(inputs.for_candidate(model), training=False)
        ours = {key: as_real(to_torch(leaf)) for key, leaf in leaves_by_key(result).items()}
    partners, _ = pair_results({key: Truth(tensor) for key, tensor in theirs.items()}, ours)
    worst = 0.0
    inside = any(pair.in_float32 for pair in (*session.pairs.values(), *session.results.values()))
    for key, own in partners.items():
        expected, actual = theirs[key].permute(session.axes_of_result(key, theirs[key].ndim)), ours[own]
        if not bool(expected.isfinite().all()) or expected.shape != actual.shape:
            return None
        scale = float(expected.square().mean().sqrt())
        distance = float((actual - expected).square().mean().sqrt())
        relative = distance / scale if scale else (math.inf if distance else 0.0)
        if inside:  # what is float32 inside cannot be finer
            relative = 0.0 if relative < 1e3 * FLOAT32_ROUNDOFF else relative
        worst = max(worst, relative) if not math.isnan(relative) else math.inf
    return worst


def _culprits(session: Session, report: ParityReport) -> tuple[Culprit, ...]:
    """Where the two part in float64; where they do not, the first layer that rounds too much."""
    if any(divergence.view == EXACT for divergence in report.divergences):
        found = tuple(locate(session, session.few(2), report.limits, MAX_CULPRITS))
        if found:
            return found
    first = report.divergences[0]
    layer = next(each for each in report.layers if each.source == first.layer)
    view = layer.views.get(first.view)
    own = session.names.layers.get(layer.target.partition("#")[0])
    dtype = getattr(own, "compute_dtype", "float32") if own is not None else _precision(session.candidate)
    diagnosis = None
    if first.view == FLOAT32 and dtype != "float32":
        diagnosis = Diagnosis(first.layer, f"it computes in {dtype}", 0.0, (f"it computes in {dtype}",))
    relative = view.relative_error if view is not None else math.inf
    return (Culprit(first.layer, layer.target, first.reason, relative, diagnosis=diagnosis),)


def _precision(candidate: keras.Model) -> str:
    """The narrowest type that a layer with weights computes in."""
    dtypes = {str(layer.compute_dtype) for layer in candidate._flatten_layers(include_self=False) if layer.weights} or {
        "float32"
    }
    narrow = [dtype for dtype in ("bfloat16", "float16") if dtype in dtypes]
    return narrow[0] if narrow else "float32"


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DataParallel", "DistributedDataParallel"}:
            inner = model.module
        if inner is None:
            return model
        model = inner


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.suppress(NotImplementedError):  # an exported module has no modes
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _in_float32(model: nn.Module) -> nn.Module:
    """The model itself, or a copy where its numbers are of another type."""
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()):
        return model
    return copy.deepcopy(model).float()


def _stated_axes(output_axes: Any) -> dict[str, Axes]:
    if output_axes is None:
        return {}
    if isinstance(output_axes, Mapping):
        return {str(key): tuple(axes) for key, axes in output_axes.items()}
    if output_axes and isinstance(output_axes[0], int):
        return {"": tuple(output_axes)}
    return {f"[{index}]": tuple(axes) for index, axes in enumerate(output_axes)}


def _without_result(problem: str, limits: Limits, name: str) -> ParityReport:
    return ParityReport((), (), (), None, (), limits, name, problem=problem)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def with_usual_rounding(layers: list[LayerComparison], reference: nn.Module) -> Iterator[LayerComparison]:
    """Tells small tensors what rounding does as a rule.

    That is what a plain sum makes, over as many terms as the layer's largest product has: n additions of independent
    terms have an RMS error of about sqrt(n) / 4 roundings of the sum; or the median of the layers just before, if that
    is more.
    """
    modules = dict(reference.named_modules())
    before: deque[float] = deque(maxlen=_LAYERS_BEFORE)
    for layer in layers:
        view = layer.views.get(FLOAT32)
        if math.prod(layer.shape) >= FEW_ELEMENTS:
            if view is not None and math.isfinite(view.relative_rounding):
                before.append(view.relative_rounding)
            yield layer
            continue
        module = modules.get(layer.source.partition("#")[0], reference)  # the models' own result is no module's
        summed = max((weight[0].numel() for weight in module.parameters() if weight.ndim > 1), default=1)
        own = math.sqrt(summed) / 4 * FLOAT32_ROUNDOFF
        usual = max(own, statistics.median(before) if before else 0.0)
        finer = {name: each.roundoff / FLOAT32_ROUNDOFF for name, each in layer.views.items()}
        views = {name: replace(each, usual_rounding=usual * finer[name]) for name, each in layer.views.items()}
        yield replace(layer, views=views)


def compare_logits(pairs: list[tuple[Array, Array]]) -> LogitsComparison | None:
    """None where the output is not one row of numbers a sample."""
    if not pairs or any(one.ndim != 2 or one.shape != other.shape or one.shape[1] < 2 for one, other in pairs):
        return None
    expected, actual = (np.concatenate(side) for side in zip(*pairs, strict=True))
    kept = min(5, expected.shape[1])
    best = [np.sort(np.argsort(side, axis=1, kind="stable")[:, -kept:], axis=1) for side in (expected, actual)]
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, and say so
        change = np.abs(_softmax(expected) - _softmax(actual))
    return LogitsComparison(
        samples=len(expected),
        top1_agreement=int((expected.argmax(1) == actual.argmax(1)).sum()),
        top5_agreement=int((best[0] == best[1]).all(1).sum()),
        max_probability_change=float(change.max()),
    )


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities
