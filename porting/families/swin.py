"""Swin Transformer, from timm to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.library import LibraryFamily, classifier, library, timm_model
from porting.mapping.rules import KeyRule
from porting.models.images import IMAGENET, Preprocessing

if TYPE_CHECKING:
    import keras
    from torch import nn

# Per size: the width of the first stage, the depths, and the numbers of heads.
_SIZES = {
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}


class SwinFamily(LibraryFamily):
    """Swin with patches of 4 pixels, windows of 7 patches, and images of 224 pixels (arXiv 2103.14030)."""

    name = "swin"
    models = {f"swin_{size}_patch4_window7_224": shape for size, shape in _SIZES.items()}
    head = "head.fc"
    inputs = Preprocessing(224, 248, **IMAGENET)

    def rows_of(self, spec: Spec) -> tuple[KeyRule, ...]:
        own = "backbone/" if spec.num_classes else ""
        source, target = "layers.{s}.blocks.{j}", f"{own}stage_{{s}}/blocks_{{j}}"
        table = "attn.relative_position_bias_table"
        return (
            KeyRule("patch_embed.proj", f"{own}patch_embedding/conv_projection", "conv"),
            KeyRule("patch_embed.norm", f"{own}patch_embedding/norm", "layer_norm"),
            KeyRule(f"{source}.norm{{n}}", f"{target}/norm{{n}}", "layer_norm"),
            KeyRule(f"{source}.{table}", f"{target}/{table.replace('.', '/')}", "parameter"),
            KeyRule(f"{source}.attn.qkv", f"{target}/attn/attention_qkv", "dense"),
            KeyRule(f"{source}.attn.proj", f"{target}/attn/attention_projection", "dense"),
            KeyRule(f"{source}.mlp.fc{{n}}", f"{target}/mlp/fc{{n}}", "dense"),
            # timm assigns the downsampling to the stage that follows it.
            KeyRule("layers.{s}.downsample.reduction", f"{own}stage_{{s-1}}/downsample/reduction", "dense"),
            KeyRule("layers.{s}.downsample.norm", f"{own}stage_{{s-1}}/downsample/norm", "layer_norm"),
            KeyRule("norm", f"{own}norm", "layer_norm"),
            KeyRule("head.fc", "predictions", "dense"),
        )

    def build_reference(self, spec: Spec) -> nn.Module:
        return timm_model(spec)

    def make_candidate(self, spec: Spec) -> keras.Model:
        width, depths, heads = self.models[spec.variant]
        backbone = library("keras_hub.models").SwinTransformerBackbone(
            image_shape=(224, 224, 3), embed_dim=width, depths=depths, num_heads=heads, window_size=7, name="backbone"
        )
        return classifier("SwinTransformerImageClassifier", backbone, spec)
