"""Compares every Keras layer while it runs: in float64, which also pairs it with its partner, and in float32."""

from __future__ import annotations

import functools
import math
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from porting.kinds.activation import KIND as ACTIVATION
from porting.models.inputs import Axes, Inputs, leaves_by_key
from porting.models.observe import Replacement, applied, to_torch
from porting.parity.background import Background
from porting.parity.content import (
    ROUNDED,
    SAME,
    SAME_IN_FLOAT32,
    Match,
    Place,
    Truth,
    as_real,
    is_result,
    is_whole,
    place_of_result,
)
from porting.parity.measure import DifferenceSum, DistanceSum, measure_distance, measure_size
from porting.parity.record import Recording, output_name
from porting.parity.report import (
    FLOAT32_ROUNDOFF,
    Limits,
)
from porting.parity.results import other_shape, pair_results
from porting.parity.session import Pair, Session

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Waiting:
    """A tensor that a layer has returned, and the comparison with its likely partner, which is being made.

    There is no comparison yet where the same tensor waits already, such as a block's result that is its last layer's.
    """

    name: str
    inputs: list[Tensor]
    index: int
    output: Tensor
    comparison: Future[Match | None] | None


class ExactObserver:
    """Compares every Keras layer in float64 as it runs, and pairs its results by content.

    With a `background`, comparisons with likely partners are made there, and the model goes on meanwhile. All else is
    done in the order of the calls. `is_late` says that a result should have been replaced, and the model has gone on
    with its own: then this pass is void, and has to be made again without a background.
    """

    def __init__(
        self,
        session: Session,
        recording: Recording,
        samples_before: int,
        batch: Inputs,
        background: Background | None = None,
    ) -> None:
        import torch

        self.session, self.recording, self._background = session, recording, background
        self.is_late = False
        self._waiting: deque[_Waiting] = deque()
        self.samples_before = samples_before
        self.watches_inputs = bool(session.computed)
        self._inputs: list[list[Tensor]] = []  # of the calls that have begun
        # Those layers are told from mistakes by what they take, and what PyTorch's code makes of them.
        others: list[Tensor] = []
        if session.computed:
            others += [torch.from_numpy(array) for array in batch.candidate]
            others += session.tensors_of_code(batch, recording)
        self.library = session.library(recording, others)
        self.wanted: set[int] = set()
        self.matched: set[int] = set()
        self._known: dict[int, tuple[weakref.ref[Any], list[Match]]] = {}
        # Set once a tensor is nearly right: what differs after it need not be the rounding of float32.
        self._is_doubtful = False

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self._inputs.append(inputs)
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        self.session.called[name] = None
        inputs = self._inputs.pop()
        if self.is_late:
            return None
        if self._compare_later(name, inputs, outputs):
            self._take_up(all_of_them=False)
            return None
        self._take_up(all_of_them=True)
        if self.is_late:
            return None
        replacements: list[Tensor | None] = [self._compare(name, inputs, *pair) for pair in enumerate(outputs)]
        return replacements if any(each is not None for each in replacements) else None

    def _compare_later(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        """Begin to compare results with their likely partners in the background, if all of them have one."""
        if self._background is None:
            return False
        partners: list[tuple[int, Truth]] = []
        for index, output in enumerate(outputs):
            actual = as_real(output)
            if actual.numel() < 2:
                continue
            truth = self._likely(name, index)
            if truth is None or truth.tensor.numel() != actual.numel():
                return False
            partners.append((index, truth))
        for index, truth in partners:
            output, comparison = outputs[index], None
            if not any(each.output is output for each in self._waiting):
                match = functools.partial(self.library.match, as_real(output), truth, likely=True)
                comparison = self._background.submit(match, output)
            self._waiting.append(_Waiting(name, inputs, index, output, comparison))
        return True

    def _likely(self, name: str, index: int) -> Truth | None:
        """The partner in an earlier batch, or else the one by name; None where a result may have to be replaced."""
        pair = self.session.pairs.get((name, index))
        if pair is None or pair.named:
            return self._named_truth(name, index)
        return None if pair.in_float32 or pair.reordered else pair.truth(self.recording)

    def _take_up(self, *, all_of_them: bool) -> None:
        """Go on with what was waiting for comparisons, in the order of the calls, or with what need not wait longer."""
        while self._waiting:
            first = self._waiting[0]
            comparison = first.comparison
            if not all_of_them and comparison is not None and not comparison.done():
                return
            self._waiting.popleft()
            found = self._known_matches(first.output) if comparison is None else comparison.result()
            if found is None and self._background is not None:
                self._background.wait()  # so that no other thread uses the library
            if self._compare(first.name, first.inputs, first.index, first.output, comparison) is not None:
                self.is_late = True
                self._waiting.clear()

    def _compare(
        self,
        name: str,
        inputs: list[Tensor],
        index: int,
        output: Tensor,
        comparison: Future[Match | None] | None = None,
    ) -> Tensor | None:
        session, actual = self.session, as_real(output)
        if actual.numel() < 2:
            return None
        pair = session.pairs.get((name, index))
        if pair is not None and not pair.named:
            truth = pair.truth(self.recording)
            found = None if truth is None else self._match(actual, truth, pair, comparison)
            if found is not None:
                self._include(pair, found, actual)
                return _steered(found, output) if pair.in_float32 else None
            comparison = None  # which was with this partner
        matches = self._matches(name, inputs, index, output, comparison)
        if not matches:
            self._without_partner(name, index, actual)
            return None
        place = pair.place if pair is not None and not pair.named else None
        if not any(place in match.truth.places for match in matches):
            place = self._choose(name, index, matches)
        for match in matches:
            self.matched.add(id(match.truth))
        if place is None:
            return _steered(matches[0], output) if matches[0].in_float32 else None
        match = next(match for match in matches if place in match.truth.places)
        if pair is None or pair.named:
            pair = self._new_pair(name, index, place, match)
        pair.in_float32 |= match.in_float32  # zeros in an earlier batch did not show it
        self._include(pair, match, actual)
        return _steered(match, output) if match.in_float32 else None

    def _match(self, actual: Tensor, truth: Truth, pair: Pair, comparison: Future[Match | None] | None) -> Match | None:
        tolerance = SAME_IN_FLOAT32 if pair.in_float32 and not self._is_doubtful else SAME
        found = self._compared(actual, truth, comparison, tolerance)
        if found is None and pair.reordered:
            found = next((each for each in self.library.find(actual) if each.truth is truth), None)
        return found if found is None or not pair.in_float32 else replace(found, in_float32=True)

    def _matches(
        self,
        name: str,
        inputs: list[Tensor],
        index: int,
        output: Tensor,
        comparison: Future[Match | None] | None,
    ) -> list[Match]:
        """Find all partners by content. If the partner by name has the same content, it alone is returned."""
        known = self._known_matches(output)
        # What a layer inside could not explain, the layer around it may, if the port computed its weights.
        if known is not None and (known or name not in self.session.computed):
            return known
        named, actual = self._named_truth(name, index), as_real(output)
        match = None if named is None else self._compared(actual, named, comparison)
        matches = [match] if match is not None else self.library.find(actual)
        if not matches:
            # Some layers always compute in float32.
            inside, has_mistake = self.session.inside_float32(self.library, name, inputs, output)
            self._is_doubtful |= has_mistake
            matches += [] if self._is_doubtful else inside
        self._known[id(output)] = weakref.ref(output), matches
        return matches

    def _compared(
        self, actual: Tensor, truth: Truth, comparison: Future[Match | None] | None, tolerance: float = SAME
    ) -> Match | None:
        """Compare a tensor with its likely partner, or take what was found in the background."""
        if comparison is not None:
            return comparison.result()
        return self.library.match(actual, truth, tolerance, likely=True)

    def _known_matches(self, output: Tensor) -> list[Match] | None:
        """The partners of a tensor that was compared before; None if it was not."""
        known = self._known.get(id(output))
        return known[1] if known is not None and known[0]() is output else None

    def _named_truth(self, name: str, index: int) -> Truth | None:
        source = self.session.names.source(name, self.recording.calls)
        if source is None:
            return None
        outputs = self.recording.calls[source].outputs
        return outputs[index] if index < len(outputs) else None

    def _choose(self, name: str, index: int, matches: list[Match]) -> Place | None:
        """The place that this tensor stands for: by name, else the first free one, of the same kind if possible."""
        session = self.session
        source = session.names.source(name, self.recording.calls)
        places = [place for match in matches for place in match.truth.places if not is_result(place)]
        if (source, True, index) in places:
            return source, True, index  # type: ignore[return-value]  # in `places`, so not None
        free = [place for place in places if place not in session.used]
        results = [place for place in free if place[1]]
        own_kind = [place for place in results if session.kind_matches(place[0], name)]
        return next(iter((*own_kind, *results, *free)), None)

    def _new_pair(self, name: str, index: int, place: Place, match: Match) -> Pair:
        session, (call, is_output, number) = self.session, place
        label = call if is_output else f"input of {call}"
        source = label if number == 0 else f"{label}[{number}]"
        order = self.recording.order.get(call, len(self.recording.order)) - (0.0 if is_output else 0.5)
        pair = Pair(name, index, source, place, order, in_float32=match.in_float32, reordered=match.reordered)
        pair.is_whole = match.truth.is_whole
        pair.axes = None if match.reordered else match.axes
        session.pairs[name, index] = pair
        session.used.add(place)
        if match.reordered:
            session.written[source] = "the same numbers in another order"
        named = session.names.source(name, self.recording.calls)
        if named is not None and is_output and named != call and index == 0:
            session.notes[f"{name} in Keras gives what {source} gives in PyTorch"] = None
        return pair

    def _without_partner(self, name: str, index: int, actual: Tensor) -> None:
        """Measure the difference to the partner by name, if any. The outputs decide whether that difference matters."""
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
        expected = self._activated(name, expected)
        pair.exact.scale.include(measure_size(expected))
        pair.exact.actual_error.include(measure_distance(actual, expected))

    def _activated(self, name: str, expected: Tensor) -> Tensor:
        """A module's result behind the activation that Keras has in the layer, if PyTorch has such a tensor."""
        function = ACTIVATION.inside(self.session.layer(name))
        if function is None:
            return expected
        made = as_real(applied(function, expected))
        return made if self.library.find(made) else expected

    def _include(self, pair: Pair, match: Match, actual: Tensor) -> None:
        pair.exact.scale.include(match.truth.size)
        pair.exact.actual_error.include(match.distance)
        pair.shape = (self.samples_before + actual.shape[0], *actual.shape[1:]) if actual.ndim else ()
        self.wanted.add(id(match.truth))
        self.matched.add(id(match.truth))

    def results(self, result: Any) -> dict[str, Any]:
        """Compare the results of the model. Their axes follow the convention and are never chosen to fit."""
        session = self.session
        self._take_up(all_of_them=True)
        found = {key: to_torch(leaf) for key, leaf in leaves_by_key(result).items()}
        session.has_whole_results &= all(is_whole(as_real(leaf)) for leaf in found.values())
        partners, notes = pair_results(self.recording.outputs, found)
        session.caveats.update(dict.fromkeys(notes))
        for theirs, ours in partners.items():
            truth, actual = self.recording.outputs[theirs], as_real(found[ours])
            source = output_name(theirs)
            pair = session.results.get(theirs)
            if pair is None:
                target = output_name(ours)
                pair = session.results[theirs] = Pair(target, 0, source, place_of_result(theirs), math.inf)
            axes = session.axes_of_result(theirs, truth.tensor.ndim)
            expected = truth.tensor.permute(axes) if len(axes) == truth.tensor.ndim else truth.tensor
            pair.shape = (self.samples_before + actual.shape[0], *actual.shape[1:]) if actual.ndim else ()
            self.wanted.add(id(truth))
            if expected.shape != actual.shape:
                pair.exact.problem = other_shape(actual, expected, truth)
                continue
            distance = measure_distance(actual, expected)
            in_float32 = session.computes_in_float32(found[ours], Match(truth, axes, distance))
            in_float32 &= not self._is_doubtful
            pair.in_float32 |= in_float32 and not distance.total().rms <= ROUNDED * truth.rms
            pair.exact.scale.include(truth.size)
            pair.exact.actual_error.include(distance)
        return found


def _steered(match: Match, output: Tensor) -> Tensor:
    """The truth, to put in place of a result that was computed in float32."""
    import torch

    expected = match.expected(as_real(output))
    return torch.view_as_complex(expected.contiguous()) if output.is_complex() else expected


def _in_shape(expected: Tensor, actual: Tensor, inputs: Inputs) -> Tensor | None:
    """PyTorch's tensor in Keras's shape, by the first order of axes that fits; None if none does.

    The convention comes first, then the unchanged order, then channels last and channels first.
    """
    rank = expected.ndim
    orders = [inputs.output_axes(rank), tuple(range(rank))]
    orders += [(0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))] if rank > 2 else []
    for axes in orders:
        if tuple(expected.shape[axis] for axis in axes) == tuple(actual.shape):
            return expected.permute(axes)
    return expected.permute(orders[0]).reshape(actual.shape) if expected.numel() == actual.numel() else None


class RoundingObserver:
    """Compares every paired Keras layer in float32."""

    watches_inputs = False

    def __init__(
        self,
        session: Session,
        recording: Recording,
        limits: Limits,
        samples_before: int,
        background: Background | None = None,
    ) -> None:
        self.session, self.recording, self.limits = session, recording, limits
        self.samples_before, self._background = samples_before, background
        self._waiting: deque[Future[None]] = deque()
        self._known: dict[tuple[int, int], tuple[weakref.ref[Any], DifferenceSum, DistanceSum]] = {}

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        for index, output in enumerate(outputs):
            pair = self.session.pairs.get((name, index))
            if pair is not None and not pair.named and not pair.reordered:
                if self._background is None:
                    self._compare(pair, output, None)
                else:
                    compare = functools.partial(self._compare, pair, output, None)
                    self._waiting.append(self._background.submit(compare, output))
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        return None

    def results(self, found: Mapping[str, Any], partners: Mapping[str, str]) -> None:
        while self._waiting:
            self._waiting.popleft().result()
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
        expected: Tensor | None
        if axes is None and pair.axes is not None and truth.tensor.numel() == actual.numel():
            expected = truth.tensor.permute(pair.axes).reshape(actual.shape)
        elif axes is None:
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
            power = truth.size.sum_of_squares
            size = difference.add(actual, expected.contiguous(), None, limit, expected_power=power)
            self._known[id(output), id(truth)] = weakref.ref(output), difference, size
        sums.actual_error.include(size)
        pair.difference.include(difference)
        pair.dtype = str(output.dtype).removeprefix("torch.")
        pair.measured = True
