"""Models that two libraries publish, mapped without a row and ported by what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import porting

keras_hub = pytest.importorskip("keras_hub")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

IMAGES = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)
TEXT = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}


class Text(nn.Module):
    """A model of transformers under keras-hub's names of inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Any, padding_mask: Any) -> Any:
        return self.model(input_ids=token_ids, attention_mask=padding_mask).last_hidden_state


def resnet() -> tuple[nn.Module, Any, Any]:
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[2, 2, 2, 2],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        use_pre_activation=False,
        image_shape=(None, None, 3),
    )
    model = keras_hub.models.ResNetImageClassifier(backbone=backbone, num_classes=10)
    return timm.create_model("resnet18", num_classes=10), model, np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)


def vit() -> tuple[nn.Module, Any, Any]:
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        layer_norm_epsilon=1e-6,
    )
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    return reference, keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=10), IMAGES


def gpt2() -> tuple[nn.Module, Any, Any]:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=64, max_sequence_length=16
    )
    return Text(transformers.GPT2Model(config)), backbone, TEXT


def distilbert() -> tuple[nn.Module, Any, Any]:
    sizes = {"n_layers": 2, "dim": 16, "n_heads": 2, "vocab_size": 50, "hidden_dim": 32, "max_position_embeddings": 16}
    config = transformers.DistilBertConfig(**sizes, attn_implementation="eager")
    backbone = keras_hub.models.DistilBertBackbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32, max_sequence_length=16
    )
    return Text(transformers.DistilBertModel(config)), backbone, TEXT


@pytest.mark.parametrize("build", [resnet, vit, gpt2, distilbert], ids=lambda build: build.__name__)
def test_a_published_pair_is_mapped_ported_and_proven(build: Callable[[], tuple[nn.Module, Any, Any]]) -> None:
    torch.manual_seed(0)
    reference, candidate, inputs = build()
    proposal = porting.propose_map(reference.eval(), candidate, inputs, absorb_epsilon=True)
    assert proposal.complete, str(proposal)
    assert {row.confidence for row in proposal.rows} == {"proven"}
    ported = porting.port_weights(reference, candidate, proposal.rules, inputs=inputs)
    assert ported.report is not None
    assert ported.report.passed, ported.report.objections
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(1.0)
    porting.revert_weights(candidate, reference, ported.key_map)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-9)
