from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import struct
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from porting.errors import CheckpointError, SourceError
from porting.files.checkpoint import read_checkpoint

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.5, -2.0]),
    "bn.num_batches_tracked": torch.tensor(3),
}


def assert_same_tensors(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize(
    ("contents", "wrapper"),
    [
        (TENSORS, ""),
        ({"state_dict": TENSORS, "epoch": 3}, "state_dict"),
        ({"model": TENSORS, "optimizer": {"lr": 0.1}}, "model"),
        ({"model_ema": TENSORS}, "model_ema"),
    ],
    ids=["bare", "state_dict", "model", "only EMA"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_wrappers_in_both_pickle_formats(tmp_path: Path, contents: Any, wrapper: str, legacy: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    assert_same_tensors(checkpoint.state_dict)
    assert checkpoint.wrapper == wrapper
    assert checkpoint.format == ("torch pickle" if legacy else "torch zip")
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    safetensors.torch.save_file(TENSORS, path)
    checkpoint = read_checkpoint(path)
    assert_same_tensors(checkpoint.state_dict)
    assert checkpoint.format == "safetensors"


@pytest.mark.parametrize(
    "prefixes",
    [("module.",), ("_orig_mod.",), ("module.", "_orig_mod."), ("_orig_mod.", "module.")],
    ids="".join,
)
def test_prefixes_on_every_name_are_taken_off(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    torch.save({"".join(prefixes) + name: tensor for name, tensor in TENSORS.items()}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert_same_tensors(checkpoint.state_dict)
    assert checkpoint.prefixes == prefixes


def test_a_prefix_on_some_names_stays(tmp_path: Path) -> None:
    torch.save({"backbone.w": torch.ones(1), "head.w": torch.ones(1)}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").state_dict.keys() == {"backbone.w", "head.w"}


def test_a_prefix_on_most_names_is_taken_off_where_the_model_has_none(tmp_path: Path) -> None:
    """As in a body of transformers that was saved with another head."""
    torch.save({f"bert.{name}": torch.ones(1) for name in "abc"} | {"head.w": torch.ones(1)}, tmp_path / "x.pt")

    def fit(names: Collection[str]) -> float:
        return len({"a", "b", "c"} & set(names)) / 3

    found = read_checkpoint(tmp_path / "x.pt", fit=fit)
    assert (set(found.state_dict), found.prefixes) == ({"a", "b", "c", "head.w"}, ("bert.",))
    own = read_checkpoint(tmp_path / "x.pt", fit=lambda names: float("bert.a" in names))
    assert own.state_dict.keys() == {"bert.a", "bert.b", "bert.c", "head.w"}


def test_plain_weights_are_the_default_where_there_are_averages_too(tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": {"w": torch.ones(1)}}, path)
    plain, averaged = read_checkpoint(path), read_checkpoint(path, ema=True)
    assert (plain.state_dict["w"][0], plain.is_ema, plain.has_ema) == (0.0, False, True)
    assert (averaged.state_dict["w"][0], averaged.is_ema, averaged.wrapper) == (1.0, True, "state_dict_ema")


def test_asking_for_averages_that_are_not_there(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="has no moving averages of weights"):
        read_checkpoint(tmp_path / "x.pth", ema=True)


def test_inert_classes_beside_the_weights_are_allowed(tmp_path: Path) -> None:
    extras = {
        "args": argparse.Namespace(lr=0.1, out=Path("runs/1")),
        "cfg": types.SimpleNamespace(depth=3),
        "metric": np.float64(75.4),
        "epoch": np.int64(310),
    }
    torch.save({"state_dict": TENSORS, **extras}, tmp_path / "x.pth.tar")
    assert_same_tensors(read_checkpoint(tmp_path / "x.pth.tar").state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types_are_kept_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    torch.save({"w": tensor}, tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth").state_dict["w"]
    assert found.dtype == (ml_dtypes.bfloat16 if dtype == torch.bfloat16 else tensor.numpy().dtype)
    np.testing.assert_array_equal(found.astype(np.float64), tensor.double().numpy())


class Evil:
    """An object whose pickle runs a command when it is loaded normally."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    marker = tmp_path / "ran"
    contents = {"state_dict": TENSORS, "evil": Evil(f"touch {marker}")}
    path = tmp_path / "x.pth"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(contents, protocol=2))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=how == "zip")
    # A plain pickle is refused at its first tensor, since torch.save does not write such files.
    refused = "torch.storage._load_from_bytes" if how == "plain pickle" else r"\w+\.system"
    with pytest.raises(CheckpointError, match=f"refused: the file asks to run or build {refused}, but"):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_whole_pickled_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="build torch.nn.modules.linear.Linear") as caught:
        read_checkpoint(tmp_path / "x.pt")
    assert "torch.save(model.state_dict(), FILE)" in caught.value.hint


def test_one_flipped_bit_in_a_weight_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.full((1000,), 1.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(np.full(1000, 1.5, np.float32).tobytes()) + 2001] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the file is damaged: the checksum of x/data/0 does not match"):
        read_checkpoint(path)


def write_truncated(path: Path, legacy: bool) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated zip": (lambda path: write_truncated(path, legacy=False), "truncated or damaged: its end is missing"),
    "truncated legacy": (lambda path: write_truncated(path, legacy=True), "truncated or damaged|not a readable"),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "not a checkpoint: a web page"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(99)), "a gzip archive"),
    "noise": (lambda path: path.write_bytes(b"hello world"), "not a checkpoint: unknown format"),
    "safetensors": (
        lambda path: path.write_bytes(struct.pack("<Q", 20) + b'{"w":{"dtype":"F32"}' + bytes(20)),
        "not a complete safetensors file",
    ),
    "newer pickle": (
        lambda path: path.write_bytes(pickle.dumps({"w": 1}, protocol=4)),
        "readable checkpoint: Unsupported operand 149",
    ),
    "a list": (lambda path: torch.save([1, 2], path), "holds a list, not a state_dict"),
    "no tensors": (
        lambda path: torch.save({"epoch": 3}, path),
        "contains no state_dict or other dict of tensors; it holds epoch \\(int\\)",
    ),
    "sparse": (
        lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path),
        "torch.sparse_coo, on cpu.: only dense, real tensors can",
    ),
    "nested": (
        lambda path: torch.save({"w": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])}, path),
        "neste",
    ),
    "complex": (
        lambda path: torch.save({"w": torch.ones(1, dtype=torch.cfloat)}, path),
        "complex64.*dense, real tensors can",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch itself warns about some of these files
@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str) -> None:
    write, message = BROKEN[name]
    path = tmp_path / "x.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert caught.value.message.startswith(str(path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_checkpoint(tmp_path / "x.pth")


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], kind: str) -> Path:
    """Write two shards and their index, as `save_pretrained(max_shard_size=...)` does."""
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        base, _, suffix = stem.partition(".")
        shard = f"{base}-{number:05}-of-00002.{suffix}"
        held = {name: tensors[name] for name in part}
        if kind == "safetensors":
            safetensors.torch.save_file(held, folder / shard)
        else:
            torch.save(held, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one(tmp_path: Path, kind: str) -> None:
    tensors = {f"module.{name}": torch.rand(3, 2) for name in "abcde"}
    index = write_shards(tmp_path, tensors, kind)
    for path in (index, tmp_path):
        loaded = read_checkpoint(path)
        assert loaded.format == f"shards of {'safetensors' if kind == 'safetensors' else 'torch zip'}"
        assert loaded.prefixes == ("module.",)
        assert loaded.state_dict.keys() == set("abcde")
        for name in "abcde":
            np.testing.assert_array_equal(loaded.state_dict[name], tensors[f"module.{name}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an index of shards"),
        ("[1]", "not an index of shards"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"a": "../x.bin"}}', "'../x.bin' is not the name of a file beside it"),
        ('{"weight_map": {"a": "model.index.json"}}', "is not the name of a file beside it"),
        ('{"weight_map": {"a": "x.bin", "z": "x.bin"}}', "x.bin does not hold what the index lists: b, z"),
    ],
)
def test_bad_indices(tmp_path: Path, text: str, message: str) -> None:
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.bin")
    index = tmp_path / "model.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_checkpoint(index)


def test_a_missing_shard_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "x.index.json").write_text('{"weight_map": {"a": "gone.bin"}}')
    with pytest.raises(SourceError, match="gone.bin: no such file"):
        read_checkpoint(tmp_path / "x.index.json")
    with pytest.raises(SourceError, match="a folder that contains no checkpoint"):
        read_checkpoint(tmp_path)
