"""Loads image files into the arrays that both models take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import SourceError
from porting.kinds.transforms import Array

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Means and standard deviations of the images of ImageNet, on which most published models were trained.
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Preprocessing:
    """A model's preprocessing: bicubic resize of the shorter side, centre crop, normalisation.

    Sizes are in pixels. `mean` and `std` have one number per channel, for values from 0 to 1.
    """

    input_size: int
    resize_size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


def find_images(folder: Path) -> list[Path]:
    """List the image files in a folder, sorted by name. Raises SourceError when there are none."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "no such folder"
        raise SourceError(f"{folder}: {what}", hint="--images takes a folder of PNG or JPEG files.")
    # `is_file` leaves out pipes and devices, which could block forever.
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise SourceError(f"{folder}: holds no images", hint=f"Expected files ending in {', '.join(IMAGE_SUFFIXES)}.")
    return paths


def load_images(paths: list[Path], preprocessing: Preprocessing) -> Array:
    """Load images as `(N, input_size, input_size, 3)` float32. Raises SourceError for a file that is no image."""
    return np.stack([_load_image(path, preprocessing) for path in paths])


def _load_image(path: Path, preprocessing: Preprocessing) -> Array:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path}: not a readable image: {error}", hint="Remove it or give another folder.") from None
    return prepare_image(image, preprocessing)


def prepare_image(image: Image.Image, preprocessing: Preprocessing) -> Array:
    """Prepare an RGB image as `(input_size, input_size, 3)` float32."""
    from PIL import Image

    # Like torchvision's Resize and CenterCrop: the longer side is rounded down, and half a pixel to the even number.
    width, height = (preprocessing.resize_size * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - preprocessing.input_size) / 2) for side in (width, height))
    image = image.crop((left, top, left + preprocessing.input_size, top + preprocessing.input_size))
    return _normalised(np.asarray(image, np.float32) / np.float32(255), preprocessing)


def prepare_in_tensorflow(image: Image.Image, preprocessing: Preprocessing) -> Array:
    """Prepare the same image with TensorFlow's functions at their defaults: bilinear, without antialiasing."""
    import tensorflow as tf

    width, height = (preprocessing.resize_size * side // min(image.size) for side in image.size)
    resized = tf.image.resize(np.asarray(image), (height, width)).numpy()
    top, left = (round((side - preprocessing.input_size) / 2) for side in (height, width))
    cropped = resized[top : top + preprocessing.input_size, left : left + preprocessing.input_size]
    return _normalised(cropped.astype(np.float32) / np.float32(255), preprocessing)


def _normalised(pixels: Array, preprocessing: Preprocessing) -> Array:
    mean, std = np.asarray(preprocessing.mean, np.float32), np.asarray(preprocessing.std, np.float32)
    normalised: Array = (pixels - mean) / std
    return normalised
