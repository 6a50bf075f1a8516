"""Inception-ResNet v2, from timm to keras.applications, whose norms have no scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import application
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing

if TYPE_CHECKING:
    import keras
    from torch import nn


def _unnamed() -> Iterator[str]:
    """PyTorch's names of the convolutions that Keras numbers, in Keras's order."""
    yield from (f"conv2d_{name}" for name in ("1a", "2a", "2b", "3b", "4a"))
    yield from _branches("mixed_5b", 1, 2, 3)
    yield "mixed_5b.branch3.1"
    for index in range(10):
        yield from _branches(f"repeat.{index}", 1, 2, 3)
    yield from _branches("mixed_6a", 1, 3)
    for index in range(20):
        yield from _branches(f"repeat_1.{index}", 1, 3)
    yield from _branches("mixed_7a", 2, 2, 3)
    for index in range(9):
        yield from _branches(f"repeat_2.{index}", 1, 3)
    yield from _branches("block8", 1, 3)


def _branches(block: str, *lengths: int) -> Iterator[str]:
    for branch, length in enumerate(lengths):
        place = f"{block}.branch{branch}"
        yield from (place,) if length == 1 else (f"{place}.{index}" for index in range(length))


def _rows() -> Iterator[KeyRule]:
    for index, name in enumerate(_unnamed()):
        number = f"_{index}" if index else ""
        yield KeyRule(f"{name}.conv", f"conv2d{number}", "conv")
        yield KeyRule(f"{name}.bn", f"batch_normalization{number}", "batch_norm")
    yield KeyRule("repeat.{j}.conv2d", "block35_{j+1}_conv", "conv")
    yield KeyRule("repeat_1.{j}.conv2d", "block17_{j+1}_conv", "conv")
    yield KeyRule("repeat_2.{j}.conv2d", "block8_{j+1}_conv", "conv")
    yield KeyRule("block8.conv2d", "block8_10_conv", "conv")
    yield KeyRule("conv2d_7b.conv", "conv_7b", "conv")
    yield KeyRule("conv2d_7b.bn", "conv_7b_bn", "batch_norm")
    yield KeyRule("classif", "predictions", "dense")


class InceptionResNetV2Family(LibraryFamily):
    """Inception-ResNet v2 (arXiv 1602.07261)."""

    name = "inceptionresnetv2"
    models = {"inception_resnet_v2": "InceptionResNetV2"}
    head = "classif"
    rows = tuple(_rows())
    inputs = Preprocessing(299, 333)

    def synthetic_reference(self, spec: Spec) -> nn.Module:
        reference = super().synthetic_reference(spec)
        for name, parameter in reference.named_parameters():
            if name.endswith(".bn.weight"):
                parameter.data.fill_(1.0)  # as in the published weights
        return reference

    def make_candidate(self, spec: Spec) -> keras.Model:
        return application(self.models[spec.variant], spec, input_shape=(299, 299, 3))
