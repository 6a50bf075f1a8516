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
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import porting
from porting.models.frameworks import start_tensorflow


@dataclass(frozen=True)
class Pair:
    """Two models that should be one, the inputs of the Keras model, and what is known of how they differ."""

    build: Callable[[], tuple[nn.Module, Any]]
    inputs: Any
    absorb_epsilon: bool = False
    options: dict[str, Any] = field(default_factory=dict)


class Text(nn.Module):
    """A model of transformers, with the inputs under keras-hub's names and one tensor as the result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Any, padding_mask: Any) -> Any:
        return self.model(input_ids=token_ids, attention_mask=padding_mask).last_hidden_state


def images(side: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)


def tokens() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 1000, (2, 16)).astype(np.int32)
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def applications(name: str, **options: Any) -> Any:
    import keras

    return getattr(keras.applications, name)(weights=None, classifier_activation=None, **options)


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)  # type: ignore[no-any-return]


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)()  # type: ignore[no-any-return]


def resnet50() -> tuple[nn.Module, Any]:
    import keras_hub

    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="bottleneck_block",
        use_pre_activation=False,
        image_shape=(None, None, 3),
    )
    return timm_model("resnet50"), keras_hub.models.ResNetImageClassifier(backbone=backbone, num_classes=1000)


def vit() -> tuple[nn.Module, Any]:
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        layer_norm_epsilon=1e-6,
    )
    return timm_model("vit_tiny_patch16_224"), keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=1000)


def gpt2() -> tuple[nn.Module, Any]:
    import keras_hub
    import transformers

    config = transformers.GPT2Config(n_layer=6, vocab_size=1000, n_positions=128)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=1000,
        num_layers=6,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=128,
    )
    return Text(transformers.GPT2Model(config)), backbone


def distilbert() -> tuple[nn.Module, Any]:
    import keras_hub
    import transformers

    config = transformers.DistilBertConfig(vocab_size=1000, attn_implementation="eager")
    backbone = keras_hub.models.DistilBertBackbone(
        vocabulary_size=1000,
        num_layers=6,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=512,
    )
    return Text(transformers.DistilBertModel(config)), backbone


def bare(name: str) -> Any:
    return applications(name, include_preprocessing=False)


PAIRS: dict[str, Pair] = {
    "torchvision vgg16 -> keras.applications": Pair(
        lambda: (torchvision_model("vgg16"), applications("VGG16")), images(224)
    ),
    "torchvision densenet121 -> keras.applications": Pair(
        lambda: (torchvision_model("densenet121"), applications("DenseNet121")), images(224), absorb_epsilon=True
    ),
    "timm tf_efficientnetv2_b0 -> keras.applications": Pair(
        lambda: (timm_model("tf_efficientnetv2_b0"), bare("EfficientNetV2B0")), images(224), absorb_epsilon=True
    ),
    "timm tf_mobilenetv3_large_100 -> keras.applications": Pair(
        lambda: (timm_model("tf_mobilenetv3_large_100"), bare("MobileNetV3Large")), images(224), absorb_epsilon=True
    ),
    "timm convnext_tiny -> keras.applications": Pair(
        lambda: (timm_model("convnext_tiny"), bare("ConvNeXtTiny")), images(224)
    ),
    "timm resnet50 -> keras-hub": Pair(resnet50, images(128), absorb_epsilon=True),
    "timm vit_tiny_patch16_224 -> keras-hub": Pair(vit, images(224)),
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
        except ImportError as error:
            yield name, "-", f"not tried: {error.name} is not installed", "-", "-", "-", "-"
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
