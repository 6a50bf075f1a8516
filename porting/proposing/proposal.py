"""Proposes a key map between two unmapped models, states how sure each row is, and proves it by a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import KeyMapError
from porting.kinds import kind_called, kind_of_layer
from porting.mapping.compress import compress_rows
from porting.mapping.key_map import KeyMap, LayerPair, TensorEntry
from porting.mapping.rules import KeyRule, join_name
from porting.models.float64 import in_float64
from porting.models.inputs import Axes, Inputs, make_inputs
from porting.models.keras_float64 import Float64Model
from porting.models.live import effective_tensors
from porting.models.synthetic import fill_with_synthetic_weights
from porting.parity.content import Library
from porting.parity.record import record
from porting.progress import SILENT, Progress
from porting.proposing.options import Options
from porting.proposing.walk import Choice, Outcome, Walk

if TYPE_CHECKING:
    import keras
    from torch import nn

PROVEN, LIKELY, OPEN = "proven", "likely", "open"
# This many numbers per sample identify tensors. If inputs have fewer, a second sample is used.
_ENOUGH = 1000


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


@dataclass(frozen=True)
class Proposal:
    """A key map as far as it could be found. `differences` says where the two models are not the same network.

    `unused_sources` are the PyTorch tensors that no row takes, `unfilled_targets` the Keras variables that no row
    writes. `agrees` is whether the outputs are exact. `names` are the names of all PyTorch tensors.
    """

    rows: tuple[Row, ...]
    key_map: KeyMap
    unused_sources: tuple[str, ...]
    unfilled_targets: tuple[str, ...]
    differences: tuple[str, ...] = ()
    agrees: bool = False
    names: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every tensor and every variable has a row, and the outputs are exact."""
        return self.agrees and not self.unused_sources and not self.unfilled_targets

    @property
    def rules(self) -> list[KeyRule]:
        """The rows that are not open, in the form that `port_weights` takes."""
        return [KeyRule(row.source, row.target, row.kind) for row in self.rows if row.confidence != OPEN]

    @property
    def short_rules(self) -> list[KeyRule]:
        """The same rows, compressed by placeholders for the numbers in names."""
        return compress_rows(self.rules, self.names)

    def require_complete(self, drop: Collection[str] = (), keep: Collection[str] = ()) -> Proposal:
        """Return the proposal itself. Raises KeyMapError, with everything that is open, if it is not complete.

        `drop` names tensors that no row needs to take, `keep` variables that no row needs to write.
        """
        lines = [f"  {row.target}: {row.why}" for row in self.rows if row.confidence == OPEN]
        lines += [f"  {name}: no row writes it" for name in self.unfilled_targets if name not in keep]
        lines += [f"  {name}: no row takes it" for name in self.unused_sources if name not in drop]
        if self.agrees and not lines:
            return self
        lines += [f"  {line}" for line in self.differences]
        if not lines:
            lines = ["  the outputs still differ"]
        raise KeyMapError(
            "the two models could not be mapped completely:\n" + "\n".join(lines[:50]),
            hint="Give the rows that you know as pairs, or rows of your own to port_weights.",
        )

    def __str__(self) -> str:
        count = {each: sum(row.confidence == each for row in self.rows) for each in (PROVEN, LIKELY, OPEN)}
        lines = [f"{count[PROVEN]} rows proven, {count[LIKELY]} likely, {count[OPEN]} open"]
        lines += [
            f"  {row.source or '?'} -> {row.target} ({row.kind or 'unknown'}): {row.confidence}, {row.why}"
            for row in self.rows
            if row.confidence != PROVEN
        ]
        lines += [f"  PyTorch only: {name}" for name in self.unused_sources]
        lines += [f"  Keras only: {name}" for name in self.unfilled_targets]
        lines += [f"  {line}" for line in self.differences]
        lines.append(f"Outputs: {'exact in float64' if self.agrees else 'not the same'}")
        return "\n".join(lines)


def propose_map(
    reference: nn.Module,
    candidate: keras.Model,
    inputs: Any,
    *,
    reference_inputs: Any = None,
    pairs: Mapping[str, str] | None = None,
    input_axes: Sequence[Axes | None] | None = None,
    absorb_epsilon: bool = False,
    progress: Progress = SILENT,
) -> Proposal:
    """Find which module of a PyTorch model belongs to which layer of a Keras model, by running both in float64.

    The weights of the models do not matter: the search runs a copy of the PyTorch model with random weights that make
    mistakes show. `inputs`, `reference_inputs` and `input_axes` are those of `check_parity`. `pairs` fixes rows,
    `{"torch.name": "keras/path"}`. With `absorb_epsilon`, if the epsilon of a batch norm in Keras is not PyTorch's, its
    variance absorbs the difference, and the function at inference is the same. Both models are left as they were.

    Raises ValueError when the inputs do not fit, and KeyMapError for names that the models do not have.
    """
    import torch

    given = make_inputs(reference, candidate, inputs, reference_inputs, input_axes)
    given = given.batch(0, 1 if max(array[0].size for array in given.candidate) >= _ENOUGH else 2)
    truth_model = in_float64(reference)

    def run(model: nn.Module) -> Any:
        return given.call_reference(model, torch.float64)

    progress("running PyTorch")
    fill_with_synthetic_weights(truth_model, 0, run=run)
    truth_model.eval()
    recording = record(truth_model, run)
    ranks = {truth.tensor.ndim for truth in recording.truths}
    library = Library(recording.truths, {rank: given.output_axes(rank) for rank in ranks})
    tensors = effective_tensors(truth_model, in_float32=False)
    options = Options(truth_model, candidate, recording, tensors, absorb_epsilon=absorb_epsilon)
    fixed = _by_layer(pairs or {}, options)
    outcome = Walk(options, recording, library, Float64Model(candidate), given, fixed, progress).search()
    progress("done", 1, 1)
    return _proposal(outcome, options, given)


def _by_layer(pairs: Mapping[str, str], options: Options) -> dict[str, str]:
    for source, target in pairs.items():
        if source not in options.modules and source not in options.tensors:
            raise KeyMapError(f"pairs: {source!r} is no module and no tensor of the PyTorch model")
        if target not in options.layers:
            raise KeyMapError(f"pairs: {target!r} is no layer of the Keras model")
    return {target: source for source, target in pairs.items()}


def _proposal(outcome: Outcome, options: Options, given: Inputs) -> Proposal:
    rows: list[Row] = []
    layers: list[LayerPair] = []
    entries: list[TensorEntry] = []
    differences: list[str] = []
    drops: set[str] = set()
    for choice in outcome.choices.values():
        option = choice.option
        target = choice.slot
        confidence, why = _confidence(choice, outcome)
        rows.append(Row(option.source, target, option.kind, confidence, why))
        layers.append(LayerPair(option.source, target, option.kind))
        entries += option.entries
        drops |= {join_name(option.source, ".", name) for name in kind_called(option.kind).drops}
        if choice.steered:
            differences.append(_difference(choice, options))
    rows += [Row("", name, "", OPEN, why) for name, why in outcome.open.items()]
    # Several rows may take tensors of the same module, as in a stack of recurrent layers.
    used = {name for entry in entries for name in entry.sources}
    filled = {name for entry in entries for name in entry.targets}
    unique: dict[tuple[tuple[str, ...], tuple[str, ...]], TensorEntry] = {(e.sources, e.targets): e for e in entries}
    counters = {name for name in options.tensors if name.endswith("num_batches_tracked")}
    return Proposal(
        tuple(rows),
        KeyMap.of(layers, unique.values(), drops | counters),
        tuple(sorted(name for name in options.tensors.keys() - used - drops - counters)),
        tuple(sorted(options.variables.keys() - filled)),
        tuple(differences),
        outcome.agrees and not any(choice.steered for choice in outcome.choices.values()),
        tuple(options.tensors),
    )


def _confidence(choice: Choice, outcome: Outcome) -> tuple[str, str]:
    exact = outcome.agrees and not any(each.steered for each in outcome.choices.values())
    if choice.tied:
        return LIKELY, f"interchangeable with {choice.tied}: no input shows which is which"
    if choice.steered:
        return LIKELY, "its kind, shapes and input fit, but its result differs"
    if exact and choice.untold:
        return LIKELY, f"exact from this layer to the outputs, but not tested against {choice.untold} for lack of time"
    if exact and (choice.seen or choice.refuted or (choice.rivals == 1 and not choice.guessed)):
        return PROVEN, "exact from this layer to the outputs"
    # If the two networks differ, an option may have failed for that reason alone.
    if choice.seen and choice.rivals == 1 and not choice.guessed:
        return PROVEN, "it returns what PyTorch returns, and nothing else fits"
    if choice.seen:
        others = f"{choice.rivals - 1} others take" if choice.rivals > 1 else "its input matches nothing in PyTorch"
        return LIKELY, f"it returns what PyTorch returns, and {others}{' the same' if choice.rivals > 1 else ''}"
    return LIKELY, "its kind and shapes fit"


def _difference(choice: Choice, options: Options) -> str:
    """Describe the difference between a layer and its module, with the settings that differ."""
    module, layer = options.modules.get(choice.option.source), options.layers[choice.layer]
    kind = kind_of_layer(layer)
    said = []
    if module is not None and kind is not None and kind is options.kinds[choice.option.source]:
        theirs, ours = kind.module_settings(module), kind.layer_settings(layer)
        for name in theirs.keys() & ours.keys():
            if isinstance(theirs[name], np.ndarray):
                same = np.allclose(theirs[name], ours[name])
            else:
                same = theirs[name] == ours[name]
            if not same and name not in kind.training_settings:
                said.append(f"{name} is {ours[name]} in Keras, {theirs[name]} in PyTorch")
    text = f"{choice.layer} does not give what {choice.option.source} gives" + (f": {'; '.join(said)}" if said else "")
    only_epsilon = len(said) == 1 and said[0].startswith("eps ") and choice.option.kind == "batch_norm"
    return text + (" (absorb_epsilon=True puts the difference into the variance)" if only_epsilon else "")
