"""Measure how far ways to preprocess images in TensorFlow are from the official way, in pixels and in logits.

    python scripts/compare_preprocessing.py PHOTOS --weights van_nano.h5 --picture preprocessing.png

The official way is timm's evaluation transform on Pillow images. PHOTOS is a folder, which is searched recursively.
Pixels are compared at 224x224, in levels of 255. Logits are those of the model of --variant at its own input size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from porting.models.frameworks import load_triton

load_triton()

Way = Callable[[bytes, int, float], np.ndarray]
SUFFIXES = {".jpg", ".jpeg", ".png"}


def official(contents: bytes, size: int, crop_fraction: float) -> np.ndarray:
    """Preprocess with timm, to `(size, size, 3)`."""
    import io

    from PIL import Image
    from timm.data import create_transform

    transform = create_transform(
        size, is_training=False, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=crop_fraction
    )
    image: np.ndarray = transform(Image.open(io.BytesIO(contents)).convert("RGB")).numpy().transpose(1, 2, 0)
    return image


def ours(contents: bytes, size: int, crop_fraction: float, dct_method: str = "INTEGER_ACCURATE") -> np.ndarray:
    import tensorflow as tf

    import van_tf

    pixels = tf.io.decode_jpeg(contents, channels=3, dct_method=dct_method)
    return np.asarray(van_tf.prepare_images(pixels, size, crop_fraction))


def resized_at_once(
    contents: bytes, size: int, crop_fraction: float, *, method: str = "bicubic", antialias: bool = True
) -> np.ndarray:
    """Resize with one call of tf.image.resize, without rounding, and crop as usual."""
    import tensorflow as tf

    import van_tf

    pixels = tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")
    sides, side = pixels.shape[:2], int(size / crop_fraction)
    shape = [side * length // min(sides) for length in sides]
    resized = tf.image.resize(pixels, shape, method=method, antialias=antialias)
    top, left = (round((length - size) / 2) for length in shape)
    return np.asarray(van_tf.preprocess_input(resized[top : top + size, left : left + size]))


def squashed(contents: bytes, size: int, crop_fraction: float) -> np.ndarray:
    """Resize directly to the target size, without keeping the aspect ratio and without a crop."""
    import tensorflow as tf

    import van_tf

    pixels = tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")
    return np.asarray(van_tf.preprocess_input(tf.image.resize(pixels, (size, size), "bicubic", antialias=True)))


WAYS: dict[str, Way] = {
    "van_tf.prepare_images": ours,
    "the same, decoded the fast way": partial(ours, dct_method="INTEGER_FAST"),
    "tf.image.resize, bicubic, antialias": resized_at_once,
    "bilinear, antialias": partial(resized_at_once, method="bilinear"),
    "bicubic, no antialias": partial(resized_at_once, antialias=False),
    "bilinear, no antialias (the default)": partial(resized_at_once, method="bilinear", antialias=False),
    "squashed to a square": squashed,
}


def draw(contents: bytes, path: Path) -> None:
    """Draw the official image and the differences of the other ways from it, amplified twenty times."""
    from matplotlib.figure import Figure

    expected = official(contents, 224, 0.9)
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    axes[0].imshow(expected / 2 + 0.5)
    axes[0].set_title("official", fontsize=10)
    for axis, (name, way) in zip(axes[1:], WAYS.items(), strict=True):
        levels = np.abs(way(contents, 224, 0.9) - expected) * 127.5
        axis.imshow((levels * 20 / 255).clip(0, 1))
        axis.set_title(f"{name}\nmean {levels.mean():.3f}, largest {levels.max():.0f}", fontsize=9)
    for axis in axes:
        axis.axis("off")
    figure.suptitle("Difference from the official preprocessing, times 20")
    figure.savefig(path, dpi=90)


@click.command(help=__doc__)
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--variant", default="nano", show_default=True)
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="PNG to draw for the first photo.")
def main(photos: Path, variant: str, weights: Path, picture: Path | None) -> None:
    import keras

    import van_tf

    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise click.ClickException(f"{photos} contains no JPEG or PNG files")
    config = van_tf.VARIANTS[variant]
    crop_fraction = 1.0 if variant == "nano" else 0.9
    model: Any = getattr(van_tf, f"van_{variant}")(weights=weights)
    levels: dict[str, list[np.ndarray]] = {name: [] for name in WAYS}
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in ("official", *WAYS)}
    for path in track(files, "preparing", transient=True):
        contents = path.read_bytes()
        expected = official(contents, 224, 0.9)
        inputs["official"].append(official(contents, config.input_size, crop_fraction))
        for name, way in WAYS.items():
            difference = np.abs(way(contents, 224, 0.9) - expected) * 127.5
            levels[name].append(np.array([difference.max(), difference.mean(), (difference > 0.5).mean()]))
            inputs[name].append(way(contents, config.input_size, crop_fraction))
    logits = {
        name: keras.ops.convert_to_numpy(model.predict(np.stack(batch), verbose=0)) for name, batch in inputs.items()
    }
    expected = logits["official"]
    table = Table("way", "pixels: largest", "mean", "share off", f"{variant}'s logits: largest", "other class")
    for name in WAYS:
        found = np.array(levels[name])
        change = np.abs(logits[name] - expected).max()
        other = int((logits[name].argmax(1) != expected.argmax(1)).sum())
        table.add_row(
            name,
            f"{found[:, 0].max():.1f}",
            f"{found[:, 1].mean():.4f}",
            f"{100 * found[:, 2].mean():.3f} %",
            f"{change:.3g}",
            f"{other} of {len(files)}",
        )
    Console(width=None if Console().is_terminal else 140).print(table)
    click.echo(f"{len(files)} photos; official logits reach {np.abs(expected).max():.3g}")
    if picture is not None:
        draw(files[0].read_bytes(), picture)
        click.echo(f"Wrote {picture}")


if __name__ == "__main__":
    main()
