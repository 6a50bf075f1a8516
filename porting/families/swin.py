"""Swin Transformer, from timm to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import classifier, library
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule
from porting.models.images import IMAGENET, Preprocessing

if TYPE_CHECKING:
    import keras

# Per size: the width of the first stage, the depths, and the numbers of heads.
_SIZES = {
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
_SOURCE, _TARGET, _TABLE = "layers.{s}.blocks.{j}", "stage_{s}/blocks_{j}", "relative_position_bias_table"


class SwinFamily(LibraryFamily):
    """Swin with patches of 4 pixels, windows of 7 patches, and images of 224 pixels (arXiv 2103.14030)."""

    name = "swin"
    models = {f"swin_{size}_patch4_window7_224": shape for size, shape in _SIZES.items()}
    head = "head.fc"
    inputs = Preprocessing(224, 248, **IMAGENET)
    body = ("", "backbone/")
    rows = (
        KeyRule("patch_embed.proj", "patch_embedding/conv_projection", "conv"),
        KeyRule("patch_embed.norm", "patch_embedding/norm", "layer_norm"),
        KeyRule(f"{_SOURCE}.norm{{n}}", f"{_TARGET}/norm{{n}}", "layer_norm"),
        KeyRule(f"{_SOURCE}.attn.{_TABLE}", f"{_TARGET}/attn/{_TABLE}", "parameter"),
        KeyRule(f"{_SOURCE}.attn.qkv", f"{_TARGET}/attn/attention_qkv", "dense"),
        KeyRule(f"{_SOURCE}.attn.proj", f"{_TARGET}/attn/attention_projection", "dense"),
        KeyRule(f"{_SOURCE}.mlp.fc{{n}}", f"{_TARGET}/mlp/fc{{n}}", "dense"),
        # timm assigns the downsampling to the stage that follows it.
        KeyRule("layers.{s}.downsample.reduction", "stage_{s-1}/downsample/reduction", "dense"),
        KeyRule("layers.{s}.downsample.norm", "stage_{s-1}/downsample/norm", "layer_norm"),
        KeyRule("norm", "norm", "layer_norm"),
        KeyRule("head.fc", "predictions", "dense"),
    )

    def make_candidate(self, spec: Spec) -> keras.Model:
        width, depths, heads = self.models[spec.variant]
        backbone = library("keras_hub.models").SwinTransformerBackbone(
            image_shape=(224, 224, 3), embed_dim=width, depths=depths, num_heads=heads, window_size=7, name="backbone"
        )
        return classifier("SwinTransformerImageClassifier", backbone, spec)
