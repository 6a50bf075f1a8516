"""The registry of families: those of this package, and those that other packages provide as entry points.

A package registers a family in its pyproject.toml:

    [project.entry-points."porting.families"]
    resnet = "my_package.resnet:ResNetFamily"
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from porting.errors import FamilyError
from porting.wording import nearest

if TYPE_CHECKING:
    from porting.families.base import Family

ENTRY_POINTS = "porting.families"
# The families of this package. To add one, add a file to this folder and a line here.
_FAMILIES = {
    "van": "porting.families.van:VanFamily",
    "convnext": "porting.families.convnext:ConvNeXtFamily",
    "deit": "porting.families.deit:DeiTFamily",
    "densenet": "porting.families.densenet:DenseNetFamily",
    "distilbert": "porting.families.distilbert:DistilBertFamily",
    "efficientnet": "porting.families.efficientnet:EfficientNetFamily",
    "efficientnetv2": "porting.families.efficientnetv2:EfficientNetV2Family",
    "gpt2": "porting.families.gpt2:GPT2Family",
    "inceptionresnetv2": "porting.families.inceptionresnetv2:InceptionResNetV2Family",
    "mobilenetv3": "porting.families.mobilenetv3:MobileNetV3Family",
    "resnet": "porting.families.resnet:ResNetFamily",
    "resnetv2": "porting.families.resnetv2:ResNetV2Family",
    "roberta": "porting.families.roberta:RobertaFamily",
    "swin": "porting.families.swin:SwinFamily",
    "vgg": "porting.families.vgg:VGGFamily",
    "vit": "porting.families.vit:ViTFamily",
    "whisper": "porting.families.whisper:WhisperFamily",
}


@cache
def _offered() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS) if point.name not in _FAMILIES}


def family_names() -> tuple[str, ...]:
    """The names of all families, this package's first, without importing any."""
    return (*_FAMILIES, *sorted(_offered()))


def families_with(names: Collection[str]) -> Iterator[Family]:
    """Yield the families of this package whose rows cover most of these names of PyTorch tensors, the best first."""
    known = [get_family(name) for name in _FAMILIES]
    shares = {family: family.coverage(names) for family in known}
    yield from sorted((family for family in known if shares[family] > 0.5), key=lambda each: -shares[each])


@cache
def get_family(name: str) -> Family:
    """The family with this name; raises FamilyError if it does not exist or cannot be imported."""
    if name in _FAMILIES:
        module, _, attribute = _FAMILIES[name].partition(":")
        family: Family = getattr(import_module(module), attribute)()
        return family
    point = _offered().get(name)
    if point is None:
        guess = nearest(name, family_names())
        raise FamilyError(f"unknown family {name!r}", hint=f"{guess}Choose from {', '.join(family_names())}.")
    try:
        offered: Family = point.load()()
        _ = offered.variants
    except Exception as error:  # another package's code may raise anything
        package = point.dist.name if point.dist else point.value
        raise FamilyError(
            f"the family {name!r} of the package {package} cannot be used: {type(error).__name__}: {error}",
            hint=f"Update or remove {package}. The other families are not affected.",
        ) from None
    return offered
