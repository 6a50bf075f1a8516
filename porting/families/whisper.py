"""Whisper: the encoder and decoder of transformers, to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from porting.families.base import Spec
from porting.families.builders import (
    attention_rows,
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

_SIZES = {"tiny": (4, 6, 384), "base": (6, 8, 512), "small": (12, 12, 768), "medium": (24, 16, 1024)}
_TABLES = "decoder_token_and_position_embedding"
_ENCODER, _DECODER = "transformer_encoder_layer_{s}", "transformer_decoder_layer_{s}"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_NAMES = (*(f"self_attn.{name}" for name in _PROJECTIONS), "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")


class WhisperFamily(LibraryFamily):
    """Whisper (arXiv 2212.04356) without its head, which shares the token embedding."""

    name = "whisper"
    publisher = "transformers"
    # Per variant: the numbers of layers and heads, the width, and the size of the vocabulary.
    models = {
        f"openai/whisper-{size}{english}": (*shape, 51864 if english else 51865)
        for size, shape in _SIZES.items()
        for english in ("", ".en")
    }
    rows = (
        KeyRule("encoder.conv{n}", "encoder_token_embedding_conv_layer_{n}", "conv"),
        KeyRule("encoder.embed_positions.weight", "encoder_position_embedding/embeddings", "parameter"),
        *transformer_rows("encoder.layers.{s}", _ENCODER, *_NAMES),
        KeyRule("encoder.layer_norm", "encoder_layer_norm", "layer_norm"),
        KeyRule("decoder.embed_tokens", f"{_TABLES}/token_embedding", "embedding"),
        KeyRule("decoder.embed_positions.weight", f"{_TABLES}/position_embedding/embeddings", "parameter"),
        *transformer_rows("decoder.layers.{s}", _DECODER, *_NAMES, attention="self_attention"),
        *attention_rows("decoder.layers.{s}.encoder_attn", f"{_DECODER}/cross_attention", *_PROJECTIONS),
        KeyRule("decoder.layers.{s}.encoder_attn_layer_norm", f"{_DECODER}/cross_attention_layer_norm", "layer_norm"),
        KeyRule("decoder.layer_norm", "decoder_layer_norm", "layer_norm"),
    )
    foreign = ("proj_out.",)

    def check_inputs(self, spec: Spec) -> dict[str, Array]:
        sound = np.random.default_rng(1).normal(size=(2, 3000, 80)).astype(np.float32)
        return {"encoder_features": sound, **{f"decoder_{name}": array for name, array in text_inputs(50000).items()}}

    def build_reference(self, spec: Spec) -> nn.Module:
        layers, heads, width, vocabulary = self.models[spec.variant]
        config: dict[str, Any] = {"vocab_size": vocabulary, "d_model": width, "use_cache": False}
        for side in ("encoder", "decoder"):
            config |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
        # keras-hub has the frames before the frequency bands.
        return transformers_model(
            "WhisperModel",
            config,
            {"encoder_sequence_output": "encoder_last_hidden_state", "decoder_sequence_output": "last_hidden_state"},
            prepare=lambda given: {**given, "input_features": given["input_features"].mT},
        )

    def make_candidate(self, spec: Spec) -> keras.Model:
        *sizes, vocabulary = self.models[spec.variant]
        return transformer_backbone("WhisperBackbone", *sizes, vocabulary_size=vocabulary)
