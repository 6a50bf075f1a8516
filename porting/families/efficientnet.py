"""EfficientNet, from timm's `tf_` models, which pad like TensorFlow, to keras.applications."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import application
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule
from porting.models.images import IMAGENET, Preprocessing

if TYPE_CHECKING:
    import keras

_SIDES = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456, "b6": 528, "b7": 600}


def rows_around(depthwise: str) -> tuple[KeyRule, ...]:
    """The rows that both generations share: stem, blocks with an expansion, head.

    `depthwise` is Keras's name of the depthwise layer.
    """
    row, block = "blocks.{s}.{j}", "block{s+1}{j:letter}"
    return (
        KeyRule("conv_stem", "stem_conv", "conv"),
        KeyRule("bn1", "stem_bn", "batch_norm"),
        KeyRule(f"{row}.conv_pw", f"{block}_expand_conv", "conv"),
        KeyRule(f"{row}.bn1", f"{block}_expand_bn", "batch_norm"),
        KeyRule(f"{row}.conv_dw", f"{block}_{depthwise}", "depthwise"),
        KeyRule(f"{row}.bn2", f"{block}_bn", "batch_norm"),
        KeyRule(f"{row}.se.conv_reduce", f"{block}_se_reduce", "conv"),
        KeyRule(f"{row}.se.conv_expand", f"{block}_se_expand", "conv"),
        KeyRule(f"{row}.conv_pwl", f"{block}_project_conv", "conv"),
        KeyRule(f"{row}.bn3", f"{block}_project_bn", "batch_norm"),
        KeyRule("conv_head", "top_conv", "conv"),
        KeyRule("bn2", "top_bn", "batch_norm"),
        KeyRule("classifier", "predictions", "dense"),
    )


class EfficientNetFamily(LibraryFamily):
    """EfficientNet B0 to B7 (arXiv 1905.11946), without the preprocessing layers of the Keras model."""

    name = "efficientnet"
    models = {f"tf_efficientnet_{size}": (f"EfficientNet{size.upper()}", side) for size, side in _SIDES.items()}
    head = "classifier"
    rows = (
        # The first stage has no expansion.
        KeyRule("blocks.0.{j}.bn1", "block1{j:letter}_bn", "batch_norm"),
        KeyRule("blocks.0.{j}.conv_pw", "block1{j:letter}_project_conv", "conv"),
        KeyRule("blocks.0.{j}.bn2", "block1{j:letter}_project_bn", "batch_norm"),
        *rows_around("dwconv"),
    )

    def preprocessing(self, spec: Spec) -> Preprocessing:
        _, side = self.models[spec.variant]
        return Preprocessing(side, side * 8 // 7, **IMAGENET)

    def make_candidate(self, spec: Spec) -> keras.Model:
        import keras

        name, side = self.models[spec.variant]
        whole = application(name, spec, input_shape=(side, side, 3))
        # Only Rescaling and Normalization precede the network; weights="imagenet" would add another division.
        prepared = next(layer for layer in whole.layers if isinstance(layer, keras.layers.Normalization)).output
        return keras.Model(prepared, whole.output, name=spec.variant)
