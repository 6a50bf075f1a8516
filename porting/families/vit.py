"""Vision Transformer, from timm to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import classifier, library, timm_model
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing

if TYPE_CHECKING:
    import keras
    from torch import nn

# Per size: the number of heads, the width, and the depth.
_SIZES = {"tiny": (3, 192, 12), "small": (6, 384, 12), "base": (12, 768, 12), "large": (16, 1024, 24)}
_PATCHES, _BLOCK = "vit_patching_and_embedding", "vit_encoder/transformer_block_{s+1}"


class ViTFamily(LibraryFamily):
    """ViT with patches of 16 pixels, for images of 224 and 384 pixels (arXiv 2010.11929)."""

    name = "vit"
    models = {f"vit_{size}_patch16_{side}": (*_SIZES[size], side) for side in (224, 384) for size in _SIZES}
    head = "head"
    inputs = Preprocessing(224, 248)
    body = ("", "backbone/")
    rows = (
        KeyRule("cls_token", f"{_PATCHES}/class_token", "parameter"),
        KeyRule("patch_embed.proj", f"{_PATCHES}/patch_embedding", "conv"),
        KeyRule("pos_embed", f"{_PATCHES}/position_embedding/embeddings", "parameter"),
        KeyRule("blocks.{s}.norm{n}", f"{_BLOCK}/ln_{{n}}", "layer_norm"),
        KeyRule("blocks.{s}.attn.qkv", f"{_BLOCK}/mha", "qkv"),
        KeyRule("blocks.{s}.attn.proj", f"{_BLOCK}/mha/attention_output", "dense"),
        KeyRule("blocks.{s}.mlp.fc{n}", f"{_BLOCK}/mlp/dense_{{n}}", "dense"),
        KeyRule("norm", "vit_encoder/ln", "layer_norm"),
        KeyRule("head", "predictions", "dense"),
    )

    def preprocessing(self, spec: Spec) -> Preprocessing:
        side = self.models[spec.variant][-1]
        return Preprocessing(side, side * 10 // 9)

    def build_reference(self, spec: Spec) -> nn.Module:
        # Without a head, return all tokens, as keras-hub's backbone does.
        return timm_model(spec) if spec.num_classes else timm_model(spec, global_pool="")

    def make_candidate(self, spec: Spec) -> keras.Model:
        heads, width, depth, side = self.models[spec.variant]
        backbone = library("keras_hub.models").ViTBackbone(
            image_shape=(side, side, 3),
            patch_size=16,
            num_layers=depth,
            num_heads=heads,
            hidden_dim=width,
            mlp_dim=4 * width,
            layer_norm_epsilon=1e-6,
            name="backbone",
        )
        return classifier("ViTImageClassifier", backbone, spec, pooled=False)
