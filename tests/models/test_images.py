from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from porting.errors import SourceError
from porting.models.images import Preprocessing, find_images, load_images


def save(path: Path, width: int, height: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (500, 333), (32, 32)], ids=str)
def test_shorter_side_to_size_then_centre_crop(tmp_path: Path, width: int, height: int) -> None:
    path = save(tmp_path / "x.png", width, height)
    preprocessing = Preprocessing(input_size=56, resize_size=62)
    found = load_images([path], preprocessing)
    assert found.shape == (1, 56, 56, 3)
    assert found.dtype == np.float32

    scale = 62 / min(width, height)
    resized = Image.open(path).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 56) // 2, (resized.height - 56) // 2
    expected = np.asarray(resized)[top : top + 56, left : left + 56] / 127.5 - 1.0
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_mean_and_std_are_of_values_from_0_to_1(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (51, 102, 204)).save(tmp_path / "x.png")
    found = load_images([tmp_path / "x.png"], Preprocessing(8, 8, (0.1, 0.2, 0.3), (0.5, 0.25, 0.1)))
    np.testing.assert_allclose(found[0, 0, 0], [0.2, 0.8, 5.0], rtol=1e-6)


def test_grey_images_get_three_channels(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 100).save(tmp_path / "x.png")
    assert load_images([tmp_path / "x.png"], Preprocessing(8, 8)).shape == (1, 8, 8, 3)


def test_images_are_found_by_name_and_others_passed_over(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.PNG"]


def test_errors_say_which_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(SourceError, match="missing: no such folder"):
        find_images(tmp_path / "missing")
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(SourceError, match="x.png: not a readable image"):
        load_images([tmp_path / "x.png"], Preprocessing(8, 8))
