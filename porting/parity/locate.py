"""Locates where two models part, and why: finds every mistake in one run.

The Keras model runs in float64 once more, and every tensor that a layer takes or returns is compared with the PyTorch
model's. From the outputs that differ, the search goes back through the layers as long as a layer's input differs too. A
layer that took the truth and returned something else is the culprit. The truth is put in there, and the search
continues with the next culprit until the outputs agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from porting.call_names import without_number
from porting.models.inputs import Inputs, inverse, leaves_by_key
from porting.models.observe import observe_layers
from porting.models.stacks import last_layer
from porting.parity.causes import (
    cause_of,
    exchanged_parts,
    other_activation,
    reordered_channels,
    tensors_before,
    tensors_near,
    with_names_of_stack,
)
from porting.parity.content import (
    SAME,
    SAME_IN_FLOAT32,
    Match,
    Place,
    Truth,
    as_real,
)
from porting.parity.diagnose import diagnose
from porting.parity.differing_weights import has_size_of, nearest_by_weights
from porting.parity.fused import activations_of, last_of_fused, same
from porting.parity.measure import mean_square_distance, measure_distance, rms
from porting.parity.record import Recording, output_name
from porting.parity.report import WEIGHTS, WIRING, Culprit, Diagnosis
from porting.parity.results import other_shape, pair_results
from porting.parity.trace import Gap, Node, Tracer, key_of

if TYPE_CHECKING:
    from torch import Tensor

    from porting.parity.session import Session

MAX_CULPRITS = 10
# A tensor of PyTorch's code is what a layer stands for if its squared distance is less than this share of the others.
_NEARER = 0.25
# The rounding of float64 itself stays below this, relative to a tensor's RMS.
_FINEST = 2e-14
# Up to so many channels are looked for in another order, in so many rows first.
_MOST_CHANNELS, _SORTED = 4096, 8


@dataclass(frozen=True)
class _Step:
    """A culprit, None if there is none, and how to go on behind it.

    `truth` is put in at `place`. `difference` is what Keras has there instead, less the truth. `is_own` means that the
    culprit itself made the difference, `is_permuted` that Keras has the same channels in another order. `instead` is
    the step to take if the truth does not help there.
    """

    culprit: Culprit | None = None
    place: Place | None = None
    truth: Tensor | None = None
    difference: Tensor | None = None
    is_own: bool = False
    is_permuted: bool = False
    instead: _Step | None = None


def locate(session: Session, inputs: Inputs) -> Iterator[Culprit]:
    """Yield at most `MAX_CULPRITS` culprits in the order of data flow; none if the outputs agree."""
    import torch

    recording = session.record_truth(inputs)
    # What the models are given is right, even where only PyTorch's code takes it.
    given = [torch.from_numpy(array) for array in inputs.candidate]
    in_code = session.tensors_of_code(inputs, recording)
    of_code = session.library(Recording(), in_code)
    library = session.library(recording, [*given, *(in_code if session.computed else ())])
    # Some of what the code computes is what a module takes.
    in_code += [each.tensor for each in recording.truths if not any(place[1] for place in each.places)]
    fixes: dict[Place, Tensor] = {}
    innocent: set[Place] = set()
    found: list[Culprit] = []
    carried: list[Tensor] = []
    previous: tuple[float, int] | None = None
    tried: _Step | None = None
    tolerance = SAME
    for _ in range(3 * MAX_CULPRITS):  # some culprits turn out to be none
        tracer = Tracer(library, fixes, tolerance, of_code, session.inside_float32)
        ours: dict[str, Tensor] | None = None
        # A layer may not take PyTorch's tensor, such as positions that count from two.
        with contextlib.suppress(Exception), session.float64.active() as model, observe_layers(model, tracer) as seen:
            result = model(inputs.for_candidate(model, exact=True), training=False)
            ours = {key: seen(leaf) for key, leaf in leaves_by_key(result).items()}
        helps = ours is not None
        if ours is not None:
            wrong = _wrong_results(session, recording, ours, tolerance, loosely=not tracer.is_doubtful)
            if not wrong:
                break
            worst = max(relative for _, _, relative in wrong)
            # The remaining difference may be smaller than all before.
            tolerance = min(SAME, max(_FINEST, worst / 10))
            tracer.refine(tolerance)
            agreeing = sum(any(tracer.is_exact(output) for output in node.outputs) for node in tracer.nodes)
            # Channels in another order may be so on purpose. Only what follows tells, and not that they agree now.
            most = agreeing - (tried is not None and tried.is_permuted)
            helps = tried is None or previous is None or most > previous[1] or worst < 0.5 * previous[0]
        if helps:
            previous = worst, agreeing
            step = _next_culprit(session, recording, tracer, wrong, innocent, in_code)
        elif tried is None or tried.place is None:
            break
        else:
            fixes.pop(tried.place, None)
            found.pop()
            carried.pop()
            if tried.instead is None:
                # The truth did not help there, so the layer is only written in another way.
                innocent.add(tried.place)
                tried = None
                continue
            step = tried.instead
        if step.culprit is None:
            break
        if step.place is None or step.truth is None or step.difference is None:
            found.append(step.culprit)
            break
        difference, fixes[step.place] = step.difference, step.truth
        if not step.is_own and any(_is_carried(difference, each) for each in carried):
            tried = None
            continue
        carried.append(difference)
        found.append(step.culprit)
        tried = step
        if len(found) >= MAX_CULPRITS:
            break
    yield from _once_a_layer(found)


def _is_carried(difference: Tensor, earlier: Tensor) -> bool:
    """Whether a sum beside the layers, such as that of a residual block, carries an earlier difference on."""
    if difference.numel() != earlier.numel():
        return False
    size = rms(earlier)
    return mean_square_distance(difference.reshape(earlier.shape), earlier) <= (1e-6 * size) ** 2


def _once_a_layer(culprits: list[Culprit]) -> Iterator[Culprit]:
    """Merge the culprits of a layer that is called several times into one, under the layer's own name."""
    calls: dict[tuple[str, bool], list[Culprit]] = {}
    for culprit in culprits:
        calls.setdefault((without_number(culprit.layer), culprit.is_input), []).append(culprit)
    for (layer, _), several in calls.items():
        if len(several) == 1:
            yield several[0]
        else:
            target = without_number(several[0].target)
            yield replace(
                several[0], layer=layer, target=target, reason=f"{several[0].reason}, in {len(several)} calls"
            )


def _wrong_results(
    session: Session, recording: Recording, ours: dict[str, Tensor], tolerance: float, *, loosely: bool
) -> list[tuple[str, Tensor, float]]:
    """List the results that differ: key, Keras's tensor, and the difference relative to the truth's RMS.

    `loosely` is whether to allow for the rounding of what is computed in float32.
    """
    partners, _ = pair_results(recording.outputs, ours)
    wrong = []
    for theirs, own in partners.items():
        truth, actual = recording.outputs[theirs], as_real(ours[own])
        axes = session.axes_of_result(theirs, truth.tensor.ndim)
        expected = truth.tensor.permute(axes)
        if expected.shape != actual.shape:
            wrong.append((theirs, ours[own], 1.0))
            continue
        measured = measure_distance(actual, expected)
        distance = measured.total().rms
        relative = distance / truth.rms if truth.rms else float(distance > 0)
        match = Match(truth, axes, measured)
        inside = loosely and session.computes_in_float32(ours[own], match)
        limit = SAME_IN_FLOAT32 if inside else min(tolerance, 1e-13)
        if not relative <= limit:
            wrong.append((theirs, ours[own], relative))
    return wrong


def _next_culprit(
    session: Session,
    recording: Recording,
    tracer: Tracer,
    wrong: list[tuple[str, Tensor, float]],
    innocent: set[Place],
    in_code: list[Tensor],
) -> _Step:
    """Find the first culprit that makes results differ. `in_code` is what PyTorch computes and shows to no module."""

    def known(node: Node) -> bool:
        return _partner(session, recording, tracer, node) is not None

    @cache
    def permuted(node: Node) -> bool:
        call = _partner(session, recording, tracer, node)
        given = recording.calls[call].outputs if call is not None else []
        return len(given) == len(node.outputs) == 1 and _is_permuted(session, given[0], node.outputs[0])

    for _ in range(len(tracer.nodes) + 2):  # each time one more tensor is assumed to be right
        candidates: list[tuple[int, Node | Gap]] = []
        for key, tensor, _ in wrong:
            found = _search(tracer, tensor, Gap(None, 0, key), innocent, known, permuted)
            if isinstance(found, Node):
                candidates.append((found.began, found))
            else:
                candidates.append((found.node.began if found.node is not None else len(tracer.nodes), found))
        _, first = min(candidates, key=lambda each: each[0])
        if isinstance(first, Gap):
            if first.node is None:
                break
            on_purpose = innocent and _takes_permuted(session, recording, tracer, first.node, first.index)
            if (first.node.name, False, first.index) not in innocent and not on_purpose:
                break
            # What the layer takes is unknown to PyTorch, which is no mistake: look behind it.
            tracer.assume(first.node.inputs[first.index])
            continue
        call = _partner(session, recording, tracer, first)
        around = first.parent
        if call is None and around is not None and session.layer_kind(around.name) is not None:
            # The cell of a recurrent layer has no partner, but the layer has one.
            first, call = around, _partner(session, recording, tracer, around)
        if call is not None:
            call = last_layer(call, session.modules, recording.calls)
            taken = _wrongly_taken(tracer, first, recording.calls[call].inputs)
            # A layer before it may have its channels in another order on purpose.
            if taken is not None and innocent and _takes_permuted(session, recording, tracer, first, taken):
                taken = None
            if taken is None:
                call = last_of_fused(session, recording, tracer, first, call)
                if not _is_right_inside(session, recording, first, call):
                    return _own_mistake(session, recording, tracer, first, call, in_code)
            # Where PyTorch's tensor did not help there, the layer stands for something else.
            elif (first.name, False, taken) not in innocent:
                return _wrong_input(session, recording, tracer, Gap(first, taken))
        # PyTorch shows its result to no module, such as a padding's: look at the layers that take its result.
        for output in first.outputs:
            tracer.assume(output)
        given = {key_of(output) for output in first.outputs}
        result = next((key for key, tensor, _ in wrong if key_of(tensor) in given), None)
        if result is not None:
            return _Step(_wrong_result(session, recording, result, wrong))
    if isinstance(first, Node):
        return _Step()
    other = _gives_anothers(session, recording, tracer, first, innocent)
    if other is not None:
        return _own_mistake(session, recording, tracer, *other, in_code)
    if first.node is None:
        return _Step(_wrong_result(session, recording, first.key, wrong))
    return _wrong_input(session, recording, tracer, first)


def _gives_anothers(
    session: Session, recording: Recording, tracer: Tracer, gap: Gap, innocent: set[Place]
) -> tuple[Node, str] | None:
    """A call before a gap, in the same layer, whose result is not that of the PyTorch call of the same name."""
    parent = gap.node.parent if gap.node is not None else None
    limit = gap.node.began if gap.node is not None else len(tracer.nodes)
    for node in tracer.nodes:
        if node.parent is not parent or node.began >= limit or (node.name, True, 0) in innocent or not node.outputs:
            continue
        call = session.names.source(node.name, recording.calls)
        if call is None or f"{call.partition('#')[0]}#1" in recording.calls:
            continue  # with several calls, their order says nothing
        outputs = recording.calls[call].outputs
        if not outputs or outputs[0].tensor.numel() != node.outputs[0].numel():
            continue
        if tracer.library.match(as_real(node.outputs[0]), outputs[0]) is not None:
            continue
        match, inside = tracer.match(node.outputs[0]), f"{call.partition('#')[0]}."
        is_part = match is not None and any(place[0].startswith(inside) for place in match.truth.places)
        if is_part and outputs[0] in _agreeing(tracer):
            continue  # Keras has a layer for each part of this module, such as its activation
        if not _is_right_inside(session, recording, node, call):
            return node, call
    return None


def _search(
    tracer: Tracer,
    tensor: Tensor,
    gap: Gap,
    innocent: set[Place],
    known: Callable[[Node], bool],
    permuted: Callable[[Node], bool],
) -> Node | Gap:
    """Go back from a tensor that differs to the call that made it from tensors that agree, or to a gap.

    A call without a partner in PyTorch, such as the cell of a recurrent layer, counts as part of the call around it.
    """
    seen: set[int] = set()
    while True:
        seen.add(key_of(tensor))
        node = tracer.producer(tensor)
        # A layer that does nothing at inference, such as a dropout, returns the very tensor that it takes.
        passed = (
            next((i for i, each in enumerate(node.inputs) if key_of(each) == key_of(tensor)), None) if node else None
        )
        if node is not None and passed is not None:
            gap = Gap(node, passed)
        if node is None or passed is not None or (node.name, True, 0) in innocent:
            # No layer made it. It was made from results of the layers beside the one that takes it.
            before = _beside(tracer, gap, innocent, permuted)
            step = next((each for each in before if key_of(each) not in seen), None)
            around = gap.node.parent if gap.node is not None else None
            if step is None and gap.node is not None and around is not None:
                step = next(
                    (each for each in around.inputs if not tracer.is_exact(each) and key_of(each) not in seen), None
                )
                if step is None:
                    return gap if known(gap.node) else around
                gap = Gap(around, next(i for i, each in enumerate(around.inputs) if each is step))
            if step is None:
                return gap
            tensor = step
            continue
        own = [*node.inputs, *(output for child in node.children for output in child.outputs)]
        bad = [each for each in own if not tracer.is_exact(each) and key_of(each) not in seen]
        if not bad:
            return node
        # A mask may have no partner, since PyTorch models build masks in other ways.
        tensor = next((each for each in bad if not _is_mask(each)), bad[0])
        gap = Gap(node, next((i for i, each in enumerate(node.inputs) if each is tensor), 0))
        if not any(each is tensor for each in node.inputs):
            inner = next(c for c in node.children if any(o is tensor for o in c.outputs))
            gap = Gap(inner, 0)


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def _beside(tracer: Tracer, gap: Gap, innocent: set[Place], permuted: Callable[[Node], bool]) -> list[Tensor]:
    """The results that differ, of the earlier calls in the same layer; last those that may only be in another order."""
    parent = gap.node.parent if gap.node is not None else None
    limit = gap.node.began if gap.node is not None else len(tracer.nodes)
    found: list[tuple[Node, Tensor]] = []
    for node in tracer.nodes:
        if (
            node.parent is parent
            and node.began < limit
            and node is not gap.node
            and (node.name, True, 0) not in innocent
        ):
            found += [(node, output) for output in node.outputs if not tracer.is_exact(output)]
    if len(found) > 1:
        found.sort(key=lambda each: permuted(each[0]))
    return [output for _, output in found]


def _is_permuted(session: Session, truth: Truth, tensor: Tensor) -> bool:
    """Whether a Keras tensor has the channels of PyTorch's, in another order for all samples."""
    actual = as_real(tensor)
    axes = session.axes_in_keras(truth.tensor, actual)
    return axes is not None and _has_channels(actual, truth.tensor.permute(axes).reshape(actual.shape))


def _has_channels(actual: Tensor, expected: Tensor) -> bool:
    """Whether a tensor has the channels of another, in another order for all samples."""
    import torch

    if actual.ndim < 2 or not 1 < actual.shape[-1] <= _MOST_CHANNELS:
        return False
    limit = SAME * rms(expected)
    if rms(actual - expected) <= limit:
        return False
    rows = [each.reshape(-1, each.shape[-1]) for each in (actual, expected)]
    # Most tensors are told apart by the first rows.
    return all(
        rms(torch.sort(rows[0][:count]).values - torch.sort(rows[1][:count]).values) <= limit
        for count in (_SORTED, len(rows[0]))
    )


def _takes_permuted(session: Session, recording: Recording, tracer: Tracer, node: Node, index: int) -> bool:
    """Whether what a layer takes has the channels of what its partner takes, in another order."""
    call = _partner(session, recording, tracer, node)
    given = recording.calls[call].inputs if call is not None else []
    return index < len(given) and _is_permuted(session, given[index], node.inputs[index])


def _wrongly_taken(tracer: Tracer, node: Node, expected: list[Truth]) -> int | None:
    """The index of an input that differs from its partner's of the same size; None if none does, or it is unclear.

    An attention layer of Keras takes fewer tensors, in another order: what it takes must be one of PyTorch's.
    """
    if len(node.inputs) > len(expected):
        return None
    fewer = len(node.inputs) < len(expected)
    for index, (tensor, truth) in enumerate(zip(node.inputs, expected, strict=False)):
        given = _behind_paddings(tracer, tensor, truth)
        actual = as_real(given)
        if actual.numel() != truth.tensor.numel() or actual.numel() < 2 or (fewer and _is_mask(actual)):
            continue
        partners = [each for each in expected if each.tensor.numel() == actual.numel()] if fewer else [truth]
        # The numbers of a map in another order come from a Flatten, and count as right: the weights must follow.
        found = tracer.library.find(actual, tracer.tolerance)
        same = any(
            match.truth in partners and (not match.reordered or tracer.is_flattened(given, match.truth.tensor))
            for match in found
        )
        if not same and all(tracer.library.match(actual, each) is None for each in partners):
            return index
    return None


def _behind_paddings(tracer: Tracer, tensor: Tensor, truth: Truth) -> Tensor:
    """The tensor, or the input of the paddings before it that has as many elements as the truth."""
    seen = set[int]()  # a layer may return the very tensor that it takes
    while tensor.numel() != truth.tensor.numel() and key_of(tensor) not in seen:
        seen.add(key_of(tensor))
        producer = tracer.producer(tensor)
        if producer is None or len(producer.inputs) != 1 or tracer.match(tensor) is not None or producer.children:
            return tensor
        tensor = producer.inputs[0]
    return tensor


def _is_right_inside(session: Session, recording: Recording, node: Node, call: str) -> bool:
    """Whether a layer returns PyTorch's result of its module behind an activation that PyTorch shows to no module."""
    truth, actual = recording.calls[call].outputs[:1], as_real(node.outputs[0])
    axes = session.axes_in_keras(truth[0].tensor, actual) if truth else None
    if axes is None:
        return False
    expected = truth[0].tensor.permute(axes).reshape(actual.shape).contiguous()
    inside = activations_of(session, recording, node, call, truth[0].tensor, axes, actual)
    return inside is not None and inside.theirs is None and same(inside.ours(expected), actual)


def _own_mistake(
    session: Session, recording: Recording, tracer: Tracer, node: Node, call: str, in_code: list[Tensor]
) -> _Step:
    own = next((i for i, output in enumerate(node.outputs) if not tracer.is_exact(output)), 0)
    actual, given = as_real(node.outputs[own]), recording.calls[call].outputs
    # Keras may return only the last step, where PyTorch returns all steps and also the last one.
    as_large = [i for i, each in enumerate(given) if each.tensor.numel() == actual.numel()]
    index = own if own in as_large else next(iter(as_large), min(own, len(given) - 1))
    truth = given[index]
    label = call if own == 0 else f"{call}[{index}]"
    axes = session.axes_in_keras(truth.tensor, actual)
    if axes is None:
        text = f"shape {tuple(actual.shape)} for PyTorch's {tuple(truth.tensor.shape)}"
        return _Step(Culprit(label, node.name, text, 1.0))
    expected = truth.tensor.permute(axes).reshape(actual.shape).contiguous()
    inside = activations_of(session, recording, node, call, truth.tensor, axes, actual)
    cause = None if inside is None else inside.another(call, expected, actual)
    cause = cause or cause_of(session, recording, tracer, node, call, index, axes, actual, inside)
    is_open = cause is None or cause.pattern or cause.basis == WEIGHTS
    reordered = reordered_channels(session, recording, node, call) if is_open else None
    if reordered is not None:
        on_purpose = _takes_permuted(session, recording, tracer, node, 0)
        cause = reordered.mistake if on_purpose and reordered.order is None else reordered.with_orders
    cause = with_names_of_stack(session, call, cause)
    is_computed = without_number(node.name) in session.computed
    # These may be said of a layer that stands for this module and others.
    is_vague = cause is not None and (cause.basis == WEIGHTS or (is_computed and cause.basis == WIRING))
    if cause is None or is_vague:
        several = _meant_of_code(session, node, actual, expected, in_code)
        if several is not None:
            relative = rms(actual - several) / rms(several)
            text = f"differs by {relative:.2g} in float64 from what PyTorch's code computes of it and of other tensors"
            culprit = Culprit(label, node.name, text, relative)
            return _Step(culprit, (node.name, True, own), several, actual - several, is_own=True)
    if cause is not None and is_vague and is_computed and all(place[1] for place in truth.places):
        cause = replace(cause, pattern=True)
    if inside is not None:
        expected = inside.expected(expected, actual).contiguous()
    relative = _relative(actual, expected, truth)
    if cause is not None and not cause.pattern and cause.layer != call:
        label = cause.layer  # the layer is several modules, and this one has the mistake
    culprit = Culprit(label, node.name, _by_how_much(relative), relative, diagnosis=cause)
    is_permuted = _has_channels(actual, expected)
    place = node.name, True, own
    step = _Step(culprit, place, expected, actual - expected, is_own=True, is_permuted=is_permuted)
    if reordered is None or reordered.order is None or len(reordered.order) != actual.shape[-1]:
        return step
    # What follows may take the channels in this order. Only the truth put in there tells.
    expected = expected[..., reordered.order]
    relative = _relative(actual, expected, truth)
    mistake = with_names_of_stack(session, call, reordered.mistake)
    culprit = replace(culprit, reason=_by_how_much(relative), relative=relative, diagnosis=mistake)
    return _Step(culprit, place, expected, actual - expected, is_own=True, is_permuted=True, instead=step)


def _meant_of_code(
    session: Session, node: Node, actual: Tensor, expected: Tensor, in_code: list[Tensor]
) -> Tensor | None:
    """What a Keras layer with weights stands for if it is several modules that PyTorch's code adds, in Keras's order.

    That is the tensor of PyTorch's code that is clearly the nearest to the layer's result.
    """
    if not getattr(session.layer(node.name), "weights", None):
        return None
    found = []
    for tensor in in_code:
        axes = session.axes_in_keras(tensor, actual) if tensor.numel() == actual.numel() else None
        if axes is not None and tuple(tensor.shape[axis] for axis in axes) == tuple(actual.shape):
            found.append(tensor.permute(axes).contiguous())
    nearest = min(found, key=lambda tensor: mean_square_distance(actual, tensor), default=None)
    if nearest is None or not rms(nearest):
        return None
    distance = mean_square_distance(actual, nearest)
    is_near = distance < _NEARER * mean_square_distance(actual, expected) and distance < rms(nearest) ** 2
    return nearest if is_near else None


def _wrong_input(session: Session, recording: Recording, tracer: Tracer, gap: Gap) -> _Step:
    node, index = gap.node, gap.index
    assert node is not None  # the caller has seen to it
    call = _partner(session, recording, tracer, node)
    inputs = recording.calls[call].inputs if call is not None else []
    while index < len(inputs) and node.inputs[index].numel() != inputs[index].tensor.numel():
        producer = tracer.producer(node.inputs[index])
        if producer is None or producer is node or len(producer.inputs) != 1 or producer.children:
            break
        node, index, inputs = producer, 0, [inputs[index]]
    actual = as_real(node.inputs[index])
    if call is None or index >= len(inputs):
        text = "is fed a tensor that PyTorch does not have"
        name = node.name.replace("/", ".")
        return _Step(Culprit(name, node.name, text, 1.0, True, feeder=_feeder(session, name)))
    truth = inputs[index]
    orders = session.orders_in_keras(truth.tensor, actual)
    if not orders:
        text = f"shape {tuple(actual.shape)} for PyTorch's {tuple(truth.tensor.shape)}"
        return _Step(Culprit(call, node.name, text, 1.0, True, feeder=_feeder(session, call)))
    # What comes in differs in every order. Where sides are equal, the nearest is the one that is meant.
    axes = min(orders, key=lambda each: mean_square_distance(actual, truth.tensor.permute(each).reshape(actual.shape)))
    expected = _as_flattened(tracer, node.inputs[index], truth.tensor, truth.tensor.permute(axes).reshape(actual.shape))
    relative = _relative(actual, expected, truth)
    cause = None
    if expected.ndim == truth.tensor.ndim:
        found, others = actual.permute(inverse(axes)), tensors_near(recording, call)
        cause = other_activation(call, expected, actual, f"before {call}", tensors_before(recording, call), axes)
        cause = cause or diagnose(call, None, [], expected.permute(inverse(axes)), found, others)
    said = cause or exchanged_parts(tracer, node, call)
    label, is_input = _to_blame(session, recording, tracer, call, truth)
    feeder = _feeder(session, label) if is_input else None
    culprit = Culprit(label, node.name, _by_how_much(relative), relative, is_input, said, feeder)
    place = _place_of_input(tracer, node, index, truth)
    return _Step(culprit, place, expected, actual - expected)


def _feeder(session: Session, call: str) -> str:
    """The module whose code feeds a call: the nearest around it that runs, which a list of modules does not."""
    from torch import nn

    parent = without_number(call).rpartition(".")[0]
    while isinstance(session.modules.get(parent), (nn.ModuleList, nn.ModuleDict)):
        parent = parent.rpartition(".")[0]
    return parent


def _as_flattened(tracer: Tracer, tensor: Tensor, truth: Tensor, expected: Tensor) -> Tensor:
    """What Keras should have in the place of `tensor`: `expected`, or its numbers in the order of Keras's Flatten."""
    actual, given = as_real(tensor), tracer.map_before(tensor)
    if given is None or truth.ndim != 2:
        return expected.contiguous()
    count, *sides, channels = given.shape
    rows = truth.reshape(count, channels, *sides).movedim(1, -1).reshape(actual.shape)
    return min((expected, rows), key=lambda each: mean_square_distance(actual, each)).contiguous()


def _to_blame(session: Session, recording: Recording, tracer: Tracer, call: str, truth: Truth) -> tuple[str, bool]:
    """Find the call to blame when `call` takes something else than `truth`, and whether only its input is wrong."""
    same = [match.truth for match in tracer.library.find(truth.tensor)]
    # If a layer that is right makes it, the call takes another tensor.
    makers = [
        name
        for each in (() if truth in _agreeing(tracer) else dict.fromkeys((truth, *same)))
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
    parent = without_number(call).rpartition(".")[0]
    while parent in recording.calls and truth in recording.calls[parent].inputs:
        call, parent = parent, parent.rpartition(".")[0]
    return call, True


def _place_of_input(tracer: Tracer, node: Node, index: int, truth: Truth) -> Place:
    """Where to put in the truth: at the call that made the wrong tensor, unless that tensor is right elsewhere."""
    producer = tracer.producer(node.inputs[index])
    key = key_of(node.inputs[index])
    match = tracer.match(node.inputs[index])
    elsewhere = match is not None and any(
        key_of(output) != key and tracer.is_exact(output) and (own := tracer.match(output)) and own.truth is match.truth
        for other in tracer.nodes
        for output in other.outputs
    )
    made = truth in _agreeing(tracer)
    if producer is None or made or producer is node.parent or not (match is None or elsewhere):
        return node.name, False, index
    return producer.name, True, next((i for i, each in enumerate(producer.outputs) if key_of(each) == key), 0)


def _wrong_result(session: Session, recording: Recording, key: str, wrong: list[tuple[str, Tensor, float]]) -> Culprit:
    """Describe a result that the layers returned correctly and that something after them changed."""
    actual, relative = next((as_real(tensor), relative) for name, tensor, relative in wrong if name == key)
    truth = recording.outputs[key]
    axes = session.axes_of_result(key, truth.tensor.ndim)
    expected = truth.tensor.permute(axes)
    label = output_name(key)
    if expected.shape != actual.shape:
        return Culprit(label, label, other_shape(actual, expected, truth), 1.0)
    cause = None
    library = session.library(recording)
    moved = next((k for k, each in recording.outputs.items() if k != key and library.match(actual, each)), None)
    other = library.match(actual, truth)
    if other is not None and not other.reshaped and other.axes != axes:
        text = f"its axes are in the order {other.axes}, not {axes}"
        cause = Diagnosis.certain(label, text)
    elif moved is not None:
        text = f"it is what PyTorch returns as {output_name(moved)}: the results come in another order"
        cause = Diagnosis.certain(label, text)
    else:
        near = tensors_near(recording, "")
        cause = other_activation(label, expected, actual, f"before the {label}", near, axes)
        cause = cause or diagnose(label, None, [], truth.tensor, actual.permute(inverse(axes)), near)
    return Culprit(label, label, _by_how_much(relative), relative, diagnosis=cause)


def _partner(session: Session, recording: Recording, tracer: Tracer, node: Node) -> str | None:
    """The PyTorch call that a Keras call stands for: by name, else one with the same input and as large a result."""
    index = next((i for i, output in enumerate(node.outputs) if not tracer.is_exact(output)), 0)
    named = session.names.source(node.name, recording.calls)
    if named is not None and index < len(recording.calls[named].outputs):
        return _same_call(session, recording, tracer, node, named)
    # The parts of a layer, such as an attention's projections, stand for parts of its partner.
    around = node.parent
    inside = None
    if around is not None and session.layer_kind(around.name) is not None:
        outer = _partner(session, recording, tracer, around)
        inside = None if outer is None else f"{outer.partition('#')[0]}."
    count = as_real(node.outputs[index]).numel() if node.outputs else 0
    taken = {place[0] for output in _agreeing(tracer) for place in output.places if place[1]}
    fitting = [
        call
        for call, each in recording.calls.items()
        if any(truth.tensor.numel() == count for truth in each.outputs)
        and call not in taken
        and (inside is None or call.startswith(inside))
    ]
    match = _first_known(tracer, node.inputs[0]) if node.inputs else None
    same_input = [call for call in fitting if match is not None and match.truth in recording.calls[call].inputs]
    # Otherwise the nearest call after those that agree.
    before = [
        place[0]
        for each in tracer.nodes
        if each.began < node.began
        for output in each.outputs[:1]
        if (own := tracer.match(output)) is not None
        for place in own.truth.places
        if place[1]
    ]
    latest = max((recording.order.get(call, -1) for call in before), default=-1)
    later = [call for call in fitting if recording.order.get(call, -1) > latest]
    for pool in (same_input, later, fitting):
        own_kind = [call for call in pool if session.kind_matches(call, node.name)]
        own_kind = [call for call in own_kind if has_size_of(session, node, call)] or own_kind
        if own_kind:
            return _same_call(session, recording, tracer, node, nearest_by_weights(session, node, own_kind))
    modules = {call: session.modules[without_number(call)] for call in same_input}
    # A layer without weights, such as an addition, stands for no module that has some.
    weighs = bool(getattr(session.layer(node.name), "weights", None))
    leaves = [
        call
        for call, module in modules.items()
        if not list(module.children()) and (weighs or not list(module.parameters()))
    ]
    return leaves[0] if leaves else None


def _same_call(session: Session, recording: Recording, tracer: Tracer, node: Node, call: str) -> str:
    """The call of a module, if it runs several times, whose input is the nearest: Keras's order may differ."""
    module = without_number(call)
    if f"{module}#1" not in recording.calls or not node.inputs:
        return call
    known = tracer.same_calls.get((node.name, module))
    if known is not None:
        return known
    calls = [name for name in recording.calls if without_number(name) == module]
    match = tracer.match(node.inputs[0])
    if match is not None:
        return next((name for name in calls if match.truth in recording.calls[name].inputs), call)
    actual = as_real(node.inputs[0])

    def distance(name: str) -> float:
        given = recording.calls[name].inputs
        axes = session.axes_in_keras(given[0].tensor, actual) if given else None
        if axes is None:
            return float("inf")
        return mean_square_distance(actual, given[0].tensor.permute(axes).reshape(actual.shape))

    nearest = min(calls, key=distance)
    tracer.same_calls[node.name, module] = nearest if distance(nearest) < distance(call) else call
    return tracer.same_calls[node.name, module]


def _first_known(tracer: Tracer, tensor: Tensor) -> Match | None:
    """The match of a tensor, or of the input of layers without a PyTorch module before it, such as a padding."""
    while (match := tracer.match(tensor)) is None:
        producer = tracer.producer(tensor)
        if producer is None or len(producer.inputs) != 1 or producer.children:
            return None
        if key_of(producer.inputs[0]) == key_of(tensor):
            return None
        tensor = producer.inputs[0]
    return match


def _agreeing(tracer: Tracer) -> list[Truth]:
    matches = [tracer.match(output) for node in tracer.nodes for output in node.outputs]
    return [match.truth for match in matches if match is not None]


def _relative(actual: Tensor, expected: Tensor, truth: Truth) -> float:
    distance = measure_distance(actual, expected).total().rms
    return distance / truth.rms if truth.rms else float("inf")


def _by_how_much(relative: float) -> str:
    if not np.isfinite(relative):
        return "values that are not finite"
    return f"differs by {relative:.2g} of its size in float64"
