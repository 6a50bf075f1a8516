"""DenseNet, from torchvision to keras.applications, whose epsilon of 1.001e-5 is compensated in the variances."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import application, torchvision_model
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

_NORM = "batch_norm:-1e-08"
_LAYER = "features.denseblock{s}.denselayer{j}"


class DenseNetFamily(LibraryFamily):
    """DenseNet 121, 169 and 201 (arXiv 1608.06993)."""

    name = "densenet"
    publisher = "torchvision"
    models = {"densenet121": "DenseNet121", "densenet169": "DenseNet169", "densenet201": "DenseNet201"}
    head = "classifier"
    rows = (
        KeyRule("features.conv0", "conv1_conv", "conv"),
        KeyRule("features.norm0", "conv1_bn", _NORM),
        KeyRule(f"{_LAYER}.norm{{n}}", "conv{s+1}_block{j}_{n-1}_bn", _NORM),
        KeyRule(f"{_LAYER}.conv{{n}}", "conv{s+1}_block{j}_{n}_conv", "conv"),
        KeyRule("features.transition{s}.norm", "pool{s+1}_bn", _NORM),
        KeyRule("features.transition{s}.conv", "pool{s+1}_conv", "conv"),
        KeyRule("features.norm5", "bn", _NORM),
        KeyRule("classifier", "predictions", "dense"),
    )

    def build_reference(self, spec: Spec) -> nn.Module:
        return torchvision_model(spec, _without_head)

    def make_candidate(self, spec: Spec) -> keras.Model:
        return application(self.models[spec.variant], spec, input_shape=(224, 224, 3))


def _without_head(model: nn.Module) -> nn.Module:
    from torch import nn

    model.classifier = nn.Identity()
    return model
