"""A family of one variant: a VAN of any size, configured by a file of settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import FamilyError, KeyMapError, SourceError
from porting.families.base import Spec
from porting.families.van import VanFamily
from porting.kinds.transforms import Array
from porting.models.images import Preprocessing
from porting.sources.table import Source

if TYPE_CHECKING:
    import van_tf
    from porting.files.checkpoint import Checkpoint
    from porting.progress import Progress
    from porting.references.van import VanShape

_RGB = 3
# The crop fraction of the official evaluation.
_CROP = 0.9


class ConfiguredVanFamily(VanFamily):
    """The VAN that a JSON or TOML file describes, with van_tf's settings or as transformers' config.json.

    Raises FamilyError if the file is not the configuration of a VAN.
    """

    def __init__(self, path: Path) -> None:
        from porting.models.frameworks import start_tensorflow

        start_tensorflow()
        from van_tf.config import VanConfig, read_settings

        try:
            settings = read_settings(path)
            self._config = VanConfig.from_dict(settings, name=path.stem)
        except FileNotFoundError as error:
            raise SourceError(str(error), hint="--config takes a .json or .toml file.") from None
        except (ValueError, TypeError) as error:
            raise FamilyError(
                f"{path}: not the configuration of a VAN: {error}",
                hint='Expected settings such as {"embed_dims": [32, 64], "depths": [2, 2], "mlp_ratios": [8, 4]}.',
            ) from None
        self._states_epsilon = not {"layer_norm_eps", "layer_norm_epsilon"}.isdisjoint(settings)
        self._path = path
        self.variant = re.sub(r"\W+", "_", self._config.name) or "custom"
        self.sources = (Source(self.name, self.variant, "its own", note="by --config", classes=self._config.classes),)

    def shape(self, variant: str) -> VanShape:
        from porting.references.van import VanShape

        config = self._config
        return VanShape(config.embed_dims, config.depths, config.mlp_ratios, config.in_chans)

    def config(self, variant: str) -> van_tf.VanConfig:
        return self._config

    def stated_settings(self, variant: str, facts: Mapping[str, Any]) -> Mapping[str, float]:
        own = {"layer_norm_eps": self._config.layer_norm_epsilon} if self._states_epsilon else {}
        stated = super().stated_settings(variant, facts)
        if any(stated.get(name, value) != value for name, value in own.items()):
            raise KeyMapError(
                f"{self._path} states layer_norm_eps {own['layer_norm_eps']:g}, but the checkpoint states "
                f"{stated['layer_norm_eps']:g}",
                hint="Use the settings that the checkpoint was trained with.",
            )
        return {**stated, **own}

    def preprocessing(self, spec: Spec) -> Preprocessing:
        side = self._config.input_size
        return Preprocessing(input_size=side, resize_size=int(side / _CROP))

    def check_inputs(self, spec: Spec) -> Any:
        """None for RGB images; else noise with the model's number of channels."""
        if self._config.in_chans == _RGB:
            return None
        noise: Array = np.random.default_rng(0).normal(size=(4, *[self._config.input_size] * 2, self._config.in_chans))
        return noise.astype(np.float32)

    def how_to_build(self, spec: Spec) -> str:
        arguments = [f'van_tf.VanConfig.from_file("{self._path.name}")']
        if not spec.num_classes:
            arguments.append("include_top=False")
        elif spec.num_classes != self._config.classes:
            arguments.append(f"classes={spec.num_classes}")
        epsilon = spec.settings["layer_norm_eps"]
        if epsilon != self._config.layer_norm_epsilon:
            arguments.append(f"layer_norm_epsilon={epsilon:g}")
        return f"van_tf.van({', '.join(arguments)})"

    def published(self, variant: str, progress: Progress | None = None) -> Checkpoint:
        raise SourceError(
            f"{self._path}: no published weights are known", hint="Give a PyTorch checkpoint with --checkpoint FILE."
        )
