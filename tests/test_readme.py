"""Runs every block of Python in README and docs unchanged, on small models under the names that it uses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from porting.families.van import VanFamily
from porting.tasks.port import port

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text()))
]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.conv1(x))


class Net(nn.Module):
    """A model whose layers have the names in the rows of docs/any-two-models.md."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(3), Block(4))
        self.layer2 = nn.Sequential(Block(4), Block(4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def small_keras() -> keras.Model:
    inputs = x = keras.Input((12, 12, 3))
    for stage in (2, 3):
        for block in (1, 2):
            name = f"conv{stage}_block{block}_1_conv"
            x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name=name)(x)
    return keras.Model(inputs, keras.layers.Dense(5, name="predictions")(keras.layers.GlobalAveragePooling2D()(x)))


def test_there_are_blocks() -> None:
    assert len(BLOCKS) > 4


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(
    block: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_parity: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    names: dict[str, Any] = {"torch_model": Net().eval(), "keras_model": small_keras(), "images": images}
    if "van_nano.h5" in block:
        port(VanFamily(), "nano", tmp_path / "van_nano.h5", checkpoint=checkpoint, check=False)
        pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    if "def test_" in block:  # a gate, on a correct port
        import porting

        porting.port_weights(names["torch_model"], names["keras_model"], inputs=images)
        exec(block, names)
        names["test_port"](assert_parity)
        return
    exec(block, names)
    if "maps" in names:
        assert len(names["maps"]) == 4
    if "ported" in names:
        assert names["ported"].report.passed
