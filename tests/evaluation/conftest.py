"""A toy model, its port, and a data set on which PyTorch is right about almost every image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from porting.evaluation.items import Block, Item
from porting.models.frameworks import start_tensorflow
from porting.models.synthetic import fill_with_synthetic_weights
from porting.tasks.port import port
from tests.families.toy import ToyFamily

CLASSES = 5
COUNT = 120


@dataclass(frozen=True)
class Toy:
    family: ToyFamily
    checkpoint: Path
    weights: Path
    folder: Path
    labels: tuple[int, ...]

    @property
    def images(self) -> list[Path]:
        return sorted(self.folder.rglob("*.png"))


def save_images(folder: Path, seed: int = 0) -> list[Path]:
    """Make images of two colours in stripes, of different sizes."""
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(COUNT):
        height, width = rng.integers(16, 40, 2)
        pixels = np.zeros((height, width, 3), np.uint8) + rng.integers(0, 255, 3).astype(np.uint8)
        pixels[:: int(rng.integers(2, 6))] = rng.integers(0, 255, 3)
        path = folder / f"{number:03}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A toy model, and a data set in which every image is in the folder of the class that PyTorch predicts."""
    root = tmp_path_factory.mktemp("toy")
    start_tensorflow()
    family = ToyFamily()
    spec = family.spec("small")
    reference = family.build_reference(spec)
    fill_with_synthetic_weights(reference, seed=5)
    reference.eval()
    prepare = family.prepare_reference(spec)
    flat, folder = root / "flat", root / "data"
    flat.mkdir()
    paths = save_images(flat)
    images = np.stack([prepare(Image.open(path)) for path in paths])
    with torch.inference_mode():
        tensor = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        # This makes PyTorch predict all classes.
        reference.get_parameter("head.bias").sub_(reference(tensor).mean(0))
        answers = reference(tensor).argmax(1).numpy()
    for path, answer in zip(paths, answers, strict=True):
        (folder / str(answer)).mkdir(parents=True, exist_ok=True)
        path.rename(folder / str(answer) / path.name)
    assert len(set(answers)) == CLASSES
    checkpoint, weights = root / "toy.pth", root / "toy.h5"
    torch.save(reference.state_dict(), checkpoint)
    port(family, "small", weights, checkpoint=checkpoint, check=False)
    return Toy(family, checkpoint, weights, folder, tuple(int(each) for each in answers))


def block_of(*items: Item) -> Block:
    return Block(0, 0, items)
