"""Fine-tune ported weights on a folder of images, with the paper's recipe (arXiv 2202.09741, section 4.1).

\b
    python scripts/finetune.py IMAGES --variant nano --weights van_nano.h5 --out run
    tensorboard --logdir run/log

IMAGES contains the folders train and test (or val), each with one folder of JPEG or PNG files per class. The recipe is
AdamW, a cosine schedule with warm-up, label smoothing, random crop and flip, MixUp or CutMix, random erasing, and
stochastic depth. All of these are Keras's own, except the arithmetic of the optimiser. A stopped run resumes after the
last complete epoch when it is started again. The script writes best.weights.h5, TensorBoard's log and, at the end,
tuned.keras (which `van-port revert` accepts) to OUT.

--strategy mirrored uses all GPUs of a machine. Several machines are not supported: with Keras 3.15, fit fails under
tf.distribute.MultiWorkerMirroredStrategy when it averages the first batch, with "Attempt to convert a value
(PerReplica...) with an unsupported type" (keras issue 20585; tested as two processes with TensorFlow 2.21).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import click
import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png"}


def find_images(folder: Path, limit: int | None) -> tuple[list[str], np.ndarray, list[str]]:
    """Find paths, class numbers and class names. With `limit`, use equally many images of each class."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    paths: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(names):
        found = sorted(str(path) for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        found = found[: None if limit is None else -(-limit // len(names))]
        paths += found
        labels += [number] * len(found)
    if not paths:
        raise click.ClickException(f"{folder} has no folders of JPEG or PNG files, one per class")
    return paths, np.array(labels), names


def training_data(paths: list[str], labels: np.ndarray, classes: int, size: int, batch: int, recipe: Any) -> Any:
    """Batches of augmented images in [-1, 1] and soft labels, reshuffled each epoch."""
    import keras
    import tensorflow as tf

    import van_tf

    one_image = keras.Sequential(
        [
            keras.layers.RandomCrop(size, size),
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomErasing((recipe["erasing"],) * 2, value_range=(-1, 1)),
        ]
    )
    mixes = [keras.layers.MixUp(alpha=0.8), keras.layers.CutMix(factor=1.0)]

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        image = van_tf.prepare_images(van_tf.load_image(path), size + size // 8, crop_fraction=1.0)
        return image, tf.one_hot(label, classes)

    def augment(images: Any, labels: Any) -> tuple[Any, Any]:
        images = one_image(images, training=True)
        if not recipe["mix"]:
            return images, labels
        both = {"images": images, "labels": labels}
        mixed = [mix(both, training=True) for mix in mixes]
        first = tf.random.uniform(()) < 0.5
        return tuple(tf.where(first, mixed[0][key], mixed[1][key]) for key in ("images", "labels"))

    dataset = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths), seed=0)
    dataset = dataset.map(load, tf.data.AUTOTUNE).batch(batch, drop_remainder=True)
    return dataset.map(augment, tf.data.AUTOTUNE).prefetch(2)


def test_data(paths: list[str], labels: np.ndarray, classes: int, size: int, fraction: float, batch: int) -> Any:
    """Batches of images, preprocessed as for evaluation, and labels."""
    import tensorflow as tf

    import van_tf

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        return van_tf.prepare_images(van_tf.load_image(path), size, fraction), tf.one_hot(label, classes)

    return tf.data.Dataset.from_tensor_slices((paths, labels)).map(load, tf.data.AUTOTUNE).batch(batch).prefetch(2)


def make_strategy(name: str) -> Any:
    import tensorflow as tf

    return tf.distribute.MirroredStrategy() if name == "mirrored" else tf.distribute.get_strategy()


@click.command(help=__doc__)
@click.argument("images", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--variant", default="nano", show_default=True)
@click.option("--weights", help="Ported file, or the name of the data set of published weights.  [default: untrained]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--size", type=click.IntRange(min=32), help="Image size.  [default: the variant's]")
@click.option("--epochs", default=30, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option(
    "--learning-rate",
    default=5e-4,
    show_default=True,
    help="Learning rate for a batch of 1024; it is scaled with the square root of the batch size.",
)
@click.option("--weight-decay", default=0.05, show_default=True)
@click.option("--warmup-epochs", default=1.0, show_default=True)
@click.option("--label-smoothing", default=0.1, show_default=True)
@click.option("--drop-path", default=0.1, show_default=True)
@click.option("--erasing", default=0.25, show_default=True, help="Probability that a rectangle of an image is erased.")
@click.option("--mix/--no-mix", default=True, show_default=True, help="Use MixUp or CutMix.")
@click.option("--limit", type=click.IntRange(min=1), help="Use this many images of each set.  [default: all]")
@click.option("--strategy", type=click.Choice(["one", "mirrored"]), default="one", show_default=True)
def main(
    images: Path,
    variant: str,
    weights: str | None,
    out: Path,
    size: int | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    warmup_epochs: float,
    label_smoothing: float,
    drop_path: float,
    limit: int | None,
    strategy: str,
    **recipe: Any,
) -> None:
    # This must come before TensorFlow's first operation.
    distribution = make_strategy(strategy)
    import keras

    import van_tf

    if variant not in van_tf.VARIANTS:
        raise click.UsageError(f"--variant must be one of {', '.join(van_tf.VARIANTS)}")
    keras.utils.set_random_seed(0)
    config = van_tf.VARIANTS[variant]
    size = size or config.input_size
    held_out = next((images / name for name in ("test", "val") if (images / name).is_dir()), None)
    if held_out is None or not (images / "train").is_dir():
        raise click.ClickException(f"{images} has no folders train and test (or val)")
    paths, labels, names = find_images(images / "train", limit)
    test_paths, test_labels, test_names = find_images(held_out, limit)
    if names != test_names:
        raise click.ClickException(f"train and {held_out.name} do not have the same classes")
    training = training_data(paths, labels, len(names), size, batch_size, recipe)
    testing = test_data(test_paths, test_labels, len(names), size, 1.0 if variant == "nano" else 0.9, batch_size)
    steps = len(paths) // batch_size
    if not steps:
        raise click.ClickException(f"{len(paths)} images do not make one batch of {batch_size}")
    rate = learning_rate * math.sqrt(batch_size / 1024)  # the rule for Adam; the linear rule is for SGD
    warmup = round(warmup_epochs * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 100, max(epochs * steps - warmup, 1), warmup_target=rate, warmup_steps=warmup
    )
    with distribution.scope():
        try:
            build = getattr(van_tf, f"van_{variant}")
            model = build(weights=weights, classes=len(names), drop_path_rate=drop_path)
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            raise click.ClickException(str(error)) from None
        optimizer = van_tf.AdamW(schedule, weight_decay=weight_decay)
        # As in timm, only kernels decay.
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias", "layer_scale"])
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing)
        model.compile(optimizer, loss, metrics=["accuracy"])
    out.mkdir(parents=True, exist_ok=True)
    click.echo(
        f"{len(paths)} images of {len(names)} classes, {steps} steps per epoch; maximum learning rate {rate:.2g}"
    )
    best = out / "best.weights.h5"
    goes_on = best.is_file() and (out / "backup").is_dir()
    if goes_on:
        model.load_weights(best)  # to measure the accuracy to beat; the backup then replaces them
    before = model.evaluate(testing, verbose=0, return_dict=True)["accuracy"]
    click.echo(f"{'best so far' if goes_on else 'before'}: {100 * before:.2f}% of {len(test_paths)} test images")
    model.fit(
        training,
        epochs=epochs,
        shuffle=False,  # the data set shuffles itself
        validation_data=testing,
        verbose=1 if os.isatty(1) else 2,
        callbacks=[
            keras.callbacks.BackupAndRestore(out / "backup"),
            keras.callbacks.ModelCheckpoint(
                best,
                "val_accuracy",
                mode="max",
                save_best_only=True,
                save_weights_only=True,
                initial_value_threshold=before if goes_on else None,
            ),
            keras.callbacks.TensorBoard(out / "log"),
        ],
    )
    model.save(out / "tuned.keras")
    click.echo(f"Wrote {out / 'tuned.keras'} and {best}")


if __name__ == "__main__":
    main()
