"""Reading PyTorch checkpoints. A checkpoint is hostile input: no code in it is ever run.

Pickles go through `torch.load(weights_only=True)`, which builds tensors and plain containers and nothing else;
`INERT_GLOBALS` adds, by name, the few harmless classes that training scripts leave in their files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import pathlib
import re
import struct
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from porting.errors import CheckpointError, SourceError
from porting.kinds.transforms import Array

PLAIN_WRAPPERS = ("state_dict", "model")
EMA_WRAPPERS = ("state_dict_ema", "model_ema")
# Left by DataParallel, torch.compile and detection frameworks; taken off when every tensor has it.
PREFIXES = ("module.", "_orig_mod.", "backbone.")

_INDEX_SUFFIX = ".index.json"
_NAMES_IN_FOLDER = (
    "model.safetensors",
    f"model.safetensors{_INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX_SUFFIX}",
)
_SAFETENSORS_MAX_HEADER = 100_000_000  # the format's own limit, in bytes


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file.

    `state_dict` has the tensors by PyTorch's name, in the file's own types (bfloat16 as `ml_dtypes.bfloat16`).
    `wrapper` is the entry of the file that held them, "" for none; `prefixes` what was taken off the names;
    `is_ema` whether they are moving averages, and `has_ema` whether the file has such weights at all.
    """

    path: Path
    sha256: str
    format: str
    state_dict: dict[str, Array]
    wrapper: str = ""
    prefixes: tuple[str, ...] = ()
    is_ema: bool = False
    has_ema: bool = False


def inert_globals() -> list[Any]:
    """Classes that may appear in a checkpoint beside tensors: building one runs nothing but its own fields."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    scalar_types = [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")]
    return [
        argparse.Namespace,
        types.SimpleNamespace,
        pathlib.PosixPath,
        pathlib.WindowsPath,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
        np.dtype,
        *scalar_types,
        scalar,
        # The module's name in files written with NumPy 1.
        (scalar, "numpy.core.multiarray.scalar"),
    ]


def read_checkpoint(path: Path, *, ema: bool = False) -> Checkpoint:
    """Reads a `.pth`, `.pth.tar`, `.pt`, `.bin` or `.safetensors` file; its content, not its name, says which.

    An index of shards (`model.safetensors.index.json`, `pytorch_model.bin.index.json`) stands for all of them, and a
    folder for the index or file in it that has one of the names that transformers gives.

    `ema` takes the moving averages where a file has them beside the plain weights; by default the plain ones are
    taken, or the averages where there is nothing else.

    Raises SourceError when there is no such file, and CheckpointError when it is not a whole checkpoint, holds
    anything that would run code, or has no state_dict.
    """
    if path.is_dir():
        path = _file_in(path)
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_shards(path)
    try:
        with path.open("rb") as file:
            kind = _recognise(path, file)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            contents = _load_safetensors(path) if kind == "safetensors" else _load_pickle(path, file, kind)
    except FileNotFoundError:
        raise SourceError(
            f"{path}: no such file", hint="Check the path, or leave out --checkpoint to use the official weights."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    tensors, wrapper, is_ema, has_ema = _unwrap(path, contents, ema)
    tensors, prefixes = _strip_prefixes(tensors)
    state_dict = {name: _to_numpy(path, name, tensor) for name, tensor in tensors.items()}
    return Checkpoint(path, sha256, kind, state_dict, wrapper, prefixes, is_ema, has_ema)


def _file_in(folder: Path) -> Path:
    for name in _NAMES_IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise SourceError(
        f"{folder}: a folder without a checkpoint in it",
        hint=f"Give the file itself; in a folder, one of {', '.join(_NAMES_IN_FOLDER)} is looked for.",
    )


def _read_shards(index: Path) -> Checkpoint:
    """All shards that an index names, as one checkpoint; its hash is that of the index and the shards' hashes."""
    try:
        text = index.read_bytes()
        names = {str(name): str(shard) for name, shard in json.loads(text)["weight_map"].items()}
    except FileNotFoundError:
        raise SourceError(f"{index}: no such file", hint="Check the path.") from None
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{index}: not an index of shards: a JSON object with `weight_map` was expected", hint="Fetch it again."
        ) from None
    digest = hashlib.sha256(text)
    state_dict: dict[str, Array] = {}
    kinds = set()
    for shard in sorted(set(names.values())):
        # A name with a folder in it could lead anywhere.
        if Path(shard).name != shard or shard in {"", ".", ".."} or shard.endswith(_INDEX_SUFFIX):
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file beside it")
        loaded = read_checkpoint(index.with_name(shard))
        # Prefixes are taken off the whole, not off a part of it.
        held = {"".join(loaded.prefixes) + name: array for name, array in loaded.state_dict.items()}
        if differing := sorted(held.keys() ^ {name for name, place in names.items() if place == shard}):
            raise CheckpointError(
                f"{index}: {shard} does not hold what the index says: {', '.join(differing[:5])}",
                hint="Index and shards are of different checkpoints; fetch all of them again.",
            )
        state_dict |= held
        digest.update(loaded.sha256.encode())
        kinds.add(loaded.format)
    if not state_dict:
        raise CheckpointError(f"{index}: names no tensors")
    tensors, prefixes = _strip_prefixes(state_dict)
    return Checkpoint(index, digest.hexdigest(), f"shards of {', '.join(sorted(kinds))}", tensors, "", prefixes)


def verify_container(path: Path) -> None:
    """Raises CheckpointError where a file is not a checkpoint, or not a whole one, as far as that shows unread."""
    with path.open("rb") as file:
        kind = _recognise(path, file)
        file.seek(0)
        if kind == "torch zip":
            try:
                _verify_checksums(path, file)
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise _pickle_error(path, error) from None
    if kind == "safetensors":
        _load_safetensors(path)


def _recognise(path: Path, file: BinaryIO) -> str:
    """Names the format by the first bytes, or says what the file is instead."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty", hint="Fetch it again; the download did not begin.")
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= min(size, _SAFETENSORS_MAX_HEADER):
        return "safetensors"
    if head[:1] == b"\x80":
        return "torch pickle"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        what, hint = "a web page", "The download gave a page, perhaps a login or an error; fetch the file itself."
    elif text.startswith(b"version https://git-lfs"):
        what, hint = "a Git LFS pointer", "Run `git lfs pull` where it came from; the weights were not fetched."
    elif head.startswith(b"\x89HDF"):
        what, hint = "an HDF5 file", "Keras weights are read by `van-port inspect`; a checkpoint comes from PyTorch."
    elif head.startswith(b"\x1f\x8b"):
        what, hint = "a gzip archive", "Unpack it first; --checkpoint takes the file within."
    else:
        what, hint = "no format of PyTorch's", "Expected a file made by torch.save, or safetensors."
    raise CheckpointError(f"{path}: not a checkpoint: {what}", hint=hint)


def _load_pickle(path: Path, file: BinaryIO, kind: str) -> Any:
    import torch

    try:
        if kind == "torch zip":
            _verify_checksums(path, file)
        _refuse_allocation(path, file)
        with torch.serialization.safe_globals(inert_globals()):
            if kind == "torch zip":
                # Mapped, not read: a tensor comes into memory when it is used, and a large checkpoint never as a whole.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: declares more data than fits into memory") from None
    except Exception as error:  # torch.load fails in dozens of ways on a broken file; none is a bug here
        raise _pickle_error(path, error) from None


def _verify_checksums(path: Path, file: BinaryIO) -> None:
    """torch.load does not look at the archive's checksums, so a flipped bit in a weight would pass unseen."""
    with zipfile.ZipFile(file) as archive:
        if compressed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(
                f"{path}: {compressed[0][:100]} in it is compressed, and torch.save compresses nothing",
                hint="It may unpack to any size. Where you trust its origin, load it in PyTorch and save it again.",
            )
        damaged = archive.testzip()
    file.seek(0)
    if damaged is not None:
        raise CheckpointError(
            f"{path}: the file is damaged: {damaged} does not have the checksum that the file says it has",
            hint="Fetch it again; if it was saved with checksums turned off in torch, save it again with them on.",
        )


def _refuse_allocation(path: Path, file: BinaryIO) -> None:
    """torch.load lets a pickle ask for a bytearray of any size, the one way in which a small file takes much memory."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # A pickle is stored uncompressed and names what it builds in plain letters.
        if content.find(b"bytearray") >= 0:
            raise CheckpointError(
                f"{path}: refused: the file asks to build a bytearray, and a checkpoint may hold only tensors and "
                "plain values; nothing in it was run",
                hint="Where you trust its origin, load it there and save only `model.state_dict()`.",
            )


def _pickle_error(path: Path, error: Exception) -> CheckpointError:
    """Says in one sentence what torch.load says in ten, and without its advice to run the file's code."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", text):
        name = found.group(1) or found.group(2)
        return CheckpointError(
            f"{path}: refused: the file asks to run or build {name}, and a checkpoint may hold only tensors and "
            "plain values; nothing in it was run",
            hint="Where you trust its origin, load it there and save only `model.state_dict()`.",
        )
    if (
        "central directory" in text
        or isinstance(error, zipfile.BadZipFile)
        or "seek" in text
        or isinstance(error, EOFError)
    ):
        return CheckpointError(
            f"{path}: the file is cut off or damaged: its end is missing",
            hint="Fetch it again and compare its size with the source's.",
        )
    reason = text.partition("WeightsUnpickler error:")[2] or text
    first_line = next((line.strip() for line in reason.splitlines() if line.strip()), type(error).__name__)
    return CheckpointError(
        f"{path}: not a readable checkpoint: {first_line[:200]}",
        hint="The file is damaged, or made by something other than torch.save(state_dict, FILE).",
    )


def _load_safetensors(path: Path) -> dict[str, Any]:
    import safetensors
    import safetensors.torch

    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file: {error}", hint="Fetch it again and compare its size."
        ) from None


def _unwrap(path: Path, contents: Any, ema: bool) -> tuple[Mapping[str, Any], str, bool, bool]:
    """Finds the state_dict in what a file holds: `(tensors, wrapper, is_ema, has_ema)`."""
    if not isinstance(contents, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(contents).__name__}, not a state_dict", hint="Save `model.state_dict()` instead."
        )
    wrappers = {key: value for key, value in contents.items() if isinstance(value, Mapping) and value}
    plain = [key for key in PLAIN_WRAPPERS if key in wrappers]
    averaged = [key for key in EMA_WRAPPERS if key in wrappers]
    if ema and not averaged:
        raise CheckpointError(
            f"{path}: has no moving averages of weights (looked for {', '.join(EMA_WRAPPERS)})",
            hint="Leave out --ema to take the plain weights.",
        )
    chosen = averaged if ema or not plain else plain
    wrapper = chosen[0] if chosen else ""
    tensors = wrappers[wrapper] if wrapper else contents
    others = [str(key) for key, value in tensors.items() if not isinstance(key, str) or not _is_tensor(value)]
    if others or not tensors:
        found = ", ".join(sorted(others)[:10]) or "nothing"
        raise CheckpointError(
            f"{path}: {f'its entry {wrapper!r}' if wrapper else 'the file'} is not a state_dict: "
            f"these entries are no tensors: {found}",
            hint=f"Weights are looked for at the top and under {', '.join(PLAIN_WRAPPERS + EMA_WRAPPERS)}.",
        )
    return tensors, wrapper, wrapper in EMA_WRAPPERS, bool(averaged)


def _strip_prefixes(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Takes off each known prefix that every name has, again and again: they nest."""
    stripped: list[str] = []
    tensors = dict(tensors)
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped.append(prefix)
    return tensors, tuple(stripped)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _to_numpy(path: Path, name: str, tensor: Any) -> Array:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path}: {name} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device.type}; "
            "only dense, real, unquantised tensors can be ported",
            hint="Dequantise or densify the model in PyTorch and save its state_dict again.",
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} is said to have shape {tuple(tensor.shape)}, more than the "
            f"{tensor.untyped_storage().nbytes():,} bytes that the file has for it",
            hint="An expanded tensor repeats what it has; save it with .contiguous(). Otherwise the file is damaged.",
        )
    dense = tensor.detach().contiguous()
    array: Array
    if dense.dtype == torch.bfloat16:  # NumPy has no such type of its own; the bits are the same
        array = dense.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    with _unsupported_type(path, name, tensor):
        array = dense.numpy()
    return array


@contextlib.contextmanager
def _unsupported_type(path: Path, name: str, tensor: Any) -> Iterator[None]:
    try:
        yield
    except TypeError:
        raise CheckpointError(f"{path}: {name} has type {tensor.dtype}, which cannot be ported") from None
