"""List the contents of an untrusted file of Keras weights.

HDF5's library is not safe for hostile files: a damaged file can make it hang or crash the process. So the whole file is
first read in a separate process with limited time and memory. Only if that succeeds, this process reads it.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.errors import PortingError, WeightsFileError
from porting.files.bounds import GREATEST_EXPANSION
from porting.files.exported_file import TITLES, exported_form, read_exported

PROVENANCE = "provenance"
WEIGHTS_MEMBER = "model.weights.h5"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Reading is limited by disk speed. An intact file of any size takes a fraction of this time.
_SECONDS, _BYTES_A_SECOND = 30.0, 10e6
_MEMORY = 4 << 30
_ROOM_BESIDE_WEIGHTS = 64 << 20
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from porting.files.survey import main; main(sys.argv[1])"
)


@dataclass(frozen=True)
class Survey:
    """The provenance, if the file has any, and `(name, shape, type)` of each tensor."""

    provenance: dict[str, Any] | None
    tensors: list[tuple[str, tuple[int, ...], str]]


def survey_file(path: Path) -> Survey:
    """Read a whole HDF5, `.keras` or exported file in another process.

    Raises WeightsFileError if that fails, crashes or hangs.
    """
    seconds = _SECONDS + _size(path) / _BYTES_A_SECOND
    # -P: do not import modules from the working folder.
    command = [sys.executable, "-P", "-c", _CHILD, str(path), json.dumps(sys.path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise _unreadable(path, f"reading it took more than {seconds:.0f} s") from None
    try:
        answer = json.loads(done.stdout)
        if error := answer.get("error"):
            raise _unreadable(path, error)
        tensors = [(name, tuple(shape), dtype) for name, shape, dtype in answer["tensors"]]
        return Survey(answer["provenance"], tensors)
    except (ValueError, KeyError, AttributeError):
        raise _unreadable(path, f"the process that read it ended with {done.returncode}") from None


def main(path: str) -> None:
    """Entry point of the other process: print the survey, or the error, as JSON."""
    _limit_memory(Path(path))
    try:
        answer = _survey(Path(path))
    except PortingError as error:
        answer = {"error": error.message}
    except Exception as error:  # h5py turns a damaged file into errors of any type
        answer = {"error": str(error).partition("\n")[0] or repr(error)}
    json.dump(answer, sys.stdout)


def _limit_memory(path: Path) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has this limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY + 2 * _size(path),) * 2)


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files)


def _survey(path: Path) -> dict[str, Any]:
    if exported_form(path) is not None:
        facts, rows = read_exported(path)
        return {"provenance": facts, "tensors": rows}
    import h5py

    # Decide as Keras does: by the suffix, or else by the first bytes.
    with path.open("rb") as raw:
        is_hdf5 = path.suffix != ".keras" and (path.suffix == ".h5" or raw.read(8) == HDF5_SIGNATURE)
    if is_hdf5:
        with h5py.File(path, "r") as file:
            return {
                "provenance": _provenance(file.attrs.get(PROVENANCE)),
                "tensors": _read_all(file, path.stat().st_size),
            }
    with zipfile.ZipFile(path) as archive:
        beside = sum(member.file_size for member in archive.infolist() if member.filename != WEIGHTS_MEMBER)
        if beside > _ROOM_BESIDE_WEIGHTS:
            raise ValueError(f"it contains {beside:,} bytes beside the weights")
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged} is damaged")
        name = f"{PROVENANCE}.json"
        text = archive.read(name) if name in archive.namelist() else None
        with archive.open(WEIGHTS_MEMBER) as member, h5py.File(member, "r") as file:
            return {"provenance": _provenance(text), "tensors": _read_all(file, path.stat().st_size)}


def _provenance(text: Any) -> dict[str, Any] | None:
    if text is None:
        return None
    provenance = json.loads(text)
    if not isinstance(provenance, dict):
        raise ValueError("its provenance is not a JSON object")
    return provenance


def _read_all(file: Any, size: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Read every dataset and attribute. Return the name, shape and type of each dataset."""
    import h5py

    links: list[str] = []

    def find_links(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink):
            links.append(name)

    file.visititems_links(find_links)
    if links:
        raise ValueError(f"{links[0]} is a link to another place in the file or outside it")
    rows: list[tuple[str, tuple[int, ...], str]] = []
    allowed = GREATEST_EXPANSION * size
    dict(file.attrs)

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
        nonlocal allowed
        dict(item.attrs)
        if not isinstance(item, h5py.Dataset):
            return
        shape = tuple(item.shape or ())
        allowed -= math.prod(shape) * item.dtype.itemsize
        if allowed < 0 or item.external or item.is_virtual:
            raise ValueError(f"{name} says it has the shape {shape}, but the file has no such data")
        item[()]
        rows.append((name, shape, str(item.dtype)))

    file.visititems(visit)
    return rows


def _unreadable(path: Path, why: str) -> WeightsFileError:
    form = exported_form(path)
    what = "HDF5 or .keras file" if form is None else TITLES[form] + (" file" if path.is_file() else "")
    again = "Port" if form is None else "Export"
    return WeightsFileError(
        f"{path}: not a whole {what}: {why}", hint=f"The file is truncated or damaged. {again} it again."
    )
