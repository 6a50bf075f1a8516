"""Where two models part, and why: every mistake in one run.

The Keras model runs in float64 once more, and every tensor that a layer takes or gives is held against the PyTorch
model's. From the outputs that differ the search goes back through the layers, as long as what a layer took differs too.
A layer that took the truth and gave something else is the culprit. It is given the truth there, and the search goes on
with the next, until the outputs agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_of_layer, kind_of_module
from porting.models.inputs import Axes, Inputs, inverse, leaves_by_key
from porting.models.observe import Replacement, observe_layers
from porting.parity.content import (
    SAME,
    SAME_IN_FLOAT32,
    Library,
    Match,
    Truth,
    as_real,
    computes_in_float32,
)
from porting.parity.diagnose import diagnose
from porting.parity.measure import measure_candidate
from porting.parity.record import Recording, output_name
from porting.parity.report import OUTPUT, Culprit, Diagnosis, Limits

if TYPE_CHECKING:
    from torch import Tensor

    from porting.parity.compare import Session

# Below this, relative to a tensor's RMS, float64's own rounding lies.
_FINEST = 2e-14
# Numbers of a weight that differ, up to which they are named one by one.
_FEW = 3


@dataclass(eq=False)
class _Node:
    """A call of a Keras layer: what it took and gave, and the calls inside it."""

    name: str
    parent: _Node | None
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    began: int = 0


@dataclass(frozen=True)
class _Gap:
    """A tensor that no layer made and that is wrong: what feeds `node` (None: the result `key`)."""

    node: _Node | None
    index: int
    key: str = ""


# Where a truth is put in: a call, whether it is its result, and which.
_Place = tuple[str, bool, int]


class _Tracer:
    """Keeps every tensor of a Keras run, and puts the truth in at the places in `fixes`."""

    watches_inputs = True

    def __init__(self, library: Library, fixes: dict[_Place, Tensor], tolerance: float) -> None:
        self.library, self.fixes, self.tolerance = library, fixes, tolerance
        self.nodes: list[_Node] = []
        self._stack: list[_Node] = []
        self._producers: dict[int, _Node] = {}
        self._exact: dict[int, tuple[Tensor, Match | None, bool]] = {}
        # What was put in or assumed is right whatever the tolerance.
        self._given: set[int] = set()
        # All that has been seen: memory that is freed is given to another tensor, and would be taken for the first.
        self._alive: list[Tensor] = []

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self._alive += inputs
        parent = self._stack[-1] if self._stack else None
        node = _Node(name, parent, list(inputs), began=len(self.nodes))
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
            self._producers.setdefault(_key(output), node)
        replaced = self._fixed(name, True, node.outputs)
        if replaced is not None:
            return replaced
        inside = [self._inside(output) for output in outputs]
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

    def _inside(self, output: Tensor) -> Tensor | None:
        """The truth in the place of a result that was computed in float32."""
        if self.is_exact(output):
            return None
        for match in self.library.find(as_real(output), SAME_IN_FLOAT32):
            if computes_in_float32(output, match):
                expected = match.expected(as_real(output)).contiguous()
                self._give(expected, match)
                return expected
        return None

    def refine(self, tolerance: float) -> None:
        """Asks again, with a finer tolerance, for all that the library was asked for."""
        if tolerance < self.tolerance:
            self.tolerance = tolerance
            self._exact = {key: each for key, each in self._exact.items() if key in self._given}

    def assume(self, tensor: Tensor) -> None:
        """Takes a tensor for right: nothing is known of it."""
        self._give(tensor, None)

    def _give(self, tensor: Tensor, match: Match | None) -> None:
        self._exact[_key(tensor)] = tensor, match, True
        self._given.add(_key(tensor))

    def producer(self, tensor: Tensor) -> _Node | None:
        return self._producers.get(_key(tensor))

    def match(self, tensor: Tensor) -> Match | None:
        self.is_exact(tensor)
        return self._exact[_key(tensor)][1]

    def is_exact(self, tensor: Tensor) -> bool:
        """Whether the PyTorch model has this tensor, or one that it is a part of; a single number says nothing."""
        key = _key(tensor)
        if key not in self._exact:
            actual = as_real(tensor)
            matches = self.library.find(actual, self.tolerance) if actual.numel() > 1 else []
            exact = actual.numel() < 2 or bool(matches) or self.library.find_part(actual) is not None
            self._exact[key] = tensor, next(iter(matches), None), exact
        return self._exact[key][2]


def _key(tensor: Tensor) -> int:
    """Keras's tensors come over without a copy, so the memory tells which is which."""
    return int(tensor.data_ptr()) or id(tensor)


def locate(session: Session, inputs: Inputs, limits: Limits, most: int) -> Iterator[Culprit]:
    """The culprits in data flow, at most so many; nothing where the outputs agree."""
    recording = session.record_truth(inputs)
    library = session.library(recording)
    fixes: dict[_Place, Tensor] = {}
    innocent: set[_Place] = set()
    found: list[tuple[int, Culprit]] = []
    previous: tuple[float, int] | None = None
    last: _Place | None = None
    tolerance = SAME
    for _ in range(3 * most):
        tracer = _Tracer(library, fixes, tolerance)
        with session.float64.active() as model, observe_layers(model, tracer) as seen:
            result = model(inputs.for_candidate(model), training=False)
            ours = {key: seen(leaf) for key, leaf in leaves_by_key(result).items()}
        wrong = _wrong_results(session, recording, ours, tolerance)
        if not wrong:
            break
        worst = max(relative for _, _, relative in wrong)
        # What is left may be smaller than all before.
        tolerance = min(SAME, max(_FINEST, worst / 10))
        tracer.refine(tolerance)
        agreeing = sum(any(tracer.is_exact(output) for output in node.outputs) for node in tracer.nodes)
        if last is not None and previous is not None and agreeing <= previous[1] and worst >= 0.5 * previous[0]:
            # The truth there did no good: the layer was only written in another way.
            innocent.add(last)
            fixes.pop(last, None)
            found.pop()
            last = None
            continue
        previous = worst, agreeing
        place, culprit, truth = _next_culprit(session, recording, tracer, wrong, innocent)
        if culprit is None:
            break
        found.append((place[2] if place else 0, culprit))
        last = None
        if truth is None or place is None or len(found) >= most:
            break
        last = place[0], place[1], place[3] if len(place) > 3 else 0
        fixes[last] = truth
    yield from _once_a_layer([culprit for _, culprit in found])


def _once_a_layer(culprits: list[Culprit]) -> Iterator[Culprit]:
    """A layer that is called several times is one culprit, under its own name."""
    calls: dict[tuple[str, bool], list[Culprit]] = {}
    for culprit in culprits:
        calls.setdefault((culprit.layer.partition("#")[0], culprit.is_input), []).append(culprit)
    for (layer, _), several in calls.items():
        if len(several) == 1:
            yield several[0]
        else:
            target = several[0].target.partition("#")[0]
            yield replace(
                several[0], layer=layer, target=target, reason=f"{several[0].reason}, in {len(several)} calls"
            )


def _wrong_results(
    session: Session, recording: Recording, ours: dict[str, Tensor], tolerance: float
) -> list[tuple[str, Tensor, float]]:
    """Results that differ: key, Keras's tensor, and by how much of the truth's RMS."""
    from porting.parity.results import pair_results

    partners, _ = pair_results(recording.outputs, ours)
    wrong = []
    for theirs, own in partners.items():
        truth, actual = recording.outputs[theirs], as_real(ours[own])
        axes = session.axes_of_result(theirs, truth.tensor.ndim)
        expected = truth.tensor.permute(axes)
        if expected.shape != actual.shape:
            wrong.append((theirs, ours[own], 1.0))
            continue
        distance = measure_candidate(actual, expected, None).total().rms
        relative = distance / truth.rms if truth.rms else float(distance > 0)
        inside = computes_in_float32(ours[own], Match(truth, axes, measure_candidate(actual, expected, None)))
        limit = SAME_IN_FLOAT32 if inside else min(tolerance, 1e-13)
        if not relative <= limit:
            wrong.append((theirs, ours[own], relative))
    return wrong


def _next_culprit(
    session: Session,
    recording: Recording,
    tracer: _Tracer,
    wrong: list[tuple[str, Tensor, float]],
    innocent: set[_Place],
) -> tuple[Any, Culprit | None, Tensor | None]:
    """The first culprit behind the results that differ: where it is, what is to be said, and the truth to put in."""

    def known(node: _Node) -> bool:
        return _partner(session, recording, tracer, node) is not None

    while True:
        candidates: list[tuple[int, _Node | _Gap]] = []
        for key, tensor, _ in wrong:
            found = _search(tracer, tensor, _Gap(None, 0, key), innocent, known)
            if isinstance(found, _Node):
                candidates.append((found.began, found))
            else:
                candidates.append((found.node.began if found.node is not None else len(tracer.nodes), found))
        began, first = min(candidates, key=lambda each: each[0])
        if isinstance(first, _Gap):
            break
        call = _partner(session, recording, tracer, first)
        if call is not None:
            call = _with_what_is_fused(session, recording, first, call)
            taken = _wrongly_taken(tracer, first, recording.calls[call].inputs)
            if taken is not None:
                return _wrong_input(session, recording, tracer, _Gap(first, taken), began)
            return _own_mistake(session, recording, tracer, first, call, began)
        # PyTorch has no module for it, a padding say: whoever takes its result is to be looked at.
        for output in first.outputs:
            tracer.assume(output)
        given = {_key(output) for output in first.outputs}
        result = next((key for key, tensor, _ in wrong if _key(tensor) in given), None)
        if result is not None:
            return None, _wrong_result(session, recording, result, wrong), None
    other = _gives_anothers(session, recording, tracer, first, innocent)
    if other is not None:
        return _own_mistake(session, recording, tracer, *other, other[0].began)
    if first.node is None:
        return None, _wrong_result(session, recording, first.key, wrong), None
    return _wrong_input(session, recording, tracer, first, began)


def _gives_anothers(
    session: Session, recording: Recording, tracer: _Tracer, gap: _Gap, innocent: set[_Place]
) -> tuple[_Node, str] | None:
    """A call before a gap, within the same layer, that gives a tensor of PyTorch's, but not that of its namesake."""
    parent = gap.node.parent if gap.node is not None else None
    limit = gap.node.began if gap.node is not None else len(tracer.nodes)
    for node in tracer.nodes:
        if node.parent is not parent or node.began >= limit or (node.name, True, 0) in innocent or not node.outputs:
            continue
        call = session.names.source(node.name, recording.calls)
        if call is None or f"{call.partition('#')[0]}#1" in recording.calls:
            continue  # of several calls the order says nothing
        outputs = recording.calls[call].outputs
        if not outputs or outputs[0].tensor.numel() != node.outputs[0].numel():
            continue
        if tracer.library.match(as_real(node.outputs[0]), outputs[0]) is None:
            return node, call
    return None


def _search(
    tracer: _Tracer, tensor: Tensor, gap: _Gap, innocent: set[_Place], known: Callable[[_Node], bool]
) -> _Node | _Gap:
    """Back from a tensor that differs to the call that made it of what agrees, or to where nothing is known.

    A call that PyTorch has no partner for, such as a recurrent layer's cell, is a part of the one around it.
    """
    seen: set[int] = set()
    while True:
        seen.add(_key(tensor))
        node = tracer.producer(tensor)
        if node is None or (node.name, True, 0) in innocent:
            # No layer made it, so what made it took what layers gave: those beside the one that takes it.
            before = _beside(tracer, gap, innocent)
            step = next((each for each in before if _key(each) not in seen), None)
            around = gap.node.parent if gap.node is not None else None
            if step is None and gap.node is not None and around is not None and not known(gap.node):
                step = next(
                    (each for each in around.inputs if not tracer.is_exact(each) and _key(each) not in seen), None
                )
                if step is None:
                    return around
                gap = _Gap(around, next(i for i, each in enumerate(around.inputs) if each is step))
            if step is None:
                return gap
            tensor = step
            continue
        own = [*node.inputs, *(output for child in node.children for output in child.outputs)]
        bad = [each for each in own if not tracer.is_exact(each) and _key(each) not in seen]
        if not bad:
            return node
        tensor = bad[0]
        gap = _Gap(node, next((i for i, each in enumerate(node.inputs) if each is tensor), 0))
        if not any(each is tensor for each in node.inputs):
            inner = next(c for c in node.children if any(o is tensor for o in c.outputs))
            gap = _Gap(inner, 0)


def _beside(tracer: _Tracer, gap: _Gap, innocent: set[_Place]) -> list[Tensor]:
    """Results that differ of the calls before, within the same layer, that no later call has healed."""
    parent = gap.node.parent if gap.node is not None else None
    limit = gap.node.began if gap.node is not None else len(tracer.nodes)
    found = []
    for node in tracer.nodes:
        if (
            node.parent is parent
            and node.began < limit
            and node is not gap.node
            and (node.name, True, 0) not in innocent
        ):
            found += [output for output in node.outputs if not tracer.is_exact(output)]
    return found


def _wrongly_taken(tracer: _Tracer, node: _Node, expected: list[Truth]) -> int | None:
    """Which input of a call is not what its partner took, though as large; None where all are, or cannot be told."""
    if len(expected) != len(node.inputs):
        return None
    for index, (tensor, truth) in enumerate(zip(node.inputs, expected, strict=True)):
        actual = as_real(_behind_paddings(tracer, tensor, truth))
        if actual.numel() != truth.tensor.numel() or actual.numel() < 2:
            continue
        # The same numbers in another order are what a Flatten gives, and whose weights must follow.
        found = tracer.library.find(actual, tracer.tolerance)
        if not any(match.truth is truth for match in found) and tracer.library.match(actual, truth) is None:
            return index
    return None


def _behind_paddings(tracer: _Tracer, tensor: Tensor, truth: Truth) -> Tensor:
    """The tensor, or what a layer that PyTorch has no module for made it of, where that is as large as the truth."""
    while tensor.numel() != truth.tensor.numel():
        producer = tracer.producer(tensor)
        if producer is None or len(producer.inputs) != 1 or tracer.match(tensor) is not None or producer.children:
            return tensor
        tensor = producer.inputs[0]
    return tensor


def _own_mistake(
    session: Session, recording: Recording, tracer: _Tracer, node: _Node, call: str, began: int
) -> tuple[Any, Culprit, Tensor | None]:
    own = next((i for i, output in enumerate(node.outputs) if not tracer.is_exact(output)), 0)
    actual, given = as_real(node.outputs[own]), recording.calls[call].outputs
    # Keras may give the last step where PyTorch gives all of them, and the last beside them.
    as_large = [i for i, each in enumerate(given) if each.tensor.numel() == actual.numel()]
    index = own if own in as_large else next(iter(as_large), min(own, len(given) - 1))
    truth = given[index]
    label = call if own == 0 else f"{call}[{index}]"
    axes = _axes(session, truth.tensor, actual)
    if axes is None:
        text = f"shape {tuple(actual.shape)} for PyTorch's {tuple(truth.tensor.shape)}"
        return None, Culprit(label, node.name, text, 1.0), None
    expected = truth.tensor.permute(axes).reshape(actual.shape).contiguous()
    relative = _relative(actual, expected, truth)
    cause = _cause(session, recording, tracer, node, call, index, axes, actual)
    culprit = Culprit(label, node.name, _by_how_much(relative), relative, diagnosis=cause)
    return (node.name, True, began, own), culprit, expected


def _wrong_input(
    session: Session, recording: Recording, tracer: _Tracer, gap: _Gap, began: int
) -> tuple[Any, Culprit, Tensor | None]:
    node, index = gap.node, gap.index
    assert node is not None  # the caller has seen to it
    call = _partner(session, recording, tracer, node)
    inputs = recording.calls[call].inputs if call is not None else []
    while index < len(inputs) and node.inputs[index].numel() != inputs[index].tensor.numel():
        producer = tracer.producer(node.inputs[index])
        if producer is None or len(producer.inputs) != 1 or producer.children:
            break
        node, index, inputs = producer, 0, [inputs[index]]
    actual = as_real(node.inputs[index])
    if call is None or index >= len(inputs):
        return (
            None,
            Culprit(node.name.replace("/", "."), node.name, "is fed what PyTorch does not have", 1.0, True),
            None,
        )
    truth = inputs[index]
    axes = _axes(session, truth.tensor, actual)
    if axes is None:
        text = f"shape {tuple(actual.shape)} for PyTorch's {tuple(truth.tensor.shape)}"
        return None, Culprit(call, node.name, text, 1.0, True), None
    expected = truth.tensor.permute(axes).reshape(actual.shape).contiguous()
    relative = _relative(actual, expected, truth)
    cause = None
    if expected.ndim == truth.tensor.ndim:
        others = _others(recording, call)
        cause = diagnose(call, None, [], truth.tensor, actual.permute(inverse(axes)), others)
    said = cause or _exchanged(tracer, node, call)
    label, is_input = _to_blame(session, recording, tracer, call, truth)
    culprit = Culprit(label, node.name, _by_how_much(relative), relative, is_input, said)
    return _place_of_input(tracer, node, index, began, truth), culprit, expected


def _to_blame(session: Session, recording: Recording, tracer: _Tracer, call: str, truth: Truth) -> tuple[str, bool]:
    """Whose mistake it is that `call` takes something else than `truth`: a call, and whether it is only fed wrongly."""
    same = [match.truth for match in tracer.library.find(truth.tensor)]
    makers = [
        name
        for each in dict.fromkeys((truth, *same))
        for name, is_output, _ in each.places
        if is_output and name in session.modules and each not in recording.calls[name].inputs
    ]
    nodes = {session.names.source(node.name, recording.calls): node for node in tracer.nodes}
    for maker in makers:
        node = nodes.get(maker)
        if node is not None and _wrongly_taken(tracer, node, recording.calls[maker].inputs) is None:
            return maker, False
    for maker in makers:
        if maker not in nodes and list(session.modules[maker].children()):
            return maker, False
    parent = call.partition("#")[0].rpartition(".")[0]
    while parent in recording.calls and truth in recording.calls[parent].inputs:
        call, parent = parent, parent.rpartition(".")[0]
    return call, True


def _place_of_input(tracer: _Tracer, node: _Node, index: int, began: int, truth: Truth) -> tuple[str, bool, int, int]:
    """Where to put the truth in: at the call that made the wrong tensor, unless what it gives is right elsewhere."""
    producer = tracer.producer(node.inputs[index])
    key = _key(node.inputs[index])
    match = tracer.match(node.inputs[index])
    elsewhere = match is not None and any(
        _key(output) != key and tracer.is_exact(output) and (own := tracer.match(output)) and own.truth is match.truth
        for other in tracer.nodes
        for output in other.outputs
    )
    made = any(each is truth for each in _agreeing(tracer))
    if producer is None or made or producer is node.parent or not (match is None or elsewhere):
        return node.name, False, began, index
    return producer.name, True, began, next((i for i, each in enumerate(producer.outputs) if _key(each) == key), 0)


def _wrong_result(session: Session, recording: Recording, key: str, wrong: list[tuple[str, Tensor, float]]) -> Culprit:
    """A result that layers gave rightly and something behind them changed."""
    actual, relative = next((as_real(tensor), relative) for name, tensor, relative in wrong if name == key)
    truth = recording.outputs[key]
    axes = session.axes_of_result(key, truth.tensor.ndim)
    expected = truth.tensor.permute(axes)
    label = output_name(key)
    if expected.shape != actual.shape:
        text = f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        return Culprit(label, label, text, 1.0)
    cause = None
    other = session.library(recording).match(actual, truth)
    if other is not None and not other.reshaped:
        text = f"its axes are in the order {other.axes}, not {axes}"
        cause = Diagnosis(label, text, 0.0, (text,))
    else:
        found = diagnose(label, None, [], truth.tensor, actual.permute(inverse(axes)), _others(recording, ""))
        cause = found or _as_an_activation(label, expected, actual)
    return Culprit(label, label, _by_how_much(relative), relative, diagnosis=cause)


def _as_an_activation(label: str, expected: Tensor, actual: Tensor) -> Diagnosis | None:
    """A softmax or sigmoid behind the last layer, on one side alone."""
    for cause, guess, target in (
        ("a softmax follows it in Keras alone", expected.softmax(-1), actual),
        ("a softmax follows it in PyTorch alone", actual.softmax(-1), expected),
        ("a sigmoid follows it in Keras alone", expected.sigmoid(), actual),
        ("a sigmoid follows it in PyTorch alone", actual.sigmoid(), expected),
    ):
        left = float((guess - target).square().mean().sqrt())
        if left <= 1e-9 * float(target.square().mean().sqrt()):
            return Diagnosis(label, cause, 0.0, (cause,))
    return None


def _partner(session: Session, recording: Recording, tracer: _Tracer, node: _Node) -> str | None:
    """The PyTorch call that a Keras call stands for: by name; else one that took the same and gives as much."""
    index = next((i for i, output in enumerate(node.outputs) if not tracer.is_exact(output)), 0)
    named = session.names.source(node.name, recording.calls)
    if named is not None and index < len(recording.calls[named].outputs):
        return named
    count = as_real(node.outputs[index]).numel() if node.outputs else 0
    taken = {place[0] for output in _agreeing(tracer) for place in output.places if place[1]}
    fitting = [
        call
        for call, each in recording.calls.items()
        if index < len(each.outputs) and each.outputs[index].tensor.numel() == count and call not in taken
    ]
    match = tracer.match(node.inputs[0]) if node.inputs else None
    same_input = [call for call in fitting if match is not None and match.truth in recording.calls[call].inputs]
    for pool in (same_input, fitting):
        own_kind = [call for call in pool if session.kind_matches(call, node.name)]
        if own_kind:
            return own_kind[0]
    leaves = [call for call in same_input if not list(session.modules[call.partition("#")[0]].children())]
    return leaves[0] if leaves else None


def _with_what_is_fused(session: Session, recording: Recording, node: _Node, call: str) -> str:
    """The call itself, or one that takes its result alone and whose own is much nearer: an activation in a layer."""

    def distance(name: str) -> float:
        outputs = recording.calls[name].outputs
        actual = as_real(node.outputs[0])
        axes = _axes(session, outputs[0].tensor, actual) if outputs else None
        if axes is None:
            return float("inf")
        expected = outputs[0].tensor.permute(axes).reshape(actual.shape)
        return float((actual - expected).square().mean().nan_to_num(float("inf")))

    mine = recording.calls[call].outputs
    behind = [
        name
        for name, each in recording.calls.items()
        if mine
        and len(each.inputs) == 1
        and each.inputs[0] is mine[0]
        and name != call
        and not list(session.modules[name.partition("#")[0]].children())
    ]
    nearest = min((call, *behind), key=distance)
    return nearest if distance(nearest) < 0.01 * distance(call) else call


def _agreeing(tracer: _Tracer) -> list[Truth]:
    matches = [tracer.match(output) for node in tracer.nodes for output in node.outputs]
    return [match.truth for match in matches if match is not None]


def _axes(session: Session, expected: Tensor, actual: Tensor) -> Axes | None:
    """PyTorch's axes in Keras's order: the first that fits the shape, the convention before all others."""
    rank = expected.ndim
    if expected.numel() != actual.numel():
        return None
    same = tuple(range(rank))
    orders = dict.fromkeys((session.inputs.output_axes(rank), same, (0, *range(2, rank), 1) if rank > 2 else same))
    fitting = [axes for axes in orders if tuple(expected.shape[axis] for axis in axes) == tuple(actual.shape)]
    return fitting[0] if fitting else session.inputs.output_axes(rank)


def _relative(actual: Tensor, expected: Tensor, truth: Truth) -> float:
    distance = measure_candidate(actual, expected, None).total().rms
    return distance / truth.rms if truth.rms else float("inf")


def _by_how_much(relative: float) -> str:
    if not np.isfinite(relative):
        return "values that are not finite"
    return f"differs by {relative:.2g} of its size in float64"


def _others(recording: Recording, call: str) -> dict[str, Tensor]:
    """Tensors near a call that might have been taken by mistake, by name."""
    parent = call.partition("#")[0].rpartition(".")[0]
    scope = f"{parent}." if parent else ""
    near = {
        name: each.outputs[0].tensor
        for name, each in recording.calls.items()
        if name.startswith(scope) and name != call and each.outputs and name.partition("[")[0] != OUTPUT
    }
    if parent in recording.calls and recording.calls[parent].inputs:
        near[f"the input of {parent}"] = recording.calls[parent].inputs[0].tensor
    return near


def _cause(
    session: Session,
    recording: Recording,
    tracer: _Tracer,
    node: _Node,
    call: str,
    index: int,
    axes: Axes,
    actual: Tensor,
) -> Diagnosis | None:
    base = call.partition("#")[0]
    module = dict(session.truth_model.named_modules()).get(base)
    layer = session.names.layers.get(node.name.partition("#")[0])
    inputs = [truth.tensor for truth in recording.calls[call].inputs]
    truth = recording.calls[call].outputs[index].tensor
    if module is None or truth.ndim != actual.ndim:
        return None
    few = _few_numbers(call, session.modules[base], layer)
    if few is not None:
        return few
    found = actual.permute(inverse(axes))
    other_order = _other_order(tracer, node, module, inputs, found, call)
    if other_order is not None:
        return other_order
    leaf = not list(module.children())
    diagnosis = diagnose(call, module if leaf else None, inputs if leaf else [], truth, found, _others(recording, call))
    if diagnosis is None or diagnosis.pattern:
        differing = _differing_weights(call, session.modules[base], layer)
        diagnosis = differing or diagnosis
    return diagnosis


def _other_order(
    tracer: _Tracer, node: _Node, module: Any, inputs: list[Tensor], found: Tensor, call: str
) -> Diagnosis | None:
    """Keras's layer takes the same numbers in another order, and its weights were not permuted to match."""
    import torch

    if len(node.inputs) != 1 or len(inputs) != 1 or node.inputs[0].numel() != inputs[0].numel():
        return None
    found_by = [match for match in tracer.library.find(as_real(node.inputs[0])) if match.truth.tensor is inputs[0]]
    if not found_by or not found_by[0].reordered:
        return None

    with torch.no_grad():
        guess = module(node.inputs[0].double().reshape(inputs[0].shape))
    if guess.shape != found.shape or float((guess - found).square().mean().sqrt()) > 1e-9 * float(found.std() + 1e-300):
        return None
    cause = (
        f"the rows of {call} are in PyTorch's order (channels, height, width), and what comes in is in Keras's "
        "(height, width, channels): permute the rows, or the tensor before it"
    )
    return Diagnosis(call, cause, 0.0, (cause,))


def _weights(module: Any, layer: Any) -> Iterator[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The weights that both sides have, in PyTorch's order of axes: name, expected, actual."""
    kind = kind_of_module(module)
    if kind is None or layer is None or kind is not kind_of_layer(layer):
        return
    own = {variable.name: variable for variable in layer.weights}
    for leaf in kind.leaves:
        tensor, variable = getattr(module, leaf.source, None), own.get(leaf.target)
        if tensor is None or variable is None or not leaf.transform.accepts(len(variable.shape)):
            continue
        expected = tensor.detach().float().numpy()
        actual = leaf.transform.invert(np.asarray(variable).astype(np.float32))
        if expected.shape == actual.shape:
            yield leaf.source, expected, actual


def _few_numbers(call: str, module: Any, layer: Any) -> Diagnosis | None:
    """Single numbers of a weight that are not the checkpoint's."""
    for name, expected, actual in _weights(module, layer):
        differing = np.argwhere(~((expected == actual) | (np.isnan(expected) & np.isnan(actual))))
        if 0 < len(differing) <= _FEW and len(differing) < expected.size / 2:
            said = []
            for place in differing:
                one, other = float(expected[tuple(place)]), float(actual[tuple(place)])
                index = ", ".join(str(int(each)) for each in place)
                times = f", {other / one:.9g} times what it should be" if one else ""
                said.append(f"{call}.{name}[{index}] is {other:.9g}{times or ', which should be 0'}")
            channel = f"output channel {int(differing[0][0])}: " if expected.ndim > 1 else ""
            cause = channel + "; ".join(said)
            return Diagnosis(call, cause, 0.0, (cause,))
    return None


def _differing_weights(call: str, module: Any, layer: Any) -> Diagnosis | None:
    weights = list(_weights(module, layer))
    for (name, expected, actual), (other, theirs, ours) in itertools.combinations(weights, 2):
        if np.array_equal(expected, ours) and np.array_equal(theirs, actual) and not np.array_equal(expected, actual):
            text = f"its {name} and {other} are exchanged"
            return Diagnosis(call, text, 0.0, (text,))
    factors = {name: _factor(expected, actual) for name, expected, actual in weights}
    if any(factor is not None for factor in factors.values()):
        said = [f"{call}.{name} is {factor:.6g} times what it should be" for name, factor in factors.items() if factor]
        return Diagnosis(call, "; ".join(said), 0.0, tuple(said))
    for name, expected, actual in weights:
        if not np.array_equal(expected, actual, equal_nan=True):
            count = int((expected != actual).sum())
            scale = float(np.sqrt(np.square(expected, dtype=np.float64).mean())) or 1.0
            greatest = float(np.abs(expected.astype(np.float64) - actual).max())
            text = (
                f"{call}.{name} is not the checkpoint's: {count} of {expected.size} numbers differ, by at most "
                f"{greatest / scale:.2g} of its size"
            )
            return Diagnosis(call, text, 0.0, (text,))
    return None


def _factor(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float | None:
    """What every number of a weight was multiplied by, but for rounding; None where it was not, or by 1."""
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    power = float(np.square(one).sum())
    if not power or not np.isfinite(other).all():
        return None
    factor = float((one * other).sum()) / power
    left = float(np.abs(other - factor * one).max())
    if not factor or abs(factor - 1.0) < 1e-6 or left > 2.0**-22 * float(np.abs(other).max()):
        return None
    return factor


def _exchanged(tracer: _Tracer, node: _Node, call: str) -> Diagnosis | None:
    """Parts of one PyTorch tensor, q, k and v say, that layers beside this one give in another order than their own."""
    if node.parent is None:
        return None
    parts: list[tuple[str, int, int]] = []
    for child in node.parent.children:
        for output in child.outputs[:1]:
            part = tracer.library.find_part(as_real(output))
            if part is not None and tracer.match(output) is None:
                parts.append((child.name, part[1], id(part[0])))
    indices = [index for _, index, _ in parts]
    if len(parts) < 2 or len({owner for *_, owner in parts}) != 1 or indices == sorted(indices):
        return None
    moved = [
        name.rpartition("/")[2]
        for (name, index, _), right in zip(parts, sorted(indices), strict=True)
        if index != right
    ]
    cause = f"{' and '.join(moved)} are exchanged: each gives another's part of one PyTorch tensor"
    return Diagnosis(call, cause, 0.0, (cause,))
