"""Recognise the format of a checkpoint from its bytes, and name other kinds of files."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Collection
from io import BufferedReader
from pathlib import Path

from porting.errors import CheckpointError, SourceError
from porting.files.atomic import open_regular

SAFETENSORS_MAX_HEADER = 100_000_000  # the format's own limit, in bytes
# For any model, a pickle of names and shapes is far smaller than this. Reading a larger one could exhaust the memory.
MAX_PICKLE = 64 << 20
# More tensors than any published model has.
MAX_TENSORS = 200_000

_WEIGHTS_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".safetensors", ".ckpt")
# The hint for a file that holds code beside its weights.
SAVE_THE_STATE_DICT = "Load it where it was created and save only its weights: torch.save(model.state_dict(), FILE)."


def open_checkpoint(path: Path) -> BufferedReader:
    """Open a file for reading; raises SourceError if it does not exist, CheckpointError if it cannot be read."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise SourceError(
            f"{path}: no such file",
            hint="Check the path. A family with published weights takes those when --checkpoint is omitted.",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None


def recognise(path: Path, file: BufferedReader) -> str:
    """The format: `torch zip`, `torchscript`, `safetensors` or `torch pickle`.

    Raises CheckpointError for anything else, with a message that names what the file is.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    file.seek(0)
    if not head:
        raise CheckpointError(f"{path}: the file is empty", hint="Download it again: the download did not begin.")
    if head.startswith(b"PK\x03\x04"):
        return _recognise_zip(path, file)
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= min(size, SAFETENSORS_MAX_HEADER):
        return "safetensors"
    if head[:1] == b"\x80":
        return "torch pickle"
    what, hint = _other_format(path, head)
    raise CheckpointError(f"{path}: not a checkpoint: {what}", hint=hint)


def _other_format(path: Path, head: bytes) -> tuple[str, str]:
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page", "A download may have returned a login page or an error. Download the file itself."
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "The weights were not fetched: run `git lfs pull` in its repository."
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file", "A checkpoint comes from PyTorch. For Keras weights, use `van-port inspect`."
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive", "Unpack it first and give the file inside."
    if head.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp", "Its weights are usually quantised. Use the PyTorch checkpoint of the model."
    if head[4:8] == b"TFL3":
        return "a LiteRT (TFLite) model", "Use the PyTorch checkpoint that it was converted from."
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy array", "Save a state_dict with torch.save, or as safetensors."
    if head[257:262] == b"ustar":
        return "a tar archive", "Unpack it first and give the file inside."
    # A protobuf message whose first field is ONNX's ir_version and whose second names the producer.
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12" and b"pytorch" in head[:64]):
        return "an ONNX model", "Use the PyTorch checkpoint that it was exported from."
    if path.name == "checkpoint" or path.suffix == ".index" or ".data-00000-of-" in path.name:
        return "a TensorFlow checkpoint", "van-port ports from PyTorch to TensorFlow: give the PyTorch checkpoint."
    if path.suffix == ".msgpack":
        return "a Flax checkpoint", "Use the model's PyTorch weights, which are often beside it on the hub."
    if path.suffix == ".distcp":
        return "one part of a distributed checkpoint", _consolidate(path.parent)
    return "unknown format", "Expected a file of torch.save or safetensors."


def _recognise_zip(path: Path, file: BufferedReader) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
        return "torch zip"  # truncated; the reader's message is better
    finally:
        file.seek(0)
    ends = {name.partition("/")[2] for name in names} | set(names)
    if "data.pkl" in ends:
        return "torchscript" if "constants.pkl" in ends or any(end.startswith("code/") for end in ends) else "torch zip"
    what, hint = _other_zip(names, ends)
    raise CheckpointError(f"{path}: not a checkpoint: {what}", hint=hint)


def _other_zip(names: list[str], ends: Collection[str]) -> tuple[str, str]:
    if ends & {"models/model.json", "serialized_exported_program.json", "archive_format"}:  # type: ignore[operator]
        return (
            "a program of torch.export (.pt2)",
            "Save its weights: torch.save(torch.export.load(FILE).state_dict, OUT).",
        )
    if "model.weights.h5" in ends:
        return "a Keras model (.keras)", "A checkpoint comes from PyTorch. For this file, use `van-port inspect`."
    if any(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)", "Save a state_dict with torch.save, or as safetensors."
    if held := [name for name in names if name.endswith(_WEIGHTS_SUFFIXES)]:
        return f"a zip archive that holds {held[0][:100]}", "Unpack it first and give the file inside."
    held = names[:3]
    return (
        f"a zip archive that is not from torch.save; it holds {', '.join(name[:60] for name in held) or 'nothing'}",
        "Expected a file of torch.save or safetensors.",
    )


def refuse_other_folder(folder: Path) -> None:
    """Raise CheckpointError if a folder is a checkpoint of another known format; else return."""
    names = {path.name for path in folder.iterdir()}
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise CheckpointError(f"{folder}: a distributed checkpoint of PyTorch, in parts", hint=_consolidate(folder))
    if "saved_model.pb" in names:
        raise CheckpointError(
            f"{folder}: a TensorFlow SavedModel, not a PyTorch checkpoint",
            hint="van-port ports from PyTorch to TensorFlow: give the PyTorch checkpoint.",
        )
    if "checkpoint" in names and any(name.endswith(".index") for name in names):
        raise CheckpointError(
            f"{folder}: a TensorFlow checkpoint, not a PyTorch one",
            hint="van-port ports from PyTorch to TensorFlow: give the PyTorch checkpoint.",
        )
    if "zero_to_fp32.py" in names or any(name.endswith("_optim_states.pt") for name in names):
        raise CheckpointError(
            f"{folder}: a DeepSpeed checkpoint, in parts",
            hint=f"Join them: python zero_to_fp32.py {folder} consolidated.pt (the script is beside the checkpoint).",
        )


def _consolidate(folder: Path) -> str:
    return (
        f"Join its parts: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} consolidated.pth, "
        "and give --checkpoint consolidated.pth."
    )
