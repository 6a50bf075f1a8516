"""The configuration of a VAN, and the table of variants."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Names of the same settings in other code: transformers' config.json, timm and mmpretrain.
_OTHER_NAMES = {
    "hidden_sizes": "embed_dims",
    "num_channels": "in_chans",
    "in_channels": "in_chans",
    "image_size": "input_size",
    "img_size": "input_size",
    "layer_norm_eps": "layer_norm_epsilon",
    "num_classes": "classes",
    "num_labels": "classes",
}
# The default of transformers, whose config.json leaves out defaults.
_TRANSFORMERS_LABELS = 2
_MOST_STAGES = 9
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class VanConfig:
    """The configuration of a Visual Attention Network.

    `embed_dims`, `depths` and `mlp_ratios` have one number per stage. The width of an MLP is `int(dim * ratio)`, as in
    the official code. `input_size` is the height and width in pixels at which the published weights were trained; the
    network accepts any size from 32. `in_chans` is the number of image channels. `layer_norm_epsilon` is 1e-6 in the
    official classifier and 1e-5 in some other published code. `trained_on` is the data set of the published weights, or
    "" if there are none, and `classes` is its number of classes.

    Raises ValueError if the numbers of stages differ or a number is out of range.
    """

    name: str
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    input_size: int = 224
    layer_norm_epsilon: float = 1e-6
    classes: int = 1000
    trained_on: str = "imagenet"
    in_chans: int = 3

    def __post_init__(self) -> None:
        stages = {len(self.embed_dims), len(self.depths), len(self.mlp_ratios)}
        if len(stages) != 1 or not 1 <= max(stages) <= _MOST_STAGES:
            raise ValueError(
                f"embed_dims, depths and mlp_ratios need one number per stage each, for 1 to {_MOST_STAGES} stages: "
                f"got {self.embed_dims}, {self.depths} and {self.mlp_ratios}"
            )
        whole = {
            "embed_dims": self.embed_dims,
            "depths": self.depths,
            "input_size": (self.input_size,),
            "classes": (self.classes,),
            "in_chans": (self.in_chans,),
        }
        for field, numbers in whole.items():
            if not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError(f"{field} must be positive integers: got {numbers}")
        if not all(
            _is_number(ratio) and int(dim * ratio) > 0
            for dim, ratio in zip(self.embed_dims, self.mlp_ratios, strict=True)
        ):
            raise ValueError(f"mlp_ratios must give an MLP of at least one channel: got {self.mlp_ratios}")
        if not _is_number(self.layer_norm_epsilon) or not 0 < self.layer_norm_epsilon < 1:
            raise ValueError(f"layer_norm_epsilon must be between 0 and 1: got {self.layer_norm_epsilon}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], name: str = "custom") -> VanConfig:
        """Create a config from the result of `to_dict`, or of transformers' `VanConfig.to_dict`, ignoring other keys.

        `name` is used if the settings have no name. Raises ValueError for settings of another network.
        """
        model_type = settings.get("model_type", "van")
        if model_type != "van":
            raise ValueError(f"the settings are for the model type {model_type!r}, not for van")
        found: dict[str, Any] = {"trained_on": ""}
        for key, value in settings.items():
            field = _OTHER_NAMES.get(key, key)
            if field in cls.__dataclass_fields__:
                found[field] = tuple(value) if isinstance(value, list) else value
        if isinstance(settings.get("id2label"), Mapping):
            found.setdefault("classes", len(settings["id2label"]))
        if "hidden_sizes" in settings:
            found.setdefault("classes", _TRANSFORMERS_LABELS)
        if missing := [field for field in ("embed_dims", "depths") if field not in found]:
            raise ValueError(f"the settings lack {' and '.join(missing)}")
        stages = len(found["embed_dims"]) if isinstance(found["embed_dims"], tuple) else 0
        fixed = {"patch_sizes": [7] + [3] * (stages - 1), "strides": [4] + [2] * (stages - 1), "hidden_act": "gelu"}
        for key, expected in fixed.items():
            if settings.get(key, expected) != expected:
                raise ValueError(f"{key} is {settings[key]}; a VAN of {stages} stages has {expected}")
        found.setdefault("mlp_ratios", (8, 8, 4, 4))
        if not isinstance(found.setdefault("name", name), str):
            raise ValueError(f"the name must be text: got {found['name']!r}")
        if not all(isinstance(found[field], tuple) for field in ("embed_dims", "depths", "mlp_ratios")):
            raise ValueError("embed_dims, depths and mlp_ratios must be lists of numbers")
        return cls(**found)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> VanConfig:
        """Read a config from a JSON or TOML file, such as transformers' config.json.

        Raises FileNotFoundError, or ValueError if the file is not a configuration of a VAN.
        """
        path = Path(path)
        try:
            return cls.from_dict(read_settings(path), name=path.stem)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not the configuration of a VAN: {error}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a JSON or TOML file; raises FileNotFoundError, or ValueError for other contents."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8")
        settings = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(settings, dict):
        raise ValueError("expected an object with the settings")
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


# From the paper, table 2; b4 to b6 from the official repositories. nano is this project's own.
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
