"""Models that two libraries publish, mapped without any given rows and ported by the map found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import porting
from porting.families.builders import transformer_backbone, transformers_model
from porting.families.registry import get_family

keras_hub = pytest.importorskip("keras_hub")
timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

IMAGES = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)
TEXT = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}


def resnet() -> tuple[nn.Module, Any, Any]:
    family = get_family("resnet")
    spec = family.spec("resnet18", 10)
    images = np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)
    return family.build_reference(spec), family.build_candidate(spec), images


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
    config = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    backbone = transformer_backbone("GPT2Backbone", 2, 2, 16, vocabulary_size=50, max_sequence_length=16)
    return transformers_model("GPT2Model", config), backbone, TEXT


def distilbert() -> tuple[nn.Module, Any, Any]:
    sizes = {"n_layers": 2, "dim": 16, "n_heads": 2, "vocab_size": 50, "hidden_dim": 64, "max_position_embeddings": 16}
    backbone = transformer_backbone("DistilBertBackbone", 2, 2, 16, vocabulary_size=50, max_sequence_length=16)
    return transformers_model("DistilBertModel", sizes), backbone, TEXT


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
