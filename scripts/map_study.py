"""Proposes the key map between published models of two libraries, ports them by it, and prints a table.

    python scripts/map_study.py                       # every pair whose packages are installed
    python scripts/map_study.py --pair vit --pair gpt2

No row is given: `porting.propose_map` finds all of them. Nothing is downloaded; PyTorch's models have random weights,
on which the port is then checked as a user's would be. timm, torchvision and transformers are the source,
keras.applications and keras-hub the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import porting
from porting.errors import FamilyError
from porting.families.library import last_hidden_state, transformer_backbone, transformers_model
from porting.families.registry import get_family
from porting.models.frameworks import start_tensorflow


@dataclass(frozen=True)
class Pair:
    """Two models that should be one, the inputs of the Keras model, and what is known of how they differ."""

    build: Callable[[], tuple[nn.Module, Any]]
    inputs: Any
    absorb_epsilon: bool = False


def images(side: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)


def tokens() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 1000, (2, 16)).astype(np.int32)
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def of_family(name: str, variant: str) -> tuple[nn.Module, Any]:
    """Both models of a family, whose rows stay hidden."""
    family = get_family(name)
    spec = family.spec(variant)
    return family.build_reference(spec), family.build_candidate(spec)


def gpt2() -> tuple[nn.Module, Any]:
    config = {"n_layer": 6, "vocab_size": 1000, "n_positions": 128}
    backbone = transformer_backbone("GPT2Backbone", 6, 12, 768, vocabulary_size=1000, max_sequence_length=128)
    return transformers_model("GPT2Model", last_hidden_state, config), backbone


def distilbert() -> tuple[nn.Module, Any]:
    backbone = transformer_backbone("DistilBertBackbone", 6, 12, 768, vocabulary_size=1000, max_sequence_length=512)
    return transformers_model("DistilBertModel", last_hidden_state, {"vocab_size": 1000}), backbone


PAIRS: dict[str, Pair] = {
    "torchvision vgg16 -> keras.applications": Pair(partial(of_family, "vgg", "vgg16"), images(224)),
    "torchvision densenet121 -> keras.applications": Pair(
        partial(of_family, "densenet", "densenet121"), images(224), absorb_epsilon=True
    ),
    "timm tf_efficientnetv2_b0 -> keras.applications": Pair(
        partial(of_family, "efficientnetv2", "tf_efficientnetv2_b0"), images(224), absorb_epsilon=True
    ),
    "timm tf_mobilenetv3_large_100 -> keras.applications": Pair(
        partial(of_family, "mobilenetv3", "tf_mobilenetv3_large_100"), images(224), absorb_epsilon=True
    ),
    "timm convnext_tiny -> keras.applications": Pair(partial(of_family, "convnext", "convnext_tiny"), images(224)),
    "timm resnet50 -> keras-hub": Pair(partial(of_family, "resnet", "resnet50"), images(128), absorb_epsilon=True),
    "timm vit_tiny_patch16_224 -> keras-hub": Pair(partial(of_family, "vit", "vit_tiny_patch16_224"), images(224)),
    "transformers gpt2, 6 layers -> keras-hub": Pair(gpt2, tokens()),
    "transformers distilbert -> keras-hub": Pair(distilbert, tokens()),
}


def study(names: list[str]) -> Iterator[tuple[str, ...]]:
    """One row of the table for each pair, as soon as there is one."""
    for name in names:
        pair = PAIRS[name]
        try:
            torch.manual_seed(0)
            reference, candidate = pair.build()
        except FamilyError as error:
            yield name, "-", f"not tried: {error.message}", "-", "-", "-", "-"
            continue
        reference.eval()
        begin = time.perf_counter()
        proposal = porting.propose_map(reference, candidate, pair.inputs, absorb_epsilon=pair.absorb_epsilon)
        seconds = time.perf_counter() - begin
        count = {each: sum(row.confidence == each for row in proposal.rows) for each in ("proven", "likely", "open")}
        parameters = sum(int(np.prod(variable.shape)) for variable in candidate.weights)
        row = (name, f"{parameters / 1e6:.1f} M", f"{count['proven']}", f"{count['likely']}", f"{count['open']}")
        if not proposal.complete:
            yield (*row, f"{seconds:.0f}", "not complete")
            continue
        report = porting.port_weights(reference, candidate, proposal.key_map, inputs=pair.inputs).report
        assert report is not None  # inputs were given
        exact = report.worst_exact
        verdict = (
            f"{'at parity' if report.passed else 'NOT AT PARITY'}, outputs {exact.relative_error:.1e}" if exact else "-"
        )
        yield (*row, f"{seconds:.0f}", verdict)


@click.command(help=__doc__)
@click.option("--pair", "wanted", multiple=True, help="Part of a pair's name.  [default: all]")
def main(wanted: tuple[str, ...]) -> None:
    start_tensorflow()
    names = [name for name in PAIRS if not wanted or any(part in name for part in wanted)]
    click.echo(
        "| pair | parameters | rows proven | likely | open | seconds | ported by it |\n|---|---|---|---|---|---|---|"
    )
    for row in study(names):
        click.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
