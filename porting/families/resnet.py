"""ResNet with the stride on the 3x3 convolution (v1.5), from timm to keras-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import classifier, library
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras

_BLOCK = "stack{s-1}_block{j}"
_BASIC, BOTTLENECK = "basic_block", "bottleneck_block"


class ResNetFamily(LibraryFamily):
    """ResNet 18 to 152 (arXiv 1512.03385)."""

    name = "resnet"
    models = {
        "resnet18": (_BASIC, [2, 2, 2, 2]),
        "resnet34": (_BASIC, [3, 4, 6, 3]),
        "resnet50": (BOTTLENECK, [3, 4, 6, 3]),
        "resnet101": (BOTTLENECK, [3, 4, 23, 3]),
        "resnet152": (BOTTLENECK, [3, 8, 36, 3]),
    }
    head = "fc"
    body = ("", "backbone/")
    rows = (
        KeyRule("conv1", "conv1_conv", "conv"),
        KeyRule("bn1", "conv1_bn", "batch_norm"),
        KeyRule("layer{s}.{j}.conv{n}", f"{_BLOCK}_{{n}}_conv", "conv"),
        KeyRule("layer{s}.{j}.bn{n}", f"{_BLOCK}_{{n}}_bn", "batch_norm"),
        KeyRule("layer{s}.{j}.downsample.0", f"{_BLOCK}_0_conv", "conv"),
        KeyRule("layer{s}.{j}.downsample.1", f"{_BLOCK}_0_bn", "batch_norm"),
        KeyRule("fc", "predictions", "dense"),
    )

    def make_candidate(self, spec: Spec) -> keras.Model:
        block, depths = self.models[spec.variant]
        return classifier("ResNetImageClassifier", resnet_backbone(block, depths), spec)


def resnet_backbone(block: str, depths: list[int], *, pre_activation: bool = False) -> keras.Model:
    """Build keras-hub's backbone of four stages: v1.5, or v2 with `pre_activation`."""
    return library("keras_hub.models").ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=depths,
        stackwise_num_strides=[1, 2, 2, 2],
        block_type=block,
        use_pre_activation=pre_activation,
        image_shape=(None, None, 3),
        name="backbone",
    )
