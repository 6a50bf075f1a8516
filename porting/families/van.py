"""Visual Attention Network (VAN): the names of its tensors, both models, and its preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.families.base import Family, Spec
from porting.kinds.transforms import Array, Shape
from porting.mapping.naming import Naming
from porting.mapping.rules import KeyRule
from porting.models.images import IMAGENET, Preprocessing
from porting.parity.training import OptimizerPair, usual_optimizers
from porting.sources.table import Source, embedded_table

if TYPE_CHECKING:
    import keras
    from PIL import Image
    from torch import nn

    import van_tf
    from porting.references.van import VanShape

# s is the stage, from 1; j is the block within it, from 0.
_BLOCK, _TARGET = "block{s}.{j}", "block{s}_{j}"
RULES = (
    KeyRule("patch_embed{s}.proj", "patch_embed{s}/proj", "conv"),
    KeyRule("patch_embed{s}.norm", "patch_embed{s}/norm", "batch_norm"),
    KeyRule("norm{s}", "norm{s}", "layer_norm"),
    KeyRule(f"{_BLOCK}.norm1", f"{_TARGET}/norm1", "batch_norm"),
    KeyRule(f"{_BLOCK}.attn.proj_1", f"{_TARGET}/attn/proj_1", "conv"),
    KeyRule(f"{_BLOCK}.attn.spatial_gating_unit.conv0", f"{_TARGET}/attn/spatial_gating_unit/conv0", "depthwise"),
    KeyRule(
        f"{_BLOCK}.attn.spatial_gating_unit.conv_spatial",
        f"{_TARGET}/attn/spatial_gating_unit/conv_spatial",
        "depthwise",
    ),
    KeyRule(f"{_BLOCK}.attn.spatial_gating_unit.conv1", f"{_TARGET}/attn/spatial_gating_unit/conv1", "conv"),
    KeyRule(f"{_BLOCK}.attn.proj_2", f"{_TARGET}/attn/proj_2", "conv"),
    KeyRule(f"{_BLOCK}.layer_scale_1", f"{_TARGET}/layer_scale_1", "parameter"),
    KeyRule(f"{_BLOCK}.norm2", f"{_TARGET}/norm2", "batch_norm"),
    KeyRule(f"{_BLOCK}.mlp.fc1", f"{_TARGET}/mlp/fc1", "conv"),
    KeyRule(f"{_BLOCK}.mlp.dwconv.dwconv", f"{_TARGET}/mlp/dwconv/dwconv", "depthwise"),
    KeyRule(f"{_BLOCK}.mlp.fc2", f"{_TARGET}/mlp/fc2", "conv"),
    KeyRule(f"{_BLOCK}.layer_scale_2", f"{_TARGET}/layer_scale_2", "parameter"),
    KeyRule("head", "head", "dense"),
)

_STAGE = "van.encoder.stages.{s-1}"
_LAYER = f"{_STAGE}.layers.{{j}}"
# transformers 4.x, models/van/modeling_van.py. "normomalization" is misspelt there.
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


OFFICIAL = Naming("official", RULES, settings={"layer_norm_eps": 1e-6})
_BODY = tuple(rule for rule in RULES if rule.source != "head")
NAMINGS = (
    OFFICIAL,
    Naming(
        "transformers",
        RULES,
        _TRANSFORMERS,
        head="classifier",
        prefix="van.",
        # A LayerNorm that the class defines but never uses.
        drops=("van.layernorm.weight", "van.layernorm.bias"),
        settings={"layer_norm_eps": 1e-6},
    ),
    Naming("mmpretrain", RULES, _MMPRETRAIN, head="head.fc", prefix="backbone.", settings={"layer_norm_eps": 1e-5}),
    Naming(
        "segmentation",
        _BODY,
        tuple(f"backbone.{rule.source}" for rule in _BODY),
        head="",
        prefix="backbone.",
        foreign=("decode_head.", "auxiliary_head.", "neck."),
        settings={"layer_norm_eps": 1e-5},
    ),
)


class VanFamily(Family):
    """VAN B0 to B6 (arXiv 2202.09741) and this project's nano. The reference uses the official code's names."""

    name = "van"
    namings = NAMINGS
    sources: Path | tuple[Source, ...] = embedded_table()
    # The official evaluation of all weights trained on ImageNet-1K: crop fraction 0.9 (224 of 248), mean and std 0.5.
    inputs = Preprocessing(input_size=224, resize_size=248)

    def shape(self, variant: str) -> VanShape:
        """The shape of a variant, from PyTorch's table of variants."""
        from porting.references.van import VARIANTS

        return VARIANTS[variant]

    def config(self, variant: str) -> van_tf.VanConfig:
        """The configuration of a variant, from Keras's table of variants."""
        import van_tf

        return van_tf.VARIANTS[variant]

    def build_reference(self, spec: Spec) -> nn.Module:
        from porting.references.van import build_van

        return build_van(self.shape(spec.variant), spec.num_classes, **spec.settings)

    def build_candidate(self, spec: Spec) -> keras.Model:
        import van_tf

        epsilon = spec.settings["layer_norm_eps"]
        return van_tf.van(self.config(spec.variant), layer_norm_epsilon=epsilon, **_top(spec))

    def stated_settings(self, variant: str, facts: Mapping[str, Any]) -> Mapping[str, float]:
        from porting.families.van_facts import stated_settings

        return stated_settings(variant, self.shape(variant), facts)

    # The methods below are faster than the defaults or do more.

    def build_with_dropout(self, spec: Spec) -> tuple[nn.Module, keras.Model]:
        import van_tf
        from porting.references.van import build_van

        rates: dict[str, Any] = {"drop_rate": 0.1, "drop_path_rate": 0.3}
        reference = build_van(self.shape(spec.variant), spec.num_classes, **rates)
        return reference, van_tf.van(self.config(spec.variant), **_top(spec), **rates)

    def fuse(self, candidate: keras.Model, form: str) -> keras.Model:
        import van_tf

        return van_tf.fuse(candidate, fold_gelu=form == "saved_model")

    def optimizers(self) -> tuple[OptimizerPair, ...]:
        import van_tf

        return usual_optimizers(van_tf.AdamW)

    def how_to_build(self, spec: Spec) -> str:
        arguments = [] if spec.num_classes else ["include_top=False"]
        if spec.num_classes and spec.num_classes != self.usual_classes(spec.variant):
            arguments.append(f"classes={spec.num_classes}")
        epsilon = spec.settings["layer_norm_eps"]
        if epsilon != OFFICIAL.settings["layer_norm_eps"]:
            arguments.append(f"layer_norm_epsilon={epsilon:g}")
        return f"van_tf.van_{spec.variant}({', '.join(arguments)})"

    def weight_shapes(self, spec: Spec) -> dict[str, dict[str, Shape]]:
        # Computed without Keras, so that a port without a check does not need TensorFlow.
        shape = self.shape(spec.variant)
        layers: dict[str, dict[str, Shape]] = {}
        channels = shape.in_chans
        for stage, (dim, depth, ratio) in enumerate(
            zip(shape.embed_dims, shape.depths, shape.mlp_ratios, strict=True), start=1
        ):
            size = 7 if stage == 1 else 3
            embed = {"proj/kernel": (size, size, channels, dim), "proj/bias": (dim,)}
            layers[f"patch_embed{stage}"] = embed | _trained("norm", dim) | _measured("norm", dim)
            for j in range(depth):
                layers[f"block{stage}_{j}"] = _block_shapes(dim, int(dim * ratio))
            layers[f"norm{stage}"] = {"gamma": (dim,), "beta": (dim,)}
            channels = dim
        if spec.num_classes:
            layers["head"] = {"kernel": (channels, spec.num_classes), "bias": (spec.num_classes,)}
        return layers

    def unused_tensors(self, spec: Spec) -> dict[str, Array]:
        tensors = super().unused_tensors(spec)
        for name in spec.naming.drops:
            # The LayerNorm that transformers' class never uses, with its initial values.
            value = 1.0 if name.endswith(".weight") else 0.0
            tensors[name] = np.full(self.shape(spec.variant).embed_dims[-1], value, np.float32)
        return tensors

    def classes_in(self, variant: str, shapes: Iterable[Shape]) -> int | None:
        # Only the head's kernel has two axes.
        heads = {shape[1] for shape in shapes if len(shape) == 2 and shape[0] == self.shape(variant).embed_dims[-1]}
        return max(heads, default=0) if len(heads) < 2 else None

    def preprocessing(self, spec: Spec) -> Preprocessing:
        if spec.variant == "nano":
            return Preprocessing(input_size=64, resize_size=64)
        if spec.naming.name == "segmentation":
            return replace(self.inputs, **IMAGENET)
        return self.inputs

    def prepare_candidate(self, spec: Spec) -> Callable[[Image.Image], Array]:
        import tensorflow as tf

        import van_tf

        how = self.preprocessing(spec)
        mean, std = np.array(how.mean, np.float32), np.array(how.std, np.float32)

        # Traced once for all sizes: eager operations take several times as long per image.
        prepared = tf.function(
            partial(van_tf.prepare_images, size=how.input_size, crop_fraction=how.input_size / how.resize_size),
            input_signature=[tf.TensorSpec((None, None, 3), tf.uint8)],
        )

        def prepare(image: Image.Image) -> Array:
            found = prepared(np.asarray(image)).numpy()
            return (found / 2 + 0.5 - mean) / std if (std != 0.5).any() else found  # type: ignore[no-any-return]

        return prepare

    def class_names(self, spec: Spec) -> Sequence[str]:
        import van_tf

        return van_tf.CIFAR10_CLASSES if spec.num_classes == len(van_tf.CIFAR10_CLASSES) else ()

    def shrinkable(self, parameter: str) -> bool:
        from_patches = parameter.startswith("patch_embed") and ".norm." in parameter
        return from_patches or parameter.rpartition(".")[2] in {"layer_scale_1", "layer_scale_2"}


def _top(spec: Spec) -> dict[str, Any]:
    """Arguments of van_tf for the head and the data format."""
    top: dict[str, Any] = {"classes": spec.num_classes} if spec.num_classes else {"include_top": False}
    return {**top, "data_format": "channels_last"}


def _trained(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}/gamma": (dim,), f"{name}/beta": (dim,)}


def _measured(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}/moving_mean": (dim,), f"{name}/moving_variance": (dim,)}


def _block_shapes(dim: int, hidden: int) -> dict[str, Shape]:
    """A block's variables in Keras's order: its own, those of its layers, and the non-trainable ones last."""
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
