"""Runs two models and compares them: the check of any two. What the results mean is in `porting.parity.report`.

Each batch goes through four passes. PyTorch in float64 is kept: it is the truth. Keras in float64 is compared with it,
tensor by tensor, paired by content. PyTorch in float32 says what rounding does, and Keras in float32 whether it rounds
about as well. Only where the outputs differ does anything else run: see `porting.parity.locate`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import KINDS
from porting.kinds.transforms import Shifted
from porting.mapping.key_map import KeyMap
from porting.models.inputs import Axes, Inputs, leaves_by_key, make_inputs
from porting.models.keras_float64 import Float64Model
from porting.models.live import effective_tensors
from porting.models.observe import observe_layers, observe_modules, to_torch
from porting.models.precision import in_precision
from porting.models.traverse import named_layers, named_variables
from porting.parity.derived import (
    StoredWeights,
    derived_weights,
    halved_weights,
    has_derived,
    rounds_to,
    substitute_for,
)
from porting.parity.locate import locate
from porting.parity.loud import compare_loud_outputs
from porting.parity.observers import ExactObserver, RoundingObserver
from porting.parity.pairing import Names, refuse_unknown_layers
from porting.parity.record import NoiseObserver, Recording
from porting.parity.report import (
    EXACT,
    FLOAT32,
    OUTPUT,
    Culprit,
    Diagnosis,
    Limits,
    ParityReport,
)
from porting.parity.results import pair_results
from porting.parity.session import Session
from porting.parity.summary import precision_of, summarize
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    import keras
    from torch import nn


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
            session = Session(reference, candidate, given, names, axes, Float64Model(candidate, build_float64), rounded)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            return _without_result(f"the PyTorch model cannot be run in float64: {_first_line(error)}", limits, name)
        try:
            if key_map is not None and any(isinstance(entry.transform, Shifted) for entry in key_map.entries):
                _substitute_by_key_map(session, key_map)
            _run_batches(session, limits, batch_size, progress)
        except CannotRunError as error:
            return _without_result(str(error), limits, name)
        report = summarize(session, limits, key_map, name, strict_settings, waive)
        if loud:
            progress("loud inputs" if key_map is None else "loud weights")
            found, on_loud = compare_loud_outputs(session, key_map, limits, locate_culprits and not report.divergences)
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
        rounding = RoundingObserver(session, recording, limits, start)
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


def _substitute_by_key_map(session: Session, key_map: KeyMap) -> None:
    """Weights that a row computes, as float64 has them, where the model holds their rounding to float32.

    A variance that takes what two epsilons differ by may round to what it was.
    """
    arrays = effective_tensors(session.truth_model, in_float32=False)
    with session.float64.active() as model:
        variables = named_variables(model)
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        for entry in key_map.entries:
            if isinstance(entry.transform, Shifted) and entry.is_in(arrays, variables):
                for name, exact in entry.to_keras(arrays, shapes).items():
                    held = np.asarray(variables[name])
                    if np.array_equal(held.astype(np.float32), exact.astype(np.float32)):
                        variables[name].assign(exact)


def _substitute_derived(session: Session, recording: Recording) -> None:
    halved = halved_weights(session.reference)
    if halved and session.float64.substitute(lambda name, values: rounds_to(values, halved)):
        session.notes["PyTorch's weights are in half precision, and Keras's are numbers that round to them"] = None
        session.halved = halved
    if not has_derived(session.truth_model):
        return
    stored = StoredWeights(
        tensor.detach().float().numpy()
        for tensor in session.reference.state_dict().values()
        if tensor.is_floating_point()
    )
    others = {name for name, values in session.float64.weights().items() if not stored.has(values)}
    if not others:
        return
    batch_norm = KINDS["batch_norm"]
    epsilons = [layer.epsilon for layer in session.names.layers.values() if batch_norm.is_layer(layer)]
    derived = derived_weights(session.truth_model, recording, epsilons)
    count = session.float64.substitute(lambda name, values: substitute_for(values, derived) if name in others else None)
    if count:
        session.notes[f"{count} weights are computed from several tensors of PyTorch's, exactly but for float32"] = None


def _run_exact(session: Session, recording: Recording, batch: Inputs, start: int) -> ExactObserver | None:
    """The Keras model in float64: turned in place, else a clone; raises CannotRunError where it does not run at all."""
    kept = dict(session.pairs), dict(session.lone), set(session.used)
    for attempt in ("in place", "clone"):
        observer = ExactObserver(session, recording, start)
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


def _culprits(session: Session, report: ParityReport) -> tuple[Culprit, ...]:
    """Where the two part in float64; where they do not, the first layer that rounds too much."""
    if any(divergence.view == EXACT for divergence in report.divergences):
        found = tuple(locate(session, session.few(2), report.limits))
        if found:
            return found
    first = report.divergences[0]
    layer = next(each for each in report.layers if each.source == first.layer)
    view = layer.views.get(first.view)
    own = session.names.layers.get(layer.target.partition("#")[0])
    dtype = getattr(own, "compute_dtype", "float32") if own is not None else precision_of(session.candidate)
    diagnosis = None
    if first.view == FLOAT32 and dtype != "float32":
        diagnosis = Diagnosis(first.layer, f"it computes in {dtype}", 0.0, (f"it computes in {dtype}",))
    relative = view.relative_error if view is not None else math.inf
    return (Culprit(first.layer, layer.target, first.reason, relative, diagnosis=diagnosis),)


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
