"""Read PyTorch checkpoints. A checkpoint is untrusted input: no code in it is ever run.

Pickles go through `torch.load(weights_only=True)`, which builds only tensors and plain containers. `inert_globals` adds
the few harmless classes that training scripts leave in their files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import pathlib
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from porting.errors import CheckpointError, SourceError
from porting.files.containers import (
    MAX_PICKLE,
    MAX_TENSORS,
    SAVE_THE_STATE_DICT,
    open_checkpoint,
    recognise,
    refuse_other_folder,
)
from porting.files.torchscript import read_torchscript
from porting.files.unwrap import Fit, find_weights
from porting.kinds.transforms import Array

_INDEX_SUFFIX = ".index.json"
_NAMES_IN_FOLDER = (
    "model.safetensors",
    f"model.safetensors{_INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX_SUFFIX}",
)
_CONFIG = "config.json"
_MAX_CONFIG = 1 << 20  # bytes
_MAX_INDEX = 64 << 20  # bytes
# Limits on the facts kept from a checkpoint: nesting, entries per dict or list, and characters per text.
_FACTS_DEPTH, _FACTS_WIDTH, _FACTS_TEXT = 5, 300, 200_000


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one checkpoint.

    `state_dict` holds the tensors by PyTorch name, in the file's own types (bfloat16 as `ml_dtypes.bfloat16`).
    `wrapper` is the entry of the file that held them, or "" for none. `prefixes` were removed from the names.
    `dropped` lists entries beside the weights that no model has. `is_ema` says whether the weights are moving averages,
    and `has_ema` whether the file contains any. `files` were read. `facts` are plain values beside the weights that may
    say how the model is built: under the file's own keys, and under "config.json" for a folder of transformers.
    """

    path: Path
    sha256: str
    format: str
    state_dict: dict[str, Array]
    wrapper: str = ""
    prefixes: tuple[str, ...] = ()
    is_ema: bool = False
    has_ema: bool = False
    files: tuple[Path, ...] = ()
    dropped: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def remarks(self) -> list[str]:
        """Sentences for the user on how the weights were found."""
        lines = []
        if self.wrapper or self.prefixes:
            where = f"Weights taken from the entry {self.wrapper!r}" if self.wrapper else "Weights taken"
            without = f", without {', '.join(map(repr, self.prefixes))} in their names" if self.prefixes else ""
            lines.append(f"{where}{without}.")
        if self.dropped:
            shown = ", ".join(self.dropped[:5]) + (", ..." if len(self.dropped) > 5 else "")
            lines.append(f"Ignored {len(self.dropped)} entries that are not weights: {shown}")
        if self.has_ema and not self.is_ema:
            lines.append("The checkpoint also has moving averages of its weights; --ema uses them.")
        elif self.is_ema:
            lines.append("These are moving averages of weights.")
        return lines


def inert_globals() -> list[Any]:
    """Classes that a checkpoint may contain beside tensors. Building one only sets its fields."""
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
        # Its name in files written with NumPy 1.
        (scalar, "numpy.core.multiarray.scalar"),
    ]


def read_checkpoint(
    path: Path, *, ema: bool = False, key: str | None = None, prefix: str | None = None, fit: Fit | None = None
) -> Checkpoint:
    """Read a file of torch.save, torch.jit.save or safetensors. The content, not the name, determines which.

    An index of shards (`model.safetensors.index.json`, `pytorch_model.bin.index.json`) stands for all its shards. A
    folder stands for the file or index in it that has one of the names that transformers uses.

    `ema` chooses the moving averages if a file has both; by default, the plain weights are used, or the averages if
    there is nothing else. `key` is the dotted entry of the file that holds the weights. `prefix` is removed from names,
    and all names without it are dropped. By default, both are found with the help of `fit`, which says how well names
    agree with the model's, from 0 to 1.

    Raises SourceError if there is no such file, and CheckpointError if it is not a complete checkpoint, contains
    anything that would run code, or has no state_dict.
    """
    if path.is_dir():
        path = _file_in(path)
    shards: tuple[Path, ...] = ()
    if path.name.endswith(_INDEX_SUFFIX):
        shards, contents, kind, sha256 = _read_shards(path)
    else:
        contents, kind, sha256 = _read_file(path)
    weights = find_weights(path, contents, ema=ema, key=key, prefix=prefix, fit=fit)
    if packed := [name for name in (*weights.tensors, *weights.dropped) if "_packed_params" in name]:
        raise CheckpointError(
            f"{path}: {packed[0]} belongs to a quantised module (torch.ao); only float weights can be ported",
            hint="Use the checkpoint from before quantisation.",
        )
    if len(weights.tensors) > MAX_TENSORS:
        raise CheckpointError(f"{path}: has {len(weights.tensors):,} tensors, more than {MAX_TENSORS:,}")
    return Checkpoint(
        path,
        sha256,
        kind,
        {name: _to_numpy(path, name, tensor) for name, tensor in weights.tensors.items()},
        weights.key,
        weights.prefixes,
        weights.is_ema,
        weights.has_ema,
        (path, *shards),
        weights.dropped,
        {**_facts_in(contents), **_config_beside(path)},
    )


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """The files that `read_checkpoint` would read for a path, as far as known without reading them. Never raises."""
    with contextlib.suppress(SourceError, CheckpointError, OSError, ValueError):
        if path.is_dir():
            path = _file_in(path)
        if path.name.endswith(_INDEX_SUFFIX):
            return (path, *(path.with_name(shard) for shard in sorted(set(_read_index(path)[0].values()))))
    return (path,)


def _read_file(path: Path) -> tuple[Any, str, str]:
    """Read one file. Return its contents, its format and its hash."""
    with open_checkpoint(path) as file:
        try:
            kind = recognise(path, file)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if kind == "safetensors":
                return _load_safetensors(path, _place(path, file)), kind, sha256
            if kind == "torchscript":
                return read_torchscript(path, file), kind, sha256
            return _load_pickle(path, file, kind), kind, sha256
        except (zipfile.BadZipFile, EOFError) as error:
            raise _pickle_error(path, error) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _file_in(folder: Path) -> Path:
    try:
        for name in _NAMES_IN_FOLDER:
            if (folder / name).is_file():
                return folder / name
        refuse_other_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from None
    raise SourceError(
        f"{folder}: a folder that contains no checkpoint",
        hint=f"Give the file itself. In a folder, van-port looks for {', '.join(_NAMES_IN_FOLDER)}.",
    )


def _read_index(index: Path) -> tuple[dict[str, str], bytes]:
    """Read an index. Return the shard of each tensor, and the bytes of the index. Raises CheckpointError."""
    with open_checkpoint(index) as file:
        text = file.read(_MAX_INDEX + 1)
    try:
        if len(text) > _MAX_INDEX:
            raise ValueError
        names = {str(name): str(shard) for name, shard in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{index}: not an index of shards: expected a JSON object with `weight_map`", hint="Download it again."
        ) from None
    for shard in set(names.values()):
        # A name with a folder in it could point anywhere.
        if Path(shard).name != shard or shard in {"", ".", ".."} or shard.endswith(_INDEX_SUFFIX) or "\0" in shard:
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file beside it")
    return names, text


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Any], str, str]:
    """Read all shards. Return their paths, their tensors as one dict, their formats, and a hash of index and shards."""
    names, text = _read_index(index)
    digest = hashlib.sha256(text)
    tensors: dict[str, Any] = {}
    kinds, shards = set(), tuple(index.with_name(shard) for shard in sorted(set(names.values())))
    for shard in shards:
        contents, kind, sha256 = _read_file(shard)
        # Keep prefixes here: they are removed from the whole, not from one part.
        held = {str(name): value for name, value in contents.items()} if isinstance(contents, Mapping) else {}
        if differing := sorted(held.keys() ^ {name for name, place in names.items() if place == shard.name}):
            raise CheckpointError(
                f"{index}: {shard.name} does not hold what the index lists: {', '.join(differing[:5])}",
                hint="The index and the shards are from different checkpoints. Download all of them again.",
            )
        tensors |= held
        digest.update(sha256.encode())
        kinds.add(kind)
    if not tensors:
        raise CheckpointError(f"{index}: lists no tensors")
    return shards, tensors, f"shards of {', '.join(sorted(kinds))}", digest.hexdigest()


def _facts_in(contents: Any) -> dict[str, Any]:
    """The plain values beside the weights: arguments of a training script, hyperparameters, a configuration."""

    def plain(value: Any, depth: int) -> Any:
        if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
            value = vars(value)
        if isinstance(value, Mapping) and depth:
            items = [(name, item) for name, item in value.items() if isinstance(name, str)][:_FACTS_WIDTH]
            pairs = ((name, plain(item, depth - 1)) for name, item in items)
            return {name: item for name, item in pairs if item is not None}
        if isinstance(value, (list, tuple)) and depth:
            return [plain(item, depth - 1) for item in value[:_FACTS_WIDTH]]
        if isinstance(value, str):
            return value[:_FACTS_TEXT]
        if isinstance(value, (bool, int)):
            return value
        return float(value) if isinstance(value, float) else None  # np.float64 is a subclass of float

    found = plain(contents, _FACTS_DEPTH) if isinstance(contents, Mapping) else {}
    return {name: value for name, value in found.items() if not isinstance(value, (dict, list)) or value}


def _config_beside(path: Path) -> dict[str, Any]:
    """Read `config.json` beside a file with one of the names that transformers uses; raises CheckpointError."""
    config = path.with_name(_CONFIG)
    if path.name not in _NAMES_IN_FOLDER or not config.is_file():
        return {}
    with open_checkpoint(config) as file:
        text = file.read(_MAX_CONFIG + 1)
    try:
        if len(text) > _MAX_CONFIG:
            raise ValueError
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{config}: not a JSON object of at most {_MAX_CONFIG >> 20} MiB",
            hint="It describes how the model is built. Download it again, or move the weights to a folder without it.",
        ) from None
    return {_CONFIG: found}


def verify_container(path: Path) -> None:
    """Raise CheckpointError if a file is not a complete checkpoint, as far as shown without unpickling it."""
    with open_checkpoint(path) as file:
        kind = recognise(path, file)
        if kind == "torch zip":
            try:
                _verify_checksums(path, file)
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise _pickle_error(path, error) from None
    if kind == "safetensors":
        _load_safetensors(path, path)


def _load_pickle(path: Path, file: BufferedReader, kind: str) -> Any:
    import torch

    try:
        if kind == "torch zip":
            _verify_checksums(path, file)
        _refuse_allocation(path, file)
        with torch.serialization.safe_globals(inert_globals()):
            if kind == "torch zip":
                # Mapped, not read: tensors are loaded on use, so a large checkpoint is never in memory as a whole.
                return torch.load(_place(path, file), map_location="cpu", weights_only=True, mmap=True)
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: declares more data than fits in memory") from None
    except Exception as error:  # torch.load raises dozens of types for broken files
        raise _pickle_error(path, error) from None


def _place(path: Path, file: BufferedReader) -> Path:
    """A path of the open file for C++ libraries, which accept only UTF-8, while Linux allows any bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Path(f"/dev/fd/{file.fileno()}")
    return path


def _verify_checksums(path: Path, file: BufferedReader) -> None:
    """Verify the archive's checksums, which torch.load ignores, so that it would miss a flipped bit in a weight."""
    with zipfile.ZipFile(file) as archive:
        if compressed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(
                f"{path}: {compressed[0][:100]} in it is compressed, but torch.save never compresses",
                hint="It may unpack to any size. If you trust its source, load it in PyTorch and save it again.",
            )
        pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
        if any(info.file_size > MAX_PICKLE for info in pickles):
            raise CheckpointError(
                f"{path}: its list of tensors is larger than {MAX_PICKLE >> 20} MiB, which no model needs",
                hint=SAVE_THE_STATE_DICT,
            )
        damaged = archive.testzip()
    file.seek(0)
    if damaged is not None:
        raise CheckpointError(
            f"{path}: the file is damaged: the checksum of {damaged} does not match",
            hint="Download it again. If torch saved it with checksums turned off, save it again with them on.",
        )


def _refuse_allocation(path: Path, file: BufferedReader) -> None:
    """Refuse pickles with a bytearray of any size, the only way for a small file to use much memory in torch.load."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # A pickle is stored uncompressed and names what it builds in plain ASCII.
        if content.find(b"bytearray") >= 0:
            raise CheckpointError(
                f"{path}: refused: the file asks to build a bytearray, but a checkpoint may hold only tensors and "
                "plain values; nothing in it was run",
                hint=SAVE_THE_STATE_DICT,
            )


def _pickle_error(path: Path, error: Exception) -> CheckpointError:
    """Shorten an error of torch.load to one sentence, without its advice to run the file's code."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", text):
        name = found.group(1) or found.group(2)
        return CheckpointError(
            f"{path}: refused: the file asks to run or build {name}, but a checkpoint may hold only tensors and "
            "plain values; nothing in it was run",
            hint=SAVE_THE_STATE_DICT,
        )
    if "qtensor" in text or "per_channel" in text or "quantized" in text:
        return CheckpointError(
            f"{path}: a quantised checkpoint; only float weights can be ported",
            hint="Use the checkpoint from before quantisation.",
        )
    if (
        "central directory" in text
        or isinstance(error, zipfile.BadZipFile)
        or "seek" in text
        or isinstance(error, EOFError)
    ):
        return CheckpointError(
            f"{path}: the file is truncated or damaged: its end is missing",
            hint="Download it again and compare its size with that of the source.",
        )
    reason = text.partition("WeightsUnpickler error:")[2] or text
    first_line = next((line.strip() for line in reason.splitlines() if line.strip()), type(error).__name__)
    return CheckpointError(
        f"{path}: not a readable checkpoint: {first_line[:200]}",
        hint="The file is damaged, or was not written by torch.save(state_dict, FILE).",
    )


def _load_safetensors(path: Path, place: Path) -> dict[str, Any]:
    import safetensors
    import safetensors.torch

    try:
        with safetensors.safe_open(place, framework="pt") as file:
            if (count := len(file.keys())) > MAX_TENSORS:
                raise CheckpointError(f"{path}: has {count:,} tensors, more than {MAX_TENSORS:,}")
        return dict(safetensors.torch.load_file(place))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file: {error}", hint="Download it again and compare its size."
        ) from None


def _to_numpy(path: Path, name: str, tensor: Any) -> Array:
    import torch

    if tensor.is_quantized:
        raise CheckpointError(
            f"{path}: {name} is quantised ({tensor.dtype}); only float weights can be ported",
            hint="Use the checkpoint from before quantisation: dequantised weights differ from the trained ones.",
        )
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_complex() or tensor.device.type != "cpu":
        what = "nested" if tensor.is_nested else f"{tensor.dtype}, {tensor.layout}, on {tensor.device.type}"
        raise CheckpointError(
            f"{path}: {name} cannot be ported ({what}): only dense, real tensors can",
            hint="Make it dense and real in PyTorch, and save the state_dict again.",
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} has the shape {tuple(tensor.shape)}, which needs more than the "
            f"{tensor.untyped_storage().nbytes():,} bytes that the file has for it",
            hint="Save an expanded tensor with .contiguous(). If it is not expanded, the file is damaged.",
        )
    dense = tensor.detach().contiguous()
    array: Array
    if dense.dtype == torch.bfloat16:  # NumPy has no bfloat16, so the bits are reinterpreted
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
