"""RoBERTa: the encoder of transformers, to keras-hub, which has no positions for padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import (
    encoder_config,
    text_inputs,
    transformer_backbone,
    transformer_rows,
    transformers_model,
)
from porting.families.library import LibraryFamily
from porting.kinds.transforms import Array
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_ATTENTION = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
_NAMES = (*(f"attention.{name}" for name in _ATTENTION), "intermediate.dense", "output.dense", "output.LayerNorm")


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
        *transformer_rows("encoder.layer.{s}", "transformer_layer_{s}", *_NAMES),
    )
    # This is added to every token, and keras-hub lacks it. The published weights are zeros.
    zeros = ("embeddings.token_type_embeddings.weight",)
    foreign = ("lm_head.", "classifier.", "qa_outputs.", "pooler.")

    def check_inputs(self, spec: Spec) -> dict[str, Array]:
        return text_inputs(self.models[spec.variant][0])

    def build_reference(self, spec: Spec) -> nn.Module:
        vocabulary, *sizes = self.models[spec.variant]
        lengths = {"max_position_embeddings": 514, "type_vocab_size": 1}
        config = encoder_config(*sizes, vocab_size=vocabulary, layer_norm_eps=1e-5, **lengths)
        return transformers_model("RobertaModel", config, add_pooling_layer=False)

    def make_candidate(self, spec: Spec) -> keras.Model:
        vocabulary, *sizes = self.models[spec.variant]
        return transformer_backbone("RobertaBackbone", *sizes, vocabulary_size=vocabulary, max_sequence_length=512)
