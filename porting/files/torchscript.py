"""Read the weights in a TorchScript archive without running or compiling its code.

An archive of `torch.jit.save` is a zip: `data.pkl` pickles the modules as objects of classes that `code/` defines, and
`data/` holds the tensors. This reader replaces each class with a plain record of attributes and rebuilds tensors from
their bytes. It can build nothing else. Format: the torch.jit serialization notes in PyTorch's source.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from porting.errors import CheckpointError
from porting.files.containers import MAX_PICKLE, MAX_TENSORS
from porting.files.unwrap import is_tensor

# Opcodes that reserve memory before they read, or reach outside the pickle.
_REFUSED_OPCODES = ("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "INST", "OBJ")


class _Record:
    """An object of a class that the archive's code defines, reduced to its attributes."""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = {str(name): value for name, value in state.items()}


class _Unpickler(pickle._Unpickler):
    """An unpickler that builds only records, tensors and plain containers.

    It derives from the unpickler in Python, because opcodes can be removed from that one.
    """

    dispatch = {  # noqa: RUF012  # the base class reads it so
        code: act
        for code, act in pickle._Unpickler.dispatch.items()
        if code not in {getattr(pickle, name)[0] for name in _REFUSED_OPCODES}
    }

    def __init__(self, file: Any, tensor: Callable[..., Any]) -> None:
        super().__init__(file, encoding="utf-8")
        self._tensor = tensor

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_Record,), {})
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        known |= {
            ("torch.jit._pickle", f"build_{kind}list"): lambda value, *_: value
            for kind in ("int", "tensor", "double", "bool")
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it requests {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_torchscript(path: Path, file: BinaryIO) -> dict[str, Any]:
    """Read every tensor attribute, by the dotted name that a state_dict would use; raises CheckpointError.

    The archive does not tell which attributes are parameters, so non-persistent buffers are included.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            if archive.getinfo(f"{root}data.pkl").file_size > MAX_PICKLE:
                raise CheckpointError(f"{path}: its list of tensors is larger than {MAX_PICKLE >> 20} MiB")
            reader = _Tensors(archive, f"{root}data/")
            module = _Unpickler(io.BytesIO(_stored(archive, f"{root}data.pkl")), reader.tensor).load()
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can fail in any way
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable TorchScript archive: {reason}",
            hint="Load it where it was created and save only its weights: torch.save(module.state_dict(), FILE).",
        ) from None
    found: dict[str, Any] = {}
    pending = [("", module)]
    while pending:
        prefix, value = pending.pop()
        if not isinstance(value, _Record):
            if is_tensor(value):
                found[prefix.removesuffix(".")] = value
            continue
        pending += [(f"{prefix}{name}.", item) for name, item in reversed(value.attributes.items())]
        if len(found) + len(pending) > MAX_TENSORS:
            raise CheckpointError(f"{path}: has more than {MAX_TENSORS:,} attributes")
    if not found:
        raise CheckpointError(
            f"{path}: a TorchScript archive without named weights; a frozen module has them as constants of its code",
            hint="Use the checkpoint that the module was created from.",
        )
    return found


class _Tensors:
    """Tensors of an archive. None can be larger than the bytes that the archive holds for it."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, Any] = {}

    def tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
        import torch

        kind, dtype_name, key = storage[0], storage[1], str(storage[2])
        if kind != "storage":
            raise pickle.UnpicklingError("a tensor without a storage")
        dtype = getattr(torch, dtype_name).dtype
        if key not in self._storages:
            self._storages[key] = bytearray(_stored(self._archive, f"{self._folder}{key}"))
        data = self._storages[key]
        if not data:
            return torch.empty(tuple(size), dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype)
        # This raises an error if the shape needs more data than there is.
        return flat.as_strided(tuple(size), tuple(stride), int(offset))


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member and verify its checksum. Compressed members are refused, because they may unpack to any size."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed, but torch never compresses tensors")
    return archive.read(info)
