"""How thorough a check is, and the images that it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from porting.data import weights_folder
from porting.kinds.transforms import Array
from porting.models.images import Preprocessing, find_images, load_images
from porting.parity.report import Limits

SAMPLES_OF_LARGE_IMAGES = 4


@dataclass(frozen=True)
class CheckOptions:
    """How thorough a check is.

    `images` is a folder, by default the embedded one, and `samples` how many of them: by default all for a small
    input and four for a large one. `locate` looks for the layers where the models part, `stress` adds other weights and
    shapes, `train` ten steps of training with each of the family's optimisers. `strict_settings` makes settings that
    matter only in training count for a model that a user brings, as they do for one that is built here; `waive` names
    modules, or "module:setting", whose settings may differ.
    `allow_non_finite` lets NaN and infinity pass: where the same weight has the same on both sides, the check has zero
    in its place on both, so that it can tell anything of the others.
    """

    limits: Limits = field(default_factory=Limits)
    images: Path | None = None
    samples: int | None = None
    locate: bool = True
    stress: bool = False
    train: bool = False
    allow_non_finite: bool = False
    strict_settings: bool = False
    waive: tuple[str, ...] = ()

    def load_images(self, preprocessing: Preprocessing, input_size: int | None = None) -> Array:
        """The images of a check, `(N, H, W, 3)`, prepared as the model's authors did; raises SourceError.

        For another `input_size` than theirs the resized side grows or shrinks with it.
        """
        if input_size is not None:
            resize_size = preprocessing.resize_size * input_size // preprocessing.input_size
            preprocessing = replace(preprocessing, input_size=input_size, resize_size=resize_size)
        paths = find_images(self.images if self.images is not None else weights_folder() / "parity_images")
        samples = self.samples
        if samples is None:
            samples = len(paths) if preprocessing.input_size <= 64 else SAMPLES_OF_LARGE_IMAGES
        # Spread over the folder: its names may be sorted by class.
        chosen = np.linspace(0, len(paths) - 1, min(samples, len(paths))).round().astype(int)
        return load_images([paths[index] for index in chosen], preprocessing)
