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
# Of what a checkpoint says of its model, so much is kept: nesting, entries of one dict or list, letters of a text.
_FACTS_DEPTH, _FACTS_WIDTH, _FACTS_TEXT = 5, 300, 200_000


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file.

    `state_dict` has the tensors by PyTorch's name, in the file's own types (bfloat16 as `ml_dtypes.bfloat16`).
    `wrapper` is the entry of the file that held them, "" for none; `prefixes` what was taken off the names; `dropped`
    the entries beside them that no model has; `is_ema` whether they are moving averages, and `has_ema` whether the file
    has such weights at all; `files` what was read. `facts` are plain values that stand beside the weights and may say
    how the model is built: by the file's own keys, and under "config.json" what a folder of transformers has.
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
        """What a user should know of how the weights were found, in sentences."""
        lines = []
        if self.wrapper or self.prefixes:
            where = f"Weights taken from the entry {self.wrapper!r}" if self.wrapper else "Weights taken"
            without = f", without {', '.join(map(repr, self.prefixes))} in their names" if self.prefixes else ""
            lines.append(f"{where}{without}.")
        if self.dropped:
            shown = ", ".join(self.dropped[:5]) + (", ..." if len(self.dropped) > 5 else "")
            lines.append(f"Left out, as no part of the weights: {len(self.dropped)} entries: {shown}")
        if self.has_ema and not self.is_ema:
            lines.append("The checkpoint also has moving averages of its weights; --ema takes them.")
        elif self.is_ema:
            lines.append("These are moving averages of weights.")
        return lines


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


def read_checkpoint(
    path: Path, *, ema: bool = False, key: str | None = None, prefix: str | None = None, fit: Fit | None = None
) -> Checkpoint:
    """Reads a file of torch.save or torch.jit.save, or safetensors; its content, not its name, says which.

    An index of shards (`model.safetensors.index.json`, `pytorch_model.bin.index.json`) stands for all of them, and a
    folder for the index or file in it that has one of the names that transformers gives.

    `ema` takes the moving averages where a file has them beside the plain weights; by default the plain ones are
    taken, or the averages where there is nothing else. `key` is the dotted entry of the file that holds the weights and
    `prefix` what is taken off their names, dropping all others; by default both are found, with the help of `fit`:
    which share of some names the model has.

    Raises SourceError when there is no such file, and CheckpointError when it is not a whole checkpoint, holds
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
            f"{path}: {packed[0]} is of a quantised module (torch.ao); only float weights can be ported",
            hint="Take the checkpoint from before quantisation.",
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
    """The files that `read_checkpoint` would read for a path, as far as that can be told; never raises."""
    with contextlib.suppress(SourceError, CheckpointError, OSError, ValueError):
        if path.is_dir():
            path = _file_in(path)
        if path.name.endswith(_INDEX_SUFFIX):
            return (path, *(path.with_name(shard) for shard in sorted(set(_read_index(path)[0].values()))))
    return (path,)


def _read_file(path: Path) -> tuple[Any, str, str]:
    """What one file holds, its format and its hash."""
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
        f"{folder}: a folder without a checkpoint in it",
        hint=f"Give the file itself; in a folder, one of {', '.join(_NAMES_IN_FOLDER)} is looked for.",
    )


def _read_index(index: Path) -> tuple[dict[str, str], bytes]:
    """The shard of every tensor, and the index's own bytes; raises CheckpointError."""
    with open_checkpoint(index) as file:
        text = file.read(_MAX_INDEX + 1)
    try:
        if len(text) > _MAX_INDEX:
            raise ValueError
        names = {str(name): str(shard) for name, shard in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{index}: not an index of shards: a JSON object with `weight_map` was expected", hint="Fetch it again."
        ) from None
    for shard in set(names.values()):
        # A name with a folder in it could lead anywhere.
        if Path(shard).name != shard or shard in {"", ".", ".."} or shard.endswith(_INDEX_SUFFIX) or "\0" in shard:
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file beside it")
    return names, text


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Any], str, str]:
    """The shards, their tensors as one dict, their formats, and a hash of the index and the shards' hashes."""
    names, text = _read_index(index)
    digest = hashlib.sha256(text)
    tensors: dict[str, Any] = {}
    kinds, shards = set(), tuple(index.with_name(shard) for shard in sorted(set(names.values())))
    for shard in shards:
        contents, kind, sha256 = _read_file(shard)
        # Prefixes are taken off the whole, not off a part of it.
        held = {str(name): value for name, value in contents.items()} if isinstance(contents, Mapping) else {}
        if differing := sorted(held.keys() ^ {name for name, place in names.items() if place == shard.name}):
            raise CheckpointError(
                f"{index}: {shard.name} does not hold what the index says: {', '.join(differing[:5])}",
                hint="Index and shards are of different checkpoints; fetch all of them again.",
            )
        tensors |= held
        digest.update(sha256.encode())
        kinds.add(kind)
    if not tensors:
        raise CheckpointError(f"{index}: names no tensors")
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
        return float(value) if isinstance(value, float) else None  # NumPy's numbers are floats of another class

    found = plain(contents, _FACTS_DEPTH) if isinstance(contents, Mapping) else {}
    return {name: value for name, value in found.items() if not isinstance(value, (dict, list)) or value}


def _config_beside(path: Path) -> dict[str, Any]:
    """`config.json` beside a file with one of the names that transformers gives; raises CheckpointError."""
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
            hint="It says how the model is built. Fetch it again, or move the weights to a folder without it.",
        ) from None
    return {_CONFIG: found}


def verify_container(path: Path) -> None:
    """Raises CheckpointError where a file is not a checkpoint, or not a whole one, as far as that shows unread."""
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
                # Mapped, not read: a tensor comes into memory when it is used, and a large checkpoint never as a whole.
                return torch.load(_place(path, file), map_location="cpu", weights_only=True, mmap=True)
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: declares more data than fits into memory") from None
    except Exception as error:  # torch.load fails in dozens of ways on a broken file; none is a bug here
        raise _pickle_error(path, error) from None


def _place(path: Path, file: BufferedReader) -> Path:
    """A name of the open file that libraries in C++ can take: theirs are UTF-8, those of Linux any bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Path(f"/dev/fd/{file.fileno()}")
    return path


def _verify_checksums(path: Path, file: BufferedReader) -> None:
    """torch.load does not look at the archive's checksums, so a flipped bit in a weight would pass unseen."""
    with zipfile.ZipFile(file) as archive:
        if compressed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(
                f"{path}: {compressed[0][:100]} in it is compressed, and torch.save compresses nothing",
                hint="It may unpack to any size. Where you trust its origin, load it in PyTorch and save it again.",
            )
        pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
        if any(info.file_size > MAX_PICKLE for info in pickles):
            raise CheckpointError(
                f"{path}: its list of tensors takes more than {MAX_PICKLE >> 20} MiB, which no model needs",
                hint=SAVE_THE_STATE_DICT,
            )
        damaged = archive.testzip()
    file.seek(0)
    if damaged is not None:
        raise CheckpointError(
            f"{path}: the file is damaged: {damaged} does not have the checksum that the file says it has",
            hint="Fetch it again; if it was saved with checksums turned off in torch, save it again with them on.",
        )


def _refuse_allocation(path: Path, file: BufferedReader) -> None:
    """torch.load lets a pickle ask for a bytearray of any size, the one way in which a small file takes much memory."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # A pickle is stored uncompressed and names what it builds in plain letters.
        if content.find(b"bytearray") >= 0:
            raise CheckpointError(
                f"{path}: refused: the file asks to build a bytearray, and a checkpoint may hold only tensors and "
                "plain values; nothing in it was run",
                hint=SAVE_THE_STATE_DICT,
            )


def _pickle_error(path: Path, error: Exception) -> CheckpointError:
    """Says in one sentence what torch.load says in ten, and without its advice to run the file's code."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", text):
        name = found.group(1) or found.group(2)
        return CheckpointError(
            f"{path}: refused: the file asks to run or build {name}, and a checkpoint may hold only tensors and "
            "plain values; nothing in it was run",
            hint=SAVE_THE_STATE_DICT,
        )
    if "qtensor" in text or "per_channel" in text or "quantized" in text:
        return CheckpointError(
            f"{path}: a quantised checkpoint; only float weights can be ported",
            hint="Take the checkpoint from before quantisation.",
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
            f"{path}: not a whole safetensors file: {error}", hint="Fetch it again and compare its size."
        ) from None


def _to_numpy(path: Path, name: str, tensor: Any) -> Array:
    import torch

    if tensor.is_quantized:
        raise CheckpointError(
            f"{path}: {name} is quantised ({tensor.dtype}); only float weights can be ported",
            hint="Take the checkpoint from before quantisation; dequantised weights are not what it was trained to.",
        )
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_complex() or tensor.device.type != "cpu":
        what = "nested" if tensor.is_nested else f"{tensor.dtype}, {tensor.layout}, on {tensor.device.type}"
        raise CheckpointError(
            f"{path}: {name} is a tensor that cannot be ported ({what}); dense, real tensors can",
            hint="Make it dense and real in PyTorch and save the state_dict again.",
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
