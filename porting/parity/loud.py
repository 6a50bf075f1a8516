"""Compares the outputs once more, on weights or inputs that do not hide mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.mapping.key_map import KeyMap
from porting.models.inputs import Inputs, inverse, leaves_by_key
from porting.models.live import effective_tensors
from porting.models.observe import to_torch
from porting.models.synthetic import fill_with_synthetic_weights
from porting.models.traverse import named_variables
from porting.parity.content import Truth, as_real
from porting.parity.locate import locate
from porting.parity.measure import rms, without_equal_infinities
from porting.parity.report import (
    FLOAT32_ROUNDOFF,
    Culprit,
    Loud,
)
from porting.parity.results import pair_results
from porting.parity.session import Session

if TYPE_CHECKING:
    from torch import Tensor, nn

# Loud weights and inputs increase rounding too. The mistakes that they are meant to show are above a hundredth.
LOUD_LIMIT = 1e-9
LOUD_INPUTS = 16.0
# Where so large inputs saturate, these do not. A difference of so much of the outputs may be another choice.
CALMER_INPUTS, _GREATLY = 4.0, 0.1
_MOST_SAMPLES, _NUMBERS = 8, 64 * 64 * 3
# Inputs of zeros and ones with at most this many axes are masks.
_MOST_MASKS = 3


def compare_loud_outputs(
    session: Session, inputs: Inputs | None, key_map: KeyMap | None, locates: bool
) -> tuple[Loud | None, tuple[Culprit, ...]]:
    """Compare the outputs on loud weights, or on loud inputs if no key map can transfer weights.

    `inputs` are by default a few samples of the session's. If the outputs differ and `locates` is True, also returns
    the culprits. None if there is nothing to compare.
    """
    inputs = session.few(_samples(session.inputs)) if inputs is None else inputs
    if key_map is not None:
        return _on_loud_weights(session, inputs, key_map, locates)
    if not any(array.dtype.kind == "f" for array in inputs.candidate):
        return None, ()
    size = f"inputs {LOUD_INPUTS:g} times as large"
    large = louder(inputs, noisy=True)
    found = _judged_loud(session, large, f"{size}, with noise", locates)
    if found[0] is not None and found[0].relative > _GREATLY and _is_another_choice(session, large):
        # Among equal scores either choice is right. Smaller inputs do not saturate.
        what = f"inputs {CALMER_INPUTS:g} times as large, with noise"
        calm = _judged_loud(session, louder(inputs, noisy=True, by=CALMER_INPUTS), what, locates)
        found = found if calm[0] is None else calm
    if found[0] is None:  # the model may take only numbers of some range
        found = _judged_loud(session, louder(inputs, noisy=False), size, locates)
    return found


def _is_another_choice(session: Session, inputs: Inputs) -> bool:
    """Whether results that differ are other numbers of PyTorch's, chosen where its scores have saturated at one.

    A sort or a top-k then chooses among equal scores. All numbers of Keras's result are among PyTorch's tensors, but in
    no tensor in that order.
    """
    import torch

    recording = session.record_truth(inputs)
    tensors = [*(truth.tensor for truth in recording.truths), *session.tensors_of_code(inputs, recording)]
    scores = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel() > 1)
    if not any(bool((each == 1.0).any()) and bool(((each > 0.0) & (each < 1.0)).any()) for each in scores):
        return False
    results = {id(truth.tensor) for truth in recording.outputs.values()}
    known = torch.cat([tensor.reshape(-1).double() for tensor in tensors if id(tensor) not in results]).sort().values
    library = session.library(recording, tensors)
    with session.float64.active() as model:
        ours = leaves_by_key(model(inputs.for_candidate(model, exact=True), training=False))
    for leaf in ours.values():
        actual = as_real(to_torch(leaf)).double()
        if library.find(actual):
            continue  # it agrees, or is a tensor as a whole
        place = torch.searchsorted(known, actual.reshape(-1)).clamp(1, len(known) - 1)
        near = torch.minimum((known[place] - actual.reshape(-1)).abs(), (known[place - 1] - actual.reshape(-1)).abs())
        if not bool((near <= LOUD_LIMIT * actual.reshape(-1).abs().clamp_min(1e-300)).all()):
            return False
    return True


def _samples(inputs: Inputs) -> int:
    """As many samples as are as large as one photo, up to eight: a clamp is not reached in each."""
    numbers = sum(array.size for array in inputs.candidate) // len(inputs)
    return max(1, min(_MOST_SAMPLES, _NUMBERS // max(1, numbers)))


def _judged_loud(session: Session, inputs: Inputs, what: str, locates: bool) -> tuple[Loud | None, tuple[Culprit, ...]]:
    relative = _relative_on(session, inputs)
    if relative is None:
        return None, ()
    found = Loud(what, relative, LOUD_LIMIT)
    if found.passed or not locates:
        return found, ()
    return found, tuple(locate(session, inputs))


def louder(inputs: Inputs, *, noisy: bool, by: float = LOUD_INPUTS) -> Inputs:
    """Make floats larger, and add noise as large as they are, which brings channels to life that they leave at zero.

    Numbers that are not negative stay so. Masks stay as they are, and noise is left out where the two sides have inputs
    of their own.
    """
    rng = np.random.default_rng(0)
    candidate, reference = list(inputs.candidate), list(inputs.reference)
    for index, axes in enumerate(inputs.axes):
        array = candidate[index]
        if array.dtype.kind != "f" or (array.ndim <= _MOST_MASKS and bool(((array == 0) | (array == 1)).all())):
            continue
        candidate[index] = array * np.float32(by)
        reference[index] = reference[index] * np.float32(by)
        if noisy and axes is not None:
            size = float(np.sqrt(np.square(array, dtype=np.float64).mean())) or 1.0
            noise = rng.normal(0.0, by * size, array.shape).astype(array.dtype)
            candidate[index] = candidate[index] + (np.abs(noise) if bool((array >= 0).all()) else noise)
            reference[index] = np.transpose(candidate[index], inverse(axes)).astype(reference[index].dtype)
    return replace(inputs, candidate=tuple(candidate), reference=tuple(reference))


def _on_loud_weights(
    session: Session, inputs: Inputs, key_map: KeyMap, locates: bool
) -> tuple[Loud | None, tuple[Culprit, ...]]:
    import torch

    def run(model: nn.Module) -> Any:
        return inputs.call_reference(model, torch.float64)

    def own() -> Iterator[tuple[str, Array]]:
        """The Keras weights that are those of the reference, bit for bit."""
        state = session.reference.state_dict()
        for entry in key_map.entries:
            if session.bits.copies.issuperset(entry.targets) and entry.targets:
                arrays = {name: state[name].detach().float().numpy() for name in entry.sources}
                yield from entry.to_keras(arrays, shapes).items()

    shapes = {name: tuple(variable.shape) for name, variable in named_variables(session.candidate).items()}
    try:
        with session.overwritten() as truth_model, session.float64.overwritten(own) as variables:
            try:
                fill_with_synthetic_weights(truth_model, 0, run=run)
            except Exception:  # a model may raise anything when it runs as in training
                return None, ()
            truth_model.eval()
            for parameter in truth_model.parameters():
                parameter.data = parameter.data.float().to(parameter.dtype)  # numbers that float32 variables hold
            _restore_constants(truth_model, key_map, session.reference.state_dict())
            arrays = effective_tensors(truth_model, in_float32=False)
            with session.float64.active():
                for entry in key_map.entries:
                    if entry.is_in(arrays, variables):
                        for name, values in entry.to_keras(arrays, shapes).items():
                            variables[name].assign(np.asarray(values, order="C"))
            return _judged_loud(session, inputs, "loud random weights", locates)
    except (RuntimeError, ValueError):  # a model that cannot be filled with loud weights has none
        return None, ()


def _restore_constants(model: nn.Module, key_map: KeyMap, before: Mapping[str, Tensor]) -> None:
    """Restore the tensors that Keras leaves out, such as a bias of zeros."""
    fixed = {name: before[name] for entry in key_map.entries if not entry.targets for name in entry.sources}
    model.load_state_dict(fixed, strict=False)


def _relative_on(session: Session, inputs: Inputs) -> float | None:
    """The worst relative distance of the outputs in float64; None if PyTorch's are not finite or shapes differ."""
    import torch

    with torch.no_grad(), session.noting_clamps():
        theirs = {
            key: as_real(to_torch(leaf))
            for key, leaf in leaves_by_key(inputs.call_reference(session.truth_model, torch.float64)).items()
        }
    with session.float64.active() as model:
        result = model(inputs.for_candidate(model, exact=True), training=False)
        ours = {key: as_real(to_torch(leaf)) for key, leaf in leaves_by_key(result).items()}
    partners, _ = pair_results({key: Truth(tensor) for key, tensor in theirs.items()}, ours)
    worst = 0.0
    inside = any(pair.in_float32 for pair in (*session.pairs.values(), *session.results.values()))
    allowed = 1e3 if inside else 1e2 if session.has_rounded_weights else 0.0
    for key, own in partners.items():
        expected, actual = theirs[key].permute(session.axes_of_result(key, theirs[key].ndim)), ours[own]
        if expected.shape != actual.shape:
            return None
        if not expected.numel():
            continue
        expected, actual = without_equal_infinities(expected, actual)
        if not bool(expected.isfinite().all()):
            return None
        scale, distance = rms(expected), rms(actual - expected)
        relative = distance / scale if scale else (math.inf if distance else 0.0)
        # What is computed in float32 inside, or with weights that were rounded to it, cannot agree better.
        relative = 0.0 if relative < allowed * FLOAT32_ROUNDOFF else relative
        worst = max(worst, relative) if not math.isnan(relative) else math.inf
    return worst
