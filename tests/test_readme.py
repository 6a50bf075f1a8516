"""Runs every block of Python in README and docs unchanged, on small models under the names that it uses."""

from __future__ import annotations

import sys
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
from porting.kinds import KINDS
from porting.tasks.export import export
from porting.tasks.port import port
from tests.documents import GUIDES, ROOT, python_blocks, python_files

BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in GUIDES
    for number, block in enumerate(python_blocks(page))
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
    monkeypatch.syspath_prepend(tmp_path)
    for file, text in python_files().items():
        (tmp_path / file).write_text(text)
        monkeypatch.delitem(sys.modules, file.removesuffix(".py"), raising=False)
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    names: dict[str, Any] = {"torch_model": Net().eval(), "keras_model": small_keras(), "images": images}
    names |= {"old_model": Net().eval(), "new_model": Net().eval(), "batch": images.transpose(0, 3, 1, 2)}
    if "van_nano.h5" in block:
        port(VanFamily(), "nano", tmp_path / "van_nano.h5", checkpoint=checkpoint, check=False)
    if "van_nano.tflite" in block:
        port(VanFamily(), "nano", tmp_path / "van_nano.h5", checkpoint=checkpoint, check=False)
        weights, out = tmp_path / "van_nano.h5", tmp_path / "van_nano.tflite"
        export(
            VanFamily(), "nano", weights, out, form="litert", check=False, with_preprocessing=True, with_softmax=True
        )
    if "photo.jpg" in block:
        pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    if "own.pth" in block:
        made: dict[str, Any] = {}
        exec(python_files()["models.py"], made)
        torch.save(made["torch_net"]().state_dict(), "own.pth")
    if "def test_" in block:  # a gate, on a correct port
        import porting

        porting.port_weights(names["torch_model"], names["keras_model"], inputs=images)
        exec(block, names)
        names["test_port"](assert_parity)
        return
    exec(block, names)
    if "probabilities" in names:
        assert names["probabilities"].sum() == pytest.approx(1)
    if "maps" in names:
        assert len(names["maps"]) == 4
    if "ported" in names:
        assert names["ported"].report.passed
    for file in python_files():
        sys.modules.pop(file.removesuffix(".py"), None)


def test_the_kind_of_the_guide_ports_and_names_its_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import porting

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        self.factor = nn.Parameter(torch.tensor([0.5, 2.0, 3.0]))

    def build(self: Any, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    # The guide's kind goes by the name that the classes have in both frameworks.
    module = type("ChannelScale", (nn.Module,), {"__init__": init, "forward": lambda self, x: x * self.factor})
    layer = type("ChannelScale", (keras.layers.Layer,), {"build": build, "call": lambda self, x: x * self.scale})
    [block] = python_blocks(ROOT / "docs" / "add-a-kind.md")
    names: dict[str, Any] = {}
    exec(block, names)
    monkeypatch.setitem(KINDS, "channel_scale", names["KIND"])
    reference = nn.Sequential(module(), nn.Linear(3, 2)).eval()
    inputs = keras.Input((3,))
    candidate = keras.Model(inputs, keras.layers.Dense(2, name="head")(layer(name="factors")(inputs)))
    data = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    rows = [porting.KeyRule("0", "factors", "channel_scale"), porting.KeyRule("1", "head", "dense")]
    porting.port_weights(reference, candidate, rows, inputs=data).require_parity()
    candidate.get_layer("factors").scale.assign(1 / np.array([0.5, 2.0, 3.0]))
    broken = porting.check_parity(reference, candidate, data, pairs={"0": "factors", "1": "head"})
    assert broken.diagnosis is not None
    assert broken.diagnosis.cause == "its factors divide instead of multiply"
