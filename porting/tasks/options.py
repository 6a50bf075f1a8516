"""Options of a check: how thorough it is, and the images that it uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from porting.data import weights_folder
from porting.kinds.transforms import Array
from porting.models.images import Preprocessing, find_images, load_images
from porting.parity.report import Limits

# The greatest width of images that are all used.
SMALL_IMAGE = 64
SAMPLES_OF_LARGE_IMAGES = 2


@dataclass(frozen=True)
class CheckOptions:
    """Options of a check.

    `images` is a folder, by default the embedded one. `samples` is the number of images or other inputs to use: by
    default all images for inputs of up to 64 pixels, else two: one for the layers and one for the loud weights.
    `locate` finds the layers where the models diverge. `stress` adds other weights and shapes. `train` adds ten
    training steps with each of the family's optimisers.
    `strict_settings` also compares settings that matter only in training for a user's own model, as is always done for
    a model built here. `waive` names modules, or "module:setting", whose settings may differ.
    `allow_non_finite` allows NaN and infinite weights. Where both sides have the same non-finite weight, the check
    replaces it with zero on both sides, so that the other weights can still be compared.
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
        """Load the images of a check, `(N, H, W, 3)`, with the model's own preprocessing. Raises SourceError.

        If `input_size` differs from the model's own, the resize size scales with it.
        """
        if input_size is not None:
            resize_size = preprocessing.resize_size * input_size // preprocessing.input_size
            preprocessing = replace(preprocessing, input_size=input_size, resize_size=resize_size)
        paths = find_images(self.images if self.images is not None else weights_folder() / "parity_images")
        samples = self.samples
        if samples is None:
            samples = len(paths) if preprocessing.input_size <= SMALL_IMAGE else SAMPLES_OF_LARGE_IMAGES
        # Spread the samples over the folder, because its names may be sorted by class.
        chosen = np.linspace(0, len(paths) - 1, min(samples, len(paths))).round().astype(int)
        return load_images([paths[index] for index in chosen], preprocessing)

    def compared(self, images: Array) -> Array:
        """The images to compare layer by layer: all that `samples` asks for, else as many as fit into one batch."""
        is_small = images.shape[1] <= SMALL_IMAGE
        return images if self.samples is not None or is_small else images[: batch_size_of(images)]


def batch_size_of(images: Array) -> int:
    """How many images are checked at once: up to eight of 64x64 pixels, or one large one."""
    height, width = images.shape[1:3]
    return max(1, int(8 * SMALL_IMAGE**2 // (height * width)))
