"""ResNet with normalisation before the convolutions (v2), from timm to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.library import LibraryFamily, classifier, timm_model
from porting.families.resnet import BOTTLENECK, resnet_backbone
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing

if TYPE_CHECKING:
    import keras
    from torch import nn


class ResNetV2Family(LibraryFamily):
    """ResNetV2 50 and 101 (arXiv 1603.05027)."""

    name = "resnetv2"
    models = {"resnetv2_50": [3, 4, 6, 3], "resnetv2_101": [3, 4, 23, 3]}
    head = "head.fc"
    inputs = Preprocessing(224, 236)

    def rows_of(self, spec: Spec) -> tuple[KeyRule, ...]:
        own = "backbone/" if spec.num_classes else ""
        source, target = "stages.{s}.blocks.{j}", f"{own}stack{{s}}_block{{j}}"
        return (
            KeyRule("stem.conv", f"{own}conv1_conv", "conv"),
            KeyRule(f"{source}.norm1", f"{target}_pre_activation_bn", "batch_norm"),
            KeyRule(f"{source}.norm2", f"{target}_1_bn", "batch_norm"),
            KeyRule(f"{source}.norm3", f"{target}_2_bn", "batch_norm"),
            KeyRule(f"{source}.conv{{n}}", f"{target}_{{n}}_conv", "conv"),
            KeyRule(f"{source}.downsample.conv", f"{target}_0_conv", "conv"),
            KeyRule("norm", f"{own}post_bn", "batch_norm"),
            # A 1x1 convolution in PyTorch, and a dense layer in Keras.
            KeyRule("head.fc", "predictions", "conv"),
        )

    def build_reference(self, spec: Spec) -> nn.Module:
        return timm_model(spec)

    def make_candidate(self, spec: Spec) -> keras.Model:
        backbone = resnet_backbone(BOTTLENECK, self.models[spec.variant], pre_activation=True)
        return classifier("ResNetImageClassifier", backbone, spec)
