"""VGG, from torchvision to keras.applications. The rows of its first dense layer have a different order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import application, torchvision_model
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

# The number of convolutions per block. In PyTorch, an activation follows each, and a pooling follows each block.
_BLOCKS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_TOP = (
    KeyRule("classifier.0", "fc1", "dense:512x7x7"),
    KeyRule("classifier.3", "fc2", "dense"),
    KeyRule("classifier.6", "predictions", "dense"),
)


class VGGFamily(LibraryFamily):
    """VGG 16 and 19 without batch norm (arXiv 1409.1556). Without a head, they return the mean of the last map."""

    name = "vgg"
    publisher = "torchvision"
    models = {"vgg16": "VGG16", "vgg19": "VGG19"}
    head = "classifier.6"

    def rows_of(self, spec: Spec) -> tuple[KeyRule, ...]:
        rows, place = [], 0
        for block, count in enumerate(_BLOCKS[spec.variant], start=1):
            for conv in range(1, count + 1):
                rows.append(KeyRule(f"features.{place}", f"block{block}_conv{conv}", "conv"))
                place += 2
            place += 1
        return (*rows, *(_TOP if spec.num_classes else ()))

    def build_reference(self, spec: Spec) -> nn.Module:
        return torchvision_model(spec, _without_head)

    def make_candidate(self, spec: Spec) -> keras.Model:
        return application(self.models[spec.variant], spec, input_shape=(224, 224, 3))


def _without_head(model: nn.Module) -> nn.Module:
    from torch import nn

    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Identity()
    return model
