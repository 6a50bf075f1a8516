"""Copy weights between two live models by a key map, in both directions. Home of `porting.port_weights`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import KeyMapError, ParityError
from porting.mapping.convert import Conversion, convert, invert
from porting.mapping.key_map import KeyMap
from porting.mapping.rules import KeyRule
from porting.models.inputs import make_inputs
from porting.models.live import assign_tensors, effective_tensors, require_models, shapes_of
from porting.models.rows import key_map_of_rows, pairs_of
from porting.models.traverse import named_layers, named_variables
from porting.parity.compare import check_parity, require_options
from porting.parity.report import ParityReport, refusal
from porting.proposing.proposal import propose_map
from porting.wording import counted

if TYPE_CHECKING:
    import keras
    from torch import nn


@dataclass(frozen=True)
class Ported:
    """The result of a port between live models.

    `key_map` is the key map that was used. `dropped` lists PyTorch tensors that were left out on purpose, and
    `untouched` lists Keras variables that were kept on purpose. `report` is None if no inputs were given.
    """

    key_map: KeyMap
    dropped: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    report: ParityReport | None = None

    def __str__(self) -> str:
        count = len(self.key_map.entries)
        kept = counted(len(self.untouched), "variable")
        lines = [f"{counted(count, 'row')} of tensors ported, {len(self.dropped)} dropped, {kept} kept"]
        return "\n".join([*lines, str(self.report) if self.report is not None else "not checked"])

    def __repr__(self) -> str:
        return f"<Ported: {' '.join(str(self).split())}>"

    def require_parity(self) -> Ported:
        """Return self, or raise ParityError if the two models were not compared or are not at parity."""
        if self.report is None:
            raise ParityError("the port was not checked", hint="Pass inputs= to port_weights to compare the models.")
        if not self.report.passed:
            raise ParityError(refusal(self.report))
        return self


def port_weights(
    reference: nn.Module,
    candidate: keras.Model,
    key_map: KeyMap | Sequence[KeyRule] | None = None,
    *,
    inputs: Any = None,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    absorb_epsilon: bool = False,
    **check_options: Any,
) -> Ported:
    """Copy the weights of a PyTorch model into a Keras model. With `inputs`, also check that both compute the same.

    `key_map` is an existing key map, or rows: each names a module, its layer and their kind. If it is None,
    `propose_map` finds the rows, which needs `inputs`; its result is used only if it is complete and proven.
    `absorb_epsilon` is passed to `propose_map`. A kind such as `batch_norm:-9.9e-04` adds the difference of two
    epsilons to the variance. A row covers all tensors of its kind, even if one side lacks some: a bias that PyTorch
    lacks becomes zeros in Keras, and a PyTorch bias of zeros may be missing in Keras. `drop` names PyTorch tensors
    without a partner. `keep` names Keras variables that stay as they are. Weights under weight_norm and spectral_norm
    are copied as the module computes them. `check_options` are passed to `check_parity`. Settings that matter only in
    training produce a note unless `strict_settings=True`.

    Every tensor and variable must be accounted for before any is assigned. Otherwise this raises KeyMapError, which
    lists the first differences of each kind.
    """
    require_models(reference, candidate)
    require_options(reference, **check_options)
    tensors = effective_tensors(reference)
    if inputs is not None:
        _build(reference, candidate, inputs, check_options)
    variables = named_variables(candidate)
    _refuse_unknown("drop", drop, tensors)
    _refuse_unknown("keep", keep, variables)
    if key_map is None:
        key_map = _proposed(reference, candidate, inputs, drop, keep, absorb_epsilon, check_options)
    if not isinstance(key_map, KeyMap):
        key_map = key_map_of_rows(reference, candidate, key_map)
    key_map = KeyMap.of(key_map.layers, key_map.entries, [*key_map.drops, *drop], key_map.foreign)
    shapes = {name: tuple(variable.shape) for name, variable in variables.items() if name not in keep}
    conversion = convert(tensors, key_map, shapes, where="the PyTorch model", hint=lambda: _HINT)
    _assign(variables, conversion)
    report = None
    if inputs is not None:
        options = {
            "pairs": pairs_of(key_map, reference, candidate),
            "strict_settings": False,  # for a user's own models, settings that matter only in training are notes
            **check_options,
        }
        # The difference of these epsilons is in the variances, so it is no mistake.
        absorbed = [f"{source}:eps" for source in key_map.absorbed]
        options["waive"] = [*options.get("waive", ()), *absorbed]
        report = check_parity(reference, candidate, inputs, key_map=key_map, **options)
    return Ported(key_map, conversion.dropped, tuple(sorted(keep)), report)


def revert_weights(candidate: keras.Model, reference: nn.Module, key_map: KeyMap | Sequence[KeyRule]) -> None:
    """Copy the weights of a Keras model back into a PyTorch model, by the same key map as the port.

    If several tensors share one variable, such as an LSTM's two biases, the first gets the values and the others become
    zero. Tensors that the key map drops stay as they are. Everything must be accounted for before anything is
    assigned; otherwise this raises KeyMapError.
    """
    require_models(reference, candidate)
    if not isinstance(key_map, KeyMap):
        key_map = key_map_of_rows(reference, candidate, key_map)
    tensors = effective_tensors(reference)
    weights = {name: np.asarray(variable) for name, variable in named_variables(candidate).items()}
    wanted = {name for entry in key_map.entries for name in entry.sources}
    given = {name for entry in key_map.entries for name in entry.targets}
    missing = [*sorted(given - weights.keys()), *sorted(wanted - tensors.keys())]
    if missing:
        raise KeyMapError(f"the key map names tensors that the models lack: {', '.join(missing[:10])}", hint=_HINT)
    try:
        values = invert(weights, key_map, shapes_of(tensors))
    except ValueError as error:
        raise KeyMapError(f"the weights cannot be converted back: {error}") from None
    if wrong := [name for name, array in values.items() if tuple(array.shape) != tensors[name].shape]:
        raise KeyMapError(f"{wrong[0]} has {tensors[wrong[0]].shape} in PyTorch and {values[wrong[0]].shape} in Keras")
    try:
        assign_tensors(reference, values)
    except ValueError as error:
        raise KeyMapError(str(error)) from None


_HINT = "A row is KeyRule(module, layer, kind); drop= and keep= name tensors and variables without a partner."


def _proposed(
    reference: nn.Module,
    candidate: keras.Model,
    inputs: Any,
    drop: Sequence[str],
    keep: Sequence[str],
    absorb_epsilon: bool,
    check_options: dict[str, Any],
) -> KeyMap:
    if inputs is None:
        raise KeyMapError("without a key map, port_weights needs inputs: it runs both models on them to find one")
    options = {name: check_options[name] for name in ("reference_inputs", "input_axes") if name in check_options}
    proposal = propose_map(reference, candidate, inputs, absorb_epsilon=absorb_epsilon, **options)
    # The key map refuses anything else in these.
    tensors = effective_tensors(reference)
    zeros = [name for name in proposal.zeros if not tensors[name].any()]
    return proposal.require_complete([*drop, *zeros], keep).key_map


def _build(reference: nn.Module, candidate: keras.Model, inputs: Any, check_options: Mapping[str, Any]) -> None:
    """Run a Keras model once if it has no variables yet, as before the first call of a subclassed one."""
    if all(layer.built for layer in (candidate, *named_layers(candidate).values())):
        return
    axes = [check_options.get(name) for name in ("reference_inputs", "input_axes")]
    with contextlib.suppress(Exception):  # the check says what is wrong with the inputs
        candidate(make_inputs(reference, candidate, inputs, *axes).batch(0, 1).for_candidate(candidate), training=False)


def _assign(variables: Mapping[str, Any], conversion: Conversion) -> None:
    for name, values in conversion.weights.items():
        variables[name].assign(np.asarray(values, order="C"))


def _refuse_unknown(option: str, names: Sequence[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise KeyMapError(f"{option}: unknown name {', '.join(unknown[:10])}")
