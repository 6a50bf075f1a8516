"""Files of weights for a model: found or ported, looked into, and loaded even where the head is another."""

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
# Weights hardly compress: a file with more numbers than this for its bytes holds other things, and could fill memory.
_GREATEST_EXPANSION = 16
_MAX_PROVENANCE = 16 << 20  # bytes


@dataclass(frozen=True)
class WeightsFile:
    """A file of Keras weights; `classes` is 0 where it has no head, `layer_norm_epsilon` None where it says none."""

    path: Path
    classes: int
    layer_norm_epsilon: float | None

    def load_into(
        self, model: keras.Model, config: VanConfig, build: Callable[..., keras.Model], *, whole: bool
    ) -> None:
        """Gives the model these weights, all but the head where that is another one, and warns of that.

        `whole` is whether the model has no other layers than VAN's. Raises ValueError for the weights of another model.
        """
        head = next((layer for layer in model.layers if layer.name == "head"), None)
        classes = head.units if head is not None else 0
        try:
            if whole and classes == self.classes:
                _load(model, self.path)
                return
            # Files are read in the order of a whole model's layers; so such a model reads this one, and hands on.
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
                f"{self.path.name} {has} and the model has {classes}: its head starts afresh, all else is loaded",
                stacklevel=4,
            )


def _load(model: keras.Model, path: Path) -> None:
    """Loads all weights of a VAN; those of a plain `.h5` by name, since their order depends on what was frozen.

    Raises ValueError, OSError or KeyError for a file with other variables.
    """
    if path.suffix != ".h5" or path.name.endswith(".weights.h5"):
        model.load_weights(path)
        return
    values = {}
    with h5py.File(path) as file:
        # A whole model saved as .h5 has its weights in a group of their own.
        root = file.get("model_weights", file)
        for layer in root.values():

            def visit(name: str, item: h5py.Dataset | h5py.Group, layer: h5py.Group = layer) -> None:
                if isinstance(item, h5py.Dataset):
                    # Keras writes a variable's whole path inside the layer's group, van-port what follows its name.
                    own = layer.name.rpartition("/")[2]
                    path = name if name.startswith(f"{own}/") else f"{own}/{name}"
                    # Version 0.1 named blocks block1.0; Keras's torch backend takes no dots.
                    values[re.sub(r"^(block\d+)\.(\d+/)", r"\1_\2", path)] = item[()]

            if isinstance(layer, h5py.Group):
                layer.visititems(visit)
    variables = {variable.path: variable for variable in model.weights}
    if differing := sorted(variables.keys() ^ values.keys()):
        raise ValueError(f"{len(differing)} variables are only in one of the two, first {differing[0]}")
    for name, variable in variables.items():
        variable.assign(values[name])


def cache_folder() -> Path:
    """Where ported weights are kept: in `VAN_PORT_CACHE`, or in the user's cache folder."""
    return Path(os.environ.get("VAN_PORT_CACHE") or platformdirs.user_cache_path("van-port", appauthor=False)) / "keras"


def find_weights(config: VanConfig, weights: str | os.PathLike[str]) -> WeightsFile:
    """The file at a path, or with the published weights that `weights` names, which are ported where need be.

    A file is opened as Keras opens it, which is not safe for one from a stranger; `van-port inspect` is.

    Raises FileNotFoundError, ValueError for a name of other weights or a file of another kind, and RuntimeError when
    published weights cannot be had.
    """
    names = {each.trained_on for each in VARIANTS.values()}
    if weights in names:
        if weights != config.trained_on:
            raise ValueError(f"the published weights of van_{config.name} are {config.trained_on!r}: got {weights!r}")
        return _look_into(_published(config), config)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no such file of weights: {path}. Expected None, {config.trained_on!r} or a file that van-port has "
            f"written: van-port --variant {config.name} --out van_{config.name}.h5"
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
            f"{path.parent} cannot be made: {error.strerror}. Set VAN_PORT_CACHE to a folder of your own."
        ) from None
    # In a process of its own: that needs PyTorch, which whoever uses the model does not.
    # -P and the path as it is here: nothing else in the working folder is taken for a module.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "porting.cli.main", "--variant", config.name, "--out", str(path)]
    shown = sys.stderr is not None and sys.stderr.isatty()  # then it shows its progress there
    stderr = None if shown else subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, check=False)
    if done.returncode:
        said = (done.stderr or b"").decode(errors="replace").strip().splitlines()
        why = next((line for line in said if line.startswith("Error: ")), said[-1] if said else "see above")
        raise RuntimeError(
            f"the published weights of van_{config.name} are not in {path.parent}, and porting them failed: "
            f"{why.removeprefix('Error: ')}\nRun this where they can be had, with --checkpoint FILE if you have them, "
            f"and bring the file here: van-port --variant {config.name} --out {path}"
        )
    return path


def _look_into(path: Path, config: VanConfig) -> WeightsFile:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weights are a file that ends in .h5, .weights.h5 or .keras")
    try:
        with _open(path) as (file, text):
            heads: set[int] = set()

            allowed = _GREATEST_EXPANSION * path.stat().st_size

            def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
                nonlocal allowed
                if isinstance(item, h5py.Dataset):
                    allowed -= math.prod(item.shape or ()) * item.dtype.itemsize
                    if allowed < 0 or item.external or item.is_virtual:
                        raise ValueError(f"{name} says it has the shape {item.shape}, and the file has no such data")
                    if item.dtype.kind == "c":
                        raise ValueError(f"{name} is of type {item.dtype}, and weights are real numbers")
                # Nothing but the head's kernel has two axes.
                if isinstance(item, h5py.Dataset) and item.ndim == 2 and item.shape[0] == config.embed_dims[-1]:
                    heads.add(item.shape[1])

            file.visititems(visit)
            provenance = json.loads(text) if text and len(text) <= _MAX_PROVENANCE else {}
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole file of Keras weights: {error}") from None
    settings = provenance.get("settings") if isinstance(provenance, dict) else None
    epsilon = settings.get("layer_norm_eps") if isinstance(settings, dict) else None
    return WeightsFile(path, max(heads, default=0), epsilon if isinstance(epsilon, float) else None)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[h5py.File, str | bytes | None]]:
    """The HDF5 file, or the one inside a `.keras` archive, and its provenance as JSON."""
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
