"""Maps models of two libraries without a row, and counts what is right, beside other ways to guess a map.

\b
    python scripts/map_study.py                          # every pair, under its own names and under random ones
    python scripts/map_study.py --pair vit --pair gpt2 --no-rivals
    python scripts/map_study.py --planted                # one difference planted in each
    python scripts/map_study.py --sizes                  # the time of one model of 2 to 16 layers

The pairs are the families, a few layers of them where they are large, and small models whose Keras side is written with
other names, fused activations and folded norms. A family's own rows are hidden, and say afterwards what is right.
Nothing is downloaded; PyTorch's weights are random. `random` gives every layer and variable of the Keras model a name
that says nothing. The rivals are weightbridge, and both lists of tensors put side by side: sorted by path, in the order
of definition, and in the order of execution.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import signal
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import porting
from porting.errors import FamilyError
from porting.families.builders import transformer_backbone, transformers_model
from porting.families.registry import get_family
from porting.kinds import kind_of_module
from porting.models.frameworks import start_tensorflow
from porting.models.inputs import make_inputs
from porting.models.live import effective_tensors
from porting.models.observe import observe_layers, observe_modules
from porting.models.traverse import named_layers, named_variables, owned_variables

sys.path.insert(0, str(Path(__file__).parent))
from studied_models import MODELS, STYLES

# Which PyTorch tensors each Keras variable takes.
Truth = dict[str, tuple[str, ...]]
_WEIGHTBRIDGE_SECONDS = 40


@dataclass(frozen=True)
class Pair:
    """Two models that are one, the inputs of the Keras model, and what is right."""

    reference: nn.Module
    candidate: Any
    inputs: Any
    truth: Truth


def images(side: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)


def tokens() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(2, 1000, (2, 16)).astype(np.int32)
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def of_family(name: str, variant: str, inputs: Any = None) -> Pair:
    """Both models of a family, and what its rows say."""
    family = get_family(name)
    spec = family.spec(variant)
    truth = {target: entry.sources for entry in family.key_map(spec).entries for target in entry.targets}
    reference, candidate = family.build_reference(spec), family.build_candidate(spec)
    if inputs is None:
        inputs = family.check_inputs(spec)
    if inputs is None:
        inputs = images(family.preprocessing(spec).input_size)
    return Pair(reference.eval(), candidate, inputs, truth)


def of_text(name: str, backbone: str, model: str, config: dict[str, Any], sizes: tuple[int, int, int]) -> Pair:
    """A text model with a small vocabulary, by its family's rows."""
    from porting.models.rows import key_map_of_rows

    family: Any = get_family(name)
    reference = transformers_model(model, config)
    length = 512 if name != "gpt2" else 128
    candidate = transformer_backbone(backbone, *sizes, vocabulary_size=1000, max_sequence_length=length)
    entries = key_map_of_rows(reference, candidate, family.rows).entries
    truth = {target: entry.sources for entry in entries for target in entry.targets}
    return Pair(reference.eval(), candidate, tokens(), truth)


def of_study(name: str, style: str) -> Pair:
    """A small model of the other studies, whose Keras side is written in a style of theirs."""
    from porting.models.rows import entries_of

    studied = MODELS[name](0, style)
    names = {id(variable): own for own, variable in named_variables(studied.candidate).items()}
    tensors = effective_tensors(studied.reference)
    truth: Truth = {}
    for module_name, layer in studied.layers.items():
        module = studied.reference.get_submodule(module_name)
        kind = kind_of_module(module)
        if kind is not None:
            held = {leaf: names[id(own)] for leaf, own in kind.variables(layer).items() if id(own) in names}
            for entry in entries_of(module_name, kind.leaves_for(module), tensors, held):
                truth |= dict.fromkeys(entry.targets, entry.sources)
    return Pair(studied.reference, studied.candidate, studied.inputs, truth)


PAIRS: dict[str, Callable[[], Pair]] = {
    **{
        f"own {name}, {style}": partial(of_study, name, style)
        for name in ("resnet", "transformer", "recurrent", "detector")
        for style in STYLES
    },
    "torchvision vgg16": lambda: of_family("vgg", "vgg16"),
    "torchvision densenet121": lambda: of_family("densenet", "densenet121"),
    "timm tf_efficientnet_b0": lambda: of_family("efficientnet", "tf_efficientnet_b0"),
    "timm tf_efficientnetv2_b0": lambda: of_family("efficientnetv2", "tf_efficientnetv2_b0"),
    "timm tf_mobilenetv3_large_100": lambda: of_family("mobilenetv3", "tf_mobilenetv3_large_100"),
    "timm resnet50": lambda: of_family("resnet", "resnet50", images(128)),
    "timm resnetv2_50": lambda: of_family("resnetv2", "resnetv2_50"),
    "timm convnext_tiny": lambda: of_family("convnext", "convnext_tiny"),
    "timm vit_tiny_patch16_224": lambda: of_family("vit", "vit_tiny_patch16_224"),
    "timm swin_tiny_patch4_window7_224": lambda: of_family("swin", "swin_tiny_patch4_window7_224"),
    "transformers deit-tiny-distilled": lambda: of_family("deit", "facebook/deit-tiny-distilled-patch16-224"),
    "transformers gpt2, 6 layers": lambda: of_text(
        "gpt2", "GPT2Backbone", "GPT2Model", {"n_layer": 6, "vocab_size": 1000, "n_positions": 128}, (6, 12, 768)
    ),
    "transformers distilbert": lambda: of_text(
        "distilbert", "DistilBertBackbone", "DistilBertModel", {"vocab_size": 1000}, (6, 12, 768)
    ),
    "transformers roberta, 6 layers": lambda: of_text(
        "roberta",
        "RobertaBackbone",
        "RobertaModel",
        {"vocab_size": 1000, "num_hidden_layers": 6, "max_position_embeddings": 514, "type_vocab_size": 1}
        | {"layer_norm_eps": 1e-5},
        (6, 12, 768),
    ),
    "transformers whisper-tiny.en": lambda: of_family("whisper", "openai/whisper-tiny.en"),
    "official van_b0": lambda: of_family("van", "b0"),
}


def with_random_names(pair: Pair) -> Pair:
    """The same pair, in which no name of the Keras model says anything."""
    rng = random.Random(0)
    old = {id(variable): name for name, variable in named_variables(pair.candidate).items()}
    for layer in [pair.candidate, *named_layers(pair.candidate).values()]:
        layer.name = "".join(rng.choices(string.ascii_lowercase, k=10))
    for variable in pair.candidate.weights:
        variable._name = "".join(rng.choices(string.ascii_lowercase, k=10))
    new = {old[id(variable)]: name for name, variable in named_variables(pair.candidate).items()}
    return Pair(pair.reference, pair.candidate, pair.inputs, {new[name]: at for name, at in pair.truth.items()})


def planted(pair: Pair) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Differences to plant in the PyTorch model, each with what takes it back."""
    modules = dict(pair.reference.named_modules())

    def replaced(name: str, other: nn.Module) -> Callable[[], Any]:
        pair.reference.set_submodule(name, other)
        return lambda: pair.reference.set_submodule(name, modules[name])

    def changed(owner: Any, attribute: str, value: Any) -> Callable[[], Any]:
        own = getattr(owner, attribute)
        setattr(owner, attribute, value)
        return lambda: setattr(owner, attribute, own)

    norms = [each for each in modules.values() if hasattr(each, "eps") and isinstance(each.eps, float)]
    convs = [each for each in modules.values() if isinstance(each, nn.Conv2d) and each.kernel_size[0] > 1]
    activations = [name for name, each in modules.items() if type(each).__module__.endswith("modules.activation")]
    blocks = [
        f"{name}.{index}"
        for name, each in modules.items()
        if isinstance(each, (nn.Sequential, nn.ModuleList)) and len(each) > 2
        for index in [len(each) - 2]
        if any(True for _ in each[index].parameters())
    ]
    if norms:
        yield "another epsilon", changed(norms[len(norms) // 3], "eps", 1e-2)
    if convs and all(each.padding_mode == "zeros" and any(each.padding) for each in convs[-1:]):
        conv = convs[-1]
        if isinstance(conv.padding, tuple):
            mirrored = copy.deepcopy(conv)
            # What the convolution reads besides the mode.
            mirrored.padding_mode = "reflect"
            mirrored._reversed_padding_repeated_twice = [
                each for side in reversed(conv.padding) for each in (side, side)
            ]
            name = next(name for name, each in modules.items() if each is conv)
            yield "reflecting padding", replaced(name, mirrored)
    if activations:
        yield "another activation", replaced(activations[len(activations) // 2], nn.Softsign())
    for name in blocks[-1:]:
        own = modules[name]
        wrapped = _Through() if not isinstance(own, nn.Conv2d) else nn.Identity()
        yield f"no {name}", replaced(name, wrapped)


class _Through(nn.Module):
    """A block that gives what it takes, as a tuple where blocks of transformers do."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


def score(pair: Pair, found: Mapping[str, tuple[str, ...]], sure: set[str]) -> Counter[str]:
    """How many Keras variables got the right tensors, and which wrong ones were called proven."""
    counted: Counter[str] = Counter()
    present = set(effective_tensors(pair.reference))
    for name, right in pair.truth.items():
        if not right or not present.issuperset(right):
            continue  # filled by a constant, or planted away
        counted["all"] += 1
        if name not in found:
            counted["open"] += 1
        elif set(found[name]) == set(right):
            counted["right"] += 1
            counted["right and proven"] += name in sure
        else:
            counted["wrong"] += 1
            counted["wrong and proven"] += name in sure
    return counted


def proposed(pair: Pair) -> tuple[Counter[str], Any, float]:
    begin = time.perf_counter()
    proposal = porting.propose_map(pair.reference, pair.candidate, pair.inputs, absorb_epsilon=True, check=False)
    seconds = time.perf_counter() - begin
    found = {target: entry.sources for entry in proposal.key_map.entries for target in entry.targets}
    rows = {(row.source, row.target) for row in proposal.rows if row.confidence == "proven"}
    sure: set[str] = set()
    for layer, row_entries in _entries_by_row(proposal).items():
        if layer in rows:
            sure |= {target for entry in row_entries for target in entry.targets}
    return score(pair, found, sure), proposal, seconds


def _entries_by_row(proposal: Any) -> dict[tuple[str, str], list[Any]]:
    """The entries of each row, by the module that their tensors lie in and the layer that their variables lie in."""
    found: dict[tuple[str, str], list[Any]] = {}
    rows = [(row.source, row.target) for row in proposal.rows]
    for entry in proposal.key_map.entries:
        for source, target in rows:
            inside = all(name == source or name.startswith(f"{source}.") for name in entry.sources)
            if inside and all(name == target or name.startswith(f"{target}/") for name in entry.targets):
                found.setdefault((source, target), []).append(entry)
    return found


def side_by_side(theirs: list[str], ours: list[str], sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]] | None:
    """Two lists of tensors put side by side and reshaped; None where that raises."""
    if len(theirs) != len(ours) or any(sizes[one] != sizes[other] for one, other in zip(theirs, ours, strict=True)):
        return None
    return {other: (one,) for one, other in zip(theirs, ours, strict=True)}


def rivals(pair: Pair) -> Iterator[tuple[str, Counter[str] | None]]:
    """What other ways to guess the map make of a pair; None where they give up."""
    tensors = {name: array for name, array in effective_tensors(pair.reference).items() if array.dtype.kind == "f"}
    variables = named_variables(pair.candidate)
    sizes = {name: array.size for name, array in tensors.items()}
    sizes |= {name: int(np.prod(variable.shape)) for name, variable in variables.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it matches
        matched = _by_weightbridge(tensors, variables)
    yield "weightbridge", _scored(pair, matched)
    theirs, ours = _executed(pair, tensors, variables)
    for name, lists in (
        ("by path", (sorted(tensors), sorted(variables))),
        ("by definition", (list(tensors), list(variables))),
        ("by execution", (theirs, ours)),
    ):
        yield name, _scored(pair, side_by_side(*lists, sizes))


def _scored(pair: Pair, found: Mapping[str, tuple[str, ...]] | None) -> Counter[str] | None:
    return None if found is None else score(pair, found, set(found))


def _by_weightbridge(tensors: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, tuple[str, ...]] | None:
    import weightbridge

    # The number in a tensor says afterwards where it went; weightbridge looks at names and shapes alone.
    numbered = {name: np.full(array.shape, index, np.float32) for index, (name, array) in enumerate(tensors.items())}
    given = {name: np.zeros(variable.shape, np.float32) for name, variable in variables.items()}
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(_WEIGHTBRIDGE_SECONDS)
    try:
        made = weightbridge.adapt(
            numbered, given, in_format="pytorch", out_format="tensorflow", in_separator=".", out_separator="/"
        )
    except Exception:  # whatever it raises where it is not sure
        return None
    finally:
        signal.alarm(0)
    names = list(tensors)
    return {name: (names[int(np.asarray(array).flat[0])],) for name, array in made.items()}


def _out_of_time(*_: Any) -> None:
    raise TimeoutError


class _Order:
    watches_inputs = False

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def before(self, name: str, inputs: list[Any]) -> None:
        self.names.setdefault(name.partition("#")[0])

    def after(self, name: str, outputs: list[Any]) -> None:
        return None


def _executed(pair: Pair, tensors: Mapping[str, Any], variables: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Both lists of tensors in the order in which what holds them runs."""
    given = make_inputs(pair.reference, pair.candidate, pair.inputs).batch(0, 1)
    theirs, ours = _Order(), _Order()
    with torch.no_grad(), observe_modules(pair.reference, theirs):
        given.call_reference(pair.reference, torch.float32)
    with observe_layers(pair.candidate, ours):
        pair.candidate(given.for_candidate(pair.candidate), training=False)
    held: dict[str, list[str]] = {}
    for name in tensors:
        held.setdefault(name.rpartition(".")[0], []).append(name)
    names = {id(variable): name for name, variable in variables.items()}
    owned = {
        layer: [names[id(each)] for each in own if id(each) in names]
        for layer, own in owned_variables(pair.candidate).items()
    }
    return (
        [name for module in ["", *theirs.names] for name in held.get(module, ())],
        [name for layer in ["", *ours.names] for name in owned.get(layer, ())],
    )


def row(label: str, names: str, counted: Counter[str] | None, seconds: float | None) -> str:
    if counted is None:
        cells = ["gives up", "", "", "", ""]
    else:
        cells = [
            f"{counted[each]} of {counted['all']}" if each == "right" else str(counted[each])
            for each in ("right", "right and proven", "wrong", "wrong and proven", "open")
        ]
    return f"| {label} | {names} | {' | '.join(cells)} | {'' if seconds is None else f'{seconds:.0f}'} |"


@click.command(help=__doc__)
@click.option("--pair", "wanted", multiple=True, help="Part of a pair's name.  [default: all]")
@click.option("--rivals/--no-rivals", "with_rivals", default=True, help="Try the other ways as well.")
@click.option("--planted", "with_planted", is_flag=True, help="Plant one difference at a time instead.")
@click.option("--sizes", is_flag=True, help="Map a DistilBERT of 2, 4, 8 and 16 layers instead.")
def main(wanted: tuple[str, ...], with_rivals: bool, with_planted: bool, sizes: bool) -> None:
    start_tensorflow()
    if sizes:
        for depth in (2, 4, 8, 16):
            shape = {"vocab_size": 1000, "n_layers": depth, "dim": 256, "n_heads": 4, "hidden_dim": 1024}
            pair = of_text("distilbert", "DistilBertBackbone", "DistilBertModel", shape, (depth, 4, 256))
            counted, _, seconds = proposed(with_random_names(pair))
            click.echo(
                f"{depth} layers, {counted['all']} variables, {counted['right and proven']} proven: {seconds:.1f} s"
            )
        return
    names = [name for name in PAIRS if not wanted or any(part in name for part in wanted)]
    click.echo("| pair | names | right | and proven | wrong | and called proven | open | s |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for name in names:
        torch.manual_seed(0)
        try:
            pair = PAIRS[name]()
        except FamilyError as error:
            click.echo(f"| {name} | not tried: {error.message} |")
            continue
        parameters = sum(int(np.prod(variable.shape)) for variable in pair.candidate.weights)
        label = f"{name} ({parameters / 1e6:.1f} M)"
        if with_planted:
            for what, take_back in planted(pair):
                counted, proposal, seconds = proposed(pair)
                said = proposal.differences[0] if proposal.differences else "nothing"
                click.echo(row(f"{label}, {what}; said: {said}", "own", counted, seconds))
                take_back()
            continue
        for kind in ("own", "random"):
            if kind == "random":
                pair = with_random_names(pair)
            counted, _, seconds = proposed(pair)
            click.echo(row(f"{label}", kind, counted, seconds))
            for rival, found in rivals(pair) if with_rivals else ():
                click.echo(row(f"{name}, {rival}", kind, found, None))


if __name__ == "__main__":
    main()
