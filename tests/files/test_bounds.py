"""The size that a file states is never trusted."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
from PIL import Image

from porting.errors import CheckpointError, ReportError
from porting.files.checkpoint import read_checkpoint
from porting.files.containers import MAX_TENSORS
from porting.mapping.convert import KeyDiff
from porting.models.images import find_images
from porting.reports.document import read_report


def test_more_tensors_than_any_model_has(tmp_path: Path) -> None:
    header = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)}
    text = json.dumps(header, separators=(",", ":")).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=r"has 200,001 tensors, more than 200,000"):
        read_checkpoint(path)


def test_nearest_names_are_looked_for_only_where_that_is_quick() -> None:
    names = tuple(f"layer{i}.weight" for i in range(20_000))
    begin = time.process_time()
    text = KeyDiff(missing_keys=names, unexpected_keys=tuple(f"x.{name}" for name in names)).describe()
    assert time.process_time() - begin < 10
    assert "  and 19,990 more" in text
    assert "nearest: a.weight" in KeyDiff(missing_keys=("a.weights",), unexpected_keys=("a.weight",)).describe()


def test_a_report_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space on the disk
    with pytest.raises(ReportError, match="larger than 256 MiB"):
        read_report(path)


def test_pipes_among_images_are_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert find_images(tmp_path) == [tmp_path / "b.png"]
