"""Runs any two models and compares them. `porting.parity.report` defines what the results mean.

Each batch goes through four passes. PyTorch in float64 is recorded as the truth. Keras in float64 is compared with it
tensor by tensor, paired by content. PyTorch in float32 shows how much rounding to expect, and Keras in float32 is
compared with that. Only if the outputs differ does `porting.parity.locate` search for the culprits.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.call_names import without_number
from porting.kinds import KINDS, kind_of_module
from porting.kinds.transforms import Array, Shifted
from porting.mapping.convert import to_float32
from porting.mapping.key_map import KeyMap
from porting.mapping.rules import KeyRule
from porting.models.float32_trace import Float32Trace
from porting.models.frameworks import compiled_calls, torch_on_one_thread
from porting.models.inputs import Axes, Inputs, leaves_by_key, make_inputs
from porting.models.keras_float64 import Float64Model
from porting.models.live import effective_tensors, require_models
from porting.models.modes import in_mode
from porting.models.observe import observe_layers, observe_modules, to_torch
from porting.models.precision import HALVES, in_precision
from porting.models.rows import key_map_of_rows
from porting.models.stacks import last_layer
from porting.models.traverse import named_layers, named_variables, owned_names
from porting.parity.background import in_background
from porting.parity.bits import compare_bits
from porting.parity.content import ROUNDED, SAME_IN_FLOAT32, as_real
from porting.parity.derived import (
    StoredWeights,
    derived_weights,
    halved_weights,
    has_derived,
    in_all_orders,
    is_nearly,
    is_too_large_to_copy,
    rounds_to,
    scaled_weight,
    substitute_for,
    table_with_row,
)
from porting.parity.inferred import with_bare_weights, with_inferred_weights
from porting.parity.locate import locate
from porting.parity.loud import compare_loud_outputs
from porting.parity.measure import measure_distance, measure_size
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
from porting.parity.rounded_weights import is_rounding_rescaling
from porting.parity.session import Session
from porting.parity.summary import precision_of, summarize
from porting.parity.unreached import with_unreached_bounds
from porting.progress import SILENT, Progress
from porting.wording import counted, typed_reason_of

if TYPE_CHECKING:
    import keras
    from torch import nn


# A compiled function may round otherwise than its code, by less than this share of a result.
_COMPILED = 1e-3


def check_parity(
    reference: nn.Module,
    candidate: keras.Model,
    inputs: Any,
    *,
    reference_inputs: Any = None,
    pairs: Mapping[str, Any] | None = None,
    key_map: KeyMap | Sequence[KeyRule] | None = None,
    input_axes: Sequence[Axes | None] | None = None,
    output_axes: Mapping[str, Axes] | Sequence[Axes] | Axes | None = None,
    limits: Limits | None = None,
    batch_size: int | None = None,
    strict_settings: bool = False,
    waive: Sequence[str] = (),
    precision: str | None = None,
    build_float64: Callable[[], keras.Model] | None = None,
    loud: bool = True,
    loud_inputs: Any = None,
    locate_culprits: bool = True,
    name: str = "as ported",
    progress: Progress = SILENT,
) -> ParityReport:
    """Run both models on the same inputs, in float64 and in float32, and report whether they compute the same.

    Args:
        inputs: one array, several, or a dict, as the Keras model takes them: float32 images `(N, H, W, C)`,
            tokens or others.
        reference_inputs: the inputs for PyTorch. By default they are the same, with channels moved right after the
            samples if PyTorch's first module takes them there.
        pairs: which layer stands for which module where names do not say so, `{"torch.name": "keras/path"}`, with "-"
            for no layer. All other tensors pair by content.
        key_map: states which weights must be equal bit by bit, and carries loud weights over to Keras: a KeyMap, or
            rows.
        input_axes: PyTorch's axes in Keras's order for each input.
        output_axes: the same for each result: a dict by key, a sequence, or one order of axes for a single result.
        limits: what parity allows, and for which layers.
        batch_size: the number of samples per batch; by default all of them.
        strict_settings: whether settings that matter only in training, such as a momentum, fail the check.
        waive: modules or settings that may differ, `"name"` or `"name:setting"`.
        precision: "float16" or "bfloat16" if the Keras model computes in it on purpose.
        build_float64: makes the Keras model for the exact view. By default the model itself is switched to float64.
        loud: whether to compare the outputs on loud weights too, on which hidden mistakes show. Without a key map the
            inputs are loud instead.
        loud_inputs: the inputs for that comparison; by default a few samples of `inputs`.
        locate_culprits: whether to search for the layers where the two models part.
        name: the name of the report.
        progress: is called with what is being done, and how far it is.

    Both models are left exactly as they were. Activations of one batch are in memory at a time.

    Raises ValueError when there are no inputs, or when a name belongs to neither model, and TypeError when a model is
    of the wrong framework or an option of the wrong type. Inputs of a wrong shape raise nothing: the report says so in
    `problem` and does not pass.
    """
    from torch.nn.parameter import is_lazy

    require_models(reference, candidate)
    limits = limits or Limits()
    reference = _unwrapped(reference)
    require_options(reference, limits=limits, waive=waive, pairs=pairs, precision=precision)
    if key_map is not None and not isinstance(key_map, KeyMap):
        key_map = key_map_of_rows(reference, candidate, key_map)
    if any(is_lazy(tensor) or tensor.is_meta for tensor in (*reference.parameters(), *reference.buffers())):
        return _without_result("the PyTorch model has weights without values: lazy ones, or on meta", limits, name)
    with in_mode(reference, training=False):
        try:
            given = make_inputs(reference, candidate, inputs, reference_inputs, input_axes)
            others = None if loud_inputs is None else make_inputs(reference, candidate, loud_inputs, None, input_axes)
            names = Names(reference, candidate, pairs)
        except (RuntimeError, TypeError, AttributeError) as error:
            return _without_result(f"the inputs do not fit the models: {typed_reason_of(error)}", limits, name)
        if problem := given.not_finite():
            return _without_result(problem, limits, name)
        axes = _stated_axes(output_axes)
        try:
            plain = _in_float32(reference)
            rounded = plain if precision is None else in_precision(plain, precision, given.candidate[0])
            large = is_too_large_to_copy(reference)
            try:
                float64 = Float64Model(candidate, build_float64, saving_memory=large and _in_full_precision(candidate))
            except Exception as error:  # the caller's function may raise anything
                how = "by build_float64" if build_float64 is not None else ""
                problem = f"the Keras model cannot be made in float64 {how}".rstrip()
                return _without_result(f"{problem}: {typed_reason_of(error)}", limits, name)
            session = Session(reference, candidate, given, names, axes, float64, rounded, large=large)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            return _without_result(
                f"the PyTorch model cannot be run in float64: {typed_reason_of(error)}", limits, name
            )
        try:
            if key_map is not None and any(isinstance(entry.transform, Shifted) for entry in key_map.entries):
                _substitute_by_key_map(session, key_map)
            _run_batches(session, key_map, limits, batch_size, progress)
        except CannotRunError as error:
            return _without_result(str(error), limits, name)
        report = summarize(session, limits, name, key_map, strict_settings, waive)
        if key_map is None:
            report = with_inferred_weights(session, report, loud=loud)
        if loud:
            progress("loud inputs" if key_map is None else "loud weights")
            locates = locate_culprits and not report.divergences
            found, on_loud = compare_loud_outputs(session, others, key_map, locates)
            report = replace(report, loud=found, culprits=on_loud)
            if not report.divergences and (found is None or found.passed):
                report = with_unreached_bounds(session, report, locates=locate_culprits)
        if locate_culprits and report.divergences:
            progress("looking for the cause")
            # Otherwise the rounding of such weights would be named as a culprit beside the real mistake.
            _allow_for_rounding(session)
            notes = (*report.notes, *_rounded_weights(session))
            report = replace(report, culprits=_culprits(session, report), notes=notes)
            if key_map is None and any(each.diagnosis is None for each in report.culprits):
                report = with_bare_weights(session, report)
        progress("done", 1, 1)
        return report


class CannotRunError(Exception):
    """One of the models cannot be run on these inputs."""


def _run_batches(
    session: Session, key_map: KeyMap | None, limits: Limits, batch_size: int | None, progress: Progress
) -> None:
    nothing = session.found()
    try:
        _run_all(session, key_map, limits, batch_size, progress)
    except _BeginAgainError:
        session.forget(nothing)
        session.logits.clear()
        _allow_for_rounding(session)
        _run_all(session, key_map, limits, batch_size, progress)


def _run_all(
    session: Session, key_map: KeyMap | None, limits: Limits, batch_size: int | None, progress: Progress
) -> None:
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
        except Exception as error:  # a model may raise anything on unsuitable inputs
            raise CannotRunError(
                f"the PyTorch model cannot run in float64 on these inputs: {typed_reason_of(error)}"
            ) from None
        step(1, "Keras, float64")
        if start == 0:
            _build(session, batch)
            if key_map is not None:
                session.bits = compare_bits(session.reference, named_variables(session.candidate), key_map)
            _substitute_derived(session, recording)
        exact = _run_exact(session, recording, batch, start)
        step(2, "PyTorch, float32")
        noise = NoiseObserver(recording, exact.wanted)
        with torch.no_grad(), observe_modules(session.rounded, noise, stacks=True):
            noise.results(batch.call_reference(session.rounded, torch.float32))
        step(3, "Keras, float32")
        with torch_on_one_thread(), in_background() as background:
            rounding = RoundingObserver(session, recording, limits, start, background)
            compiled: Any = compiled_calls() if _on_tensorflow() else contextlib.nullcontext([])
            with session.as_precise_as_reference(), observe_layers(session.candidate, rounding), compiled as called:
                result = session.candidate(batch.for_candidate(session.candidate), training=False)
            if called and start == 0:
                _refuse_stale(session, batch, result)
            found = {key: to_torch(leaf) for key, leaf in leaves_by_key(result).items()}
            partners, _ = pair_results(recording.outputs, found)
            rounding.results(found, partners)
        session.unseen = {
            call: None
            for call in recording.order
            if not any(id(truth) in exact.matched for truth in recording.calls[call].outputs)
            and last_layer(call, session.modules, recording.calls) == call
        }
        if len(partners) == 1:
            ((theirs, ours),) = partners.items()
            truth = recording.outputs[theirs].tensor
            if truth.ndim == 2:
                session.logits.append((truth.numpy(), found[ours].numpy()))


def _build(session: Session, batch: Inputs) -> None:
    """Build a model that was never called, by a first call in its own precision, so that it has weights."""
    layers = [session.candidate, *session.names.layers.values()]
    if all(layer.built for layer in layers):
        return
    try:
        session.candidate(batch.for_candidate(session.candidate), training=False)
    except Exception as error:  # a model may raise anything on unsuitable inputs
        raise CannotRunError(f"the Keras model cannot run on these inputs: {typed_reason_of(error)}") from None
    session.names.layers.update(named_layers(session.candidate))


def _substitute_by_key_map(session: Session, key_map: KeyMap) -> None:
    """Give the float64 model the exact variances that rows compute, if the model holds their rounding to float32.

    A variance plus the difference of two epsilons may round to the same number as before.
    """
    arrays = effective_tensors(session.double_model, in_float32=False)
    variables = named_variables(session.candidate)
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    exact: dict[str, Any] = {}
    for entry in key_map.entries:
        if isinstance(entry.transform, Shifted) and entry.is_in(arrays, variables):
            with contextlib.suppress(ValueError):  # the comparison of bits says what is wrong with it
                exact |= entry.to_keras(arrays, shapes)

    def rounded(name: str, held: Any) -> Any:
        found = exact.get(name)
        same = found is not None and np.array_equal(held.astype(np.float32), found.astype(np.float32))
        return found if same else None

    session.float64.substitute(rounded)


def _substitute_created(session: Session) -> None:
    """Give the float64 model PyTorch's own constants where it holds their rounding to float32, such as a mean."""
    if not session.created:
        return
    created = {(each.size, to_float32(each).tobytes()): each for each in session.created}
    sizes = {size for size, _ in created}
    shapes = (variable.shape for variable in named_variables(session.candidate).values())
    if sizes.isdisjoint(math.prod(shape) for shape in shapes):
        return

    def exact(name: str, held: Any) -> Any:
        found = created.get((held.size, to_float32(held).tobytes())) if held.size in sizes else None
        return None if found is None or np.array_equal(found.ravel(), held.ravel()) else found.reshape(held.shape)

    session.float64.substitute(exact)


def _substitute_derived(session: Session, recording: Recording) -> None:
    halved = halved_weights(session.reference)
    if halved and session.float64.substitute(lambda name, values: rounds_to(values, halved)):
        session.notes["PyTorch's weights are in half precision, and Keras's are numbers that round to them"] = None
        session.halved = halved
    _substitute_created(session)
    if not has_derived(session.truth_model):
        return
    if session.bits.copies.issuperset(named_variables(session.candidate)):
        return
    weights = session.float64.weights(without=session.bits.copies)
    stored = StoredWeights(
        tensor.detach().float().numpy()
        for tensor in (session.reference.state_dict().values() if weights else ())
        if tensor.is_floating_point()
    )
    others = {name for name, values in weights.items() if not stored.has(values)}
    if not others:
        return
    batch_norm = KINDS["batch_norm"]
    epsilons = [layer.epsilon for layer in session.names.layers.values() if batch_norm.is_layer(layer)]
    derived = session.derived = derived_weights(session.double_model, recording, epsilons)
    count = session.float64.substitute(lambda name, values: substitute_for(values, derived) if name in others else None)
    if count:
        session.notes[f"{count} weights are computed from several tensors of PyTorch's, exactly up to float32"] = None


def _allow_for_rounding(session: Session) -> None:
    """Tell from mistakes what the port rounded when it computed weights, and what is computed in float32."""
    _substitute_computed(session)
    _follow_float32(session)


def _substitute_computed(session: Session) -> int:
    """Give the float64 model the exact weights that a factor or a row was folded into. Returns how many there are."""
    tensors = [
        tensor.detach()
        for tensor in session.reference.state_dict().values()
        if tensor.is_floating_point() and tensor.numel() > 1 and bool(tensor.isfinite().all())
    ]
    stored = StoredWeights(tensor.float().numpy() for tensor in tensors)
    others: set[str] = set()

    def computed(name: str, values: Array) -> Array | None:
        if name in session.bits.copies or values.size < 2 or stored.has(values) or not np.isfinite(values).all():
            return None
        same_size = [tensor for tensor in tensors if tensor.numel() == values.size]

        def orders() -> Iterator[Array]:  # one at a time: a large model has many of one size
            return (order for each in same_size for order in in_all_orders(each.double().numpy()))

        # A copy with a small mistake was not computed. Large models are not searched for parts.
        derived = (each for each in session.derived if each.size == values.size)
        near = session.is_large or any(is_nearly(values, each) for each in itertools.chain(derived, orders()))
        if not near and not stored.has_parts(values):
            others.add(name)
        scaled = scaled_weight(values, orders())
        if scaled is not None or values.ndim != 2:
            return scaled
        tables = [each.double().numpy() for each in tensors if each.ndim == 2 and each.shape[1] == values.shape[1]]
        return table_with_row(values, tables)

    count = session.float64.substitute(computed)
    session.computed = _layers_with_computed_weights(session, others)
    if count:
        session.notes[f"{counted(count, 'weight')} of Keras's computed from PyTorch's, exactly up to float32"] = None
    return count


def _layers_with_computed_weights(session: Session, others: set[str]) -> set[str]:
    """The layers of which no kernel is a tensor of PyTorch's, and those that scale their input by numbers of their own.

    `others` are the variables that hold no tensor of PyTorch's.
    """
    variables = named_variables(session.candidate)
    kernels = {
        layer: [name for name in own if len(variables[name].shape) > 1]
        for layer, own in owned_names(session.candidate).items()
    }
    found = {layer for layer, own in kernels.items() if layer and own and others.issuperset(own)}
    return found | {name for name, layer in session.names.layers.items() if is_rounding_rescaling(layer)}


def _run_exact(session: Session, recording: Recording, batch: Inputs, start: int) -> ExactObserver:
    """Run the Keras model in float64, in place or else as a clone. Raises CannotRunError if neither runs.

    If its code does not run where casts to float32 are left out, they are made. If the outputs differ by about as much
    as float32 rounds, the first batch is run again with weights that the port computed, then with float32 followed. A
    later batch that needs it raises _BeginAgainError.
    """
    attempts = iter(("without casts", "in place", "clone"))
    attempt, is_computed = next(attempts), False
    while True:
        before = session.found()
        try:
            with torch_on_one_thread(), in_background() as background, session.float64.active() as model:
                observer = ExactObserver(session, recording, start, batch, background if session.is_plain else None)
                with observe_layers(model, observer):
                    observer.results(model(batch.for_candidate(model, exact=True), training=False))
        except Exception as error:
            session.forget(before)
            attempt = next(attempts, "")
            if attempt == "in place" and start == 0:
                session.float64.stays = False
                continue
            if attempt == "clone" and start == 0:
                with contextlib.suppress(Exception):
                    session.float64.clone()
                    continue
            where = "in float64" if _runs(session, batch) else "on these inputs"
            raise CannotRunError(f"the Keras model cannot run {where}: {typed_reason_of(error)}") from None
        if observer.is_late:
            session.replaces_results = True
            if start > 0:
                raise _BeginAgainError
            session.forget(before)
            continue
        if not _may_round_in_float32(session):
            if start == 0 and not session.float64.trace:
                session.float64.trace = None  # nothing was computed in float32
            return observer
        if start > 0:
            raise _BeginAgainError
        session.forget(before)
        if is_computed or not _substitute_computed(session):
            _follow_float32(session)
        is_computed = True


class _BeginAgainError(Exception):
    """A batch shows that float32 has to be followed from the first batch on."""


def _on_tensorflow() -> bool:
    import keras

    return bool(keras.backend.backend() == "tensorflow")


def _refuse_stale(session: Session, batch: Inputs, result: Any) -> None:
    """Raise CannotRunError if what `tf.function` has compiled returns something else than its code, run eagerly."""
    with session.as_precise_as_reference():
        compiled = session.candidate(batch.for_candidate(session.candidate), training=False)
    ours, others = (leaves_by_key(each) for each in (result, compiled))
    for key, leaf in ours.items():
        one, other = as_real(to_torch(leaf)), as_real(to_torch(others[key]))
        alike = one.shape == other.shape
        if not alike or not measure_distance(other, one).total().rms <= _COMPILED * measure_size(one).total().rms:
            raise CannotRunError(
                "what tf.function has compiled in the Keras model returns something else than its code: it was "
                "compiled with other values. Build the model anew"
            )


def _follow_float32(session: Session) -> None:
    if session.float64.trace is None and not session.was_followed:
        session.was_followed = True
        if _on_tensorflow():
            session.float64.trace = Float32Trace(_constants(session.truth_model), session.created)


def _constants(model: nn.Module) -> list[Array]:
    """The buffers of a model, and other tensors that its modules hold, but for those that are weights of a kind."""
    import torch

    modules = [module for module in model.modules() if kind_of_module(module) is None]
    held = [value for module in modules for value in (*module.buffers(recurse=False), *vars(module).values())]
    held += [each for module in modules for each in module.parameters(recurse=False) if each.numel() == 1]
    floats = (each for each in held if isinstance(each, torch.Tensor) and each.is_floating_point())
    return [each.detach().double().numpy() for each in floats if each.numel()]


def _may_round_in_float32(session: Session) -> bool:
    """Whether the outputs differ by about as much as float32 rounds, and nothing was done about it."""
    if session.float64.trace is not None or session.was_followed:
        return False
    views = [pair.exact for pair in session.results.values()]
    sizes = [(view.scale.total().rms, view.actual_error.total().rms) for view in views]
    near = not any(view.problem for view in views) and all(error <= SAME_IN_FLOAT32 * scale for scale, error in sizes)
    return near and any(error > ROUNDED * scale for scale, error in sizes)


def _runs(session: Session, batch: Inputs) -> bool:
    try:
        session.candidate(batch.for_candidate(session.candidate), training=False)
    except Exception:  # a model may raise anything on unsuitable inputs
        return False
    return True


def _rounded_weights(session: Session) -> Iterator[str]:
    """Say so if all kernels of the Keras model hold numbers of half precision, and those of PyTorch do not."""
    import torch

    def ours() -> Iterator[torch.Tensor]:
        for each in session.candidate.weights:
            if len(each.shape) > 1:
                yield torch.from_numpy(np.array(each, np.float32))

    def theirs() -> Iterator[torch.Tensor]:
        for each in session.reference.parameters():
            if each.ndim > 1:
                yield each.detach().float()

    def hold(tensors: Iterator[torch.Tensor], dtype: torch.dtype) -> bool:
        return all(torch.equal(each.to(dtype).float(), each) for each in tensors)

    for dtype in (torch.bfloat16, torch.float16):
        if any(True for _ in ours()) and hold(ours(), dtype) and not hold(theirs(), dtype):
            name = str(dtype).removeprefix("torch.")
            yield f"all kernels in Keras hold numbers of {name}: they were rounded on the way"
            return


def _culprits(session: Session, report: ParityReport) -> tuple[Culprit, ...]:
    """The culprits in float64; if the models agree there, the first layer that rounds too much."""
    if any(divergence.view == EXACT for divergence in report.divergences):
        found = tuple(locate(session, session.few(2)))
        if found:
            return found
    first = report.divergences[0]
    layer = next(each for each in report.layers if each.source == first.layer)
    earlier = next((each for each in report.layers if report.failed(each)), layer)
    if first.view == EXACT and report.layers.index(earlier) < report.layers.index(layer):
        relative = earlier.views[EXACT].relative_error
        return (Culprit(earlier.source, earlier.target, f"differs by {relative:.2g} of its size in float64", relative),)
    view = layer.views.get(first.view)
    own = session.names.layers.get(without_number(layer.target))
    dtype = getattr(own, "compute_dtype", "float32") if own is not None else precision_of(session.candidate)
    diagnosis = None
    if first.view == FLOAT32 and dtype != "float32":
        diagnosis = Diagnosis.certain(first.layer, f"it computes in {dtype}")
    relative = view.relative_error if view is not None else math.inf
    return (Culprit(first.layer, layer.target, first.reason, relative, diagnosis=diagnosis),)


def require_options(
    reference: nn.Module,
    *,
    limits: Limits | None = None,
    waive: Sequence[str] = (),
    pairs: Mapping[str, Any] | None = None,
    precision: str | None = None,
    **_: Any,
) -> None:
    """Check options of `check_parity`: raise TypeError for a wrong type, ValueError for a name of neither model."""
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(
            f"limits must be porting.Limits, such as Limits(max_ratio=16), but is a {type(limits).__name__}"
        )
    if isinstance(waive, str) or not all(isinstance(each, str) for each in waive):
        raise TypeError(f'waive must be a list of names, such as ["stem:eps"], but is {waive!r:.80}')
    if pairs is not None and not isinstance(pairs, Mapping):
        raise TypeError(f'pairs must be a dict, such as {{"stem": "first"}}, but is a {type(pairs).__name__}')
    if precision not in {None, *HALVES}:
        raise ValueError(f"precision must be {' or '.join(HALVES)}, but is {precision!r}")
    refuse_unknown_layers("limits", limits.per_layer if limits is not None else (), reference, [OUTPUT])
    refuse_unknown_layers("waive", [each.partition(":")[0] for each in waive], reference)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and DataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DataParallel", "DistributedDataParallel"}:
            inner = model.module
        if inner is None:
            return model
        model = inner


def _in_float32(model: nn.Module) -> nn.Module:
    """The model itself, or a float32 copy if its numbers have another type."""
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()):
        return model
    return copy.deepcopy(model).float()


def _in_full_precision(candidate: keras.Model) -> bool:
    """Whether no variable of a Keras model is in half precision."""
    return not any(str(variable.dtype) in {"float16", "bfloat16"} for variable in candidate.weights)


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
