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

from porting.kinds import kind_of_layer
from porting.models.inputs import Inputs, leaves_by_key
from porting.models.keras_float64 import Float64Model
from porting.models.observe import Replacement, observe_layers, to_torch
from porting.parity.content import Library, Match, Truth, as_real
from porting.parity.record import Recording
from porting.parity.results import pair_results
from porting.parity.trace import key_of
from porting.progress import Progress
from porting.proposing.options import Option, Options, filled

if TYPE_CHECKING:
    from torch import Tensor

# How often the walk goes back before it gives up on a layer.
_TRIES = 48
# How long, in seconds, to test whether exchanging two choices changes the outputs.
_TIES_SECONDS = 60.0


@dataclass
class Choice:
    """The options for a slot, best first, and which one fills it.

    A slot is a layer, or a variable that a layer of no known kind holds directly; `layer` is the layer in either case.
    `rivals` is how many options fitted at first, whether or not other layers use them. `seen` means that PyTorch has
    the layer's result, `guessed` that its input matched nothing, `steered` that its result had to be replaced, and
    `refuted` that nothing else would do. `tied` names an option that would do too, `untold` one that was not tried.
    """

    slot: str
    layer: str
    options: list[Option]
    index: int = 0
    rivals: int = 1
    seen: bool = False
    guessed: bool = False
    steered: bool = False
    refuted: bool = False
    tied: str = ""
    untold: str = ""

    @property
    def option(self) -> Option:
        return self.options[self.index]


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
        recording: Recording,
        library: Library,
        model: Float64Model,
        inputs: Inputs,
        given: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self.options, self.recording, self.library = options, recording, library
        self.model, self.inputs, self.progress = model, inputs, progress
        self.given = dict(given)
        self.choices: dict[str, Choice] = {}
        self.open: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._filled: dict[str, Option] = {}
        self._truths_of: dict[int, list[Truth]] = {}
        self._stacks: dict[int, tuple[str, int]] = {}
        self._stack: list[tuple[str, list[Tensor]]] = []
        # Keeps tensors alive: freed memory goes to another tensor, which would be taken for the first.
        self._alive: list[Tensor] = []
        self._found: dict[int, list[Match]] = {}
        self._ran: set[str] = set()

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
        if agrees:
            self._find_ties()
        return Outcome(self.choices, self.open, agrees)

    def _back(self) -> bool:
        """Take the next option of the latest choice that has one, and forget all choices after it."""
        names = list(self.choices)
        for place in range(len(names) - 1, -1, -1):
            choice = self.choices[names[place]]
            taken = {self.choices[name].option.claim for name in names[:place]}
            following = next(
                (i for i in range(choice.index + 1, len(choice.options)) if choice.options[i].claim not in taken), None
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
        self._taken = {choice.option.claim for choice in self.choices.values()}
        with self.model.active() as model, observe_layers(model, self):
            for choice in self.choices.values():
                self._fill(choice)
            try:
                result = model(self.inputs.for_candidate(model), training=False)
            except _StuckError as stuck:
                return stuck.layer, False
            ours = {key: as_real(to_torch(leaf)) for key, leaf in leaves_by_key(result).items()}
        partners, _ = pair_results(self.recording.outputs, ours)
        return None, bool(partners) and all(
            self.library.match(ours[own], self.recording.outputs[key]) is not None for key, own in partners.items()
        )

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        self._alive += inputs
        self._stack.append((name, inputs))
        base = name.partition("#")[0]
        if base not in self._ran and base in self.options.layers:
            self._ran.add(base)
            if base not in self.choices:
                self._choose(base, inputs)
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        self._alive += outputs
        _, inputs = self._stack.pop()
        base = name.partition("#")[0]
        choice = self.choices.get(base)
        if choice is not None and "#" not in name:
            return self._judge(choice, outputs)
        if "#" not in name and base in self.options.owned:
            self._judge_parameters(base, outputs)
        layer = self.options.layers.get(base)
        if layer is not None and not layer.weights and len(inputs) == 1:
            # A result that no PyTorch module returns, such as a padding's, stands for the tensors it was made from.
            origins = self._origins(inputs[0])
            for output in outputs:
                if output.is_floating_point() and not self._find(output):
                    self._truths_of.setdefault(key_of(output), []).extend(origins)
        return None

    def _wanted(self, base: str) -> list[str]:
        """The variables of a layer that are not filled yet."""
        taken = {name for own in self.choices.values() for e in own.option.entries for name in e.targets}
        return [name for name in self._variables(base) if name not in taken]

    def _choose(self, base: str, inputs: list[Tensor]) -> None:
        wanted = self._wanted(base)
        if not wanted:
            return
        matches = [match for tensor in inputs for match in self._find(tensor)]
        truths = [match.truth for match in matches] or [t for tensor in inputs for t in self._origins(tensor)]
        fixed = self.given.get(base)
        options = self._options(base, inputs, matches, truths)
        if fixed is not None:
            options = [option for option in options if option.source == fixed] or self._stated(base, fixed)
        if not options and not set(wanted) & set(self.options.owned.get(base, ())):
            return  # its sublayers are filled one by one
        table = not options and len(wanted) == 1 and bool(self.options.parameters_like(wanted[0]))
        if not table and (options or kind_of_layer(self.options.layers[base]) is not None):
            self._settle(base, base, options, bool(truths), fixed is not None)
            return
        for name in wanted:
            own = self.options.parameters_like(name, truths)
            own = [option for option in own if fixed in (None, option.source)] or own
            # A table belongs to the module that looks it up; no other layer may take it.
            own = [each for each in own if each.source.rpartition(".")[0] not in self._taken] or own
            self._settle(name, base, own, True, False)

    def _settle(self, slot: str, base: str, options: list[Option], known: bool, stated: bool) -> None:
        free = [option for option in options if option.claim not in self._taken]
        guessed = False
        if not free:
            if not known and base not in self._given_up and not self._is_fixed():
                raise _StuckError(base)
            if not stated and slot == base:
                free = [option for option in self._guesses(base) if option.claim not in self._taken]
                guessed = True
            if not free:
                if self._wanted(base):
                    self.open[slot] = "no free module or parameter of PyTorch has its kind and shapes"
                return
        free.sort(key=lambda option: (-self.options.similarity(option.source, slot), self._place(option)))
        rivals = len({option.source for option in options}) or len(free)
        self.open.pop(slot, None)
        self.choices[slot] = Choice(slot, base, free, 0, rivals, guessed=guessed)
        self._taken.add(free[0].claim)
        self._fill(self.choices[slot])

    def _options(self, base: str, inputs: list[Tensor], matches: list[Match], truths: list[Truth]) -> list[Option]:
        """The options for a layer: modules that took the same input."""
        options: dict[tuple[str, str], Option] = {}
        for tensor in inputs:
            if key_of(tensor) in self._stacks:
                module, place = self._stacks[key_of(tensor)]
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

    def _stated(self, base: str, source: str) -> list[Option]:
        if source in self.options.modules:
            return list(self.options.fitting(base, source, []))
        return [
            each
            for name in self._variables(base)
            for each in self.options.parameters_like(name)
            if each.source == source
        ]

    def _variables(self, base: str) -> list[str]:
        kind = kind_of_layer(self.options.layers[base])
        found = kind.variables(self.options.layers[base]).values() if kind is not None else ()
        return list(
            dict.fromkeys([*self.options.owned.get(base, ()), *(self.options.names.get(id(v), "") for v in found)])
        )

    def _is_fixed(self) -> bool:
        """Whether no earlier choice has another option, so that going back is useless."""
        return not any(choice.index + 1 < len(choice.options) for choice in self.choices.values())

    def _place(self, option: Option) -> int:
        return self.options.order.get(option.source, 0)

    def _fill(self, choice: Choice) -> None:
        if self._filled.get(choice.slot) == choice.option:
            return
        values = filled(choice.option.entries, self.options.tensors, self.options.shapes)
        for name, array in values.items():
            self.options.variables[name].assign(array)
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
        own = [truth for call in self._calls(option.source) for truth in self.recording.calls[call].outputs]
        tensors = [each for each in outputs if each.is_floating_point() and each.numel() > 1]
        if any(self._is(tensor, truth) for tensor in tensors for truth in own) or any(map(self._find, tensors)):
            choice.seen = True
            return None
        if option.kind.startswith("recurrent"):
            place = int(option.kind.partition(":l")[2] or 0)
            if place + 1 < self.options.modules[option.source].num_layers:
                for tensor in tensors:
                    self._stacks[key_of(tensor)] = option.source, place + 1
                choice.seen = True  # PyTorch does not show the tensors between the layers of a stack
                return None
        if self._agrees_inside(choice, outputs, own):
            choice.seen = True
            return None
        if choice.index + 1 < len(choice.options) and choice.layer not in self._given_up:
            raise _StuckError(choice.layer)
        choice.steered = True
        return self._steered(outputs, own)

    def _agrees_inside(self, choice: Choice, outputs: list[Tensor], own: list[Truth]) -> bool:
        """Whether the layer returns PyTorch's result after an activation inside it that is no PyTorch module."""
        activation = getattr(self.options.layers[choice.layer], "activation", None)
        if activation is None or len(outputs) != 1:
            return False
        import keras

        for truth in own:
            for axes in {self.inputs.output_axes(truth.tensor.ndim), tuple(range(truth.tensor.ndim))}:
                expected = truth.tensor.permute(axes).contiguous()
                if expected.shape == outputs[0].shape:
                    made = to_torch(activation(keras.ops.convert_to_tensor(expected.numpy())))
                    scale = float(made.square().mean().sqrt())
                    if float((made - outputs[0]).square().mean().sqrt()) <= 1e-11 * scale:
                        return True
        return False

    def _steered(self, outputs: list[Tensor], own: list[Truth]) -> Replacement:
        replaced: list[Tensor | None] = [None] * len(outputs)
        for index, output in enumerate(outputs):
            for truth in own:
                for axes in (self.inputs.output_axes(truth.tensor.ndim), tuple(range(truth.tensor.ndim))):
                    expected = truth.tensor.permute(axes).contiguous()
                    if expected.shape == output.shape and replaced[index] is None:
                        replaced[index] = expected
                        self._alive.append(expected)
        return replaced if any(each is not None for each in replaced) else None

    def _calls(self, module: str) -> list[str]:
        return [call for call in self.recording.calls if call.partition("#")[0] == module]

    def _is(self, tensor: Tensor, truth: Truth) -> bool:
        return self.library.match(as_real(tensor), truth) is not None

    def _find(self, tensor: Tensor) -> list[Match]:
        key = key_of(tensor)
        if key not in self._found:
            self._found[key] = self.library.find(as_real(tensor)) if tensor.numel() > 1 else []
        return self._found[key]

    def _origins(self, tensor: Tensor) -> list[Truth]:
        found = [match.truth for match in self._find(tensor)]
        return found or self._truths_of.get(key_of(tensor), [])

    def _find_ties(self) -> None:
        """Find choices that can be exchanged without changing the outputs: no input shows which is which."""
        several = [choice for choice in self.choices.values() if choice.rivals > 1 and not choice.refuted]
        pairs = [
            (one, other)
            for place, one in enumerate(several)
            for other in several[place + 1 :]
            if not one.tied and {o.source for o in one.options} >= {other.option.source}
        ]
        begin = time.monotonic()
        for one, other in pairs:
            if time.monotonic() - begin > _TIES_SECONDS:
                for choice, rival in ((one, other), (other, one)):
                    if not choice.refuted:
                        self.choices[choice.slot].untold = rival.option.source
                continue
            theirs = next((o for o in one.options if o.source == other.option.source), None)
            ours = next((o for o in self._fitting_again(other, one)), None)
            if theirs is None or ours is None:
                continue
            kept = {name: _copied(choice) for name, choice in self.choices.items()}
            self.choices[one.slot] = Choice(one.slot, one.layer, [theirs], rivals=2)
            self.choices[other.slot] = Choice(other.slot, other.layer, [ours], rivals=2)
            with contextlib.suppress(Exception):
                stuck, agrees = self._run()
                steered = any(choice.steered for choice in self.choices.values())
                tie = stuck is None and agrees and not steered
                self.choices = kept
                if tie:
                    self.choices[one.slot].tied = other.option.source
                    self.choices[other.slot].tied = one.option.source
                else:
                    self.choices[one.slot].refuted = self.choices[other.slot].refuted = True
            self.choices = kept

    def _fitting_again(self, layer: Choice, of: Choice) -> list[Option]:
        if of.option.source not in self.options.modules:
            return [o for o in self.options.parameters_like(layer.option.target) if o.source == of.option.source]
        return [o for o in self.options.fitting(layer.layer, of.option.source, []) if o.kind == of.option.kind]


def _copied(choice: Choice) -> Choice:
    return Choice(**{**vars(choice), "options": list(choice.options)})
