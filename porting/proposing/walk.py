"""Walks through the Keras model in the order of execution, and fills each layer from the recorded PyTorch run.

PyTorch has run once in float64, and every tensor that a module took or returned is known. The input of a layer equals
one of them. The modules that took this tensor and whose kind and shapes fit are the options for the layer. One of them
fills the layer, and the layer runs. If its result is not a known tensor, the option was wrong. If several options fit,
the first is used for now, and the first unknown tensor sends the walk back to try the next option.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from porting.models.observe import Replacement
from porting.parity.content import Library, Match, Truth, as_real
from porting.parity.results import pair_results
from porting.parity.trace import key_of
from porting.progress import Progress
from porting.proposing.options import Option, Options, filled

if TYPE_CHECKING:
    from torch import Tensor

# How often the walk goes back before it gives up on a layer.
_TRIES = 48
# A sum is taken by one of the next so many layers.
_LAYERS_AFTER = 4
# How long, in seconds, to test whether exchanging two choices changes the outputs.
_TIES_SECONDS = 60.0


@dataclass
class Choice:
    """The options for a slot, best first, and which one fills it.

    A slot is a layer, or a variable that a layer of no known kind holds directly; `layer` is the layer in either case.
    `rivals` is how many options fitted at first, whether or not other layers use them. `seen` means that PyTorch has
    the layer's result, `guessed` that its input matched nothing, `fed` that it was therefore given PyTorch's,
    `steered` that its result had to be replaced, and `refuted` that nothing else would do. `tied` names an option that
    would do too, `untold` one that was not tried, and `excluded` those that an exchange excludes. `confirmed` means
    that PyTorch also has what a later layer makes of its result, or that it is a result of the model.
    """

    slot: str
    layer: str
    options: list[Option]
    index: int = 0
    rivals: int = 1
    seen: bool = False
    guessed: bool = False
    fed: bool = False
    steered: bool = False
    refuted: bool = False
    tied: str = ""
    untold: str = ""
    confirmed: bool = False
    excluded: set[str] = field(default_factory=set)

    @property
    def option(self) -> Option:
        return self.options[self.index]


@dataclass(frozen=True)
class Stated:
    """What a person or a row says stands in a layer or variable: a module or parameter, and perhaps the row's kind."""

    source: str
    kind: str = ""

    def allows(self, option: Option) -> bool:
        return option.source == self.source and self.kind in ("", option.kind)


# A tensor's memory, and how often it was changed in place.
Key = tuple[int, int]


def _key(tensor: Tensor) -> Key:
    return key_of(tensor), tensor._version


class _StuckError(BaseException):
    """Nothing fits at a layer. Not an Exception, because Keras would wrap it in one of its own."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


@dataclass
class Outcome:
    """The result of a walk: the choices by slot, open slots with the reason, and whether all outputs agree."""

    choices: dict[str, Choice] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    agrees: bool = False


class Walk:
    """The search of one proposal. `given` fixes choices: the path of a layer and the module or parameter for it."""

    watches_inputs = True

    def __init__(
        self,
        options: Options,
        library: Library,
        given: Mapping[str, Stated],
        progress: Progress,
    ) -> None:
        self.options, self.recording, self.library = options, options.recording, library
        self.inputs, self.progress = options.target.given, progress
        self.given = dict(given)
        self.choices: dict[str, Choice] = {}
        self.open: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._filled: dict[str, Option] = {}
        self._truths_of: dict[Key, list[Truth]] = {}
        self._stacks: dict[Key, tuple[str, int]] = {}
        self._stack: list[tuple[str, list[Tensor]]] = []
        # Keeps tensors alive: freed memory goes to another tensor, which would be taken for the first.
        self._alive: list[Tensor] = []
        self._found: dict[Key, list[Match]] = {}
        self._ran: set[str] = set()
        self._made_by: dict[Key, list[Choice]] = {}
        self._takers: dict[str, frozenset[str]] = {}
        # Exchanges are tried: no result sends the walk back.
        self._testing = False

    def search(self) -> Outcome:
        """Run the Keras model until every layer is filled or given up."""
        # The furthest point since the walk last gave up on a layer: its place and its choices.
        furthest, place, kept = -1, "", self.choices
        tries = 0
        agrees = False
        while True:
            self.progress("looking for layers", len(self.choices), len(self.options.layers))
            stuck, agrees = self._run()
            if stuck is None and (agrees or "" in self._given_up):
                break
            if len(self.choices) > furthest:
                furthest, place, tries = len(self.choices), stuck or "", 0
                kept = {name: _copied(choice) for name, choice in self.choices.items()}
            tries += 1
            if tries <= _TRIES and self._back():
                continue
            # No other option leads further, so the first was as good as any.
            self.choices, furthest = kept, -1
            self._given_up.add(place)
        self._find_ties(agrees)
        if not agrees:
            self._confirm_by_sums()
        return Outcome(self.choices, self.open, agrees)

    def _back(self) -> bool:
        """Take the next option of the latest choice that has one, and forget all choices after it."""
        names = list(self.choices)
        for place in range(len(names) - 1, -1, -1):
            choice = self.choices[names[place]]
            taken = {claim for name in names[:place] for claim in self.choices[name].option.claims}
            following = next(
                (i for i in range(choice.index + 1, len(choice.options)) if taken.isdisjoint(choice.options[i].claims)),
                None,
            )
            if following is not None:
                choice.index, choice.seen, choice.steered, choice.refuted = following, False, False, True
                for name in names[place + 1 :]:
                    del self.choices[name]
                return True
        return False

    def _run(self) -> tuple[str | None, bool]:
        """Run as far as possible. Returns the layer where it got stuck, and whether all results are PyTorch's."""
        self._truths_of, self._stacks, self._stack, self._alive, self._found = {}, {}, [], [], {}
        self._ran = set()
        self._taken = {claim for choice in self.choices.values() for claim in choice.option.claims}
        self._made_by = {}
        with self.options.target.running(self) as run:
            for choice in self.choices.values():
                choice.fed = choice.confirmed = False
                self._fill(choice)
            try:
                self._choose_parameters("", self._wanted(""), [], None)
                result = run()
            except _StuckError as stuck:
                return stuck.layer, False
            ours = {key: as_real(leaf) for key, leaf in result.items()}
        partners, _ = pair_results(self.recording.outputs, ours)
        exact = [
            self.recording.outputs[key]
            for key, own in partners.items()
            if self.library.match(ours[own], self.recording.outputs[key]) is not None
        ]
        for choice in self.choices.values():
            choice.confirmed |= any(truth is result for truth in self._results_of(choice) for result in exact)
        return None, bool(partners) and len(exact) == len(partners)

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self._alive += inputs
        base = name.partition("#")[0]
        fed: list[Tensor | None] | None = None
        if base not in self._ran and base in self.options.layers:
            self._ran.add(base)
            if base not in self.choices:
                self._choose(base, inputs)
            fed = self._feed(base, inputs)
        if fed is not None:
            inputs = [old if new is None else new for old, new in zip(inputs, fed, strict=True)]
        self._stack.append((name, inputs))
        return fed

    def _feed(self, base: str, inputs: list[Tensor]) -> list[Tensor | None] | None:
        """PyTorch's own input for a layer that was only guessed, since its input matches none of PyTorch's tensors.

        The layer is then judged by itself, and the layers after it have inputs that are known again.
        """
        choice = self.choices.get(base)
        if choice is None or not choice.guessed or any(map(self._find, inputs)):
            return None
        calls = self.options.calls(choice.option.source)
        fed = self._in_place_of(inputs, self.recording.calls[calls[0]].inputs if calls else [])
        choice.fed = any(each is not None for each in fed)
        return fed if choice.fed else None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        self._alive += outputs
        _, inputs = self._stack.pop()
        base = name.partition("#")[0]
        choice = self.choices.get(base)
        if choice is not None and "#" not in name:
            replaced = self._judge(choice, outputs)
            self._confirm(choice, inputs, outputs)
            return replaced
        if "#" not in name and base in self.options.owned:
            self._judge_parameters(base, outputs)
        layer = self.options.layers.get(base)
        if layer is not None and not self.options.target.holds_tensors(base) and len(inputs) == 1:
            # A result that no PyTorch module returns, such as a padding's, stands for the tensors it was made from.
            origins = self._origins(inputs[0])
            for output in outputs:
                if output.is_floating_point() and not self._find(output):
                    self._truths_of.setdefault(_key(output), []).extend(origins)
        return None

    def _wanted(self, base: str) -> list[str]:
        """The variables of a layer that are not filled yet."""
        taken = {name for own in self.choices.values() for e in own.option.all_entries for name in e.targets}
        return [name for name in self.options.target.tensors_of(base) if name not in taken]

    def _choose(self, base: str, inputs: list[Tensor]) -> None:
        wanted = self._wanted(base)
        if not wanted:
            return
        matches = [match for tensor in inputs for match in self._find(tensor)]
        truths = [match.truth for match in matches] or [t for tensor in inputs for t in self._origins(tensor)]
        fixed = self.given.get(base)
        options = self._options(base, inputs, matches, truths)
        if fixed is not None:
            options = [each for each in options if fixed.allows(each)] or self._stated(base, fixed)
        if not options and not set(wanted) & set(self.options.owned.get(base, ())):
            return  # its sublayers are filled one by one
        table = not options and len(wanted) == 1 and bool(self.options.parameters_like(wanted[0]))
        if not table and (options or self.options.target.kind(base) is not None):
            self._settle(base, base, options, bool(truths), fixed is not None)
            return
        self._choose_parameters(base, wanted, truths, fixed)

    def _choose_parameters(self, base: str, wanted: list[str], truths: list[Truth], fixed: Stated | None) -> None:
        for name in wanted:
            own = self.options.parameters_like(name, truths)
            stated = self.given.get(name, fixed)
            own = [option for option in own if stated is None or stated.allows(option)] or own
            # No other layer may take a table that a module of its own looks up.
            own = [each for each in own if self.options.owner_of(each.source) not in self._taken] or own
            self._settle(name, base, own, True, False)

    def _settle(self, slot: str, base: str, options: list[Option], known: bool, stated: bool) -> None:
        free = [option for option in options if self._taken.isdisjoint(option.claims)]
        guessed = False
        if not free:
            if not known and base not in self._given_up and not self._is_fixed():
                raise _StuckError(base)
            if not stated and slot == base:
                free = [option for option in self._guesses(base) if self._taken.isdisjoint(option.claims)]
                guessed = True
            if not free:
                if self._wanted(base):
                    self.open[slot] = "no free module or parameter of PyTorch has its kind and shapes"
                return
        free.sort(key=lambda option: self._rank(option, slot))
        if guessed:
            # Where the trail is lost, the order of execution says as much as names.
            ahead = {id(option): place for place, option in enumerate(sorted(free, key=self._steps_ahead))}
            alike = {id(option): place for place, option in enumerate(free)}
            free.sort(key=lambda option: ahead[id(option)] + alike[id(option)])
        rivals = len({option.source for option in options}) or len(free)
        self.open.pop(slot, None)
        self.choices[slot] = Choice(slot, base, free, 0, rivals, guessed=guessed)
        self._taken |= free[0].claims
        self._fill(self.choices[slot])

    def _rank(self, option: Option, slot: str) -> tuple[bool, float, int]:
        """The order in which options are tried: whole tables first, then by name, then as PyTorch runs them."""
        part = option.kind.startswith("parameter:")
        return part, -self.options.similarity(option.source, slot), self._place(option)

    def _steps_ahead(self, option: Option) -> int:
        """How long after the last module found a module runs. Modules that run before it come last."""
        last = max((self._place(choice.option) for choice in self.choices.values()), default=-1)
        ahead = self._place(option) - last
        return ahead if ahead > 0 else len(self.options.order) - ahead

    def _options(self, base: str, inputs: list[Tensor], matches: list[Match], truths: list[Truth]) -> list[Option]:
        """The options for a layer: modules that took the same input."""
        options: dict[tuple[str, str], Option] = {}
        for tensor in inputs:
            if _key(tensor) in self._stacks:
                module, place = self._stacks[_key(tensor)]
                for option in self.options.fitting(base, module, matches):
                    if option.kind == f"recurrent:l{place}":
                        return [option]
        for truth in truths:
            for module in self.options.takers(truth):
                for option in self.options.fitting(base, module, matches):
                    if not option.kind.startswith("recurrent:"):
                        options.setdefault((option.source, option.kind), option)
        # After a Flatten, kernel rows come in another order, so the plain kind is wrong there.
        behind = {option.source for option in options.values() if option.kind.startswith("dense:")}
        return [o for o in options.values() if o.source not in behind or o.kind.startswith("dense:")]

    def _guesses(self, base: str) -> list[Option]:
        """Options by kind and shapes alone, wherever the modules are."""
        return [o for o in self.options.modules_like(base) if not o.kind.startswith("recurrent:")]

    def _stated(self, base: str, stated: Stated) -> list[Option]:
        if stated.source in self.options.modules:
            own = list(self.options.fitting(base, stated.source, []))
            return [option for option in own if stated.allows(option)]
        return [
            each
            for name in self.options.target.tensors_of(base)
            for each in self.options.parameters_like(name)
            if stated.allows(each)
        ]

    def _is_fixed(self) -> bool:
        """Whether no earlier choice has another option, so that going back is useless."""
        return not any(choice.index + 1 < len(choice.options) for choice in self.choices.values())

    def _place(self, option: Option) -> int:
        return self.options.order.get(option.source, 0)

    def _fill(self, choice: Choice) -> None:
        if self._filled.get(choice.slot) == choice.option:
            return
        values = filled(choice.option.all_entries, self.options.tensors, self.options.shapes)
        for name, array in values.items():
            self.options.target.assign(name, array)
        self._filled[choice.slot] = choice.option

    def _judge_parameters(self, base: str, outputs: list[Tensor]) -> None:
        """Mark parameters as seen if their layer's result is in PyTorch. If it is not, later layers decide."""
        own = [self.choices[name] for name in self.options.owned[base] if name in self.choices]
        if not own:
            return
        if any(self._find(tensor) for tensor in outputs if tensor.is_floating_point()):
            for choice in own:
                choice.seen = True
                # Unlike a module's result, this one equals PyTorch's only with the right numbers.
                choice.refuted |= len(own) == 1

    def _judge(self, choice: Choice, outputs: list[Tensor]) -> Replacement:
        """Accept a layer whose result is in PyTorch; otherwise try the next option, or replace the result."""
        choice.seen = choice.steered = False  # an earlier run may have set these with other choices
        option = choice.option
        own = self._results_of(choice)
        tensors = [each for each in outputs if each.is_floating_point() and each.numel() > 1]
        if any(self._is(tensor, truth) for tensor in tensors for truth in own) or any(map(self._find, tensors)):
            choice.seen = True
            return None
        if option.kind.startswith("recurrent"):
            place = int(option.kind.partition(":l")[2] or 0)
            if place + 1 < self.options.modules[option.source].num_layers:
                for tensor in tensors:
                    self._stacks[_key(tensor)] = option.source, place + 1
                choice.seen = True  # PyTorch does not show the tensors between the layers of a stack
                return None
        if self._agrees_inside(choice, outputs, own):
            choice.seen = True
            return None
        if choice.index + 1 < len(choice.options) and choice.layer not in self._given_up and not self._testing:
            raise _StuckError(choice.layer)
        choice.steered = True
        return self._steered(outputs, own)

    def _agrees_inside(self, choice: Choice, outputs: list[Tensor], own: list[Truth]) -> bool:
        """Whether the layer returns PyTorch's result after an activation inside it that is no PyTorch module."""
        if len(outputs) != 1:
            return False
        for truth in own:
            for axes in {self.inputs.output_axes(truth.tensor.ndim), tuple(range(truth.tensor.ndim))}:
                expected = truth.tensor.permute(axes).contiguous()
                if expected.shape == outputs[0].shape:
                    made = self.options.target.activated(choice.layer, expected)
                    if made is None:
                        return False
                    scale = float(made.square().mean().sqrt())
                    if float((made - outputs[0]).square().mean().sqrt()) <= 1e-11 * scale:
                        return True
        return False

    def _steered(self, outputs: list[Tensor], own: list[Truth]) -> Replacement:
        replaced = self._in_place_of(outputs, own)
        return replaced if any(each is not None for each in replaced) else None

    def _in_place_of(self, tensors: list[Tensor], truths: list[Truth]) -> list[Tensor | None]:
        """For each tensor the first of PyTorch's with its shape, in the target's order of axes, or None."""
        replaced: list[Tensor | None] = [None] * len(tensors)
        for index, tensor in enumerate(tensors):
            for truth in truths if tensor.is_floating_point() else ():
                for axes in (self.inputs.output_axes(truth.tensor.ndim), tuple(range(truth.tensor.ndim))):
                    expected = truth.tensor.permute(axes).contiguous()
                    if expected.shape == tensor.shape and replaced[index] is None:
                        replaced[index] = expected
                        self._alive.append(expected)
        return replaced

    def _confirm(self, choice: Choice, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Marks the choices whose result this layer takes, if PyTorch has what it makes of it."""
        good = choice.seen and not choice.steered
        if good and not choice.guessed:
            for tensor in inputs:
                for maker in self._made_by.get(_key(tensor), ()):
                    maker.confirmed = True
            source = choice.option.source
            for other in self.choices.values():
                if other is not choice and other.seen and source in self._takers_of(other):
                    other.confirmed = True
        for tensor in outputs:
            self._made_by.setdefault(_key(tensor), []).append(choice)

    def _takers_of(self, choice: Choice) -> frozenset[str]:
        """The modules that take what a choice's module gives."""
        last = choice.option.last
        if last not in self._takers:
            truths = self._results_of(choice)
            self._takers[last] = frozenset(name for truth in truths for name in self.options.takers(truth))
        return self._takers[last]

    def _results_of(self, choice: Choice) -> list[Truth]:
        calls = self.options.calls(choice.option.last)
        return [truth for call in calls for truth in self.recording.calls[call].outputs]

    def _confirm_by_sums(self) -> None:
        """Confirm choices whose result goes into a sum, such as a shortcut's, that a later layer takes."""
        ordered = sorted((each for each in self.choices.values()), key=lambda each: self._place(each.option))
        for place, choice in enumerate(ordered):
            if choice.confirmed or not choice.seen:
                continue
            for later in ordered[place + 1 : place + 1 + _LAYERS_AFTER]:
                if later.seen and not later.guessed and self._is_summand(choice, later):
                    choice.confirmed = True

    def _is_summand(self, choice: Choice, later: Choice) -> bool:
        """Whether what the module of `later` takes is the result of `choice` plus another tensor of PyTorch's."""
        for call in self.options.calls(later.option.source):
            for taken in self.recording.calls[call].inputs:
                for made in self._results_of(choice):
                    if made is not taken and made.tensor.shape == taken.tensor.shape:
                        rest = taken.tensor - made.tensor
                        if rest.is_floating_point() and rest.numel() > 1 and self.library.find(rest):
                            return True
        return False

    def _is(self, tensor: Tensor, truth: Truth) -> bool:
        return self.library.match(as_real(tensor), truth) is not None

    def _find(self, tensor: Tensor) -> list[Match]:
        key = _key(tensor)
        if key not in self._found:
            self._found[key] = self.library.find(as_real(tensor)) if tensor.numel() > 1 else []
        return self._found[key]

    def _origins(self, tensor: Tensor) -> list[Truth]:
        found = [match.truth for match in self._find(tensor)]
        return found or self._truths_of.get(_key(tensor), [])

    def _find_ties(self, agrees: bool) -> None:
        """Mark choices that could be exchanged with each other, because no input shows which is which.

        One run tries an exchange in every part of the model at once. Where the result of a layer then differs from
        PyTorch's, it is replaced, so that the next exchange is judged by itself.
        """
        several = [choice for choice in self.choices.values() if choice.rivals > 1 and not (agrees and choice.refuted)]
        waiting = [
            (one.slot, other.slot)
            for place, one in enumerate(several)
            for other in several[place + 1 :]
            if {option.source for option in one.options} >= {other.option.source}
        ]
        places = {slot: place for place, slot in enumerate(self.choices)}
        begin = time.monotonic()
        self._testing = True
        while waiting and time.monotonic() - begin <= _TIES_SECONDS:
            batch: list[tuple[str, str]] = []
            for one, other in sorted(waiting, key=lambda pair: (places[pair[1]], -places[pair[0]])):
                # The layer after the last one is where an exchange shows.
                if not batch or places[one] > places[batch[-1][1]] + 1:
                    batch.append((one, other))
            waiting = [pair for pair in waiting if pair not in batch]
            for pair in self._try_exchanges(batch, places, agrees):
                if agrees and (len(batch) == 1 or self._try_exchanges([pair], places, agrees)):
                    first, second = (self.choices[slot] for slot in pair)
                    first.tied, second.tied = second.option.source, first.option.source
        self._testing = False
        for one, other in waiting:
            for slot, rival in ((one, other), (other, one)):
                if not self.choices[slot].refuted:
                    self.choices[slot].untold = self.choices[rival].option.source

    def _try_exchanges(
        self, pairs: list[tuple[str, str]], places: Mapping[str, int], agreed: bool
    ) -> list[tuple[str, str]]:
        """Run with the options of each pair exchanged. Marks those that this refutes, and returns those it does not."""
        kept = {name: _copied(choice) for name, choice in self.choices.items()}
        tried: list[tuple[str, str]] = []
        for pair in pairs:
            one, other = (kept[slot] for slot in pair)
            theirs = next((o for o in one.options if o.source == other.option.source), None)
            ours = next(iter(self._fitting_again(other, one)), None)
            if theirs is not None and ours is not None:
                self.choices[one.slot] = Choice(one.slot, one.layer, [theirs], rivals=2)
                self.choices[other.slot] = Choice(other.slot, other.layer, [ours], rivals=2)
                tried.append(pair)
        differing: list[int] = []
        agrees = False
        if tried:
            with contextlib.suppress(Exception):
                stuck, agrees = self._run()
                differing = [
                    places[name]
                    for name, choice in self.choices.items()
                    if (choice.steered and not kept[name].steered) or (kept[name].seen and not choice.seen)
                ]
                agrees &= stuck is None
        self.choices = kept
        unclear = []
        for index, pair in enumerate(tried):
            end = places[tried[index + 1][0]] if index + 1 < len(tried) else len(places)
            if any(places[pair[0]] <= place < end for place in differing) or (
                len(tried) == 1 and agreed and not agrees
            ):
                for slot, rival in (pair, pair[::-1]):
                    self.choices[slot].refuted = True
                    self.choices[slot].excluded.add(self.choices[rival].option.source)
            else:
                unclear.append(pair)
        return unclear

    def _fitting_again(self, layer: Choice, of: Choice) -> list[Option]:
        if of.option.source not in self.options.modules:
            return [o for o in self.options.parameters_like(layer.option.target) if o.source == of.option.source]
        return [o for o in self.options.fitting(layer.layer, of.option.source, []) if o.kind == of.option.kind]


def _copied(choice: Choice) -> Choice:
    return Choice(**{**vars(choice), "options": list(choice.options), "excluded": set(choice.excluded)})
