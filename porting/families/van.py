"""Visual Attention Network: the names of its tensors, its two models and its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.families.base import Family
from porting.kinds.transforms import Array, Shape
from porting.mapping.key_map import KeyMap, KeyRule, Kind
from porting.mapping.naming import CheckpointLayout
from porting.models.images import Preprocessing
from porting.parity.training import OptimizerPair, usual_optimizers

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

_STAGE = "van.encoder.stages.{s-1}"
_LAYER = f"{_STAGE}.layers.{{j}}"
# transformers 4.x, models/van/modeling_van.py; the misspelt name is theirs.
_TRANSFORMERS = (
    f"{_STAGE}.embeddings.convolution",
    f"{_STAGE}.embeddings.normalization",
    f"{_STAGE}.normalization",
    f"{_LAYER}.pre_normomalization",
    f"{_LAYER}.attention.pre_projection.conv",
    f"{_LAYER}.attention.attention_layer.attention.depth_wise",
    f"{_LAYER}.attention.attention_layer.attention.depth_wise_dilated",
    f"{_LAYER}.attention.attention_layer.attention.point_wise",
    f"{_LAYER}.attention.post_projection",
    f"{_LAYER}.attention_scaling.weight",
    f"{_LAYER}.post_normalization",
    f"{_LAYER}.mlp.in_dense",
    f"{_LAYER}.mlp.depth_wise",
    f"{_LAYER}.mlp.out_dense",
    f"{_LAYER}.mlp_scaling.weight",
    "classifier",
)
_MM_BLOCK = "backbone.blocks{s}.{j}"
# mmpretrain, models/backbones/van.py.
_MMPRETRAIN = (
    "backbone.patch_embed{s}.projection",
    "backbone.patch_embed{s}.norm",
    "backbone.norm{s}",
    f"{_MM_BLOCK}.norm1",
    f"{_MM_BLOCK}.attn.proj_1",
    f"{_MM_BLOCK}.attn.spatial_gating_unit.DW_conv",
    f"{_MM_BLOCK}.attn.spatial_gating_unit.DW_D_conv",
    f"{_MM_BLOCK}.attn.spatial_gating_unit.conv1",
    f"{_MM_BLOCK}.attn.proj_2",
    f"{_MM_BLOCK}.layer_scale_1",
    f"{_MM_BLOCK}.norm2",
    f"{_MM_BLOCK}.mlp.fc1",
    f"{_MM_BLOCK}.mlp.dwconv",
    f"{_MM_BLOCK}.mlp.fc2",
    f"{_MM_BLOCK}.layer_scale_2",
    "head.fc",
)


def _renamed(sources: tuple[str, ...]) -> tuple[KeyRule, ...]:
    return tuple(replace(rule, source=source) for rule, source in zip(RULES, sources, strict=True))


# Official names without a head are those of the backbones that VAN-Segmentation publishes.
OFFICIAL = CheckpointLayout("official", RULES, headless=False, settings={"layer_norm_eps": 1e-6})
LAYOUTS = (
    OFFICIAL,
    CheckpointLayout(
        "transformers",
        _renamed(_TRANSFORMERS),
        head="classifier",
        prefix="van.",
        # A LayerNorm that the class has and its forward pass never uses.
        drops=("van.layernorm.weight", "van.layernorm.bias"),
        settings={"layer_norm_eps": 1e-6},
    ),
    CheckpointLayout(
        "mmpretrain", _renamed(_MMPRETRAIN), head="head.fc", prefix="backbone.", settings={"layer_norm_eps": 1e-5}
    ),
    CheckpointLayout(
        "segmentation",
        tuple(replace(rule, source=f"backbone.{rule.source}") for rule in RULES if rule.source != "head"),
        head="",
        prefix="backbone.",
        foreign=("decode_head.", "auxiliary_head.", "neck."),
        settings={"layer_norm_eps": 1e-5},
    ),
)


class VanFamily(Family):
    """VAN B0 to B6 (arXiv 2202.09741) and this project's nano; the reference has the official code's names."""

    name = "van"
    layouts = LAYOUTS

    def key_map(self, variant: str, layout: CheckpointLayout | None = None) -> KeyMap:
        layout = layout or OFFICIAL
        depths = _shape(variant).depths
        stages = [{"s": stage} for stage in range(1, len(depths) + 1)]
        blocks = [{"s": stage, "j": j} for stage, depth in enumerate(depths, start=1) for j in range(depth)]
        return KeyMap.expand(layout.rules, [{}, *stages, *blocks], drops=layout.drops, foreign=layout.foreign)

    def build_reference(self, variant: str, num_classes: int, layout: CheckpointLayout | None = None) -> nn.Module:
        from porting.references.van import build_van

        return build_van(variant, num_classes, **(layout or OFFICIAL).settings)

    def build_candidate(self, variant: str, num_classes: int, layout: CheckpointLayout | None = None) -> keras.Model:
        import van_tf

        config, epsilon = van_tf.VARIANTS[variant], (layout or OFFICIAL).settings["layer_norm_eps"]
        if num_classes == 0:
            return van_tf.van(config, include_top=False, layer_norm_epsilon=epsilon, data_format="channels_last")
        return van_tf.van(config, classes=num_classes, layer_norm_epsilon=epsilon, data_format="channels_last")

    def build_with_dropout(
        self, variant: str, num_classes: int, layout: CheckpointLayout | None = None
    ) -> tuple[nn.Module, keras.Model]:
        import van_tf
        from porting.references.van import build_van

        rates: dict[str, Any] = {"drop_rate": 0.1, "drop_path_rate": 0.3}
        top: dict[str, Any] = {"classes": num_classes} if num_classes else {"include_top": False}
        top["data_format"] = "channels_last"
        return build_van(variant, num_classes, **rates), van_tf.van(van_tf.VARIANTS[variant], **top, **rates)

    def fuse(self, candidate: keras.Model, form: str) -> keras.Model:
        import van_tf

        return van_tf.fuse(candidate, fold_gelu=form == "saved_model")

    def optimizers(self) -> tuple[OptimizerPair, ...]:
        import van_tf

        return usual_optimizers(van_tf.AdamW)

    def how_to_build(self, variant: str, num_classes: int, layout: CheckpointLayout | None = None) -> str:
        arguments = [] if num_classes else ["include_top=False"]
        if num_classes and num_classes != _usual_classes(variant):
            arguments.append(f"classes={num_classes}")
        epsilon = (layout or OFFICIAL).settings["layer_norm_eps"]
        if epsilon != OFFICIAL.settings["layer_norm_eps"]:
            arguments.append(f"layer_norm_epsilon={epsilon:g}")
        return f"van_tf.van_{variant}({', '.join(arguments)})"

    def weight_shapes(self, variant: str, num_classes: int) -> dict[str, dict[str, Shape]]:
        shape = _shape(variant)
        layers: dict[str, dict[str, Shape]] = {}
        channels = 3
        for stage, (dim, depth, ratio) in enumerate(
            zip(shape.embed_dims, shape.depths, shape.mlp_ratios, strict=True), start=1
        ):
            size = 7 if stage == 1 else 3
            embed = {"proj/kernel": (size, size, channels, dim), "proj/bias": (dim,)}
            layers[f"patch_embed{stage}"] = embed | _trained("norm", dim) | _measured("norm", dim)
            for j in range(depth):
                layers[f"block{stage}.{j}"] = _block_shapes(dim, dim * ratio)
            layers[f"norm{stage}"] = {"gamma": (dim,), "beta": (dim,)}
            channels = dim
        if num_classes:
            layers["head"] = {"kernel": (channels, num_classes), "bias": (num_classes,)}
        return layers

    def num_classes(self, variant: str, state_dict: Mapping[str, Array], layout: CheckpointLayout | None = None) -> int:
        name = (layout or OFFICIAL).head
        if not name:
            return 0
        head = state_dict.get(f"{name}.weight")
        if head is not None and head.ndim == 2 and head.shape[0]:
            return int(head.shape[0])
        return _usual_classes(variant)

    def unused_tensors(self, variant: str, layout: CheckpointLayout | None = None) -> dict[str, Array]:
        tensors = super().unused_tensors(variant, layout)
        for name in (layout or OFFICIAL).drops:
            # The LayerNorm that transformers' class never uses, as it starts out.
            value = 1.0 if name.endswith(".weight") else 0.0
            tensors[name] = np.full(_shape(variant).embed_dims[-1], value, np.float32)
        return tensors

    def classes_in(self, variant: str, shapes: Iterable[Shape]) -> int | None:
        # Nothing but the head's kernel has two axes.
        heads = {shape[1] for shape in shapes if len(shape) == 2 and shape[0] == _shape(variant).embed_dims[-1]}
        return max(heads, default=0) if len(heads) < 2 else None

    def preprocessing(self, variant: str, layout: CheckpointLayout | None = None) -> Preprocessing:
        if variant == "nano":
            return Preprocessing(input_size=64, resize_size=64)
        # The official evaluation: crop fraction 0.9 of 248, mean and std 0.5, for all weights trained on 1K.
        usual = Preprocessing(input_size=224, resize_size=248)
        if layout is not None and layout.name == "segmentation":
            return replace(usual, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return usual

    def shrinkable(self, parameter: str) -> bool:
        from_patches = parameter.startswith("patch_embed") and ".norm." in parameter
        return from_patches or parameter.rpartition(".")[2] in {"layer_scale_1", "layer_scale_2"}


def _usual_classes(variant: str) -> int:
    return 10 if variant == "nano" else 1000


def _trained(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}/gamma": (dim,), f"{name}/beta": (dim,)}


def _measured(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}/moving_mean": (dim,), f"{name}/moving_variance": (dim,)}


def _block_shapes(dim: int, hidden: int) -> dict[str, Shape]:
    """A block's variables in Keras's order: its own, its layers', and last what is not trained."""
    unit = "attn/spatial_gating_unit"
    return {
        "layer_scale_1": (dim,),
        "layer_scale_2": (dim,),
        **_trained("norm1", dim),
        "attn/proj_1/kernel": (1, 1, dim, dim),
        "attn/proj_1/bias": (dim,),
        f"{unit}/conv0/kernel": (5, 5, dim, 1),
        f"{unit}/conv0/bias": (dim,),
        f"{unit}/conv_spatial/kernel": (7, 7, dim, 1),
        f"{unit}/conv_spatial/bias": (dim,),
        f"{unit}/conv1/kernel": (1, 1, dim, dim),
        f"{unit}/conv1/bias": (dim,),
        "attn/proj_2/kernel": (1, 1, dim, dim),
        "attn/proj_2/bias": (dim,),
        **_trained("norm2", dim),
        "mlp/fc1/kernel": (1, 1, dim, hidden),
        "mlp/fc1/bias": (hidden,),
        "mlp/dwconv/dwconv/kernel": (3, 3, hidden, 1),
        "mlp/dwconv/dwconv/bias": (hidden,),
        "mlp/fc2/kernel": (1, 1, hidden, dim),
        "mlp/fc2/bias": (dim,),
        **_measured("norm1", dim),
        **_measured("norm2", dim),
    }


def _shape(variant: str) -> VanShape:
    from porting.references.van import VARIANTS

    return VARIANTS[variant]
