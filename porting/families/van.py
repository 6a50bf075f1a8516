"""Visual Attention Network: its key map, its two models and its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from porting.family import Family
from porting.images import Preprocessing
from porting.key_map import KeyMap, KeyRule, Kind
from porting.layout import Array

if TYPE_CHECKING:
    import keras
    from torch import nn

    from porting.references.van import VanShape

# s is the stage, from 1; j is the block in it, from 0.
_BLOCK = "block{s}.{j}"
RULES = (
    KeyRule("patch_embed{s}.proj", "patch_embed{s}/proj", Kind.CONV),
    KeyRule("patch_embed{s}.norm", "patch_embed{s}/norm", Kind.BATCH_NORM),
    KeyRule("norm{s}", "norm{s}", Kind.LAYER_NORM),
    KeyRule(f"{_BLOCK}.norm1", f"{_BLOCK}/norm1", Kind.BATCH_NORM),
    KeyRule(f"{_BLOCK}.attn.proj_1", f"{_BLOCK}/attn/proj_1", Kind.CONV),
    KeyRule(f"{_BLOCK}.attn.spatial_gating_unit.conv0", f"{_BLOCK}/attn/spatial_gating_unit/conv0", Kind.DEPTHWISE),
    KeyRule(
        f"{_BLOCK}.attn.spatial_gating_unit.conv_spatial",
        f"{_BLOCK}/attn/spatial_gating_unit/conv_spatial",
        Kind.DEPTHWISE,
    ),
    KeyRule(f"{_BLOCK}.attn.spatial_gating_unit.conv1", f"{_BLOCK}/attn/spatial_gating_unit/conv1", Kind.CONV),
    KeyRule(f"{_BLOCK}.attn.proj_2", f"{_BLOCK}/attn/proj_2", Kind.CONV),
    KeyRule(f"{_BLOCK}.layer_scale_1", f"{_BLOCK}/layer_scale_1", Kind.PARAMETER),
    KeyRule(f"{_BLOCK}.norm2", f"{_BLOCK}/norm2", Kind.BATCH_NORM),
    KeyRule(f"{_BLOCK}.mlp.fc1", f"{_BLOCK}/mlp/fc1", Kind.CONV),
    KeyRule(f"{_BLOCK}.mlp.dwconv.dwconv", f"{_BLOCK}/mlp/dwconv/dwconv", Kind.DEPTHWISE),
    KeyRule(f"{_BLOCK}.mlp.fc2", f"{_BLOCK}/mlp/fc2", Kind.CONV),
    KeyRule(f"{_BLOCK}.layer_scale_2", f"{_BLOCK}/layer_scale_2", Kind.PARAMETER),
    KeyRule("head", "head", Kind.DENSE),
)


class VanFamily(Family):
    """VAN B0 to B6 (arXiv 2202.09741) and this project's nano, under the official code's names."""

    name = "van"

    def key_map(self, variant: str) -> KeyMap:
        depths = _shape(variant).depths
        stages = [{"s": stage} for stage in range(1, len(depths) + 1)]
        blocks = [{"s": stage, "j": j} for stage, depth in enumerate(depths, start=1) for j in range(depth)]
        return KeyMap.expand(RULES, [{}, *stages, *blocks])

    def build_reference(self, variant: str, num_classes: int) -> nn.Module:
        from porting.references.van import build_van

        return build_van(variant, num_classes)

    def build_candidate(self, variant: str, num_classes: int) -> keras.Model:
        import van_tf

        return van_tf.van(van_tf.VARIANTS[variant], classes=num_classes)

    def num_classes(self, variant: str, state_dict: Mapping[str, Array]) -> int:
        head = state_dict.get("head.weight")
        if head is not None and head.ndim == 2 and head.shape[0]:
            return int(head.shape[0])
        return 10 if variant == "nano" else 1000

    def preprocessing(self, variant: str) -> Preprocessing:
        if variant == "nano":
            return Preprocessing(input_size=64, resize_size=64)
        # The official evaluation: crop fraction 0.9 of 248, mean and std 0.5, for all weights trained on 1K.
        return Preprocessing(input_size=224, resize_size=248)

    def shrinkable(self, parameter: str) -> bool:
        from_patches = parameter.startswith("patch_embed") and ".norm." in parameter
        return from_patches or parameter.rpartition(".")[2] in {"layer_scale_1", "layer_scale_2"}

    def guess_variant(self, state_dict: Mapping[str, Array]) -> str | None:
        from porting.references.van import VARIANTS

        for variant, shape in VARIANTS.items():
            norms = [state_dict.get(f"patch_embed{stage}.norm.weight") for stage in range(1, len(shape.depths) + 1)]
            dims = tuple(norm.shape[0] if norm is not None and norm.ndim == 1 else 0 for norm in norms)
            deep_enough = all(f"block{s}.{d - 1}.norm1.weight" in state_dict for s, d in enumerate(shape.depths, 1))
            too_deep = any(f"block{s}.{d}.norm1.weight" in state_dict for s, d in enumerate(shape.depths, 1))
            if dims == shape.embed_dims and deep_enough and not too_deep:
                return variant
        return None


def _shape(variant: str) -> VanShape:
    from porting.references.van import VARIANTS

    return VARIANTS[variant]
