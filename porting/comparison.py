"""Runs two models and compares them call by call. What the results mean is in `porting.parity`.

Each batch goes through five runs. PyTorch in float32 is recorded. PyTorch in float64 gives the errors of that
recording, and Keras its own. Then both run once more, steered: every module and layer takes the recording's inputs and
hands on its outputs, so that what it makes of them shows its own error and nobody else's. Only float32 tensors are
kept: the recording, and its distance to the truth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.activations import Replacement, keras_tensors_in, observe_layers, observe_modules, tensors_in
from porting.audit import audit_settings
from porting.diagnosis import Diagnosis, diagnose
from porting.layout import Array
from porting.parity import (
    ACCUMULATED,
    FLOAT32_ROUNDOFF,
    INPUT,
    ISOLATED,
    OUTPUT,
    VIEWS,
    Divergence,
    LayerComparison,
    Limits,
    LogitsComparison,
    ParityReport,
    View,
)
from porting.progress import SILENT, Progress
from porting.statistics import DifferenceSum, DistanceSum

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn


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
class _Call:
    """What one call of a module took and gave in float32, and how far that is from the truth."""

    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    input_errors: list[Tensor] = field(default_factory=list)
    output_errors: list[Tensor] = field(default_factory=list)


class _Recorder:
    """Keeps what every module takes and gives."""

    watches_inputs = True

    def __init__(self, *, copies: bool) -> None:
        self.calls: dict[str, _Call] = {}
        self.order: list[str] = []
        self._copies = copies
        self._versions: list[tuple[Tensor, int]] = []

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self.calls[name] = _Call(self._keep(inputs))
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        self.calls[name].outputs = self._keep(outputs)
        self.order.append(name)
        return None

    def _keep(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._copies:
            return [tensor.detach().clone() for tensor in tensors]
        self._versions += [(tensor, tensor._version) for tensor in tensors]
        return [tensor.detach() for tensor in tensors]

    @property
    def overwritten(self) -> bool:
        """Whether something kept was changed in place afterwards, as `x += y` or an in-place ReLU does."""
        return any(tensor._version != version for tensor, version in self._versions)


class _TruthObserver:
    """Runs beside the recorded float32 calls in float64 and notes their errors; `forced` steers it along them."""

    def __init__(self, calls: Mapping[str, _Call], sums: Mapping[str, _LayerSum], *, forced: bool) -> None:
        self.calls, self.sums, self.forced = calls, sums, forced
        self.watches_inputs = forced

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        if not self.forced or name not in self.calls:
            return None
        call = self.calls[name]
        call.input_errors = self._errors(name, INPUT, call.inputs, inputs)
        return [_as_truth(tensor) for tensor in call.inputs]

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        if name not in self.calls:
            return None
        call = self.calls[name]
        view = ISOLATED if self.forced else ACCUMULATED
        call.output_errors = self._errors(name, view, call.outputs, outputs)
        return [_as_truth(tensor) for tensor in call.outputs] if self.forced else None

    def _errors(self, name: str, view: str, expected: list[Tensor], truth: list[Tensor]) -> list[Tensor]:
        errors = []
        for index, (one, other) in enumerate(zip(expected, truth, strict=True)):
            error = (one.double() - other).float() if one.is_floating_point() else (one != other).float()
            sums = self.sums[name].view(view, index)
            sums.scale.add(other)
            sums.expected_error.add(error)
            errors.append(error)
        return errors


def _as_truth(tensor: Tensor) -> Tensor | None:
    return tensor.double() if tensor.is_floating_point() else None


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
        moves = [_alignment(*both) for both in zip(call.inputs, inputs, strict=False)]
        comparable = len(call.inputs) == len(inputs) and all(tensor.is_floating_point() for tensor in call.inputs)
        if not comparable or None in moves:
            # The two take their tensors in other ways: one side pads in a layer of its own, say. What the parent
            # gives is then as good, for it too comes from the reference's tensors.
            layer.views.pop(INPUT, None)
            return None
        replacements: list[Tensor | None] = []
        for index, (actual, expected, move) in enumerate(zip(inputs, call.inputs, moves, strict=True)):
            assert move is not None  # ruled out above
            aligned = move(expected)
            layer.view(INPUT, index).actual_error.add(actual - aligned + move(call.input_errors[index]))
            replacements.append(aligned)
        call.inputs, call.input_errors = [], []
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
        for index, (actual, expected) in enumerate(zip(outputs, call.outputs, strict=True)):
            view = layer.view(view_name, index)
            move = _alignment(expected, actual)
            if move is None:
                view.problem = f"shape {tuple(actual.shape)} instead of {tuple(_channels_last(expected).shape)}"
                return None
            aligned = move(expected).contiguous()
            error = actual - aligned + move(call.output_errors[index])
            view.actual_error.add(error)
            if not self.forced:
                limit = self.limits.of(source) * max(view.expected_error.max, FLOAT32_ROUNDOFF * view.scale.max)
                layer.difference.add(actual, aligned.to(actual.dtype), error, limit, self.samples_before)
                layer.shape = (self.samples_before + actual.shape[0], *actual.shape[1:]) if actual.ndim else ()
                layer.dtypes = (str(expected.dtype).removeprefix("torch."), str(actual.dtype).removeprefix("torch."))
            replacements.append(aligned)
        if not self.keep:
            call.outputs, call.output_errors = [], []
        return replacements if self.forced else None


Move = Callable[["Tensor"], "Tensor"]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1) if tensor.ndim > 2 else tensor


def _channels_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 1) if tensor.ndim > 2 else tensor


def _alignment(expected: Tensor, actual: Tensor) -> Move | None:
    """How to bring PyTorch's tensor into Keras's axis order; None where no order of axes fits.

    Where several fit, all sides being equal, the order is the one in which the two tensors agree best.
    """
    moves: tuple[Move, ...] = (_channels_last, _channels_first, lambda tensor: tensor)
    fitting = [move for move in moves if move(expected).shape == actual.shape]
    if len(fitting) <= 1 or expected.ndim < 3 or _channels_last(expected).shape != expected.shape:
        return fitting[0] if fitting else None
    return min(fitting, key=lambda move: float((actual - move(expected)).abs().nan_to_num().sum()))


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
    truth_model = copy.deepcopy(reference).double()
    target_of = {module: module for module, _ in reference.named_modules() if module} | dict(pairs or {})
    source_of = {_dotted(target): source for source, target in target_of.items()} | {OUTPUT: OUTPUT}
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
            recorder = _record(reference, tensors)
            calls = recorder.calls
            for call in recorder.order:
                if call not in sums:
                    order.append(call)
                    sums[call] = _LayerSum(kinds.get(call.partition("#")[0], "output"))

            for forced in (False, True) if isolated else (False,):
                step("PyTorch, float64, layer by layer" if forced else "PyTorch, float64")
                truth = _TruthObserver(calls, sums, forced=forced)
                with observe_modules(truth_model, truth):
                    truth.after(OUTPUT, tensors_in(truth_model(*exact)))
                step("Keras, layer by layer" if forced else "Keras")
                keep = isolated and not forced
                observer = _CandidateObserver(calls, sums, source_of, limits, start, forced=forced, keep=keep)
                expected_output = calls[OUTPUT].outputs
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
        layers=tuple(sums[call].total(call) for call in order if call in seen),
        unpaired_source=tuple(call for call in order if call not in seen),
        unpaired_target=tuple(lone),
        logits=_compare_logits(logits),
        input_shapes=tuple(tuple(array.shape) for array in arrays),
        limits=limits,
        name=name,
        audit=audit_settings(reference, candidate, targets),
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
        calls = _record(reference, tensors).calls
        sums = {name: _LayerSum("") for name in calls}
        for call in calls.values():
            call.input_errors = [torch.zeros_like(tensor) for tensor in call.inputs]
            call.output_errors = [torch.zeros_like(tensor) for tensor in call.outputs]
        kept = {name: (call.inputs, call.outputs) for name, call in calls.items()}
        catcher = _Catcher(first.layer, calls, sums, source_of, Limits(), 0, forced=True, keep=True)
        with observe_layers(candidate, catcher):
            result = candidate(inputs[0] if len(inputs) == 1 else inputs, training=False)
        catcher.after(OUTPUT, keras_tensors_in(result))
    taken, given = kept[first.layer]
    expected = taken if first.view == INPUT else given
    actual = catcher.taken if first.view == INPUT else catcher.given
    if not expected or not actual:
        return None
    found = _in_order_of(expected[0], actual[0])
    if found is None:
        return None
    parent = first.layer.rpartition(".")[0]
    scope = f"{parent}." if parent else ""
    near = {name: tensors for name, tensors in kept.items() if name.startswith(scope) and name != first.layer}
    others = {name: outputs[0] for name, (_, outputs) in near.items() if outputs and name != OUTPUT}
    if parent in kept and kept[parent][0]:
        others[f"the input of {parent}"] = kept[parent][0][0]
    base = first.layer.partition("#")[0]
    module = None if first.view == INPUT or first.layer == OUTPUT else reference.get_submodule(base)
    return diagnose(first.layer, module, taken if module is not None else [], expected[0], found, others)


def _in_order_of(expected: Tensor, actual: Tensor) -> Tensor | None:
    """Keras's tensor in PyTorch's axis order; None where no order of axes fits."""
    move = _alignment(expected, actual)
    if move is _channels_last:
        return _channels_first(actual)
    if move is _channels_first:
        return _channels_last(actual)
    return None if move is None else actual


def _to_channels_first(array: Array) -> Array:
    return np.moveaxis(array, -1, 1) if array.ndim > 2 else array


def _record(reference: nn.Module, tensors: list[Tensor]) -> _Recorder:
    """Runs the reference; a second time with copies where it overwrites what was kept."""
    recorder = _Recorder(copies=False)
    for copies in (False, True):
        recorder = _Recorder(copies=copies)
        given = [tensor.clone() for tensor in tensors] if copies else tensors
        with observe_modules(reference, recorder):
            outputs = tensors_in(reference(*given))
        if not recorder.overwritten:
            break
    recorder.before(OUTPUT, [])
    recorder.after(OUTPUT, outputs)
    return recorder


def _compare_logits(pairs: list[tuple[Array, Array]]) -> LogitsComparison | None:
    """None where the output is not one row of numbers a sample."""
    if not pairs or any(one.ndim != 2 or one.shape != other.shape or one.shape[1] < 2 for one, other in pairs):
        return None
    expected, actual = (np.concatenate(side) for side in zip(*pairs, strict=True))
    kept = min(5, expected.shape[1])
    best = [np.sort(np.argsort(side, axis=1, kind="stable")[:, -kept:], axis=1) for side in (expected, actual)]
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
