"""Files of Keras weights: `.h5`, `.weights.h5` and `.keras`, with the provenance of the weights inside.

The `.h5` layout is the one that `load_weights` reads in order or by name. Its datasets are named by the variables'
paths, so `file["block1_0/attn/proj_1/kernel"]` is that kernel. Inside `.weights.h5`, Keras names groups by class and
counter, so only Keras writes and reads `.weights.h5` and `.keras` files.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from porting.errors import OutputError, SourceError, WeightsFileError
from porting.files.atomic import interrupt_later, reserve
from porting.files.bounds import bounded_building
from porting.files.survey import HDF5_SIGNATURE, PROVENANCE, WEIGHTS_MEMBER
from porting.kinds.transforms import Array, Shape
from porting.models.frameworks import without_random_weights
from porting.models.traverse import named_variables, variable_names

if TYPE_CHECKING:
    import keras

SUFFIXES = (".weights.h5", ".h5", ".keras")
# Space for what a file holds beside the weights: names, groups and the description of the model.
_ROOM_BESIDE_WEIGHTS = 4 << 20
# An HDF5 attribute holds less than 64 KiB. Keras splits a longer list of names into numbered attributes.
_ATTRIBUTE_LIMIT = 64_000
# The number of names shown of each list of differences.
_SHOWN = 5
# NumPy kinds of real numbers; bfloat16 has kind V.
_REAL = "fiuV"
_NO_WEIGHTS = {"optimizer", "_metrics"}
_CHECK_VARIANT = "Check --variant and the number of classes. `van-port inspect` shows what the file holds."


def suffix_of(path: Path) -> str:
    """The suffix of `path` among `SUFFIXES`, which determines its format; raises OutputError for other names."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix) and path.name != suffix:
            return suffix
    raise OutputError(f"{path}: the suffix does not name a format to write", hint=f"Use one of {', '.join(SUFFIXES)}.")


def require_file(path: Path) -> None:
    """Raise SourceError if there is no such file, and WeightsFileError if its suffix does not name a format."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device, a pipe or a socket"
        raise SourceError(
            f"{path}: is {what}, not a file", hint="--weights takes a file that van-port or Keras has written."
        )
    if not path.is_file():
        raise SourceError(f"{path}: no such file", hint="--weights takes a file that van-port or Keras has written.")
    if not path.name.endswith(SUFFIXES):
        raise WeightsFileError(
            f"{path}: not a file of Keras weights, which end in {', '.join(SUFFIXES)}",
            hint="--weights takes a file that van-port or Keras has written.",
        )


def variable_shapes(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by name. States of random generators are not weights."""
    return {name: tuple(variable.shape) for name, variable in named_variables(model).items()}


def assign_weights(model: keras.Model, weights: Mapping[str, Array]) -> None:
    """Assign a value to every weight of the model, by name; raises KeyError if one is missing."""
    for name, variable in named_variables(model).items():
        variable.assign(weights[name])


def write_weights(path: Path, model: keras.Model, weights: Mapping[str, Array]) -> None:
    """Write `weights`, which covers all variables of the model by name, in the format that the suffix names.

    If Keras writes the format, the weights are first assigned to the model.
    """
    suffix = suffix_of(path)
    if suffix == ".h5":
        write_h5(path, weight_shapes(model), weights)
        return
    assign_weights(model, weights)
    reserve(path, sum(array.nbytes for array in weights.values()) + _ROOM_BESIDE_WEIGHTS)
    if suffix == ".keras":
        model.save(path)
    else:
        model.save_weights(path)


def weight_shapes(model: keras.Model) -> dict[str, dict[str, Shape]]:
    """Each variable's name and shape by top-level layer, in the order in which load_weights reads them.

    Names are relative to the layer. The order differs from `layer.weights`.
    """
    names = variable_names(model)
    layers: dict[str, dict[str, Shape]] = {}
    for layer in model.layers:
        variables = [*layer.trainable_weights, *layer.non_trainable_weights]
        if variables:
            layers[layer.name] = {
                names[id(variable)].removeprefix(f"{layer.name}/"): tuple(variable.shape) for variable in variables
            }
    return layers


def load_model(path: Path, build: Callable[[], keras.Model], what: str = "the model") -> keras.Model:
    """Build the model and load the weights of `path`: `.h5` by name, other formats with Keras's own functions.

    Keras reads a `.h5` in the order of the model's variables, which changes when a layer is frozen. `what` describes
    the model in errors. Raises WeightsFileError unless the file's weights match those of the model one to one.
    """
    try:
        with bounded_building(path):
            return _load_model(path, build, what)
    except WeightsFileError:
        raise
    except Exception as error:  # Keras raises any type of error for a bad file
        raise _keras_error(path, error, what) from None


def _load_model(path: Path, build: Callable[[], keras.Model], what: str) -> keras.Model:
    import keras

    suffix = suffix_of(path)
    with without_random_weights():
        model = build()  # this registers the classes that a .keras file names
    if suffix == ".keras":
        loaded = keras.models.load_model(path, compile=False)
        if not isinstance(loaded, keras.Model):
            raise WeightsFileError(f"{path}: holds a {type(loaded).__name__}, not a model", hint=_CHECK_VARIANT)
        found = variable_shapes(loaded)
        _refuse_other_variables(path, found, model, what)
        return loaded
    if suffix == ".h5":
        _load_by_name(path, model, what)
    else:
        _refuse_other_arrays(path, model, what)
        model.load_weights(path)
    return model


def _refuse_other_arrays(path: Path, model: keras.Model, what: str) -> None:
    """Raise WeightsFileError unless the arrays of a `.weights.h5` have the same shapes as the model's weights.

    Its names are only counters, and Keras ignores arrays that it does not need.
    """
    found: Counter[Shape] = Counter()

    def count(name: str, item: h5py.Dataset | h5py.Group) -> None:
        # Skip the states of optimizers and random generators. bfloat16 has kind V.
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fV" and name.partition("/")[0] not in _NO_WEIGHTS:
            found[tuple(item.shape)] += 1

    with h5py.File(path, "r") as file:
        file.visititems(count)
    expected = Counter(variable_shapes(model).values())
    lists = (("missing", expected - found), ("not in the model", found - expected))
    details = "; ".join(
        f"{sum(shapes.values())} arrays {which}, of shape {', '.join(map(str, list(shapes)[:_SHOWN]))}"
        for which, shapes in lists
        if shapes
    )
    if details:
        raise WeightsFileError(f"{path}: its arrays do not match the weights of {what}: {details}", hint=_CHECK_VARIANT)


def _keras_error(path: Path, error: Exception, what: str) -> WeightsFileError:
    text = str(error)
    if "safe_mode" in text or "Lambda" in text:  # Keras's message advises running the code anyway
        return WeightsFileError(
            f"{path}: holds code, such as a Lambda layer; nothing in it was run",
            hint="Load it where it was created and save only its weights: model.save_weights('x.weights.h5').",
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return WeightsFileError(
        f"{path}: Keras cannot load it into {what}: {lines[0][:300] if lines else repr(error)}", hint=_CHECK_VARIANT
    )


def _load_by_name(path: Path, model: keras.Model, what: str) -> None:
    variables = named_variables(model)
    found: dict[str, h5py.Dataset] = {}
    with h5py.File(path, "r") as file:
        # A whole model saved as .h5 keeps its weights in a separate group.
        root = file["model_weights"] if "layer_names" not in file.attrs and "model_weights" in file else file
        for layer in _read_names(root, "layer_names"):
            if layer not in root:
                raise WeightsFileError(f"{path}: lists the layer {layer}, but does not hold it", hint=_CHECK_VARIANT)
            for name in _read_names(root[layer], "weight_names"):
                if name not in root[layer]:
                    raise WeightsFileError(f"{path}: lists {layer}/{name}, but does not hold it", hint=_CHECK_VARIANT)
                short = name.removesuffix(":0")  # Keras 2 wrote this suffix
                # van-port writes names relative to the layer. Keras writes whole paths, which may start elsewhere.
                # Version 0.1 named a VAN's blocks block1.0, but Keras's torch backend does not accept dots.
                names = (f"{layer}/{short}", f"{layer.replace('.', '_')}/{short}", short, short.replace(".", "_"))
                known = next((each for each in names if each in variables), names[0])
                held = root[layer][name]
                dtype = held.dtype if isinstance(held, h5py.Dataset) else "group"
                if isinstance(dtype, str) or dtype.kind not in _REAL:
                    raise WeightsFileError(
                        f"{path}: {known} is of type {dtype}, but weights are real numbers", hint=_CHECK_VARIANT
                    )
                found[known] = held
        _refuse_other_variables(path, {name: held.shape for name, held in found.items()}, model, what)
        for name, variable in variables.items():
            variable.assign(np.asarray(found[name]))  # one at a time: the file may be as large as the memory


def _refuse_other_variables(path: Path, found: Mapping[str, Shape], model: keras.Model, what: str) -> None:
    """Raise WeightsFileError, with names, for variables that one side lacks or has in another shape."""
    expected = variable_shapes(model)
    lists = (
        ("missing", sorted(expected.keys() - found.keys())),
        ("not in the model", sorted(found.keys() - expected.keys())),
        (
            "of another shape",
            [
                f"{name}: {found[name]} instead of {shape}"
                for name, shape in expected.items()
                if name in found and found[name] != shape
            ],
        ),
    )
    details = "; ".join(
        f"{len(names)} {which}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for which, names in lists
        if names
    )
    if details:
        raise WeightsFileError(f"{path}: its variables do not match those of {what}: {details}", hint=_CHECK_VARIANT)


def _read_names(group: Any, attribute: str) -> list[str]:
    """Read a list of names from one attribute or from several numbered ones, as `_write_names` and Keras write it."""
    if attribute in group.attrs:
        names = list(group.attrs[attribute])
    else:
        names, number = [], 0
        while f"{attribute}{number}" in group.attrs:
            names += list(group.attrs[f"{attribute}{number}"])
            number += 1
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def write_h5(path: Path, layers: Mapping[str, Mapping[str, Shape]], weights: Mapping[str, Array]) -> None:
    """Write a `.h5` file without Keras. `layers` is the result of `weight_shapes`."""
    with _hdf5(path, "w") as file:
        _write_names(file, "layer_names", list(layers))
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = metadata.version("keras").encode()
        for layer, shapes in layers.items():
            group = file.create_group(layer)
            _write_names(group, "weight_names", list(shapes))
            for name in shapes:
                group.create_dataset(name, data=weights[f"{layer}/{name}"])


class _Disk(io.RawIOBase):
    """A file whose writes never fail from HDF5's point of view. `error` holds the first failure.

    HDF5 ends the process if the disk is full when it closes a file. So this class reports success to HDF5, and the
    caller raises the error afterwards.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += self._file.write(view[done:]) or 0
            except OSError as error:
                self.error = error
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        found = self._file.read(len(view)) or b""
        view[:] = found.ljust(len(view), b"\0")  # zeros replace bytes that could not be written
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def _hdf5(path: Path, mode: Literal["w", "r+"]) -> Iterator[h5py.File]:
    """Open an HDF5 file for writing; raises OSError if any write fails."""
    with interrupt_later(), io.FileIO(path, "w+" if mode == "w" else "r+") as raw:
        disk = _Disk(raw)
        try:
            with h5py.File(disk, mode) as file:
                yield file
        finally:
            if disk.error is not None:
                raise disk.error


def _write_names(group: h5py.Group, attribute: str, names: list[str]) -> None:
    encoded = [name.encode() for name in names]
    width = max(map(len, encoded), default=1)
    rows = max(_ATTRIBUTE_LIMIT // width, 1)
    if len(encoded) <= rows:
        group.attrs[attribute] = np.array(encoded, dtype=f"S{width}")
        return
    for index in range(0, len(encoded), rows):
        group.attrs[f"{attribute}{index // rows}"] = np.array(encoded[index : index + rows], dtype=f"S{width}")


def write_provenance(path: Path, provenance: Mapping[str, Any]) -> None:
    """Add the provenance, as JSON, to a file that `write_weights` wrote. The weights do not change."""
    text = json.dumps(provenance, indent=1)
    if suffix_of(path) == ".keras":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{PROVENANCE}.json", text)
        return
    with _hdf5(path, "r+") as file:
        file.attrs[PROVENANCE] = text


def is_weights_file(path: Path) -> bool:
    """Whether a file is HDF5 or a `.keras` archive, by content rather than name."""
    with path.open("rb") as file:
        if file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE:
            return True
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return WEIGHTS_MEMBER in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return path.suffix == ".keras"
