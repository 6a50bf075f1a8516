from __future__ import annotations

from pathlib import Path

import pytest
import torch

import van_tf
from porting.errors import CheckpointError, SourceError
from porting.families.van import VanFamily
from porting.files.inspection import inspect_file
from porting.tasks.port import port


def test_a_checkpoint(checkpoint: Path) -> None:
    inspection = inspect_file(checkpoint)
    assert inspection.facts["format"] == "torch zip"
    assert inspection.facts["wrapper"] == "state_dict"
    assert inspection.provenance is None
    assert ("patch_embed1.proj.weight", (32, 3, 7, 7), "float32") in inspection.tensors
    assert len(inspection.tensors) == 234


def test_averages(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(2, 3)}, "model_ema": {"w": torch.ones(1)}}, tmp_path / "x.pth")
    assert inspect_file(tmp_path / "x.pth").facts["moving averages"] == "also there: --ema"
    averaged = inspect_file(tmp_path / "x.pth", ema=True)
    assert averaged.facts["moving averages"] == "taken"
    assert averaged.parameters == 1


@pytest.mark.parametrize("name", ["x.h5", "x.weights.h5", "x.keras"])
def test_a_file_of_ours(family: VanFamily, checkpoint: Path, tmp_path: Path, name: str) -> None:
    port(family, "nano", tmp_path / name, checkpoint=checkpoint, check=False)
    inspection = inspect_file(tmp_path / name)
    assert inspection.provenance is not None
    assert inspection.provenance["variant"] == "nano"
    assert inspection.parameters == van_tf.van_nano().count_params()


def test_a_file_of_keras_own(tmp_path: Path) -> None:
    van_tf.van_nano().save_weights(tmp_path / "x.weights.h5")
    assert inspect_file(tmp_path / "x.weights.h5").provenance is None


def test_nothing_and_nonsense(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        inspect_file(tmp_path / "x")
    (tmp_path / "x").write_text("x")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        inspect_file(tmp_path / "x")
