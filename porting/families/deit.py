"""DeiT, from transformers to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import (
    attention_rows,
    classifier,
    encoder_config,
    transformer_backbone,
    transformers_model,
)
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_SIZES = {"tiny": (3, 192), "small": (6, 384), "base": (12, 768)}
_EPSILON = 1e-12
_TOKENS = "deit_patching_and_embedding"
_ATTENTION = ("attention.query", "attention.key", "attention.value", "output.dense")
_LAYER, _BLOCK = "encoder.layer.{s}", "deit_encoder/transformer_block_{s+1}"


class DeiTFamily(LibraryFamily):
    """DeiT with a distillation token (arXiv 2012.12877). Its classifier uses the class token."""

    name = "deit"
    publisher = "transformers"
    # Per variant: the number of heads, and the width.
    models = {f"facebook/deit-{size}-distilled-patch16-224": shape for size, shape in _SIZES.items()}
    head = "classifier"
    # The published files have a second classifier, for the distillation token.
    foreign = ("distillation_classifier.", "cls_classifier.", "deit.pooler.", "pooler.")
    body = ("deit.", "backbone/")
    rows = (
        KeyRule("embeddings.cls_token", f"{_TOKENS}/class_token", "parameter"),
        KeyRule("embeddings.distillation_token", f"{_TOKENS}/distillation_token", "parameter"),
        KeyRule("embeddings.position_embeddings", f"{_TOKENS}/position_embedding", "parameter"),
        KeyRule("embeddings.patch_embeddings.projection", f"{_TOKENS}/patch_embedding", "conv"),
        KeyRule(f"{_LAYER}.layernorm_before", f"{_BLOCK}/ln_1", "layer_norm"),
        *attention_rows(f"{_LAYER}.attention", f"{_BLOCK}/mha", *_ATTENTION),
        KeyRule(f"{_LAYER}.layernorm_after", f"{_BLOCK}/ln_2", "layer_norm"),
        KeyRule(f"{_LAYER}.intermediate.dense", f"{_BLOCK}/mlp/dense", "dense"),
        KeyRule(f"{_LAYER}.output.dense", f"{_BLOCK}/output_layer/output", "dense"),
        KeyRule("layernorm", "deit_encoder/ln", "layer_norm"),
        KeyRule("classifier", "predictions", "dense"),
    )
    names_in_5 = (
        ("encoder.layer.", "layers."),
        *((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    )

    def build_reference(self, spec: Spec) -> nn.Module:
        config = encoder_config(12, *self.models[spec.variant], layer_norm_eps=_EPSILON)
        if not spec.num_classes:
            return transformers_model("DeiTModel", config, add_pooling_layer=False)
        config["num_labels"] = spec.num_classes
        return transformers_model("DeiTForImageClassification", config, "logits")

    def make_candidate(self, spec: Spec) -> keras.Model:
        options = {"image_shape": (224, 224, 3), "patch_size": 16, "layer_norm_epsilon": _EPSILON}
        backbone = transformer_backbone("DeiTBackbone", 12, *self.models[spec.variant], name="backbone", **options)
        return classifier("DeiTImageClassifier", backbone, spec, pooled=False)
