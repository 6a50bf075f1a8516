"""Compares the models where PyTorch's code clamps numbers that neither given nor loud inputs bring to the bound.

A port without such a clamp computes the same until an input is large, or small. PyTorch runs on such inputs. If a
number then goes beyond a bound and the results depend on it, Keras must return what PyTorch returns. If it returns what
PyTorch returns without the bound, the port lacks it. If it agreed on inputs a little nearer, the port has another one.
Anything else says nothing: so large inputs also saturate and overflow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from porting.models.clamps import Bound, Clamps, watching_clamps
from porting.models.inputs import Inputs, inverse, leaves_by_key
from porting.models.observe import to_torch
from porting.parity.content import Truth, as_real
from porting.parity.loud import LOUD_INPUTS, LOUD_LIMIT, louder
from porting.parity.measure import rms
from porting.parity.report import Culprit, Diagnosis, Loud, ParityReport
from porting.parity.results import pair_results
from porting.parity.session import Session
from porting.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

# By how much the inputs are enlarged or made smaller, one factor after the other, until a number goes beyond a bound.
_LARGER, _SMALLER = (256.0, 4096.0, 65536.0), (2.0**-4, 2.0**-8, 2.0**-16, 2.0**-32)
# How often the range of the first such factor is halved, and how far before and beyond it the models are compared.
_HALVINGS, _BEYOND = 12, 1.002
# Less than this is what a bound that Keras holds in float32 makes.
_OTHER = 1e-6
_NAMED = 3

Results = dict[str, "Tensor"]


def with_unreached_bounds(session: Session, report: ParityReport, *, locates: bool) -> ParityReport:
    """Add to the report the bounds of PyTorch's code that Keras lacks, and those that no input has shown.

    Only inputs of floats can be enlarged. A large model is left alone: it would take many passes.
    """
    open_bounds = [each for each in session.bounds if each not in session.reached]
    if session.is_large or not open_bounds:
        return report
    few = session.few(1)
    for factor, before in _factors(session, few, open_bounds):
        try:
            shown, wrong = _compare(session, few, factor, before, open_bounds)
        except Exception:  # a model may raise anything on such inputs
            continue
        if wrong is not None:
            what = f"inputs {factor:,.3g} times as large" if factor else "inputs of zeros"
            culprits = tuple(_culprits(session, few, wrong)) if locates else ()
            return replace(report, loud=Loud(what, wrong.relative, LOUD_LIMIT), culprits=culprits)
        open_bounds[:] = [each for each in open_bounds if each not in shown]
        if not open_bounds:
            return report
    modules = _modules(session, few)
    said = listed([f"{each} in {modules.get(each.call) or 'the model'}" for each in open_bounds], _NAMED)
    caveat = f"PyTorch's code clamps numbers that no input here brings to the bound: {said}"
    return replace(report, caveats=(*report.caveats, caveat))


def _enlarged(inputs: Inputs, factor: float) -> Inputs:
    return louder(inputs, noisy=factor > 0, by=factor)


def _factors(session: Session, inputs: Inputs, open_bounds: Collection[Bound]) -> Iterator[tuple[float, float | None]]:
    """Yield factors by which inputs may show `open_bounds`, which the caller makes fewer meanwhile.

    The first factor that brings a number beyond a bound comes with the one a little before it, and then one that brings
    numbers far beyond. Zeros come last.
    """
    if not any(array.dtype.kind == "f" for array in inputs.candidate):
        return

    def reaches(factor: float) -> bool:
        try:
            return not _run(session, _enlarged(inputs, factor))[1].reached.isdisjoint(open_bounds)
        except Exception:  # a model may raise anything on such inputs
            return False

    for begin, factors in ((LOUD_INPUTS, _LARGER), (1.0, _SMALLER)):
        near = begin
        for far in factors:
            if reaches(far):
                least, last = far, near
                for _ in range(_HALVINGS):
                    middle = math.sqrt(last * least)
                    last, least = (last, middle) if reaches(middle) else (middle, least)
                step = _BEYOND if far > near else 1 / _BEYOND
                yield step * least, last / step
                yield far, None
            near = far
    yield 0.0, None


@dataclass(frozen=True)
class _Wrong:
    """The bounds that Keras lacks or, if `is_other`, has at another number, and by how much the results differ."""

    bounds: list[Bound]
    relative: float
    is_other: bool = False


def _compare(
    session: Session, few: Inputs, factor: float, before: float | None, open_bounds: Collection[Bound]
) -> tuple[set[Bound], _Wrong | None]:
    """The bounds on which results depend here and that Keras has, and those that it has not."""
    inputs = _enlarged(few, factor)
    theirs, clamps = _run(session, inputs)
    reached = [each for each in open_bounds if each in clamps.reached]
    if not reached or not _is_finite(theirs.values()):
        return set(), None
    lone = {each: _run(session, inputs, [each])[0] for each in reached}
    telling = [each for each, results in lone.items() if _distance(results, theirs) > LOUD_LIMIT]
    if not telling:
        return set(), None
    ours = _run_keras(session, inputs, theirs)
    relative = _distance(ours, theirs)
    if relative <= LOUD_LIMIT:
        return set(telling), None
    several = [[each] for each in telling] + ([telling] if len(telling) > 1 else [])
    for bounds in several:
        without = lone[bounds[0]] if len(bounds) == 1 else _run(session, inputs, bounds)[0]
        if _distance(ours, without) <= LOUD_LIMIT:
            return set(), _Wrong(bounds, relative)
    if before is not None and relative > _OTHER:
        nearer = _enlarged(few, before)
        expected = _run(session, nearer)[0]
        if _distance(_run_keras(session, nearer, expected), expected) <= LOUD_LIMIT:
            return set(), _Wrong(telling, relative, is_other=True)
    return set(), None


def _run_keras(session: Session, inputs: Inputs, theirs: Results) -> Results:
    """Keras's results in float64, by PyTorch's keys and in its order of axes."""
    with session.float64.active() as model:
        leaves = leaves_by_key(model(inputs.for_candidate(model, exact=True), training=False))
    own = {key: as_real(to_torch(leaf)).double() for key, leaf in leaves.items()}
    partners, _ = pair_results({key: Truth(tensor) for key, tensor in theirs.items()}, own)
    return {
        key: own[partner].permute(inverse(session.axes_of_result(key, theirs[key].ndim)))
        for key, partner in partners.items()
    }


def _run(session: Session, inputs: Inputs, without: Collection[Bound] = ()) -> tuple[Results, Clamps]:
    """PyTorch's results in float64, maybe without some bounds, and what its code clamps."""
    import torch

    with torch.no_grad(), watching_clamps(without=without) as clamps:
        leaves = leaves_by_key(inputs.call_reference(session.truth_model, torch.float64))
    return {key: as_real(to_torch(leaf)).double() for key, leaf in leaves.items()}, clamps


def _modules(session: Session, inputs: Inputs) -> dict[int, str]:
    """The module whose code makes each call that clamps, by the call's number."""
    import torch

    with torch.no_grad(), watching_clamps(session.truth_model) as clamps:
        inputs.call_reference(session.truth_model, torch.float64)
    return clamps.modules


def _culprits(session: Session, inputs: Inputs, wrong: _Wrong) -> Iterator[Culprit]:
    modules = _modules(session, inputs)
    how = "has another bound" if wrong.is_other else "has no such bound"
    for call, several in itertools.groupby(wrong.bounds, key=lambda bound: bound.call):
        cause = f"PyTorch clamps numbers there to {' and '.join(map(str, several))}, and Keras {how}"
        label, text = modules.get(call) or "the model", f"differs by {wrong.relative:.2g}"
        yield Culprit(label, "", text, wrong.relative, diagnosis=Diagnosis.certain(label, cause))


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(each.isfinite().all()) for each in tensors)


def _distance(one: Results, other: Results) -> float:
    """The greatest relative distance of two sets of results; infinite where one is not finite or has another shape."""
    worst = 0.0
    for key, tensor in one.items():
        expected = other[key]
        if tensor.shape != expected.shape or not _is_finite((tensor, expected)):
            return float("inf")
        scale, distance = rms(expected), rms(tensor - expected)
        worst = max(worst, distance / scale if scale else float(distance > 0) * float("inf") if distance else 0.0)
    return worst
