"""The smallest possible family, with six fields. Most tests of the engine use it instead of VAN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porting.families.base import Family, Spec
from porting.mapping.naming import Naming
from porting.mapping.rules import KeyRule
from porting.models.images import Preprocessing
from porting.sources.table import Source

if TYPE_CHECKING:
    import keras
    from torch import nn

# The numbers of blocks and of channels.
VARIANTS = {"small": (2, 8), "large": (3, 16)}
RULES = (
    KeyRule("stem.conv", "stem_conv", "conv"),
    KeyRule("stem.bn", "stem_bn", "batch_norm"),
    KeyRule("blocks.{j}.dw", "block{j+1}_dw", "depthwise"),
    KeyRule("blocks.{j}.pw", "block{j+1}_pw", "conv"),
    KeyRule("blocks.{j}.bn", "block{j+1}_bn", "batch_norm"),
    KeyRule("norm", "norm", "layer_norm"),
    KeyRule("head", "head", "dense"),
)


class ToyFamily(Family):
    """A stem, some blocks and a head."""

    name = "toy"
    namings = (Naming("own", RULES),)
    sources = tuple(Source("toy", variant, "none", note="only tests have it", classes=5) for variant in VARIANTS)
    inputs = Preprocessing(input_size=16, resize_size=16)

    def build_reference(self, spec: Spec) -> nn.Module:
        return build_torch(*VARIANTS[spec.variant], spec.num_classes)

    def build_candidate(self, spec: Spec) -> keras.Model:
        return build_keras(*VARIANTS[spec.variant], spec.num_classes)


def build_torch(blocks: int, width: int, classes: int) -> nn.Module:
    import torch
    from torch import nn

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3, 2, 1, bias=False)
            self.bn = nn.BatchNorm2d(width)
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> Any:
            return self.act(self.bn(self.conv(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.pw = nn.Conv2d(width, width, 1)
            self.bn = nn.BatchNorm2d(width)
            self.act = nn.GELU()

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.act(self.bn(self.pw(self.dw(x))))

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Stem()
            self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, classes) if classes else nn.Identity()

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))

    return Toy()


def build_keras(blocks: int, width: int, classes: int) -> keras.Model:
    import keras
    from keras import layers

    settings: dict[str, Any] = {"epsilon": 1e-5, "momentum": 0.9}
    inputs = keras.Input((None, None, 3), name="images")
    x = layers.ZeroPadding2D(1, name="stem_pad")(inputs)
    x = layers.Conv2D(width, 3, 2, use_bias=False, name="stem_conv")(x)
    x = layers.ReLU(name="stem_act")(layers.BatchNormalization(name="stem_bn", **settings)(x))
    for number in range(1, blocks + 1):
        branch = layers.DepthwiseConv2D(3, padding="same", name=f"block{number}_dw")(x)
        branch = layers.Conv2D(width, 1, name=f"block{number}_pw")(branch)
        branch = layers.BatchNormalization(name=f"block{number}_bn", **settings)(branch)
        x = layers.Add(name=f"block{number}_add")([x, layers.Activation("gelu", name=f"block{number}_act")(branch)])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x) if classes else x)
