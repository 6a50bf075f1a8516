"""Tests the embedded default weights: small, trained, and right about the images that come with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import van_tf
from porting.data import weights_folder
from porting.families.van import VanFamily
from porting.files.checkpoint import read_checkpoint, verify_container
from porting.models.images import find_images, load_images
from porting.sources.fetch import fetch
from porting.tasks.port import port

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def images() -> list[Path]:
    return find_images(weights_folder() / "parity_images")


def test_the_checkpoint_is_small_and_in_the_official_format() -> None:
    path = fetch(VanFamily().source_of("nano"), verify=verify_container)
    assert path.stat().st_size <= 2_000_000
    checkpoint = read_checkpoint(path)
    assert checkpoint.wrapper == "state_dict"
    parameters = [
        a for name, a in checkpoint.state_dict.items() if "running_" not in name and "num_batches" not in name
    ]
    assert sum(array.size for array in parameters) <= 500_000


def test_the_images_are_four_of_each_class(images: list[Path]) -> None:
    assert sorted(path.name.split("_")[0] for path in images) == sorted(CLASSES * 4)
    for path in images:
        with Image.open(path) as image:
            assert image.size == (32, 32)


@pytest.mark.slow
def test_ported_and_right_about_most_images(family: VanFamily, images: list[Path], tmp_path: Path) -> None:
    result = port(family, "nano", tmp_path / "van_nano.h5")
    assert result.report is not None
    assert result.report.logits is not None
    assert result.report.logits.samples == result.report.logits.top1_agreement == 40
    assert result.provenance["source"]["license"] == "Apache-2.0"

    labels = np.array([CLASSES.index(path.name.split("_")[0]) for path in images])
    batch = load_images(images, family.preprocessing(family.spec("nano")))
    model = van_tf.van_nano()
    model.load_weights(tmp_path / "van_nano.h5")
    predicted = model.predict(batch, verbose=0).argmax(1)
    reference = result.case.load_reference()
    with torch.inference_mode():
        expected = reference(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).numpy().argmax(1)
    np.testing.assert_array_equal(predicted, expected)
    assert (predicted == labels).sum() >= 28, "a trained nano is right about most of them; chance would be 4"
