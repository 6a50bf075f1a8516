"""Builds the report from what the passes have measured."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from porting.call_names import without_number
from porting.kinds.transforms import Array
from porting.mapping.key_map import KeyMap
from porting.models.stacks import modules_of
from porting.models.traverse import named_variables, owned_variables
from porting.parity.effect import unproven_layers
from porting.parity.record import kinds_of
from porting.parity.report import (
    EXACT,
    FEW_ELEMENTS,
    FLOAT32,
    FLOAT32_ROUNDOFF,
    LayerComparison,
    Limits,
    LogitsComparison,
    ParityReport,
    Verified,
)
from porting.parity.session import Session
from porting.parity.settings import compare_settings

if TYPE_CHECKING:
    import keras
    from torch import nn

# The usual rounding of a small tensor is at least the median of this many layers before it.
_LAYERS_BEFORE = 16


def summarize(
    session: Session,
    limits: Limits,
    name: str,
    key_map: KeyMap | None,
    strict_settings: bool,
    waive: Sequence[str],
) -> ParityReport:
    """Build the report. `key_map`, if given, says whose settings must agree where the tensors do not tell."""
    kinds = kinds_of(session.reference)
    results = [pair.total(kinds, exact=True) for pair in session.results.values()]
    ordered = sorted(session.pairs.values(), key=lambda pair: pair.order)
    layers = [pair.total(kinds, exact=True) for pair in ordered]
    everything = list(with_usual_rounding([*layers, *results], session.reference))
    compared = {layer.source for layer in everything}
    report = ParityReport(
        layers=tuple(everything),
        unpaired_source=tuple(call for call in session.unseen if call not in compared),
        unpaired_target=tuple(each for each in session.lone),
        logits=compare_logits(session.logits),
        input_shapes=tuple(tuple(array.shape) for array in session.inputs.candidate),
        limits=limits,
        name=name,
        exact_model=session.float64.how,
        float32_inside=tuple(pair.source for pair in ordered if pair.in_float32),
        axes=session.inputs.described(),
        precision=precision_of(session.candidate),
        notes=tuple(session.notes),
        caveats=tuple(session.caveats),
    )
    agreed = not any(divergence.view == EXACT for divergence in report.divergences)
    called = {without_number(name) for name in session.called}
    unproven = set[str]()
    if agreed and not session.has_whole_results:
        unproven = unproven_layers(session, called)
    if agreed:
        named = {(pair.source, pair.target) for pair in session.pairs.values() if pair.named}
        report = replace(report, layers=tuple(_written(layer, session, named) for layer in report.layers))
    targets = session.layer_of_module
    if key_map is not None:
        targets = {**targets, **{pair.source: pair.target for pair in key_map.layers}}
    with session.float64.active() as model:
        audit = compare_settings(session.reference, model, targets, strict=strict_settings, waive=waive)
    return replace(report, audit=audit, verified=_verified(session, called, unproven, agreed))


def _written(layer: LayerComparison, session: Session, named: Collection[tuple[str, str]]) -> LayerComparison:
    """Mark a layer as written in another way if its own result differs and the outputs agree.

    `named` are the pairs by name only, whose results differ.
    """
    how = session.written.get(layer.source, "")
    if (layer.source, layer.target) in named and not layer.is_output:
        how = how or "its result differs, and what follows agrees again"
    return replace(layer, rewritten=how)


def _verified(session: Session, ran: Collection[str], unproven: Collection[str], agreed: bool) -> Verified:
    """Which weights are verified. Of the layers that `ran`, the results say nothing about the `unproven`."""
    called = {name for name in ran if name not in unproven}
    variables = named_variables(session.candidate)
    if agreed and session.has_whole_results:
        called = _before_fractions(session)
    elif not agreed:
        called = {without_number(pair.target) for pair in session.pairs.values() if not pair.named}
    seen: set[int] = set()
    for layer_name, own in owned_variables(session.candidate).items():
        # The model itself runs in every pass.
        if layer_name in called or (agreed and not layer_name and not session.has_whole_results):
            seen |= {id(variable) for variable in own}
    sizes = {name: math.prod(variable.shape) for name, variable in variables.items()}
    unverified = tuple(name for name, variable in variables.items() if id(variable) not in seen)
    bits = session.bits
    through = any(not pair.named for pair in session.pairs.values())
    total = sum(sizes.values())
    verified = total - sum(sizes[name] for name in unverified)
    return Verified(
        total,
        verified,
        unverified,
        differing=tuple(bits.differing),
        through_layers=through,
        compared_bits=len(bits.compared),
        details=tuple(bits.differing.values()),
        whole_numbers=session.has_whole_results,
        unproven=tuple(name for name in session.called if name in unproven),
    )


def _before_fractions(session: Session) -> set[str]:
    """The layers that ran before the last tensor with fractions that is PyTorch's."""
    paired = {pair.target for pair in session.pairs.values() if not (pair.named or pair.is_whole)}
    order = list(session.called)
    last = max((index for index, name in enumerate(order) if name in paired), default=-1)
    return {without_number(name) for name in order[: last + 1]}


def precision_of(candidate: keras.Model) -> str:
    """The narrowest type in which any layer with weights computes."""
    dtypes = {str(layer.compute_dtype) for layer in candidate._flatten_layers(include_self=False) if layer.weights} or {
        "float32"
    }
    narrow = [dtype for dtype in ("bfloat16", "float16") if dtype in dtypes]
    return narrow[0] if narrow else "float32"


def with_usual_rounding(layers: list[LayerComparison], reference: nn.Module) -> Iterator[LayerComparison]:
    """Give each small tensor the rounding that is usual for it.

    That is the rounding of a plain sum over as many terms as the layer's largest product has: n additions of
    independent terms have an RMS error of about sqrt(n) / 4 roundings of the sum. If the median of the layers just
    before is greater, that is used instead.
    """
    modules = modules_of(reference)
    known: dict[tuple[object, ...], float] = {}
    before: deque[float] = deque(maxlen=_LAYERS_BEFORE)
    for layer in layers:
        view = layer.views.get(FLOAT32)
        if math.prod(layer.shape) >= FEW_ELEMENTS:
            if view is not None and math.isfinite(view.relative_rounding):
                before.append(view.relative_rounding)
            yield layer
            continue
        module = modules.get(without_number(layer.source), reference)  # the results of the models belong to no module
        summed = max((weight[0].numel() for weight in module.parameters() if weight.ndim > 1), default=1)
        own = math.sqrt(summed) / 4 * FLOAT32_ROUNDOFF
        usual = max(own, statistics.median(before) if before else 0.0)
        # A result of the model is often that of a layer, and the same numbers are judged alike.
        numbers = (layer.shape, *(each.actual_error.rms for each in layer.views.values()))
        usual = known.setdefault(numbers, usual)
        finer = {name: each.roundoff / FLOAT32_ROUNDOFF for name, each in layer.views.items()}
        views = {name: replace(each, usual_rounding=usual * finer[name]) for name, each in layer.views.items()}
        yield replace(layer, views=views)


def compare_logits(pairs: list[tuple[Array, Array]]) -> LogitsComparison | None:
    """Compare top-1, top-5 and probabilities; None if the output is not one row of numbers per sample."""
    if not pairs or any(one.ndim != 2 or one.shape != other.shape or one.shape[1] < 2 for one, other in pairs):
        return None
    expected, actual = (np.concatenate(side) for side in zip(*pairs, strict=True))
    kept = min(5, expected.shape[1])
    best = [np.sort(np.argsort(side, axis=1, kind="stable")[:, -kept:], axis=1) for side in (expected, actual)]
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, with a warning
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
