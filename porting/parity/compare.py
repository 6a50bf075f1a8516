"""Runs two models and compares them call by call. What the results mean is in `porting.parity.report`.

Each batch goes through five runs. PyTorch in float32 is recorded. PyTorch in float64 gives the errors of that
recording, and Keras its own. Then both run once more, steered: every module and layer takes the recording's inputs and
hands on its outputs, so that what it makes of them shows its own error and nobody else's. Only float32 tensors are
kept: the recording, and its distance to the truth.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.float64 import in_float64
from porting.models.observe import Replacement, keras_tensors_in, observe_layers, observe_modules, tensors_in
from porting.parity.diagnose import diagnose
from porting.parity.measure import DifferenceSum, DistanceSum, measure_candidate, measure_truth
from porting.parity.report import (
    ACCUMULATED,
    FEW_ELEMENTS,
    FLOAT32_ROUNDOFF,
    INPUT,
    ISOLATED,
    OUTPUT,
    VIEWS,
    Diagnosis,
    Divergence,
    LayerComparison,
    Limits,
    LogitsComparison,
    ParityReport,
    View,
)
from porting.parity.settings import compare_settings
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


# So many of them tell a small tensor what rounding has come to.
_LAYERS_BEFORE = 16


class _ViewSum:
    def __init__(self) -> None:
        self.scale, self.expected_error, self.actual_error = DistanceSum(), DistanceSum(), DistanceSum()
        self.problem = ""

    def total(self) -> View:
        return View(self.scale.total(), self.expected_error.total(), self.actual_error.total(), self.problem)


class _LayerSum:
    """Everything that is summed up for one call of a layer."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.target = ""
        self.shape: tuple[int, ...] = ()
        self.dtypes = ("", "")
        self.views: dict[str, list[_ViewSum]] = {}
        self.difference = DifferenceSum()

    def view(self, name: str, index: int) -> _ViewSum:
        sums = self.views.setdefault(name, [])
        while len(sums) <= index:
            sums.append(_ViewSum())
        return sums[index]

    def total(self, source: str) -> LayerComparison:
        # A layer with several tensors is as good as the worst of them.
        views = {
            name: max((each.total() for each in self.views[name]), key=lambda view: view.ratio)
            for name in VIEWS
            if self.views.get(name)
        }
        return LayerComparison(source, self.target, self.kind, self.shape, *self.dtypes, views, self.difference.total())


@dataclass
class _Measured:
    """How far a recorded tensor is from the truth; `error` is None where it is the truth."""

    error: Tensor | None
    size: DistanceSum
    scale: DistanceSum


@dataclass
class _Recorded:
    """A tensor of the float32 run: one, however many calls take it and give it.

    What other runs have in its place is remembered by identity, without keeping it, for a tensor that only passes
    through a layer need not be measured again.
    """

    tensor: Tensor
    # The present float64 run's tensor in its place, what that showed, and whether the tensor is now steered.
    truth: weakref.ref[Tensor] | None = None
    measured: _Measured | None = None
    steered_truth: weakref.ref[Tensor] | None = None
    # The same for Keras.
    actual: weakref.ref[Tensor] | None = None
    compared: tuple[DifferenceSum, DistanceSum, float] | None = None
    steered_actual: weakref.ref[Tensor] | None = None

    def is_truth(self, other: Tensor) -> bool:
        return self.truth is not None and self.truth() is other

    def is_steered_truth(self, other: Tensor) -> bool:
        return self.steered_truth is not None and self.steered_truth() is other

    def is_actual(self, other: Tensor) -> bool:
        return self.actual is not None and self.actual() is other

    def is_steered_actual(self, other: Tensor) -> bool:
        return self.steered_actual is not None and self.steered_actual() is other


@dataclass
class _Call:
    """What one call of a module took and gave in float32, and how far that is from the truth."""

    inputs: list[_Recorded]
    outputs: list[_Recorded] = field(default_factory=list)
    input_truths: list[_Measured] = field(default_factory=list)
    output_truths: list[_Measured] = field(default_factory=list)


class _Recorder:
    """Keeps what every module gives, and what it takes if `watches_inputs`."""

    def __init__(self, *, watches_inputs: bool, copies: bool) -> None:
        self.watches_inputs = watches_inputs
        self.calls: dict[str, _Call] = {}
        self.order: list[str] = []
        self._copies = copies
        # By identity and version; the tensors are kept with them, so that no identity comes twice.
        self._kept: dict[tuple[int, int], tuple[Tensor, _Recorded]] = {}

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self.calls[name] = _Call(self._keep(inputs))
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        self.calls[name].outputs = self._keep(outputs)
        self.order.append(name)
        return None

    def _keep(self, tensors: list[Tensor]) -> list[_Recorded]:
        found = []
        for tensor in tensors:
            key = id(tensor), tensor._version
            if key not in self._kept:
                copy = tensor.detach().clone() if self._copies else tensor.detach()
                self._kept[key] = tensor, _Recorded(copy)
            found.append(self._kept[key][1])
        return found

    def finish(self) -> bool:
        """Lets go of what only the recording needs; whether it holds, nothing kept having been changed in place since.

        `x += y` and an in-place ReLU make such changes.
        """
        kept, self._kept = self._kept, {}
        return self._copies or all(tensor._version == version for (_, version), (tensor, _) in kept.items())


class _TruthObserver:
    """Runs beside the recorded float32 calls in float64 and notes their errors; `forced` steers it along them."""

    def __init__(
        self, calls: Mapping[str, _Call], sums: Mapping[str, _LayerSum], own: frozenset[int], *, forced: bool
    ) -> None:
        self.calls, self.sums, self.own, self.forced = calls, sums, own, forced
        self.watches_inputs = forced
        self._taken: dict[str, set[int]] = {}

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        if not self.forced or name not in self.calls:
            return None
        call = self.calls[name]
        call.input_truths = self._measure(name, INPUT, call.inputs, inputs)
        self._taken[name] = {_memory(tensor) for tensor in inputs}
        return [self._steer(*pair, in_place=False) for pair in zip(call.inputs, inputs, strict=True)]

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        if name not in self.calls:
            return None
        call = self.calls[name]
        view = ISOLATED if self.forced else ACCUMULATED
        call.output_truths = self._measure(name, view, call.outputs, outputs)
        if not self.forced:
            return None
        kept = self._taken.pop(name, set()) | self.own
        return [
            self._steer(recorded, truth, in_place=_fills_its_memory(truth) and _memory(truth) not in kept)
            for recorded, truth in zip(call.outputs, outputs, strict=True)
        ]

    def _measure(self, name: str, view: str, expected: list[_Recorded], truths: list[Tensor]) -> list[_Measured]:
        found = []
        for index, (recorded, truth) in enumerate(zip(expected, truths, strict=True)):
            measured = recorded.measured
            if measured is not None and recorded.is_steered_truth(truth):
                measured = _Measured(None, DistanceSum.zeros(truth.numel()), measured.scale)
            elif measured is None or not recorded.is_truth(truth):
                measured = _Measured(*measure_truth(recorded.tensor, truth))
                recorded.measured, recorded.truth = measured, weakref.ref(truth)
            sums = self.sums[name].view(view, index)
            sums.scale.include(measured.scale)
            sums.expected_error.include(measured.size)
            found.append(measured)
        return found

    def _steer(self, recorded: _Recorded, truth: Tensor, *, in_place: bool) -> Tensor | None:
        """The recorded values for the run to go on with; None where it has them already, or has now been given them.

        A result is overwritten where nobody else has its memory, because fresh memory costs more than the copy into it.
        """
        if not truth.is_floating_point() or recorded.is_steered_truth(truth):
            return None
        if in_place:
            truth.copy_(recorded.tensor)
            recorded.steered_truth = weakref.ref(truth)
            return None
        replacement = recorded.tensor.double()
        recorded.steered_truth = weakref.ref(replacement)
        return replacement


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _fills_its_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class _CandidateObserver:
    """Compares every Keras layer as it runs; `forced` feeds it, and what follows it, the reference's own tensors."""

    def __init__(
        self,
        calls: dict[str, _Call],
        sums: Mapping[str, _LayerSum],
        source_of: Mapping[str, str],
        limits: Limits,
        samples_before: int,
        *,
        forced: bool,
        keep: bool,
    ) -> None:
        self.calls, self.sums, self.source_of, self.limits = calls, sums, source_of, limits
        self.samples_before, self.forced, self.keep = samples_before, forced, keep
        self.watches_inputs = forced
        self.lone: dict[str, None] = {}
        self.seen: set[str] = set()
        self._scratch: dict[str, Tensor] = {}

    def source(self, path: str) -> str | None:
        base, _, number = path.partition("#")
        source = self.source_of.get(_dotted(base))
        if source is None:
            return None
        name = f"{source}#{number}" if number else source
        return name if name in self.calls else None

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        source = self.source(name)
        if source is None or not self.forced:
            return None
        call, layer = self.calls[source], self.sums[source]
        pairs = list(zip(call.inputs, inputs, strict=False))
        orders = [_axes_of(recorded.tensor, actual) for recorded, actual in pairs]
        floats = all(recorded.tensor.is_floating_point() for recorded in call.inputs)
        if len(call.inputs) != len(inputs) or not floats or None in orders:
            # The two take their tensors in other ways: one side pads in a layer of its own, say. What the parent
            # gives is then as good, for it too comes from the reference's tensors.
            layer.views.pop(INPUT, None)
            return None
        replacements = []
        for index, ((recorded, actual), axes) in enumerate(zip(pairs, orders, strict=True)):
            assert axes is not None  # ruled out above
            size, replacement = self._steer(recorded, actual, axes, call.input_truths[index])
            layer.view(INPUT, index).actual_error.include(size)
            replacements.append(replacement)
        call.inputs, call.input_truths = [], []
        return replacements

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        source = self.source(name)
        if source is None:
            self.lone[name] = None
            return None
        self.seen.add(source)
        layer = self.sums[source]
        layer.target = name
        call = self.calls[source]
        view_name = ISOLATED if self.forced else ACCUMULATED
        replacements: list[Tensor | None] = []
        if len(outputs) != len(call.outputs):
            layer.view(view_name, 0).problem = f"{len(outputs)} tensors instead of {len(call.outputs)}"
            return None
        for index, (actual, recorded) in enumerate(zip(outputs, call.outputs, strict=True)):
            view = layer.view(view_name, index)
            expected = recorded.tensor
            axes = _axes_of(recorded.tensor, actual)
            if axes is None:
                view.problem = f"shape {tuple(actual.shape)} instead of {tuple(_channels_last(expected).shape)}"
                return None
            truth = call.output_truths[index]
            if self.forced:
                size, replacement = self._steer(recorded, actual, axes, truth)
                view.actual_error.include(size)
                replacements.append(replacement)
                continue
            limit = self.limits.of(source) * max(view.expected_error.max, FLOAT32_ROUNDOFF * view.scale.max)
            difference, size = self._compare(recorded, actual, axes, truth, limit)
            view.actual_error.include(size)
            layer.difference.include(difference)
            layer.shape = (self.samples_before + actual.shape[0], *actual.shape[1:]) if actual.ndim else ()
            layer.dtypes = (str(expected.dtype).removeprefix("torch."), str(actual.dtype).removeprefix("torch."))
        # Its errors have served, whether or not the tensors stay for a steered run.
        for recorded in call.outputs:
            recorded.measured = None
        call.output_truths = []
        if not self.keep:
            call.outputs = []
        return replacements if self.forced else None

    def _compare(
        self, recorded: _Recorded, actual: Tensor, axes: tuple[int, ...], truth: _Measured, limit: float
    ) -> tuple[DifferenceSum, DistanceSum]:
        """The difference of Keras's tensor to the recorded one, and its distance to the truth."""
        known = recorded.compared
        if known is not None and recorded.is_actual(actual) and known[2] == limit:
            return known[:2]
        expected = self._in_order("expected", recorded.tensor, axes)
        difference = DifferenceSum(self.samples_before)
        size = difference.add(actual, expected, self._error_in_order(truth, axes), limit)
        recorded.actual, recorded.compared = weakref.ref(actual), (difference, size, limit)
        return difference, size

    def _steer(
        self, recorded: _Recorded, actual: Tensor, axes: tuple[int, ...], truth: _Measured
    ) -> tuple[DistanceSum, Tensor | None]:
        """How far Keras's tensor is from the truth, and the recorded one in its order; None where it is that one."""
        if recorded.is_steered_actual(actual):
            return truth.size, None
        replacement = recorded.tensor.permute(axes).contiguous()
        recorded.steered_actual = weakref.ref(replacement)
        return measure_candidate(actual, replacement, self._error_in_order(truth, axes)), replacement

    def _error_in_order(self, truth: _Measured, axes: tuple[int, ...]) -> Tensor | None:
        return None if truth.error is None else self._in_order("error", truth.error, axes)

    def _in_order(self, role: str, tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The tensor in Keras's order of axes, in memory that the next tensor of the same role is given again."""
        moved = tensor.permute(axes)
        if moved.is_contiguous():
            return moved
        scratch = self._scratch.get(role)
        if scratch is None or scratch.numel() < moved.numel() or scratch.dtype != moved.dtype:
            scratch = self._scratch[role] = moved.new_empty(moved.numel())
        return scratch[: moved.numel()].view(moved.shape).copy_(moved)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1) if tensor.ndim > 2 else tensor


def _axes_of(expected: Tensor, actual: Tensor) -> tuple[int, ...] | None:
    """The order in which PyTorch's axes come in Keras's tensor; None where none fits.

    Where several fit, all sides being equal, it is the one in which the two tensors agree best.
    """
    same = tuple(range(expected.ndim))
    last, first = (0, *same[2:], 1), (0, *same[-1:], *same[1:-1])
    orders = (last, first, same) if expected.ndim > 2 else (same,)
    if expected.ndim != actual.ndim:
        return None
    fitting = [axes for axes in orders if tuple(expected.shape[axis] for axis in axes) == tuple(actual.shape)]
    if len(set(fitting)) <= 1:
        return fitting[0] if fitting else None
    return min(fitting, key=lambda axes: float((actual - expected.permute(axes)).abs().nan_to_num().sum()))


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(axis) for axis in range(len(axes)))


def _dotted(path: str) -> str:
    """Paths differ between the frameworks in their separator, and Keras also has dots inside a layer's name."""
    return path.replace("/", ".")


def check_parity(
    reference: nn.Module,
    candidate: keras.Model,
    inputs: Array | Sequence[Array],
    *,
    reference_inputs: Sequence[Array] | None = None,
    pairs: Mapping[str, str] | None = None,
    isolated: bool = True,
    limits: Limits | None = None,
    batch_size: int | None = None,
    name: str = "as ported",
    progress: Progress = SILENT,
) -> ParityReport:
    """Runs both models on the same inputs and compares every layer that both have.

    `inputs` is one array, or one for each of the candidate's inputs, and goes to `candidate` as it is. `reference` gets
    the same with the last axis moved to the second place where an array has more than two axes, or
    `reference_inputs` as they are. Both models run in inference mode; the weights stay as they are.

    Modules and layers pair by name, with `/` read as `.`; `pairs` gives Keras paths for modules where the two differ
    by more. What has no partner is listed in the report. `isolated=False` leaves out the isolated and input views, and
    half of the time. One batch of activations is in memory at a time. The settings of paired layers are compared too,
    and the first divergence is looked into for its cause.

    Raises ValueError when there are no inputs.
    """
    import torch

    limits = limits or Limits()
    arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
    if not arrays or not len(arrays[0]):
        raise ValueError("at least one input is needed for a parity check")
    theirs = list(reference_inputs) if reference_inputs is not None else [_to_channels_first(a) for a in arrays]
    reference = reference.eval()
    truth_model = in_float64(reference)
    own_memory = frozenset(_memory(tensor) for tensor in (*truth_model.parameters(), *truth_model.buffers()))
    target_of = {module: module for module, _ in reference.named_modules() if module} | dict(pairs or {})
    # A Sequential or subclassed model puts its own name before its layers'; a functional one does not.
    source_of = {_dotted(f"{candidate.name}/{target}"): source for source, target in target_of.items()}
    source_of |= {_dotted(target): source for source, target in target_of.items()} | {OUTPUT: OUTPUT}
    kinds = {path: type(module).__name__ for path, module in reference.named_modules()}
    sums: dict[str, _LayerSum] = {}
    order: list[str] = []
    lone: dict[str, None] = {}
    seen: set[str] = set()
    logits: list[tuple[Array, Array]] = []
    size = batch_size or len(arrays[0])
    starts = range(0, len(arrays[0]), size)
    passes = 5 if isolated else 3
    for number, start in enumerate(starts):
        steps = iter(range(number * passes, (number + 1) * passes))

        def step(description: str, steps: Any = steps) -> None:
            progress(description, next(steps), passes * len(starts))

        batch = [array[start : start + size] for array in arrays]
        tensors = [torch.from_numpy(np.ascontiguousarray(array[start : start + size])) for array in theirs]
        exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
        with torch.no_grad():
            step("PyTorch, float32")
            recorder = _record(reference, tensors, watches_inputs=isolated)
            calls = recorder.calls
            for call in recorder.order:
                if call not in sums:
                    order.append(call)
                    sums[call] = _LayerSum(kinds.get(call.partition("#")[0], "output"))

            for forced in (False, True) if isolated else (False,):
                step("PyTorch, float64, layer by layer" if forced else "PyTorch, float64")
                truth = _TruthObserver(calls, sums, own_memory, forced=forced)
                with observe_modules(truth_model, truth):
                    truth.after(OUTPUT, tensors_in(truth_model(*exact)))
                step("Keras, layer by layer" if forced else "Keras")
                keep = isolated and not forced
                observer = _CandidateObserver(calls, sums, source_of, limits, start, forced=forced, keep=keep)
                expected_output = _tensors(calls[OUTPUT].outputs)
                with observe_layers(candidate, observer):
                    result = candidate(batch[0] if len(batch) == 1 else batch, training=False)
                outputs = keras_tensors_in(result)
                observer.after(OUTPUT, outputs)
                seen |= observer.seen
                lone.update(observer.lone)
                if not forced and len(outputs) == len(expected_output) == 1:
                    logits.append((expected_output[0].numpy(), outputs[0].numpy()))
    progress("done", passes * len(starts), passes * len(starts))
    targets = {source: layer.target for source, layer in sums.items() if source in seen and source in kinds}
    report = ParityReport(
        layers=tuple(_with_usual_rounding([sums[call].total(call) for call in order if call in seen], reference)),
        unpaired_source=tuple(call for call in order if call not in seen),
        unpaired_target=tuple(lone),
        logits=_compare_logits(logits),
        input_shapes=tuple(tuple(array.shape) for array in arrays),
        limits=limits,
        name=name,
        audit=compare_settings(reference, candidate, targets),
    )
    first = report.first_divergence
    if first is None:
        return report
    progress("looking for the cause")
    cause = _diagnose(reference, candidate, [a[:size] for a in arrays], [a[:size] for a in theirs], source_of, first)
    return replace(report, diagnosis=cause)


class _Catcher(_CandidateObserver):
    """Steers as its base does, and keeps what one layer was about to take and what it gave, in PyTorch's order."""

    def __init__(self, wanted: str, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.wanted = wanted
        self.taken: list[Tensor] = []
        self.given: list[Tensor] = []

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        if self.source(name) == self.wanted:
            self.taken = inputs
        return super().before(name, inputs)

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        if self.source(name) == self.wanted:
            self.given = outputs
        return super().after(name, outputs)


def _diagnose(
    reference: nn.Module,
    candidate: keras.Model,
    inputs: list[Array],
    reference_inputs: list[Array],
    source_of: Mapping[str, str],
    first: Divergence,
) -> Diagnosis | None:
    """Runs the first batch once more, catches the layer's tensors and asks what their difference looks like."""
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in reference_inputs]
    with torch.no_grad():
        calls = _record(reference, tensors, watches_inputs=True).calls
        sums = {name: _LayerSum("") for name in calls}
        for call in calls.values():
            call.input_truths = [_Measured(None, DistanceSum(), DistanceSum()) for _ in call.inputs]
            call.output_truths = [_Measured(None, DistanceSum(), DistanceSum()) for _ in call.outputs]
        kept = {name: (_tensors(call.inputs), _tensors(call.outputs)) for name, call in calls.items()}
        catcher = _Catcher(first.layer, calls, sums, source_of, Limits(), 0, forced=True, keep=True)
        with observe_layers(candidate, catcher):
            result = candidate(inputs[0] if len(inputs) == 1 else inputs, training=False)
        catcher.after(OUTPUT, keras_tensors_in(result))
    taken, given = kept[first.layer]
    expected = taken if first.view == INPUT else given
    actual = catcher.taken if first.view == INPUT else catcher.given
    if not expected or not actual:
        return None
    axes = _axes_of(expected[0], actual[0])
    if axes is None:
        return None
    found = actual[0].permute(_inverse(axes))
    parent = first.layer.rpartition(".")[0]
    scope = f"{parent}." if parent else ""
    near = {name: tensors for name, tensors in kept.items() if name.startswith(scope) and name != first.layer}
    others = {name: outputs[0] for name, (_, outputs) in near.items() if outputs and name != OUTPUT}
    if parent in kept and kept[parent][0]:
        others[f"the input of {parent}"] = kept[parent][0][0]
    base = first.layer.partition("#")[0]
    module = None if first.view == INPUT or first.layer == OUTPUT else reference.get_submodule(base)
    return diagnose(first.layer, module, taken if module is not None else [], expected[0], found, others)


def _tensors(recordings: list[_Recorded]) -> list[Tensor]:
    return [recorded.tensor for recorded in recordings]


def _to_channels_first(array: Array) -> Array:
    return np.moveaxis(array, -1, 1) if array.ndim > 2 else array


def _record(reference: nn.Module, tensors: list[Tensor], *, watches_inputs: bool) -> _Recorder:
    """Runs the reference; a second time with copies where it overwrites what was kept."""
    for copies in (False, True):
        recorder = _Recorder(watches_inputs=watches_inputs, copies=copies)
        given = [tensor.clone() for tensor in tensors] if copies else tensors
        with observe_modules(reference, recorder):
            outputs = tensors_in(reference(*given))
        recorder.before(OUTPUT, [])
        recorder.after(OUTPUT, outputs)
        if recorder.finish():
            break
    return recorder


def _with_usual_rounding(layers: list[LayerComparison], reference: nn.Module) -> Iterator[LayerComparison]:
    """Tells small tensors what rounding does as a rule.

    In isolation that is what a plain sum makes, over as many terms as the layer's largest product has: n float32
    additions of independent terms have an RMS error of about sqrt(n) / 4 roundings of the sum. Accumulated, it is the
    median of the layers just before, if that is more.
    """
    modules = dict(reference.named_modules())
    before: deque[float] = deque(maxlen=_LAYERS_BEFORE)
    for layer in layers:
        view = layer.views.get(ACCUMULATED)
        if math.prod(layer.shape) >= FEW_ELEMENTS:
            if view is not None and math.isfinite(view.relative_rounding):
                before.append(view.relative_rounding)
            yield layer
            continue
        module = modules.get(layer.source.partition("#")[0], reference)  # the models' own result is no module's
        summed = max((weight[0].numel() for weight in module.parameters() if weight.ndim > 1), default=1)
        own = math.sqrt(summed) / 4 * FLOAT32_ROUNDOFF
        usual = {ISOLATED: own, ACCUMULATED: max(own, statistics.median(before) if before else 0.0)}
        views = {name: replace(each, usual_rounding=usual.get(name, 0.0)) for name, each in layer.views.items()}
        yield replace(layer, views=views)


def _compare_logits(pairs: list[tuple[Array, Array]]) -> LogitsComparison | None:
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


def compare_outputs(
    reference: nn.Module,
    run: Callable[[Array], Mapping[str, Array]],
    images: Array,
    *,
    rounded: nn.Module | None = None,
    limits: Limits | None = None,
    name: str = "as exported",
    progress: Progress = SILENT,
) -> ParityReport:
    """Compares what a program outside Keras makes of images with PyTorch, by the names of PyTorch's modules.

    `run` takes `(1, H, W, C)` and gives the tensors that it can show, `OUTPUT` among them, in either order of axes.
    `rounded` is the reference as it is in the program's precision; its distance to float64 is then the unit, by default
    the reference's own.

    Raises ValueError when there are no images.
    """
    import torch

    if not len(images):
        raise ValueError("at least one input is needed for a parity check")
    limits = limits or Limits()
    reference = reference.eval()
    truth_model = in_float64(reference)
    sums: dict[str, _LayerSum] = {}
    order: list[str] = []
    logits: list[tuple[Array, Array]] = []
    kinds = {path: type(module).__name__ for path, module in reference.named_modules()}
    for index, image in enumerate(images):
        progress("comparing what was exported", index, len(images))
        found = run(image[None])
        tensor = torch.from_numpy(np.ascontiguousarray(_to_channels_first(image[None])))
        with torch.no_grad():
            recorder = _record(reference, [tensor], watches_inputs=False)
            noisy = recorder if rounded is None else _record(rounded, [tensor], watches_inputs=False)
            exact = _record(truth_model, [tensor.double()], watches_inputs=False)
            for source in recorder.order:
                if source not in found or len(recorder.calls[source].outputs) != 1:
                    continue
                if source not in sums:
                    order.append(source)
                    sums[source] = _LayerSum(kinds.get(source, "output"))
                expected, unit, truth = (each.calls[source].outputs[0].tensor for each in (recorder, noisy, exact))
                actual = torch.from_numpy(np.array(found[source], np.float32))
                _include_output(sums[source], expected, unit, truth, actual, limits.of(source), index)
            expected_output = recorder.calls[OUTPUT].outputs
            if len(expected_output) == 1:
                logits.append((expected_output[0].tensor.numpy(), np.asarray(found[OUTPUT])))
    progress("done", len(images), len(images))
    layers = [replace(sums[source].total(source), target=source) for source in order]
    return ParityReport(
        layers=tuple(_with_usual_rounding(layers, reference)),
        unpaired_source=(),
        unpaired_target=(),
        logits=_compare_logits(logits),
        input_shapes=(tuple(images.shape),),
        limits=limits,
        name=name,
    )


def _include_output(
    layer: _LayerSum, expected: Tensor, rounded: Tensor, truth: Tensor, actual: Tensor, limit: float, index: int
) -> None:
    view = layer.view(ACCUMULATED, 0)
    axes = _axes_of(expected, actual)
    if axes is None:
        view.problem = f"shape {tuple(actual.shape)} instead of {tuple(_channels_last(expected).shape)}"
        return
    error, noise, scale = measure_truth(expected, truth)
    if rounded is not expected:
        _, noise, _ = measure_truth(rounded, truth)
    view.scale.include(scale)
    view.expected_error.include(noise)
    allowed = limit * max(view.expected_error.max, FLOAT32_ROUNDOFF * view.scale.max)
    difference = DifferenceSum(index)
    view.actual_error.include(difference.add(actual, expected.permute(axes), error.permute(axes), allowed))
    layer.difference.include(difference)
    layer.shape = (index + 1, *actual.shape[1:]) if actual.ndim else ()
    layer.dtypes = (str(expected.dtype).removeprefix("torch."), str(actual.dtype).removeprefix("torch."))
