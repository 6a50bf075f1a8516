"""RoBERTa: the encoder of transformers, to keras-hub, which has no positions for padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.library import (
    LibraryFamily,
    last_hidden_state,
    text_inputs,
    transformer_backbone,
    transformers_model,
)
from porting.kinds.transforms import Array
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_LAYER, _TARGET = "encoder.layer.{s}", "transformer_layer_{s}"
_ATTENTION = f"{_TARGET}/self_attention_layer"


class RobertaFamily(LibraryFamily):
    """The encoders of RoBERTa (arXiv 1907.11692) and XLM-RoBERTa (arXiv 1911.02116)."""

    name = "roberta"
    publisher = "transformers"
    # Per variant: the size of the vocabulary, the numbers of layers and heads, and the width.
    models = {
        "roberta-base": (50265, 12, 12, 768),
        "roberta-large": (50265, 24, 16, 1024),
        "xlm-roberta-base": (250002, 12, 12, 768),
        "xlm-roberta-large": (250002, 24, 16, 1024),
    }
    rows = (
        KeyRule("embeddings.word_embeddings", "embeddings/token_embedding", "embedding"),
        KeyRule("embeddings.position_embeddings.weight", "embeddings/position_embedding/embeddings", "parameter:+2"),
        KeyRule("embeddings.LayerNorm", "embeddings_layer_norm", "layer_norm"),
        KeyRule(f"{_LAYER}.attention.self.query", f"{_ATTENTION}/query", "dense"),
        KeyRule(f"{_LAYER}.attention.self.key", f"{_ATTENTION}/key", "dense"),
        KeyRule(f"{_LAYER}.attention.self.value", f"{_ATTENTION}/value", "dense"),
        KeyRule(f"{_LAYER}.attention.output.dense", f"{_ATTENTION}/attention_output", "dense"),
        KeyRule(f"{_LAYER}.attention.output.LayerNorm", f"{_TARGET}/self_attention_layer_norm", "layer_norm"),
        KeyRule(f"{_LAYER}.intermediate.dense", f"{_TARGET}/feedforward_intermediate_dense", "dense"),
        KeyRule(f"{_LAYER}.output.dense", f"{_TARGET}/feedforward_output_dense", "dense"),
        KeyRule(f"{_LAYER}.output.LayerNorm", f"{_TARGET}/feedforward_layer_norm", "layer_norm"),
    )
    # This is added to every token, and keras-hub lacks it. The published weights are zeros.
    zeros = ("embeddings.token_type_embeddings.weight",)
    foreign = ("lm_head.", "classifier.", "qa_outputs.", "pooler.")

    def check_inputs(self, spec: Spec) -> dict[str, Array]:
        return text_inputs(self.models[spec.variant][0])

    def build_reference(self, spec: Spec) -> nn.Module:
        vocabulary, layers, heads, width = self.models[spec.variant]
        config = {
            "vocab_size": vocabulary,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        }
        return transformers_model("RobertaModel", last_hidden_state, config, add_pooling_layer=False)

    def make_candidate(self, spec: Spec) -> keras.Model:
        vocabulary, *sizes = self.models[spec.variant]
        return transformer_backbone("RobertaBackbone", *sizes, vocabulary_size=vocabulary, max_sequence_length=512)
