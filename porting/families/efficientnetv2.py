"""EfficientNetV2, from timm's `tf_` models, which pad like TensorFlow, to keras.applications."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import application
from porting.families.efficientnet import rows_around
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras


class EfficientNetV2Family(LibraryFamily):
    """EfficientNetV2 B0 to B3, S, M and L (arXiv 2104.00298)."""

    name = "efficientnetv2"
    models = {f"tf_efficientnetv2_{size}": f"EfficientNetV2{size.upper()}" for size in ("b0", "b1", "b2", "b3", *"sml")}
    head = "classifier"
    rows = (
        # The first stage has no expansion. In the next two, one convolution does the expansion and the depthwise step.
        KeyRule("blocks.0.{j}.conv", "block1{j:letter}_project_conv", "conv"),
        KeyRule("blocks.0.{j}.bn1", "block1{j:letter}_project_bn", "batch_norm"),
        KeyRule("blocks.1.{j}.bn2", "block2{j:letter}_project_bn", "batch_norm"),
        KeyRule("blocks.2.{j}.bn2", "block3{j:letter}_project_bn", "batch_norm"),
        KeyRule("blocks.{s}.{j}.conv_exp", "block{s+1}{j:letter}_expand_conv", "conv"),
        *rows_around("dwconv2"),
    )

    def make_candidate(self, spec: Spec) -> keras.Model:
        return application(self.models[spec.variant], spec, input_shape=(224, 224, 3), include_preprocessing=False)
