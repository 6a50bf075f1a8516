"""DeiT, from transformers to keras-hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.library import (
    LibraryFamily,
    classifier,
    last_hidden_state,
    renamed,
    transformer_backbone,
    transformers_model,
)
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_EPSILON = 1e-12
# Parts of the names in transformers 4, and in transformers 5.
_NAMES = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


class DeiTFamily(LibraryFamily):
    """DeiT with a distillation token (arXiv 2012.12877). Its classifier uses the class token."""

    name = "deit"
    publisher = "transformers"
    # Per variant: the number of heads, and the width.
    models = {
        f"facebook/deit-{size}-distilled-patch16-224": shape
        for size, shape in {"tiny": (3, 192), "small": (6, 384), "base": (12, 768)}.items()
    }
    head = "classifier"
    # The published files have a second classifier, for the distillation token.
    foreign = ("distillation_classifier.", "cls_classifier.", "deit.pooler.", "pooler.")

    @cached_property
    def other_names(self) -> Mapping[str, Sequence[tuple[str, str]]]:  # type: ignore[override]
        if self._is_new:
            return {"transformers 4": [(new, old) for old, new in reversed(_NAMES)]}
        return {"transformers 5": _NAMES}

    @cached_property
    def _is_new(self) -> bool:
        # Without an import: the names of the layouts are listed where the package is not installed, too.
        try:
            return int(version("transformers").partition(".")[0]) >= 5
        except PackageNotFoundError:
            return False

    def rows_of(self, spec: Spec) -> list[KeyRule]:
        names = _NAMES if self._is_new else ()
        return [replace(row, source=renamed(row.source, names)) for row in self._old_rows(spec)]

    def _old_rows(self, spec: Spec) -> tuple[KeyRule, ...]:
        own, inside = ("deit.", "backbone/") if spec.num_classes else ("", "")
        tokens, layer = f"{inside}deit_patching_and_embedding", f"{own}encoder.layer.{{s}}"
        block = f"{inside}deit_encoder/transformer_block_{{s+1}}"
        return (
            KeyRule(f"{own}embeddings.cls_token", f"{tokens}/class_token", "parameter"),
            KeyRule(f"{own}embeddings.distillation_token", f"{tokens}/distillation_token", "parameter"),
            KeyRule(f"{own}embeddings.position_embeddings", f"{tokens}/position_embedding", "parameter"),
            KeyRule(f"{own}embeddings.patch_embeddings.projection", f"{tokens}/patch_embedding", "conv"),
            KeyRule(f"{layer}.layernorm_before", f"{block}/ln_1", "layer_norm"),
            KeyRule(f"{layer}.attention.attention.query", f"{block}/mha/query", "dense"),
            KeyRule(f"{layer}.attention.attention.key", f"{block}/mha/key", "dense"),
            KeyRule(f"{layer}.attention.attention.value", f"{block}/mha/value", "dense"),
            KeyRule(f"{layer}.attention.output.dense", f"{block}/mha/attention_output", "dense"),
            KeyRule(f"{layer}.layernorm_after", f"{block}/ln_2", "layer_norm"),
            KeyRule(f"{layer}.intermediate.dense", f"{block}/mlp/dense", "dense"),
            KeyRule(f"{layer}.output.dense", f"{block}/output_layer/output", "dense"),
            KeyRule(f"{own}layernorm", f"{inside}deit_encoder/ln", "layer_norm"),
            KeyRule("classifier", "predictions", "dense"),
        )

    def build_reference(self, spec: Spec) -> nn.Module:
        heads, width = self.models[spec.variant]
        config = {
            "hidden_size": width,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "layer_norm_eps": _EPSILON,
        }
        if spec.num_classes:
            config["num_labels"] = spec.num_classes
            return transformers_model("DeiTForImageClassification", lambda output: output.logits, config)
        return transformers_model("DeiTModel", last_hidden_state, config, add_pooling_layer=False)

    def make_candidate(self, spec: Spec) -> keras.Model:
        heads, width = self.models[spec.variant]
        backbone = transformer_backbone(
            "DeiTBackbone",
            12,
            heads,
            width,
            image_shape=(224, 224, 3),
            patch_size=16,
            layer_norm_epsilon=_EPSILON,
            name="backbone",
        )
        return classifier("DeiTImageClassifier", backbone, spec, pooled=False)
