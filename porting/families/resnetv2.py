"""ResNet with normalisation before the convolutions (v2), from timm to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import classifier
from porting.families.library import LibraryFamily
from porting.families.resnet import BOTTLENECK, resnet_backbone
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing

if TYPE_CHECKING:
    import keras

_SOURCE, _TARGET = "stages.{s}.blocks.{j}", "stack{s}_block{j}"


class ResNetV2Family(LibraryFamily):
    """ResNetV2 50 and 101 (arXiv 1603.05027)."""

    name = "resnetv2"
    models = {"resnetv2_50": [3, 4, 6, 3], "resnetv2_101": [3, 4, 23, 3]}
    head = "head.fc"
    inputs = Preprocessing(224, 236)
    body = ("", "backbone/")
    rows = (
        KeyRule("stem.conv", "conv1_conv", "conv"),
        KeyRule(f"{_SOURCE}.norm1", f"{_TARGET}_pre_activation_bn", "batch_norm"),
        KeyRule(f"{_SOURCE}.norm2", f"{_TARGET}_1_bn", "batch_norm"),
        KeyRule(f"{_SOURCE}.norm3", f"{_TARGET}_2_bn", "batch_norm"),
        KeyRule(f"{_SOURCE}.conv{{n}}", f"{_TARGET}_{{n}}_conv", "conv"),
        KeyRule(f"{_SOURCE}.downsample.conv", f"{_TARGET}_0_conv", "conv"),
        KeyRule("norm", "post_bn", "batch_norm"),
        # A 1x1 convolution in PyTorch, and a dense layer in Keras.
        KeyRule("head.fc", "predictions", "conv"),
    )

    def make_candidate(self, spec: Spec) -> keras.Model:
        backbone = resnet_backbone(BOTTLENECK, self.models[spec.variant], pre_activation=True)
        return classifier("ResNetImageClassifier", backbone, spec)
