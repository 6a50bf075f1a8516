"""GPT-2, from transformers to keras-hub. Its dense kernels are `(in, out)` in PyTorch, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import text_inputs, transformer_backbone, transformers_model
from porting.families.library import LibraryFamily
from porting.kinds.transforms import Array
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_VOCABULARY = 50257
_TARGET = "transformer_layer_{s}"


class GPT2Family(LibraryFamily):
    """GPT-2 without its head, which shares the token embedding."""

    name = "gpt2"
    publisher = "transformers"
    # Per variant: the numbers of layers and heads, and the width.
    models = {
        "gpt2": (12, 12, 768),
        "distilgpt2": (6, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }
    rows = (
        KeyRule("wte", "token_embedding", "embedding"),
        KeyRule("wpe.weight", "position_embedding/embeddings", "parameter"),
        KeyRule("h.{s}.ln_1", f"{_TARGET}/self_attention_layer_norm", "layer_norm"),
        KeyRule("h.{s}.attn.c_attn", f"{_TARGET}/self_attention", "qkv:in_first"),
        KeyRule("h.{s}.attn.c_proj", f"{_TARGET}/self_attention/attention_output", "dense_in_first"),
        KeyRule("h.{s}.ln_2", f"{_TARGET}/feedforward_layer_norm", "layer_norm"),
        KeyRule("h.{s}.mlp.c_fc", f"{_TARGET}/feedforward_intermediate_dense", "dense_in_first"),
        KeyRule("h.{s}.mlp.c_proj", f"{_TARGET}/feedforward_output_dense", "dense_in_first"),
        KeyRule("ln_f", "layer_norm", "layer_norm"),
    )
    foreign = ("lm_head.",)
    tied_head = "wte.weight"
    # Masks that older versions of transformers saved.
    drops = ("h.*.attn.bias", "h.*.attn.masked_bias")

    def check_inputs(self, spec: Spec) -> dict[str, Array]:
        return text_inputs(_VOCABULARY)

    def build_reference(self, spec: Spec) -> nn.Module:
        layers, heads, width = self.models[spec.variant]
        config = {"n_layer": layers, "n_head": heads, "n_embd": width, "use_cache": False}
        return transformers_model("GPT2Model", config)

    def make_candidate(self, spec: Spec) -> keras.Model:
        return transformer_backbone(
            "GPT2Backbone", *self.models[spec.variant], vocabulary_size=_VOCABULARY, max_sequence_length=1024
        )
