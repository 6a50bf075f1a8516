"""Weights from one live model to the other, by a key map, and back: what `porting.port_weights` is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import KeyMapError, ParityError
from porting.mapping.convert import Conversion, convert, invert
from porting.mapping.key_map import KeyMap
from porting.mapping.rules import KeyRule
from porting.models.live import assign_tensors, effective_tensors, shapes_of
from porting.models.rows import key_map_of_rows
from porting.models.traverse import named_layers, named_variables
from porting.parity.compare import check_parity
from porting.parity.report import ParityReport, refusal
from porting.proposing.proposal import propose_map

if TYPE_CHECKING:
    import keras
    from torch import nn


@dataclass(frozen=True)
class Ported:
    """What a port between live models has made.

    `key_map` is what was followed. `dropped` are PyTorch's tensors that were left out, and `untouched` Keras's
    variables that were left as they are, both on purpose. `report` is None where no inputs were given.
    """

    key_map: KeyMap
    dropped: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    report: ParityReport | None = None

    def require_parity(self) -> Ported:
        """Itself; raises ParityError where the two models were not compared, or do not compute the same."""
        if self.report is None:
            raise ParityError("the port was not checked", hint="Give port_weights the inputs to compare on.")
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
    """Copies the weights of a PyTorch model into a Keras model, and with `inputs` checks that both compute the same.

    `key_map` is one made before, or rows: which layer stands for which module, and its kind. None asks `propose_map`,
    which needs `inputs`, and takes its answer only where that is complete and proven; `absorb_epsilon` goes there too.
    A kind such as `batch_norm:-9.9e-04` puts what two epsilons differ by into the variance. A row stands for all
    tensors of its kind, those of one side that the other lacks included: a bias that PyTorch does not have becomes
    zeros, and a bias of zeros needs no place in Keras. `drop` names tensors of PyTorch that have none, `keep` variables
    of Keras that stay as they are. Weights under weight_norm and spectral_norm are taken as the module computes them.
    `check_options` are those of `check_parity`; settings that matter in training alone are a note unless
    `strict_settings=True`.

    Nothing is assigned before every tensor and every variable is accounted for. Raises KeyMapError, with every
    difference, where one is not.
    """
    tensors = effective_tensors(reference)
    variables = named_variables(candidate)
    _refuse_unknown("drop", drop, tensors)
    _refuse_unknown("keep", keep, variables)
    if key_map is None:
        key_map = _proposed(reference, candidate, inputs, drop, keep, absorb_epsilon, check_options)
    if not isinstance(key_map, KeyMap):
        key_map = key_map_of_rows(reference, candidate, key_map)
    key_map = KeyMap.of(key_map.layers, key_map.entries, [*key_map.drops, *drop], key_map.foreign)
    shapes = {name: tuple(variable.shape) for name, variable in variables.items() if name not in keep}
    conversion = convert(tensors, key_map, shapes, hint=lambda: _HINT)
    _assign(candidate, variables, conversion)
    report = None
    if inputs is not None:
        options = {
            "pairs": _pairs(key_map, reference, candidate),
            "strict_settings": False,  # the models are the user's: what matters in training alone is a note
            **check_options,
        }
        # Their epsilon is in the variance.
        absorbed = [f"{source}:eps" for source in key_map.absorbed]
        options["waive"] = [*options.get("waive", ()), *absorbed]
        report = check_parity(reference, candidate, inputs, key_map=key_map, **options)
    return Ported(key_map, conversion.dropped, tuple(sorted(keep)), report)


def revert_weights(candidate: keras.Model, reference: nn.Module, key_map: KeyMap | Sequence[KeyRule]) -> None:
    """The way back: copies the weights of a Keras model into a PyTorch model, by the key map of the way there.

    Where several tensors are one variable, as an LSTM's two biases are, the first gets it and the others are zero.
    Tensors that the key map drops stay as they are. Nothing is assigned before everything is accounted for. Raises
    KeyMapError where something is not.
    """
    if not isinstance(key_map, KeyMap):
        key_map = key_map_of_rows(reference, candidate, key_map)
    tensors = effective_tensors(reference)
    weights = {name: np.asarray(variable) for name, variable in named_variables(candidate).items()}
    wanted = {name for entry in key_map.entries for name in entry.sources}
    given = {name for entry in key_map.entries for name in entry.targets}
    missing = [*sorted(given - weights.keys()), *sorted(wanted - tensors.keys())]
    if missing:
        raise KeyMapError(f"the key map names what the models do not have: {', '.join(missing[:10])}", hint=_HINT)
    try:
        values = invert(weights, key_map, shapes_of(tensors))
    except ValueError as error:
        raise KeyMapError(f"the weights do not go back: {error}") from None
    if wrong := [name for name, array in values.items() if tuple(array.shape) != tensors[name].shape]:
        raise KeyMapError(f"{wrong[0]} has {tensors[wrong[0]].shape} in PyTorch and {values[wrong[0]].shape} in Keras")
    try:
        assign_tensors(reference, values)
    except ValueError as error:
        raise KeyMapError(str(error)) from None


_HINT = "A row is KeyRule(module, layer, kind); drop= and keep= name what has no partner on purpose."


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
        raise KeyMapError("without a key map inputs are needed, on which both models are run to find one")
    options = {name: check_options[name] for name in ("reference_inputs", "input_axes") if name in check_options}
    proposal = propose_map(reference, candidate, inputs, absorb_epsilon=absorb_epsilon, **options)
    # The key map refuses anything else in these.
    zeros = [name for name in proposal.zeros if not reference.get_parameter(name).any()]
    return proposal.require_complete([*drop, *zeros], keep).key_map


def _pairs(key_map: KeyMap, reference: nn.Module, candidate: keras.Model) -> dict[str, str]:
    """Which layer stands for which module, where one does for one."""
    modules, layers = dict(reference.named_modules()), named_layers(candidate)
    found = key_map.one_to_one.items()
    return {source: target for source, target in found if source and source in modules and target in layers}


def _assign(candidate: keras.Model, variables: Mapping[str, Any], conversion: Conversion) -> None:
    for name, values in conversion.weights.items():
        variables[name].assign(np.ascontiguousarray(values))


def _refuse_unknown(option: str, names: Sequence[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise KeyMapError(f"{option}: there is no {', '.join(unknown[:10])}")
