"""Walks through the Keras model in the order of execution, and fills each layer from the recorded PyTorch run.

PyTorch has run once in float64, and every tensor that a module took or returned is known. The input of a layer equals
one of them. The modules that took this tensor and whose kind and shapes fit are the options for the layer. One of them
fills the layer, and the layer runs. If its result is not a known tensor, the option was wrong. If several options fit,
the first is used for now, and the first unknown tensor sends the walk back to try the next option.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from porting.call_names import without_number
from porting.models.observe import Replacement
from porting.parity.content import SAME, Library, Match, Truth, as_real
from porting.parity.measure import rms
from porting.parity.record import version
from porting.parity.results import in_another_order, pair_results, same_results
from porting.parity.trace import key_of
from porting.progress import Progress
from porting.proposing.options import AcrossFrameworks, Option, Options, filled

if TYPE_CHECKING:
    from torch import Tensor

# How often the walk goes back before it gives up on a layer.
_TRIES = 48
# How long, in seconds, to go back and try other options.
_SEARCH_SECONDS = 120.0
# How long it looks for another choice before a layer whose result is not PyTorch's, where all else agrees.
_FORCED_SECONDS = 30.0
# How long, in seconds, to test whether exchanging two choices changes the outputs.
_TIES_SECONDS = 60.0


@dataclass
class Choice:
    """The options for a slot, best first, and which one fills it.

    A slot is a layer, or a variable that a layer of no known kind holds directly; `layer` is the layer in either case.
    `options` are those that were free, `fitting` all that fitted. `seen` means that PyTorch has the layer's result,
    `guessed` that its input matched nothing, `fed` that it was therefore given PyTorch's, and `steered` that its result
    had to be replaced. `tied` names an option that would do too, `not_tried` one that was not tried in time, and `idle`
    means that no result of the model depends on the slot.
    """

    slot: str
    layer: str
    options: list[Option]
    fitting: list[Option]
    index: int = 0
    seen: bool = False
    guessed: bool = False
    fed: bool = False
    steered: bool = False
    tied: str = ""
    not_tried: str = ""
    idle: bool = False

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


# A tensor's memory, how often it was changed in place, and how it lies there.
Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def _key(tensor: Tensor) -> Key:
    return key_of(tensor), version(tensor), tuple(tensor.shape), tensor.stride()


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
    notes: tuple[str, ...] = ()


@dataclass
class _Known:
    """What one run has shown of the tensors in it, which it keeps alive."""

    truths_of: dict[Key, list[Truth]] = field(default_factory=dict)
    stacks: dict[Key, tuple[str, int]] = field(default_factory=dict)
    maps: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    found: dict[Key, list[Match]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)


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
        # The sides of the map that a Flatten took, in Keras's order, by the tensor that it gave.
        self._maps: dict[Key, tuple[int, ...]] = {}
        # Another option is forced on a slot: whatever PyTorch does not have refutes it.
        self._testing = False
        self._known = _Known()
        # The slot that is filled with other numbers than its option's.
        self._disturbed = ""
        # How the results of the two models were paired.
        self._notes: list[str] = []

    def search(self) -> Outcome:
        """Run the target until every layer is filled or given up."""
        # The furthest point since the walk last gave up on a layer: its place and its choices.
        furthest, place, kept = -1, "", self.choices
        tries, begin = 0, time.monotonic()
        agrees = False
        while True:
            self.progress("looking for layers", len(self.choices), len(self.options.layers))
            stuck, agrees = self._run()
            # Where a layer before it may be another one, such as a branch of several alike, its result may come right.
            forced = next((place for place, each in enumerate(self.choices.values()) if each.steered), None)
            if stuck is None and ((agrees and forced is None) or "" in self._given_up):
                break
            if len(self.choices) > furthest:
                furthest, place, tries = len(self.choices), stuck or "", 0
                kept = {name: _copied(choice) for name, choice in self.choices.items()}
            tries += 1
            seconds = _SEARCH_SECONDS if stuck is not None or not agrees else _FORCED_SECONDS
            if (
                tries <= _TRIES
                and time.monotonic() - begin <= seconds
                and self._back(before=forced if agrees else None)
            ):
                continue
            # No other option leads further, so the first was as good as any.
            self.choices, furthest = kept, -1
            self._given_up.add(place)
        if agrees and not any(choice.steered or choice.fed for choice in self.choices.values()):
            self._find_ties()
        return Outcome(self.choices, self.open, agrees, tuple(self._notes))

    def _back(self, first: int = 0, before: int | None = None) -> bool:
        """Take the next option of the latest choice that has one, and forget all choices after it.

        Choices before the place `first` stay, and with `before` all from there on are forgotten. Guesses stay: nothing
        speaks for one of them more than for another.
        """
        names = list(self.choices)
        for place in range((len(names) if before is None else before) - 1, first - 1, -1):
            choice = self.choices[names[place]]
            if choice.guessed:
                continue
            taken = {claim for name in names[:place] for claim in self.choices[name].option.claims}
            following = next(
                (i for i in range(choice.index + 1, len(choice.options)) if taken.isdisjoint(choice.options[i].claims)),
                None,
            )
            if following is not None:
                choice.index, choice.seen, choice.steered = following, False, False
                for name in names[place + 1 :]:
                    del self.choices[name]
                return True
        return False

    def _run(self) -> tuple[str | None, bool]:
        """Run as far as possible. Returns the layer where it got stuck, and whether all results are PyTorch's."""
        # What is known of tensors that are replayed stays.
        known = self._known if self._testing else _Known()
        self._truths_of, self._stacks, self._maps = dict(known.truths_of), dict(known.stacks), dict(known.maps)
        self._found, self._stack, self._alive, self._ran = dict(known.found), [], [], set()
        self._taken = {claim for choice in self.choices.values() for claim in choice.option.claims}
        with self.options.target.running(self) as run:
            for choice in self.choices.values():
                choice.fed = False
                self._fill(choice)
            try:
                self._choose_parameters("", self._wanted(""), [], None)
                result = run()
            except _StuckError as stuck:
                return stuck.layer, False
            ours = {key: as_real(leaf) for key, leaf in result.items()}
        return None, self._agree(ours)

    def _agree(self, ours: Mapping[str, Tensor]) -> bool:
        """Whether the results are PyTorch's.

        Results that the two models call by other names pair by place. In a test any order of those will do, since
        nothing but the place speaks for one.
        """
        theirs = self.recording.outputs
        partners, self._notes = pair_results(theirs, ours)
        if not self._testing or all(key == own for key, own in partners.items()):
            agree = bool(partners) and all(self._is(ours[own], theirs[key]) for key, own in partners.items())
            if not agree and (moved := same_results(theirs, ours, partners, self._is)):
                self._notes = [in_another_order(moved)]
            return agree
        left = list(theirs.values())
        for own in partners.values():
            match = next((truth for truth in left if self._is(ours[own], truth)), None)
            if match is None:
                return False
            left.remove(match)
        return True

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self._alive += inputs
        base = without_number(name)
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
        base = without_number(name)
        choice = self.choices.get(base)
        if choice is not None and "#" not in name:
            return self._judge(choice, outputs)
        if "#" not in name and base in self.options.owned:
            self._judge_parameters(base, outputs)
        layer = self.options.layers.get(base)
        if layer is not None and not self.options.target.holds_tensors(base) and len(inputs) == 1:
            # A result that no PyTorch module returns, such as a padding's, stands for the tensors it was made from.
            origins = self._origins(inputs[0])
            for output in outputs:
                if inputs[0].ndim > 2 and output.ndim == 2 and output.numel() == inputs[0].numel():
                    self._maps[_key(output)] = tuple(inputs[0].shape[1:])
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
            sides = [fixed.kind.partition(":")[2]] if fixed.kind.startswith("dense:") else self._sides(inputs, matches)
            options = [each for each in options if fixed.allows(each)] or self._stated(base, fixed, sides)
        if not options and not set(wanted) & set(self.options.owned.get(base, ())):
            return  # its sublayers are filled one by one
        table = not options and len(wanted) == 1 and bool(self.options.parameters_like(wanted[0]))
        if not table and (options or self.options.target.kind(base) is not None):
            self._settle(base, base, options, bool(truths), fixed is not None, inputs)
            return
        self._choose_parameters(base, wanted, truths, fixed)

    def _choose_parameters(self, base: str, wanted: list[str], truths: list[Truth], fixed: Stated | None) -> None:
        for name in wanted:
            own = self.options.parameters_like(name, truths)
            stated = self.given.get(name, fixed)
            if stated is not None:
                own = [option for option in own if stated.allows(option)]
            # No other layer may take a table that a module of its own looks up.
            own = [each for each in own if self.options.owner_of(each.source) not in self._taken] or own
            self._settle(name, base, own, True, stated is not None)

    def _settle(
        self,
        slot: str,
        base: str,
        options: list[Option],
        known: bool,
        stated: bool,
        inputs: Sequence[Tensor] = (),
    ) -> None:
        free = [option for option in options if self._taken.isdisjoint(option.claims)]
        guessed = False
        if not free and not stated and slot == base and len(inputs) == 1:
            # PyTorch has no module that takes the input, but one may give the result.
            options = self._guesses(base)
            free = [
                each for each in options if self._taken.isdisjoint(each.claims) and self._gives(each, base, inputs[0])
            ]
        if not free:
            if not known and base not in self._given_up:
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
            last = max((self._place(choice.option) for choice in self.choices.values()), default=-1)
            in_order = sorted(free, key=lambda option: self._steps_ahead(option, last))
            ahead = {id(option): place for place, option in enumerate(in_order)}
            alike = {id(option): place for place, option in enumerate(free)}
            free.sort(key=lambda option: ahead[id(option)] + alike[id(option)])
        self.open.pop(slot, None)
        self.choices[slot] = Choice(slot, base, free, list(free if guessed else options), guessed=guessed)
        self._taken |= free[0].claims
        self._fill(self.choices[slot])

    def _gives(self, option: Option, base: str, tensor: Tensor) -> bool:
        """Whether a layer makes what PyTorch has from a tensor, filled by an option."""
        choice = Choice(base, base, [option], [option])
        own = self._results_of(choice)
        self._fill(choice)
        made = self.options.target.result_of(base, tensor)
        if made is None:
            return False
        return any(self._is(made, truth) for truth in own) or self._agrees_inside(choice, [made], own)

    def _rank(self, option: Option, slot: str) -> tuple[bool, float, int]:
        """The order in which options are tried: whole tables first, then by name, then as PyTorch runs them."""
        part = option.kind.startswith("parameter:")
        return part, -self.options.similarity(option.source, slot), self._place(option)

    def _steps_ahead(self, option: Option, last: int) -> int:
        """How long after the last module found a module runs. Modules that run before it come last."""
        ahead = self._place(option) - last
        return ahead if ahead > 0 else len(self.options.order) - ahead

    def _options(self, base: str, inputs: list[Tensor], matches: list[Match], truths: list[Truth]) -> list[Option]:
        """The options for a layer: modules that took the same input."""
        options: dict[tuple[str, str], Option] = {}
        sides = self._sides(inputs, matches)
        for tensor in inputs:
            if _key(tensor) in self._stacks:
                module, place = self._stacks[_key(tensor)]
                for option in self.options.fitting(base, module, sides):
                    if option.kind == f"recurrent:l{place}":
                        return [option]
        for truth in truths:
            for module in self.options.takers(truth):
                for option in self.options.fitting(base, module, sides):
                    if not option.kind.startswith("recurrent:"):
                        options.setdefault((option.source, option.kind), option)
        # After a Flatten, kernel rows come in another order, so the plain kind is wrong there.
        behind = {option.source for option in options.values() if option.kind.startswith("dense:")}
        return [o for o in options.values() if o.source not in behind or o.kind.startswith("dense:")]

    def _sides(self, inputs: list[Tensor], matches: list[Match]) -> list[str]:
        """The sides, in PyTorch's order, of maps whose numbers a Flatten of the target has put in another order."""
        if not any(match.reordered and match.truth.tensor.ndim == 2 for match in matches):
            return []
        shapes = [tuple(match.truth.tensor.shape[1:]) for match in matches if match.truth.tensor.ndim > 2]
        for tensor in inputs:
            if (shape := self._maps.get(_key(tensor))) is not None:
                axes = self.inputs.output_axes(len(shape) + 1)
                shapes.append(tuple(shape[axes.index(axis) - 1] for axis in range(1, len(axes))))
        return list(dict.fromkeys("x".join(map(str, shape)) for shape in shapes))

    def _guesses(self, base: str) -> list[Option]:
        """Options by kind and shapes alone, wherever the modules are."""
        return [o for o in self.options.modules_like(base) if not o.kind.startswith("recurrent:")]

    def _stated(self, base: str, stated: Stated, sides: list[str]) -> list[Option]:
        if stated.source in self.options.modules:
            own = list(self.options.fitting(base, stated.source, sides))
            return [option for option in own if stated.allows(option)]
        return [
            each
            for name in self.options.target.tensors_of(base)
            for each in self.options.parameters_like(name)
            if stated.allows(each)
        ]

    def _place(self, option: Option) -> int:
        return self.options.order.get(option.source, 0)

    def _fill(self, choice: Choice) -> None:
        disturbed = choice.slot == self._disturbed
        if self._filled.get(choice.slot) == choice.option and not disturbed:
            return
        values = filled(choice.option.all_entries, self.options.tensors, self.options.shapes)
        if disturbed:
            rng = np.random.default_rng(1)
            values = {name: array * rng.uniform(1.5, 2.5, array.shape) + 0.5 for name, array in values.items()}
        self.options.target.assign(values)
        if disturbed:
            self._filled.pop(choice.slot, None)
        else:
            self._filled[choice.slot] = choice.option

    def _judge_parameters(self, base: str, outputs: list[Tensor]) -> None:
        """Mark parameters as seen if their layer's result is in PyTorch. If it is not, later layers decide."""
        own = [self.choices[name] for name in self.options.owned[base] if name in self.choices]
        if not own:
            return
        if any(self._find(tensor) for tensor in outputs if tensor.is_floating_point()):
            for choice in own:
                choice.seen = True

    def _judge(self, choice: Choice, outputs: list[Tensor]) -> Replacement:
        """Accept a layer whose result is in PyTorch; otherwise try the next option, or replace the result."""
        choice.seen = choice.steered = False  # an earlier run may have set these with other choices
        option = choice.option
        own = self._results_of(choice)
        tensors = [each for each in outputs if each.is_floating_point() and each.numel()]
        if any(self._is(tensor, truth) for tensor in tensors for truth in own) or any(map(self._find, tensors)):
            choice.seen = True
            return None
        if option.kind.partition(":")[0] == "recurrent" and isinstance(self.options, AcrossFrameworks):
            place = int(option.kind.partition(":l")[2] or 0)
            if place + 1 < self.options.modules[option.source].num_layers:
                for tensor in tensors:
                    self._stacks[_key(tensor)] = option.source, place + 1
                choice.seen = True  # PyTorch does not show the tensors between the layers of a stack
                return None
        if self._agrees_inside(choice, outputs, own):
            choice.seen = True
            return None
        if self._testing or (choice.index + 1 < len(choice.options) and choice.layer not in self._given_up):
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
                    scale = rms(made)
                    if rms(made - outputs[0]) <= SAME * scale:
                        return True
        return False

    def _steered(self, outputs: list[Tensor], own: list[Truth]) -> Replacement:
        replaced = self._in_place_of(outputs, own)
        return replaced if any(each is not None for each in replaced) else None

    def _in_place_of(self, tensors: list[Tensor], truths: list[Truth]) -> list[Tensor | None]:
        """For each tensor the first of PyTorch's with its shape, in the target's order of axes, or None."""
        import torch

        replaced: list[Tensor | None] = [None] * len(tensors)
        for index, tensor in enumerate(tensors):
            for truth in truths if tensor.is_floating_point() else ():
                for axes in (self.inputs.output_axes(truth.tensor.ndim), tuple(range(truth.tensor.ndim))):
                    expected = truth.tensor.permute(axes)
                    if expected.shape == tensor.shape and replaced[index] is None:
                        # In memory of its own, which a layer may overwrite.
                        replaced[index] = expected = expected.clone(memory_format=torch.contiguous_format)
                        self._alive.append(expected)
        return replaced

    def _results_of(self, choice: Choice) -> list[Truth]:
        calls = self.options.calls(choice.option.last)
        return [truth for call in calls for truth in self.recording.calls[call].outputs]

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

    def _find_ties(self) -> None:
        """Look for another assignment that gives the same results, and mark every choice in which one differs.

        Another assignment differs from this one at some choice first: there it has an option that no earlier choice
        has taken. Each of those is forced on its slot in turn, and the choices after it are made anew.
        """
        begin = time.monotonic()
        kept = {name: _copied(choice) for name, choice in self.choices.items()}
        names = list(kept)
        taken: set[str] = set()
        replay = self.options.target.replay
        if replay is not None:  # what comes before a slot is not computed again for each of its options
            replay.record()
            self._run()
            self._known = _Known(self._truths_of, self._stacks, self._maps, self._found, self._alive)
            kept = {name: _copied(choice) for name, choice in self.choices.items()}
        self._testing = True
        for place, name in enumerate(names):
            self.progress("looking for ties", place, len(names))
            choice = kept[name]
            if not choice.seen or choice.slot != choice.layer:  # a layer may give what it took, and use no parameter
                if time.monotonic() - begin > _TIES_SECONDS:
                    choice.not_tried = "other numbers"
                else:
                    choice.idle = self._is_idle(name, kept)
            others = {option.source: option for option in choice.fitting if option.source != choice.option.source}
            for source, other in others.items():
                if not taken.isdisjoint(other.claims) or choice.tied:
                    continue
                if time.monotonic() - begin > _TIES_SECONDS:
                    choice.not_tried = source
                    break
                found = self._with(place, other, kept)
                if found is None:
                    choice.not_tried = source
                for differing in found or ():
                    own = kept[differing]
                    own.tied = self.choices[differing].option.source if differing in self.choices else source
            taken |= choice.option.claims
        self._testing, self._known = False, _Known()
        if replay is not None:
            replay.clear()
        self.choices = kept

    def _is_idle(self, name: str, kept: Mapping[str, Choice]) -> bool:
        """Whether the results stay the same with other numbers in a slot."""
        self.choices = {each: _copied(choice) for each, choice in kept.items()}
        self._disturbed = name
        self._replay_until(kept[name].layer)
        try:
            return self._run()[1]
        except Exception:  # a layer may raise anything on numbers that it does not take
            return False
        finally:
            self._disturbed = ""

    def _replay_until(self, layer: str) -> None:
        if self.options.target.replay is not None:
            self.options.target.replay.until(layer)

    def _with(self, place: int, other: Option, kept: Mapping[str, Choice]) -> list[str] | None:
        """The slots in which an assignment with another option at a place differs; empty if there is no such one.

        None if that could not be decided.
        """
        names = list(kept)
        self.choices = {name: _copied(kept[name]) for name in names[:place]}
        own = kept[names[place]]
        self._replay_until(own.layer)
        self.choices[own.slot] = Choice(own.slot, own.layer, [other], [other], guessed=own.guessed)
        for _ in range(_TRIES):
            try:
                stuck, agrees = self._run()
            except Exception:  # a layer may raise anything on weights of another
                return None
            if stuck is None and agrees:
                return [
                    name
                    for name in names
                    if name not in self.choices or self.choices[name].option.claims != kept[name].option.claims
                ]
            if not self._back(place + 1):
                return []
        return None


def _copied(choice: Choice) -> Choice:
    return Choice(**{**vars(choice), "options": list(choice.options), "fitting": list(choice.fitting)})
