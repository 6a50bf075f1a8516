"""Tests the fine-tuning script: it learns, and continues a run that was stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import van_tf

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of two classes, reddish and bluish."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 8)):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def command(images: Path, out: Path, *more: str) -> list[str]:
    options = ["--weights", "cifar10", "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "0.5"]
    return [sys.executable, str(SCRIPT), str(images), "--out", str(out), *options, "--learning-rate", "0.009", *more]


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_learns(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAN_PORT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    with subprocess.Popen(command(images, out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("Epoch 2/3"):
                first.kill()
    assert not (out / "tuned.keras").exists()
    again = subprocess.run(command(images, out), capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "best so far: " in again.stdout
    assert "Epoch 1/3" not in again.stdout
    assert "Epoch 3/3" in again.stdout
    assert {path.name for path in out.iterdir()} >= {"tuned.keras", "best.weights.h5", "log"}
    assert list((out / "log").rglob("events.out.tfevents*"))
    tuned = van_tf.van_nano(weights=out / "tuned.keras", classes=2)
    assert tuned.output_shape == (None, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variant", "b9"), "--variant must be one of nano, b0"),
        (("--weights", "nowhere.h5"), "no such weights file: nowhere.h5"),
        (("--batch-size", "1000"), "32 images do not make one batch of 1000"),
    ],
)
def test_mistakes_end_in_one_message(images: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(command(images, tmp_path / "run", *arguments), capture_output=True, text=True, timeout=200)
    assert done.returncode in {1, 2}
    assert message in done.stderr
    assert "Traceback" not in done.stderr
