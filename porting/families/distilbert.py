"""DistilBERT: the encoder of transformers, to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import text_inputs, transformer_backbone, transformer_rows, transformers_model
from porting.families.library import LibraryFamily
from porting.kinds.transforms import Array
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_TABLES = "token_and_position_embedding"
_ATTENTION = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm")
_NAMES = (*_ATTENTION, "ffn.lin1", "ffn.lin2", "output_layer_norm")


class DistilBertFamily(LibraryFamily):
    """The encoder of DistilBERT (arXiv 1910.01108). `models` holds the size of each vocabulary."""

    name = "distilbert"
    publisher = "transformers"
    models = {
        "distilbert-base-uncased": 30522,
        "distilbert-base-cased": 28996,
        "distilbert-base-multilingual-cased": 119547,
    }
    rows = (
        KeyRule("embeddings.word_embeddings", f"{_TABLES}/token_embedding", "embedding"),
        KeyRule("embeddings.position_embeddings.weight", f"{_TABLES}/position_embedding/embeddings", "parameter"),
        KeyRule("embeddings.LayerNorm", "embeddings_layer_norm", "layer_norm"),
        *transformer_rows("transformer.layer.{s}", "transformer_layer_{s}", *_NAMES),
    )
    # Heads of language models and classifiers, which the encoder lacks.
    foreign = ("vocab_", "pre_classifier.", "classifier.", "qa_outputs.")

    def check_inputs(self, spec: Spec) -> dict[str, Array]:
        return text_inputs(self.models[spec.variant])

    def build_reference(self, spec: Spec) -> nn.Module:
        return transformers_model("DistilBertModel", {"vocab_size": self.models[spec.variant]})

    def make_candidate(self, spec: Spec) -> keras.Model:
        return transformer_backbone(
            "DistilBertBackbone", 6, 12, 768, vocabulary_size=self.models[spec.variant], max_sequence_length=512
        )
