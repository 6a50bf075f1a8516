"""Runs the embedded checkpoint over all 10,000 CIFAR-10 test images, in PyTorch and in TensorFlow after porting.

    van-port --variant nano
    python scripts/evaluate_nano.py --data cifar10.tar.gz --weights van_nano.h5

Both get the same arrays: enlarged by Pillow, as the parity check does it.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import click
import numpy as np
from PIL import Image
from rich.progress import track

from porting.families.registry import get_family
from porting.models.frameworks import start_tensorflow
from porting.models.images import load_images
from porting.tasks.case import open_case

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_test_images(archive: Path, folder: Path) -> tuple[list[Path], np.ndarray]:
    """Unpacks the test images as PNG files into `folder`; their paths and labels."""
    paths, labels = [], []
    with tarfile.open(archive) as tar:
        for member in track(tar, description="reading", total=60_000, transient=True):
            parts = Path(member.name).parts
            if member.isfile() and "test" in parts and parts[-2] in CLASSES:
                handle = tar.extractfile(member)
                assert handle is not None  # isfile() has just said so
                path = folder / f"{parts[-2]}_{Path(parts[-1]).stem}.png"
                Image.open(io.BytesIO(handle.read())).convert("RGB").save(path)
                paths.append(path)
                labels.append(CLASSES.index(parts[-2]))
    return paths, np.array(labels)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
def main(data: Path, weights: Path) -> None:
    import tempfile

    import torch

    start_tensorflow()
    import van_tf

    family = get_family("van")
    reference = open_case(family, "nano", None).load_reference()
    candidate = van_tf.van_nano()
    candidate.load_weights(weights)
    expected, actual = [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        paths, labels = read_test_images(data, Path(folder))
        for start in track(range(0, len(paths), 100), description="predicting", transient=True):
            batch = load_images(paths[start : start + 100], family.preprocessing(family.spec("nano")))
            expected.append(reference(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).numpy())
            actual.append(candidate.predict_on_batch(batch))
    torch_logits, keras_logits = np.concatenate(expected), np.concatenate(actual)
    for name, logits in (("PyTorch", torch_logits), ("TensorFlow", keras_logits)):
        top1 = (logits.argmax(1) == labels).mean()
        top5 = (np.argsort(logits, axis=1)[:, -5:] == labels[:, None]).any(1).mean()
        click.echo(f"{name}: top-1 {top1:.4f}, top-5 {top5:.4f} on {len(labels):,} images")
    same = int((torch_logits.argmax(1) == keras_logits.argmax(1)).sum())
    click.echo(
        f"same prediction on {same:,}; largest difference of a logit {abs(torch_logits - keras_logits).max():.1e}"
    )


if __name__ == "__main__":
    main()
