"""Find, port, inspect and load weights files of a model, including files with another head."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import keras
import platformdirs

from van_tf.config import VARIANTS, VanConfig

SUFFIXES = (".h5", ".keras")
# Weights hardly compress, so a file whose arrays exceed its size by this factor is not a weights file and could exhaust
# the memory.
_GREATEST_EXPANSION = 16
_MAX_PROVENANCE = 16 << 20  # bytes


@dataclass(frozen=True)
class WeightsFile:
    """A file of Keras weights. `classes` is 0 without a head; `layer_norm_epsilon` is None if the file states none."""

    path: Path
    classes: int
    layer_norm_epsilon: float | None

    def load_into(
        self, model: keras.Model, config: VanConfig, build: Callable[..., keras.Model], *, whole: bool
    ) -> None:
        """Load these weights into the model. If the number of classes differs, skip the head and warn.

        `whole` says that the model consists only of VAN's layers. Raises ValueError for weights of another model.
        """
        head = next((layer for layer in model.layers if layer.name == "head"), None)
        classes = head.units if head is not None else 0
        try:
            if whole and classes == self.classes:
                _load(model, self.path)
                return
            # Keras reads files in the order of a whole model's layers, so a whole model loads the file and passes on
            # the weights.
            top = self.classes > 0
            donor = build(config, include_top=top, classes=self.classes or None, data_format="channels_last")
            _load(donor, self.path)
        except (ValueError, OSError, KeyError) as error:
            first_line = str(error).partition("\n")[0]
            raise ValueError(f"{self.path}: not the weights of van_{config.name}: {first_line[:300]}") from None
        given = {layer.name: layer for layer in donor.layers}
        for layer in model.layers:
            if layer.name in given and (layer is not head or classes == self.classes):
                layer.set_weights(given[layer.name].get_weights())
        if head is not None and classes != self.classes:
            has = f"has {self.classes} classes" if self.classes else "has no head"
            warnings.warn(
                f"{self.path.name} {has}, but the model has {classes}: the head keeps its initial weights, and "
                "everything else is loaded",
                stacklevel=4,
            )


def _load(model: keras.Model, path: Path) -> None:
    """Load all weights of a VAN. A plain `.h5` is read by name, because its order depends on which layers were frozen.

    Raises ValueError, OSError or KeyError for a file with other variables.
    """
    if path.suffix != ".h5" or path.name.endswith(".weights.h5"):
        model.load_weights(path)
        return
    values = {}
    with h5py.File(path) as file:
        # A whole model saved as .h5 keeps its weights in a separate group.
        root = file.get("model_weights", file)
        for layer in root.values():

            def visit(name: str, item: h5py.Dataset | h5py.Group, layer: h5py.Group = layer) -> None:
                if isinstance(item, h5py.Dataset):
                    # Inside a layer's group, Keras writes a variable's whole path, and van-port the path below the
                    # layer.
                    own = layer.name.rpartition("/")[2]
                    path = name if name.startswith(f"{own}/") else f"{own}/{name}"
                    # Version 0.1 named blocks block1.0, but Keras's torch backend allows no dots.
                    values[re.sub(r"^(block\d+)\.(\d+/)", r"\1_\2", path)] = item[()]

            if isinstance(layer, h5py.Group):
                layer.visititems(visit)
    variables = {variable.path: variable for variable in model.weights}
    if differing := sorted(variables.keys() ^ values.keys()):
        raise ValueError(f"{len(differing)} variables are in only one of the two; the first is {differing[0]}")
    for name, variable in variables.items():
        variable.assign(values[name])


def cache_folder() -> Path:
    """The folder of ported weights: in `VAN_PORT_CACHE`, or in the user's cache folder."""
    return Path(os.environ.get("VAN_PORT_CACHE") or platformdirs.user_cache_path("van-port", appauthor=False)) / "keras"


def find_weights(config: VanConfig, weights: str | os.PathLike[str]) -> WeightsFile:
    """Find the file at a path, or the file of the published weights that `weights` names, porting them if necessary.

    A file is opened as Keras opens it, which is not safe for untrusted files. `van-port inspect` is safe.

    Raises FileNotFoundError, ValueError for the name of other weights or another kind of file, and RuntimeError if
    published weights cannot be obtained.
    """
    names = {each.trained_on for each in VARIANTS.values()}
    if weights in names:
        if weights != config.trained_on:
            raise ValueError(
                f"the published weights of van_{config.name} are named {config.trained_on!r}: got {weights!r}"
            )
        return _look_into(_published(config), config)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no such weights file: {path}. Expected None, {config.trained_on!r} or a file written by "
            f"van-port --variant {config.name} --out van_{config.name}.h5"
        )
    return _look_into(path, config)


def _published(config: VanConfig) -> Path:
    path = cache_folder() / f"van_{config.name}.h5"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"cannot create {path.parent}: {error.strerror}. Set VAN_PORT_CACHE to a writable folder."
        ) from None
    # A separate process, because porting needs PyTorch and using the model does not.
    # -P and this process's path: do not import modules from the working folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "porting.cli.main", "--variant", config.name, "--out", str(path)]
    shown = sys.stderr is not None and sys.stderr.isatty()  # if so, van-port shows its progress there
    stderr = None if shown else subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, check=False)
    if done.returncode:
        said = (done.stderr or b"").decode(errors="replace").strip().splitlines()
        why = next((line for line in said if line.startswith("Error: ")), said[-1] if said else "see above")
        raise RuntimeError(
            f"the published weights of van_{config.name} are not in {path.parent}, and porting them failed: "
            f"{why.removeprefix('Error: ')}\nRun this on a machine with access, with --checkpoint FILE if you have a "
            f"checkpoint, and copy the file here: van-port --variant {config.name} --out {path}"
        )
    return path


def _look_into(path: Path, config: VanConfig) -> WeightsFile:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a weights file must end in .h5, .weights.h5 or .keras")
    try:
        with _open(path) as (file, text):
            heads: set[int] = set()

            allowed = _GREATEST_EXPANSION * path.stat().st_size

            def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
                nonlocal allowed
                if isinstance(item, h5py.Dataset):
                    allowed -= math.prod(item.shape or ()) * item.dtype.itemsize
                    if allowed < 0 or item.external or item.is_virtual:
                        raise ValueError(f"{name} says it has the shape {item.shape}, but the file has no such data")
                    if item.dtype.kind == "c":
                        raise ValueError(f"{name} is of type {item.dtype}, but weights are real numbers")
                # Only the head's kernel has two axes.
                if isinstance(item, h5py.Dataset) and item.ndim == 2 and item.shape[0] == config.embed_dims[-1]:
                    heads.add(item.shape[1])

            file.visititems(visit)
            provenance = json.loads(text) if text and len(text) <= _MAX_PROVENANCE else {}
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a complete file of Keras weights: {error}") from None
    settings = provenance.get("settings") if isinstance(provenance, dict) else None
    epsilon = settings.get("layer_norm_eps") if isinstance(settings, dict) else None
    return WeightsFile(path, max(heads, default=0), epsilon if isinstance(epsilon, float) else None)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[h5py.File, str | bytes | None]]:
    """Open the HDF5 file, or the one inside a `.keras` archive, and read its provenance as JSON."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            yield file, file.attrs.get("provenance")
        return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > _GREATEST_EXPANSION * path.stat().st_size:
                raise ValueError(f"{info.filename} in it unpacks to {info.file_size:,} bytes")
        with archive.open("model.weights.h5") as member, h5py.File(member) as file:
            yield file, archive.read("provenance.json") if "provenance.json" in archive.namelist() else None
