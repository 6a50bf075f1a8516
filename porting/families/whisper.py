"""Whisper: the encoder and decoder of transformers, to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from porting.families.base import Spec
from porting.families.library import LibraryFamily, text_inputs, transformer_backbone, transformers_model
from porting.kinds.transforms import Array
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_TABLES = "decoder_token_and_position_embedding"


def _layers(side: str, target: str, attentions: dict[str, str]) -> list[KeyRule]:
    """The rows of one side's layers. `attentions` maps PyTorch's names of its attentions to Keras's."""
    source, rows = f"{side}.layers.{{s}}", []
    for theirs, ours in attentions.items():
        parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "attention_output"}
        rows += [KeyRule(f"{source}.{theirs}.{one}", f"{target}/{ours}/{two}", "dense") for one, two in parts.items()]
        norm = f"{ours.removesuffix('_layer')}_layer_norm"
        rows.append(KeyRule(f"{source}.{theirs}_layer_norm", f"{target}/{norm}", "layer_norm"))
    return [
        *rows,
        KeyRule(f"{source}.fc1", f"{target}/feedforward_intermediate_dense", "dense"),
        KeyRule(f"{source}.fc2", f"{target}/feedforward_output_dense", "dense"),
        KeyRule(f"{source}.final_layer_norm", f"{target}/feedforward_layer_norm", "layer_norm"),
        KeyRule(f"{side}.layer_norm", f"{side}_layer_norm", "layer_norm"),
    ]


class WhisperFamily(LibraryFamily):
    """Whisper (arXiv 2212.04356) without its head, which shares the token embedding."""

    name = "whisper"
    publisher = "transformers"
    # Per variant: the numbers of layers and heads, the width, and the size of the vocabulary.
    models = {
        f"openai/whisper-{size}{english}": (*shape, 51864 if english else 51865)
        for size, shape in {
            "tiny": (4, 6, 384),
            "base": (6, 8, 512),
            "small": (12, 12, 768),
            "medium": (24, 16, 1024),
        }.items()
        for english in ("", ".en")
    }
    rows = (
        KeyRule("encoder.conv{n}", "encoder_token_embedding_conv_layer_{n}", "conv"),
        KeyRule("encoder.embed_positions.weight", "encoder_position_embedding/embeddings", "parameter"),
        *_layers("encoder", "transformer_encoder_layer_{s}", {"self_attn": "self_attention_layer"}),
        KeyRule("decoder.embed_tokens", f"{_TABLES}/token_embedding", "embedding"),
        KeyRule("decoder.embed_positions.weight", f"{_TABLES}/position_embedding/embeddings", "parameter"),
        *_layers(
            "decoder",
            "transformer_decoder_layer_{s}",
            {"self_attn": "self_attention", "encoder_attn": "cross_attention"},
        ),
    )
    foreign = ("proj_out.",)

    def check_inputs(self, spec: Spec) -> dict[str, Array]:
        text = text_inputs(50000)
        sound = np.random.default_rng(1).normal(size=(2, 3000, 80)).astype(np.float32)
        return {
            "encoder_features": sound,
            "decoder_token_ids": text["token_ids"],
            "decoder_padding_mask": text["padding_mask"],
        }

    def build_reference(self, spec: Spec) -> nn.Module:
        layers, heads, width, vocabulary = self.models[spec.variant]
        config: dict[str, Any] = {"vocab_size": vocabulary, "d_model": width, "use_cache": False}
        for side in ("encoder", "decoder"):
            config |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
        return transformers_model("WhisperModel", _results, config, _with_frames_last)

    def make_candidate(self, spec: Spec) -> keras.Model:
        *sizes, vocabulary = self.models[spec.variant]
        return transformer_backbone("WhisperBackbone", *sizes, vocabulary_size=vocabulary)


def _with_frames_last(arguments: dict[str, Any]) -> dict[str, Any]:
    """Transpose the input for PyTorch: keras-hub has the frames before the frequency bands."""
    return {**arguments, "input_features": arguments["input_features"].transpose(1, 2)}


def _results(output: Any) -> dict[str, Any]:
    """The outputs under keras-hub's names."""
    return {
        "encoder_sequence_output": output.encoder_last_hidden_state,
        "decoder_sequence_output": output.last_hidden_state,
    }
