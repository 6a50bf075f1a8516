"""Proposes a key map between two unmapped models, states how sure each row is, and proves it by a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import KeyMapError
from porting.kinds import kind_called
from porting.kinds.transforms import Constant, Shape
from porting.mapping.compress import compress_rows
from porting.mapping.key_map import KeyMap, LayerPair, TensorEntry, expand
from porting.mapping.rules import KeyRule, join_name
from porting.models.float64 import in_float64
from porting.models.inputs import Axes
from porting.models.live import assign_tensors, effective_tensors
from porting.models.rows import pairs_of
from porting.models.traverse import named_variables
from porting.parity.compare import check_parity
from porting.parity.content import Library
from porting.parity.record import Recording, record_run
from porting.parity.report import ParityReport
from porting.parity.settings import same_setting
from porting.progress import SILENT, Progress
from porting.proposing.options import AcrossFrameworks, Options, WithinFramework
from porting.proposing.sides import KerasSide, TorchSide, make_sides
from porting.proposing.walk import Choice, Outcome, Stated, Walk
from porting.wording import listed, typed_reason_of

if TYPE_CHECKING:
    import keras
    from torch import nn

# A model is searched again with zeros in at most so many tensors that no row takes.
_MOST_SPARE = 4
PROVEN, LIKELY, OPEN = "proven", "likely", "open"


@dataclass(frozen=True)
class Row:
    """One row: a PyTorch module or parameter, the Keras layer or variable that takes it, and the kind of the row.

    `confidence` is `proven` if the float64 run was exact with this row and nothing else would do, `likely` if the row
    fits without such a proof, and `open` if nothing fits (`source` is then ""). `why` gives the reason in one line.
    """

    source: str
    target: str
    kind: str
    confidence: str
    why: str

    def __str__(self) -> str:
        return (
            f"{self.source or '?'} -> {self.target or 'none'} ({self.kind or 'unknown'}): {self.confidence}, {self.why}"
        )


@dataclass(frozen=True)
class Proposal:
    """A key map as far as it could be found. `differences` says where the two models are not the same network.

    `unused_sources` are the PyTorch tensors that no row takes, `unfilled_targets` the Keras variables that no row
    writes. `agrees` is whether the outputs are exact. `names` are the names of all PyTorch tensors,
    `zeros` are PyTorch tensors that the Keras model lacks: the outputs are exact if they hold zeros. `shapes` are the
    shapes of all Keras variables. `report` is the parity check that the map led to.
    """

    rows: tuple[Row, ...]
    key_map: KeyMap
    unused_sources: tuple[str, ...]
    unfilled_targets: tuple[str, ...]
    differences: tuple[str, ...] = ()
    agrees: bool = False
    names: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    shapes: Mapping[str, Shape] = field(default_factory=dict, repr=False)
    report: ParityReport | None = field(default=None, repr=False)

    @property
    def complete(self) -> bool:
        """Whether every tensor and every variable has a row, and the outputs are exact."""
        return self.agrees and not (self.unused_sources or self.unfilled_targets or self.zeros)

    @property
    def rules(self) -> list[KeyRule]:
        """The rows that are not open, in the form that `port_weights` takes."""
        return [KeyRule(row.source, row.target, row.kind) for row in self.rows if row.confidence != OPEN]

    @property
    def short_rules(self) -> list[KeyRule]:
        """The same rows, compressed by placeholders for the numbers in names."""
        return compress_rows(self.rules, self.names)

    def copy_weights(self, reference: Any, candidate: Any) -> None:
        """Copy the weights of one model into another of the same framework, as far as rows write them.

        For a Keras model that takes a PyTorch model's weights, use `porting.port_weights`. Raises TypeError for two
        models of two frameworks.
        """
        from torch import nn

        if isinstance(reference, nn.Module) != isinstance(candidate, nn.Module):
            raise TypeError("copy_weights takes two models of one framework; use porting.port_weights for two")
        if isinstance(reference, nn.Module):
            tensors = effective_tensors(reference)
        else:
            tensors = {name: np.asarray(variable) for name, variable in named_variables(reference).items()}
        values: dict[str, Any] = {}
        for entry in self.key_map.entries:
            if entry.targets:
                values |= entry.to_keras(tensors, self.shapes)
        if isinstance(candidate, nn.Module):
            assign_tensors(candidate, values)
            return
        variables = named_variables(candidate)
        for name, array in values.items():
            variables[name].assign(array)

    def require_complete(self, drop: Collection[str] = (), keep: Collection[str] = ()) -> Proposal:
        """Return the proposal itself. Raises KeyMapError, with everything that is open, if it is not complete.

        `drop` names tensors that no row needs to take, `keep` variables that no row needs to write.
        """
        lines = [f"  {row.target}: {row.why}" for row in self.rows if row.confidence == OPEN]
        lines += [f"  {name}: no row writes it" for name in self.unfilled_targets if name not in keep]
        lines += [f"  {name}: no row takes it" for name in self.unused_sources if name not in drop]
        lines += [f"  {name}: no row takes it, and it must hold zeros" for name in self.zeros if name not in drop]
        if self.agrees and not lines:
            return self
        lines += [f"  {line}" for line in self._why()]
        if not lines:
            lines = ["  the outputs still differ"]
        raise KeyMapError(
            "the two models could not be mapped completely:\n" + "\n".join(lines[:50]),
            hint="Mend the layers that differ. Rows of your own help where a layer is open, and drop= where Keras does "
            "without a tensor.",
        )

    def _why(self) -> Sequence[str]:
        """Why the outputs differ: settings that differ, else the first culprit of the check, else where they part.

        Further culprits may only come from the rows that could not be told.
        """
        with_reason = [each for each in self.differences if ": " in each]
        if with_reason or self.agrees or self.report is None or not self.report.culprits:
            return with_reason or self.differences
        first = self.report.culprits[0]
        cause = first.diagnosis
        return [str(first) if cause is None or cause.pattern else f"{first}: {cause.cause}"]

    def __repr__(self) -> str:
        return f"<Proposal: {self.summary.splitlines()[0]}>"

    def __str__(self) -> str:
        """The rows in short form, then the summary."""
        lines = [f"{rule.source} -> {rule.target or 'none'} ({rule.kind})" for rule in self.short_rules]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """How sure the rows are, every row that is not proven, and what has no partner."""
        count = {each: sum(row.confidence == each for row in self.rows) for each in (PROVEN, LIKELY, OPEN)}
        lines = [f"{count[PROVEN]} rows proven, {count[LIKELY]} likely, {count[OPEN]} open"]
        lines += [f"  {row}" for row in self.rows if row.confidence != PROVEN]
        lines += [f"  PyTorch only: {name}" for name in self.unused_sources]
        lines += [f"  PyTorch only: {name}, which must hold zeros for the outputs to be exact" for name in self.zeros]
        if ones := [name for entry in self.key_map.entries if _is_of_ones(entry) for name in entry.sources]:
            lines.append(f"  PyTorch only: {listed(ones)}, which must hold ones")
        lines += [f"  Keras only: {name}" for name in self.unfilled_targets]
        lines += [f"  {line}" for line in self._why()]
        lines.append(f"Outputs: {'exact in float64' if self.agrees else 'not the same'}")
        return "\n".join(lines)


def propose_map(
    reference: nn.Module | keras.Model,
    candidate: keras.Model | nn.Module,
    inputs: Any,
    *,
    reference_inputs: Any = None,
    pairs: Mapping[str, str] | None = None,
    rows: Iterable[KeyRule] = (),
    input_axes: Sequence[Axes | None] | None = None,
    absorb_epsilon: bool = False,
    check: bool = True,
    progress: Progress = SILENT,
) -> Proposal:
    """Find which module of a PyTorch model stands in which layer of a Keras model, by running both in float64.

    The weights of the models do not matter: the search runs a copy of the PyTorch model with random weights, which
    reveal mistakes. Both models are left as they were.

    Two models of one framework are mapped as well: an old checkpoint's PyTorch model to a rewritten one, or one Keras
    model to another. `Proposal.copy_weights` then moves the weights.

    Args:
        reference: The model whose weights are to be moved.
        candidate: The model that takes them.
        inputs: The inputs of the candidate, as for `check_parity`.
        reference_inputs: The inputs of the reference, as for `check_parity`.
        pairs: Rows that are known, `{"torch.name": "keras/path"}`.
        rows: Rows of a half-finished key map. Unlike `pairs` they state the kind too and may have placeholders.
        input_axes: As for `check_parity`.
        absorb_epsilon: Put the difference between two epsilons of a batch norm into its variance, which computes the
            same at inference.
        check: Run the parity check with the proposed map and keep its report. Not for two models of one framework.

    Raises:
        ValueError: The inputs do not fit.
        KeyMapError: A name in `pairs` or `rows` is none of the models', or a row matches nothing.
    """
    source, target = make_sides(reference, candidate, inputs, reference_inputs, input_axes)
    progress("running the reference")
    try:
        source.fill_with_synthetic_weights(target.lacking() if isinstance(target, KerasSide) else None)
        recorded = record_run(source.running)
    except Exception as error:  # a model may raise anything
        raise KeyMapError(
            f"the reference cannot run on these inputs: {typed_reason_of(error)}",
            hint="Give inputs that both models take; reference_inputs= are those of the reference alone.",
        ) from None

    def search(recording: Recording) -> tuple[Proposal, Options]:
        ranks = {truth.tensor.ndim for truth in recording.truths}
        library = Library(recording.truths, {rank: target.given.output_axes(rank) for rank in ranks})
        options: Options
        if isinstance(source, TorchSide) and isinstance(target, KerasSide):
            options = AcrossFrameworks(source, target, recording, absorb_epsilon=absorb_epsilon)
        else:
            options = WithinFramework(source, target, recording)
        stated = _by_pairs(pairs or {}, options) | _by_rows(rows, options)
        return _proposal(Walk(options, library, stated, progress).search(), options), options

    proposal, options = search(recorded)
    spare = proposal.unused_sources
    if not proposal.agrees and 0 < len(spare) <= _MOST_SPARE:
        # Published weights may hold zeros in a tensor that the candidate has no place for.
        first, tensors = options, source.tensors()
        held = {name: np.array(tensors[name]) for name in spare}
        source.replace({name: np.zeros_like(values) for name, values in held.items()})
        again, options = search(record_run(source.running))
        if again.agrees:
            proposal = _with_zeros(again, spare)
        else:
            source.replace(held)
            options = first
    if check and isinstance(options, AcrossFrameworks):
        progress("checking the map")
        report = _report(proposal, options.source, candidate, progress)
        proposal = replace(proposal, report=report)
        if report.passed and not any(row.confidence == OPEN for row in proposal.rows):
            # The check knows what the search does not, such as weights that are computed from several.
            proposal = replace(proposal, agrees=True, differences=())
    progress("done", 1, 1)
    if not proposal.agrees or not isinstance(options.source, TorchSide):
        return proposal
    own = options.source
    constants = own.constants().intersection(proposal.unused_sources)
    return _without(proposal, {name for name in constants if _has_effect(own, name)})


def _has_effect(source: TorchSide, name: str) -> bool:
    """Whether a result depends on a tensor of the reference, so that exact results show that Keras has it as well."""
    values = np.array(source.tensors()[name])
    before = record_run(source.running).outputs
    source.replace({name: values * (1 + 1e-3) + 1e-3})
    try:
        after = record_run(source.running).outputs
    finally:
        source.replace({name: values})
    return any(not bool((after[key].tensor == truth.tensor).all()) for key, truth in before.items() if key in after)


def _without(proposal: Proposal, constants: Collection[str]) -> Proposal:
    """A proposal that drops constants, which Keras has in its code."""
    key_map = proposal.key_map
    why = "Keras has it in its code, since the outputs depend on it and are exact"
    return replace(
        proposal,
        rows=(*proposal.rows, *(Row(name, "", "constant", PROVEN, why) for name in sorted(constants))),
        key_map=replace(key_map, drops=key_map.drops | set(constants)),
        unused_sources=tuple(name for name in proposal.unused_sources if name not in constants),
    )


def _is_of_ones(entry: TensorEntry) -> bool:
    return not entry.targets and isinstance(entry.transform, Constant) and entry.transform.value == 1.0


def _with_zeros(proposal: Proposal, names: Collection[str]) -> Proposal:
    """A proposal whose key map leaves out tensors that must hold zeros, as far as no row takes them."""
    zeros = tuple(name for name in proposal.unused_sources if name in names)
    key_map = proposal.key_map
    entries = (*key_map.entries, *(TensorEntry((name,), (), Constant(0.0)) for name in zeros))
    return replace(
        proposal,
        key_map=replace(key_map, entries=entries),
        unused_sources=tuple(name for name in proposal.unused_sources if name not in zeros),
        zeros=zeros,
    )


def _report(proposal: Proposal, source: TorchSide, candidate: keras.Model, progress: Progress) -> ParityReport:
    """The parity of the two models with the synthetic weights and the proposed map. Their own weights come back."""
    reference = in_float64(source.model).float()
    variables = named_variables(candidate)
    own = {name: np.array(variable) for name, variable in variables.items()}
    arrays = effective_tensors(reference)
    try:
        for entry in proposal.key_map.entries:
            for name, values in entry.to_keras(arrays, proposal.shapes).items():
                variables[name].assign(values)
        return check_parity(
            reference,
            candidate,
            source.given.for_candidate(candidate),
            reference_inputs=source.given.for_reference(),
            input_axes=source.given.axes,
            pairs=pairs_of(proposal.key_map, reference, candidate),
            key_map=proposal.key_map,
            name="with the proposed map",
            waive=tuple(f"{name}:eps" for name in proposal.key_map.absorbed),
            strict_settings=False,
            locate_culprits=not proposal.agrees,
            progress=progress,
        )
    finally:
        for name, values in own.items():
            variables[name].assign(values)


def _by_pairs(pairs: Mapping[str, str], options: Options) -> dict[str, Stated]:
    for source, target in pairs.items():
        if source not in options.modules and source not in options.tensors:
            raise KeyMapError(f"pairs: {source!r} is no module and no tensor of the reference")
        if target not in options.layers and target not in options.shapes:
            raise KeyMapError(f"pairs: {target!r} is no layer and no variable of the candidate")
    return {target: Stated(source) for source, target in pairs.items()}


def _by_rows(rows: Iterable[KeyRule], options: Options) -> dict[str, Stated]:
    stated: dict[str, Stated] = {}
    for _, pair in expand([row for row in rows if row.target], options.tensors):
        if pair.target not in options.layers and pair.target not in options.shapes:
            raise KeyMapError(
                f"row {pair.source!r}: {pair.target!r} is no layer and no variable of the candidate",
                hint=f"It has {', '.join(list(options.layers)[:20])}{', ...' if len(options.layers) > 20 else ''}.",
            )
        # The first of several modules that one layer holds decides.
        stated.setdefault(pair.target, Stated(pair.source, pair.kind))
    return stated


def _proposal(outcome: Outcome, options: Options) -> Proposal:
    rows: list[Row] = []
    layers: list[LayerPair] = []
    entries: list[TensorEntry] = []
    differences: list[str] = []
    drops: set[str] = set()
    agrees = outcome.agrees and not any(choice.steered or choice.fed for choice in outcome.choices.values())
    for choice in outcome.choices.values():
        confidence, why = _confidence(choice, agrees)
        for part in choice.option.parts:
            rows.append(Row(part.source, choice.slot, part.kind, confidence, why))
            layers.append(LayerPair(part.source, choice.slot, part.kind))
            entries += part.entries
            drops |= {join_name(part.source, ".", name) for name in kind_called(part.kind).drops}
        if choice.steered:
            differences.append(_difference(choice, options))
    rows += [Row("", name, "", OPEN, why) for name, why in outcome.open.items()]
    # A row may stand for tensors of a module that other rows take too: a stack of recurrent layers.
    used = {name for entry in entries for name in entry.sources}
    filled = {name for entry in entries for name in entry.targets}
    unique: dict[tuple[tuple[str, ...], tuple[str, ...]], TensorEntry] = {(e.sources, e.targets): e for e in entries}
    # Whole numbers are no weights: counters of batches, and indices that a model looks up.
    counters = options.source.whole_numbers()
    aliases = options.source.aliases()
    counters |= {name for name in aliases if name not in used and aliases[name] in used}
    counters |= {own for name, own in aliases.items() if own not in used and name in used}
    return Proposal(
        tuple(rows),
        KeyMap.of(layers, unique.values(), (drops | counters) - used),
        tuple(sorted(name for name in options.tensors.keys() - used - drops - counters)),
        tuple(sorted(options.shapes.keys() - filled - set(options.target.aliases()) - options.target.whole_numbers())),
        (*differences, *outcome.notes),
        agrees,
        tuple(options.tensors),
        shapes=dict(options.shapes),
    )


def _confidence(choice: Choice, exact: bool) -> tuple[str, str]:
    if choice.tied:
        return LIKELY, f"interchangeable with {choice.tied}: no input shows which is which"
    if choice.steered:
        return LIKELY, "its kind, shapes and input fit, but its result differs"
    if exact and choice.not_tried:
        return LIKELY, f"exact from this layer to the outputs, but not told apart from {choice.not_tried}"
    if exact and choice.idle:
        return LIKELY, "its kind and shapes fit, and no output depends on it"
    if exact:
        return PROVEN, "exact from this layer to the outputs"
    # Only exact outputs prove a row: in another network a wrong module may return what it returned in PyTorch.
    if choice.fed and choice.seen:
        return LIKELY, "its own input matches nothing in PyTorch; given PyTorch's, it returns what PyTorch returns"
    if choice.seen and choice.guessed:
        return LIKELY, "it returns what PyTorch returns, but its input matches nothing in PyTorch"
    if choice.seen:
        others = len({option.source for option in choice.fitting}) - 1
        return LIKELY, "it returns what PyTorch returns" + (f", and {others} others take the same" if others else "")
    return LIKELY, "its kind and shapes fit"


def _difference(choice: Choice, options: Options) -> str:
    """Describe the difference between a layer and its module, with the settings that differ."""
    module, layer = options.modules.get(choice.option.source), options.layers[choice.layer]
    kind = options.target.kind(choice.layer)
    said = []
    across = isinstance(options, AcrossFrameworks)
    if across and module is not None and kind is not None and kind is options.kinds[choice.option.source]:
        theirs, ours = kind.module_settings(module), kind.layer_settings(layer)
        for name in theirs.keys() & ours.keys():
            if name not in kind.training_settings and not same_setting(theirs[name], ours[name]):
                said.append(f"{name} is {ours[name]} in Keras, {theirs[name]} in PyTorch")
    text = f"{choice.layer} does not give what {choice.option.source} gives" + (f": {'; '.join(said)}" if said else "")
    only_epsilon = len(said) == 1 and said[0].startswith("eps ") and choice.option.kind == "batch_norm"
    return text + (
        " (--absorb-epsilon, or absorb_epsilon=True, puts the difference into the variance)" if only_epsilon else ""
    )
