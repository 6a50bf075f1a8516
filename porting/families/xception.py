"""Xception: timm's `legacy_xception`, to keras.applications, whose epsilon of 1e-3 goes into the variances."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.library import LibraryFamily, application, timm_model, with_names_by_place
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing

if TYPE_CHECKING:
    import keras
    from torch import nn

_NORM = "batch_norm:-0.00099"


def _separable(source: str, target: str) -> list[KeyRule]:
    """One layer in Keras: two convolutions in PyTorch."""
    return [
        KeyRule(f"{source}.conv1", target, "separable_depthwise"),
        KeyRule(f"{source}.pointwise", target, "separable_pointwise"),
    ]


class XceptionFamily(LibraryFamily):
    """Xception (arXiv 1610.02357)."""

    name = "xception"
    models = {"legacy_xception": "Xception"}
    head = "fc"
    inputs = Preprocessing(299, 333)
    rows = (
        KeyRule("conv{n}", "block1_conv{n}", "conv"),
        KeyRule("bn{n}", "block1_conv{n}_bn", _NORM),
        # The first block begins with no activation, so its places are one less.
        *_separable("block1.rep.0", "block2_sepconv1"),
        KeyRule("block1.rep.1", "block2_sepconv1_bn", _NORM),
        *_separable("block1.rep.3", "block2_sepconv2"),
        KeyRule("block1.rep.4", "block2_sepconv2_bn", _NORM),
        *_separable("block{s}.rep.1", "block{s+1}_sepconv1"),
        KeyRule("block{s}.rep.2", "block{s+1}_sepconv1_bn", _NORM),
        *_separable("block{s}.rep.4", "block{s+1}_sepconv2"),
        KeyRule("block{s}.rep.5", "block{s+1}_sepconv2_bn", _NORM),
        *_separable("block{s}.rep.7", "block{s+1}_sepconv3"),
        KeyRule("block{s}.rep.8", "block{s+1}_sepconv3_bn", _NORM),
        KeyRule("block12.skip", "conv2d~3", "conv"),
        KeyRule("block12.skipbn", "batch_normalization~3", _NORM),
        KeyRule("block{s}.skip", "conv2d~{s-1}", "conv"),
        KeyRule("block{s}.skipbn", "batch_normalization~{s-1}", _NORM),
        *_separable("conv3", "block14_sepconv1"),
        KeyRule("bn3", "block14_sepconv1_bn", _NORM),
        *_separable("conv4", "block14_sepconv2"),
        KeyRule("bn4", "block14_sepconv2_bn", _NORM),
        KeyRule("fc", "predictions", "dense"),
    )

    def build_reference(self, spec: Spec) -> nn.Module:
        return timm_model(spec)

    def make_candidate(self, spec: Spec) -> keras.Model:
        return with_names_by_place(application(self.models[spec.variant], spec, input_shape=(299, 299, 3)))
