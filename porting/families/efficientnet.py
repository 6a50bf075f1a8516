"""EfficientNet: timm's `tf_` models, which pad as TensorFlow does, to keras.applications."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.library import IMAGENET, LibraryFamily, application, timm_model
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing

if TYPE_CHECKING:
    import keras
    from torch import nn

_ROW, _BLOCK = "blocks.{s}.{j}", "block{s+1}{j:letter}"
_SIDES = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456, "b6": 528, "b7": 600}


class EfficientNetFamily(LibraryFamily):
    """EfficientNet B0 to B7 (arXiv 1905.11946); the Keras model is without its preparation of images."""

    name = "efficientnet"
    models = {f"tf_efficientnet_{size}": (f"EfficientNet{size.upper()}", side) for size, side in _SIDES.items()}
    head = "classifier"
    rows = (
        KeyRule("conv_stem", "stem_conv", "conv"),
        KeyRule("bn1", "stem_bn", "batch_norm"),
        # The first stage has no expansion.
        KeyRule("blocks.0.{j}.bn1", "block1{j:letter}_bn", "batch_norm"),
        KeyRule("blocks.0.{j}.conv_pw", "block1{j:letter}_project_conv", "conv"),
        KeyRule("blocks.0.{j}.bn2", "block1{j:letter}_project_bn", "batch_norm"),
        KeyRule(f"{_ROW}.conv_pw", f"{_BLOCK}_expand_conv", "conv"),
        KeyRule(f"{_ROW}.bn1", f"{_BLOCK}_expand_bn", "batch_norm"),
        KeyRule(f"{_ROW}.conv_dw", f"{_BLOCK}_dwconv", "depthwise"),
        KeyRule(f"{_ROW}.bn2", f"{_BLOCK}_bn", "batch_norm"),
        KeyRule(f"{_ROW}.se.conv_reduce", f"{_BLOCK}_se_reduce", "conv"),
        KeyRule(f"{_ROW}.se.conv_expand", f"{_BLOCK}_se_expand", "conv"),
        KeyRule(f"{_ROW}.conv_pwl", f"{_BLOCK}_project_conv", "conv"),
        KeyRule(f"{_ROW}.bn3", f"{_BLOCK}_project_bn", "batch_norm"),
        KeyRule("conv_head", "top_conv", "conv"),
        KeyRule("bn2", "top_bn", "batch_norm"),
        KeyRule("classifier", "predictions", "dense"),
    )

    def preprocessing(self, spec: Spec) -> Preprocessing:
        _, side = self.models[spec.variant]
        return Preprocessing(side, side * 8 // 7, **IMAGENET)

    def build_reference(self, spec: Spec) -> nn.Module:
        return timm_model(spec)

    def make_candidate(self, spec: Spec) -> keras.Model:
        import keras

        name, side = self.models[spec.variant]
        whole = application(name, spec, input_shape=(side, side, 3))
        # Without weights of ImageNet, which add another division, nothing but these two stands in front.
        prepared = next(layer for layer in whole.layers if isinstance(layer, keras.layers.Normalization)).output
        return keras.Model(prepared, whole.output, name=spec.variant)
