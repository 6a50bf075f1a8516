"""The table of variants."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class VanConfig:
    """What tells one Visual Attention Network from another.

    `embed_dims`, `depths` and `mlp_ratios` have one number a stage. `input_size` is the height and width in
    pixels that the published weights were trained at; the network itself takes any size from 32 up.
    `layer_norm_epsilon` is 1e-6 in the official classifier and 1e-5 in some other published code. `trained_on` is the
    data set of the published weights, and `classes` how many it has.

    Raises ValueError when the stages do not agree in number or a number is not positive.
    """

    name: str
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    input_size: int = 224
    layer_norm_epsilon: float = 1e-6
    classes: int = 1000
    trained_on: str = "imagenet"

    def __post_init__(self) -> None:
        stages = {len(self.embed_dims), len(self.depths), len(self.mlp_ratios)}
        if len(stages) != 1 or 0 in stages:
            raise ValueError(
                f"embed_dims, depths and mlp_ratios need one number a stage each: "
                f"got {self.embed_dims}, {self.depths} and {self.mlp_ratios}"
            )
        if min(*self.embed_dims, *self.depths, *self.mlp_ratios) < 1:
            raise ValueError(f"dimensions, depths and ratios are positive numbers: got {self}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Paper, table 2; b4 to b6 from the official repositories. Nano is this project's own.
VARIANTS: dict[str, VanConfig] = {
    config.name: config
    for config in (
        VanConfig(
            "nano", (32, 48, 64, 96), (2, 2, 2, 1), (4, 4, 4, 4), input_size=64, classes=10, trained_on="cifar10"
        ),
        VanConfig("b0", (32, 64, 160, 256), (3, 3, 5, 2)),
        VanConfig("b1", (64, 128, 320, 512), (2, 2, 4, 2)),
        VanConfig("b2", (64, 128, 320, 512), (3, 3, 12, 3)),
        VanConfig("b3", (64, 128, 320, 512), (3, 5, 27, 3)),
        VanConfig("b4", (64, 128, 320, 512), (3, 6, 40, 3)),
        VanConfig("b5", (96, 192, 480, 768), (3, 3, 24, 3)),
        VanConfig("b6", (96, 192, 384, 768), (6, 6, 90, 6)),
    )
}
