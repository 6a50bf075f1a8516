"""Infers which tensors of PyTorch fill which variables of Keras, from the layers that a check has paired.

Without a key map, only the results of the layers say whether the weights are right, and a weight that meets only zeros,
such as one behind a dead ReLU, has no effect on them. The pairs suggest a key map. It is taken only if it covers all
weights, and all its weights are equal or both models compute the same with other weights moved by it. Then a weight
that differs is a mistake, whatever the results are on these inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from porting.errors import KeyMapError
from porting.kinds import kind_called, kind_of_layer, kind_of_module
from porting.kinds.base import Kind
from porting.kinds.transforms import VECTOR, Array, Constant, Shape, Transform
from porting.mapping.key_map import KeyMap, LayerPair, TensorEntry
from porting.models.live import effective_names
from porting.models.rows import entries_filling
from porting.models.stacks import layers_of_stack, owner_of
from porting.models.traverse import named_variables, owned_names, owned_variables
from porting.parity.bits import compare_bits
from porting.parity.differing_weights import orders_of
from porting.parity.loud import compare_loud_outputs
from porting.parity.report import ParityReport
from porting.parity.session import Session

# The share of equal numbers from which a parameter without a layer is taken for another.
_MOST = 0.5
# Fewer numbers may be near others by chance, and so may those that are not this near.
_FEWEST, _NEAR = 3, 1e-3


def with_inferred_weights(session: Session, report: ParityReport, *, loud: bool) -> ParityReport:
    """Add to the report which weights are equal bit by bit, if the pairs of layers tell which belong together.

    Without `loud`, weights that differ are not reported, because only other weights show that the pairs are right.
    """
    key_map = None if session.halved or report.verified is None else infer_key_map(session)
    if key_map is None or report.verified is None:
        return report
    variables = named_variables(session.candidate)
    bits = compare_bits(session.reference, variables, key_map)
    if bits.differing and loud:
        reordered = _with_orders(session, key_map, bits.differing.keys())
        # Where the models differ for another reason, equal numbers show that the pairs are right.
        fails = bool(report.divergences)
        if reordered is not key_map and (
            _are_nearly_equal(session, reordered) if fails else _computes_the_same(session, reordered)
        ):
            key_map = reordered
            bits = compare_bits(session.reference, variables, key_map)
    differing = {name: bits.differing[name] for name in variables if name in bits.differing}
    if differing:
        same = loud and _computes_the_same(session, key_map)
        if not same and not (report.divergences and _are_nearly_equal(session, key_map)):
            return report
        if same and not session.has_whole_results:  # on which hardly anything has an effect
            tables = _tables(session)
            differing = {
                name: how
                for name, how in differing.items()
                if name in tables or not _has_no_effect(session, key_map, name)
            }
    verified = replace(
        report.verified,
        differing=tuple(differing),
        compared_bits=len(bits.compared),
        details=tuple(differing.values()),
    )
    idle = bits.differing.keys() - differing.keys()
    caveats = [f"{name} is not the checkpoint's, and has no effect" for name in sorted(idle)]
    return replace(report, verified=verified, caveats=(*report.caveats, *caveats))


@dataclass(frozen=True, eq=False)
class _InAnotherOrder(Transform):
    """Gives channels another order, before another transform. `orders` are PyTorch's numbers of Keras's, by axis."""

    inner: Transform
    orders: Mapping[int, Array]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    def to_keras(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (array,) = arrays
        for axis, order in self.orders.items():
            array = np.take(array, order, axis)
        return self.inner.to_keras([array], shapes)


def _with_orders(session: Session, key_map: KeyMap, differing: Set[str]) -> KeyMap:
    """The key map for a port that has the channels of some layers in another order, such as hidden units."""
    orders: dict[str, Mapping[int, Array]] = {}
    for pair in key_map.layers:
        module, layer = session.modules.get(pair.source), session.layer(pair.target)
        if module is not None and layer is not None:
            orders |= {f"{pair.source}.{name}": each for name, each in orders_of(module, layer).items()}
    entries = [
        replace(entry, transform=_InAnotherOrder(entry.transform, orders[entry.sources[0]]))
        if len(entry.sources) == 1 and entry.sources[0] in orders and not differing.isdisjoint(entry.targets)
        else entry
        for entry in key_map.entries
    ]
    return replace(key_map, entries=tuple(entries)) if orders else key_map


def _are_nearly_equal(session: Session, key_map: KeyMap) -> bool:
    """Whether most numbers of each layer are equal."""
    fits = _Fits(session)
    entries: dict[str, list[TensorEntry]] = {}
    for entry in key_map.entries:
        for name in entry.targets[:1]:
            entries.setdefault(name.rpartition("/")[0], []).append(entry)
    return all(fits.equal_share(own) > _MOST for own in entries.values())


def _computes_the_same(session: Session, key_map: KeyMap) -> bool:
    """Whether both models compute the same with loud weights moved by the key map."""
    found, _ = compare_loud_outputs(session, None, key_map, locates=False)
    return found is not None and found.passed


def _has_no_effect(session: Session, key_map: KeyMap, name: str) -> bool:
    """Whether the models compute the same though this variable is not PyTorch's, such as a key bias in an attention."""
    entries = tuple(entry for entry in key_map.entries if name not in entry.targets)
    return _computes_the_same(session, replace(key_map, entries=entries))


def with_bare_weights(session: Session, report: ParityReport) -> ParityReport:
    """Add to a failing report which bare variables differ from PyTorch's bare parameters that they clearly stand for.

    Neither a layer nor a module of a known kind holds them, so that no result of a layer shows them by itself.
    """
    if report.verified is None or session.halved:
        return report
    fits, state = _Fits(session), session.reference.state_dict()
    known = {name for name, module in session.modules.items() if kind_of_module(module) is not None}
    theirs = {
        name: state[name].detach().float().numpy().ravel()
        for name in fits.unread(())
        if name.rpartition(".")[0] not in known
    }
    found: dict[str, str] = {}
    for layer, names in owned_names(session.candidate).items():
        owner = session.layer(layer)
        for name in names if owner is None or kind_of_layer(owner) is None else ():
            values = np.asarray(fits.variables[name]).astype(np.float32).ravel()
            near = [each for each, other in theirs.items() if _is_near(values, other)]
            if len(near) == 1:
                entry = TensorEntry((near[0],), (name,), VECTOR)
                found |= compare_bits(session.reference, fits.variables, KeyMap((), (entry,), frozenset())).differing
    if not found:
        return report
    differing = {**dict.fromkeys(report.verified.differing, ""), **found}
    details = (*report.verified.details, *(how for name, how in found.items() if name not in report.verified.differing))
    return replace(report, verified=replace(report.verified, differing=tuple(differing), details=details))


def _is_near(values: Array, other: Array) -> bool:
    """Whether most of two tables' numbers are equal, or all are nearly so."""
    if values.shape != other.shape or values.size < _FEWEST:
        return False
    size = float(np.square(other, dtype=np.float64).sum())
    distance = float(np.square(values.astype(np.float64) - other).sum())
    return bool((values == other).mean() > _MOST) or distance < _NEAR * size


def _tables(session: Session) -> set[str]:
    """The variables of which a model may read a part, which the inputs choose: those of embeddings, and bare tables."""
    found = set[str]()
    shapes = {name: variable.shape for name, variable in named_variables(session.candidate).items()}
    for layer, names in owned_names(session.candidate).items():
        owner = session.layer(layer)
        kind = None if owner is None else kind_of_layer(owner)
        if kind is None or kind.name == "embedding":
            found.update(name for name in names if sum(side > 1 for side in shapes[name]) > 1)
    return found


def infer_key_map(session: Session) -> KeyMap | None:
    """The key map that the pairs of layers suggest; None unless it fills all variables from all tensors."""
    fits = _Fits(session)
    modules: dict[str, str] = {}
    for source, target in session.layer_of_module.items():
        modules.setdefault(target, source)
    found: dict[str, tuple[TensorEntry, ...]] = {}
    for target, source in modules.items():
        if fitting := fits.entries(source, target):
            found[target] = fitting
    # The result of a layer with an activation in it pairs with the activation's.
    for target, variables in owned_variables(session.candidate).items():
        if variables and target and target not in found and (other := fits.named_or_equal(target, modules.values())):
            modules[target], found[target] = other
    entries = [entry for each in found.values() for entry in each]
    entries += fits.parameters(entries)
    filled = {name for entry in entries for name in entry.targets}
    if filled != fits.shapes.keys() or fits.unread(entries):
        return None
    try:
        rows = [fits.row(modules[target], target) for target in found]
        return KeyMap.of(rows, entries)
    except KeyMapError:  # two layers share a tensor
        return None


class _Fits:
    """Which modules' tensors have the shapes of a layer's variables."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._state = session.reference.state_dict()
        self._tensors = effective_names(session.reference)
        self.variables = named_variables(session.candidate)
        self._names = {id(variable): name for name, variable in self.variables.items()}
        self.shapes = {name: tuple(variable.shape) for name, variable in self.variables.items()}
        self._kinds = {name: kind_of_module(module) for name, module in session.modules.items()}
        self.kind_names = {
            name: self._kind_name(name, kind)
            for name, kind in self._kinds.items()
            if kind is not None and not layers_of_stack(session.modules[name])  # its layers stand for a stack
        }

    def _kind_name(self, source: str, kind: Kind) -> str:
        """The kind of a row: of a layer in a stack, with its index."""
        owner, place = owner_of(source, self._session.modules)
        return f"{kind.name}:l{place}" if layers_of_stack(self._session.modules[owner]) else kind.name

    def row(self, source: str, target: str) -> LayerPair:
        owner, _ = owner_of(source, self._session.modules)
        return LayerPair(owner, target, self.kind_names[source])

    def entries(self, source: str, target: str) -> tuple[TensorEntry, ...]:
        """The entries that fill all variables of a layer from a module's tensors; empty if they do not fit."""
        layer, kind = self._session.layer(target), self._kinds.get(source)
        if layer is None or kind is None or not kind.leaves:
            return ()
        owner, _ = owner_of(source, self._session.modules)
        kind, module = kind_called(self.kind_names[source]), self._session.modules[owner]
        found = entries_filling(kind, owner, module, layer, self._tensors, self._names)
        return found if all(self._accepts(entry) for entry in found) else ()

    def named_or_equal(self, target: str, taken: Collection[str]) -> tuple[str, tuple[TensorEntry, ...]] | None:
        """The module of a layer's name, or else another one that has no layer yet.

        That is the first with the same weights, maybe in another order, or the one with the most equal numbers, or the
        only one that fits: a layer of which one number is wrong gives no result that pairs it.
        """
        named = self._session.names.source(target, self.kind_names)
        if named is not None and (entries := self.entries(named, target)):
            return named, entries
        fitting = {
            source: entries
            for source in self.kind_names
            if source not in taken and (entries := self.entries(source, target))
        }
        equal = {source: self.equal_share(entries) for source, entries in fitting.items()}
        best = max(equal, key=equal.__getitem__, default="")
        layer = self._session.layer(target)
        if best and equal[best] <= _MOST:
            owners = {source: owner_of(source, self._session.modules)[0] for source in fitting}
            reordered = (source for source in fitting if orders_of(self._session.modules[owners[source]], layer))
            best = next(reordered, best if len(fitting) == 1 else "")
        return (best, fitting[best]) if best else None

    def equal_share(self, entries: Sequence[TensorEntry]) -> float:
        """The share of the numbers of a layer's variables that are what the entries make of PyTorch's tensors."""
        same = count = 0
        for entry in entries:
            if not entry.is_in(self._state, self.variables):
                continue
            arrays = {name: self._state[name].detach().float().numpy() for name in entry.sources}
            for name, expected in entry.to_keras(arrays, self.shapes).items():
                same += int((expected == np.asarray(self.variables[name])).sum())
                count += expected.size
        return same / count if count else 0.0

    def parameters(self, entries: Sequence[TensorEntry]) -> list[TensorEntry]:
        """Entries for tensors that no layer holds, such as a table of positions, if most of their numbers are equal."""
        filled = {name for entry in entries for name in entry.targets}
        left = {name: self._state[name].detach().float().numpy().ravel() for name in self.unread(entries)}
        found: list[TensorEntry] = []
        for name in self.shapes.keys() - filled:
            values = np.asarray(self.variables[name]).astype(np.float32).ravel()
            same_size = (each for each in left if left[each].shape == values.shape and values.size)
            equal = {each: (left[each] == values).mean() for each in same_size}
            best = max(equal, key=equal.__getitem__, default=None)
            if best is not None and equal[best] > _MOST:
                found.append(TensorEntry((best,), (name,), VECTOR))
                del left[best]
        return found

    def unread(self, entries: Iterable[TensorEntry]) -> list[str]:
        """The float tensors of PyTorch that no entry reads, under any of their names."""
        read = {self._state[name].data_ptr() for entry in entries for name in entry.sources if name in self._state}
        return [
            name
            for name in self._tensors & self._state.keys()
            if self._state[name].is_floating_point() and self._state[name].data_ptr() not in read
        ]

    def _accepts(self, entry: TensorEntry) -> bool:
        if isinstance(entry.transform, Constant):
            # A tensor that Keras leaves out must hold nothing that would be lost.
            return all(bool((self._state[name] == entry.transform.value).all()) for name in entry.sources)
        if not all(name in self._state for name in entry.sources):
            return True  # a weight that the module computes
        sources = [tuple(self._state[name].shape) for name in entry.sources]
        return entry.transform.accepts(sources, [self.shapes[name] for name in entry.targets])
